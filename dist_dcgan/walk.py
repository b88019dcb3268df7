"""Walk through z from image to image: rows as in figure 4 of the paper, or a film.

python -m dist_dcgan.walk runs/default --out walk.png --rows 6
python -m dist_dcgan.walk runs/default --out walk.mp4 --rows 4 --loop
python -m dist_dcgan.walk runs/default --out walk.gif --seeds 3,17,40 --loop --scale 4
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from pydantic import Field
from pydantic_settings import CliPositionalArg
from torch import Tensor

from dist_dcgan.drawing import FILMS, check_out, reported_as, save_film, save_png, tile
from dist_dcgan.trained import BATCH, Trained, load_trained, parse_seeds
from shards.common.command_line import Options, UserPath, build, parse_flags, run
from shards.common.errors import UserError
from shards.common.messages import say
from shards.common.progress import Progress
from shards.common.streams import output_is_optional

STOPS = 4
"""Images of seeds on each walk, unless --seeds names them."""


class Walk(Options):
    """Walk through z from image to image."""

    run_dir: CliPositionalArg[UserPath]
    """Folder of the run."""
    out: UserPath
    """PNG of rows to write, or film: MP4 (with the extra `video`), GIF or WebP."""
    seeds: str | None = None
    """Seeds of the images of one walk, in their order."""
    rows: int = Field(4, ge=1, le=32)
    """Without --seeds: rows of the PNG, or rows and columns of the film, each image with a walk of its own."""
    frames: int | None = Field(None, ge=2, le=100_000)
    """Images from the start of a walk to its end; none: 10 in a PNG, 60 from seed to seed in a film."""
    fps: int = Field(30, ge=1, le=60)
    """Frames of the film in a second."""
    spherical: bool = False
    """Turn from one z to the next instead of going straight, for normal z (White 2016, arXiv 1609.04468)."""
    loop: bool = False
    """Go back to the start, so that a film repeats without a jump."""
    best: bool = False
    """Take the best generator so far by KID instead of the latest."""
    scale: int = Field(1, ge=1, le=32)
    """Repeat each pixel so many times in both directions."""


def main(argv: Sequence[str]) -> None:
    """Write the picture or the film, and print its path."""
    options = build(Walk, parse_flags(Walk, argv, "python -m dist_dcgan.walk", about=__doc__))
    output_is_optional()
    check_out(options.out, [".png", *FILMS])
    if options.seeds is not None and "rows" in options.model_fields_set:
        raise UserError("--seeds and --rows exclude each other: the seeds are one walk")
    is_film = options.out.suffix in FILMS
    walks = stops_of(options, options.rows * (options.rows if is_film else 1))
    legs = len(walks[0]) - (0 if options.loop else 1)
    if len(walks[0]) < 2:
        raise UserError(f"--seeds {options.seeds}: a walk needs two seeds")
    frames = options.frames or (60 * legs if is_film else 10)
    trained = load_trained(options.run_dir, options.best)
    paths = torch.stack([path(trained.latents(stops), frames, options.loop, options.spherical) for stops in walks], 1)
    with reported_as(options.out):
        if is_film:
            save_film(film(trained, paths, options.scale), options.out, options.fps)
        else:
            images = trained.images(paths.transpose(0, 1).flatten(0, 1))
            save_png(tile(images, frames, scale=options.scale), options.out)
    count = "one walk" if len(walks) == 1 else f"each of {len(walks)} walks"
    say(f"{frames} images of {count} at step {trained.description['step']} in {options.out}")


def stops_of(options: Walk, count: int) -> list[list[int]]:
    """Return the seeds of each walk."""
    if options.seeds is not None:
        return [parse_seeds(options.seeds, "--seeds")]
    return [list(range(STOPS * index, STOPS * (index + 1))) for index in range(count)]


def path(stops: Tensor, frames: int, loop: bool, spherical: bool) -> Tensor:
    """Return `frames` z at equal distances in time on the way through `stops`, float32 (frames, latent_dim).

    A walk that returns to its start ends one frame before it.
    """
    ends = torch.cat([stops, stops[:1]]) if loop else stops
    times = torch.linspace(0, len(ends) - 1, frames + 1)[:-1] if loop else torch.linspace(0, len(ends) - 1, frames)
    legs = times.floor().clamp(max=len(ends) - 2).long()
    shares = (times - legs)[:, None].to(stops.device)
    before, after = ends[legs], ends[legs + 1]
    return turned(before, after, shares) if spherical else torch.lerp(before, after, shares)


def turned(before: Tensor, after: Tensor, shares: Tensor) -> Tensor:
    """Return points on the arcs between vectors, whose lengths change evenly."""
    lengths = [part.norm(dim=1, keepdim=True) for part in (before, after)]
    directions = [part / length for part, length in zip((before, after), lengths, strict=True)]
    angle = (directions[0] * directions[1]).sum(1, keepdim=True).clamp(-1, 1).acos()
    weights = [torch.where(angle < 1e-4, share, (share * angle).sin() / angle.sin()) for share in (1 - shares, shares)]
    direction = weights[0] * directions[0] + weights[1] * directions[1]
    points: Tensor = direction * torch.lerp(lengths[0], lengths[1], shares)
    return points


def film(trained: Trained, paths: Tensor, scale: int) -> Iterator[Image.Image]:
    """Yield the frames of a film, each a grid of the images of all walks; `paths` is (frames, walks, latent_dim)."""
    walks = paths.shape[1]
    together = max(1, BATCH // walks)
    with Progress(len(paths), "frames", "frame") as progress:
        for part in paths.split(together):
            for images in trained.images(part.flatten(0, 1)).split(walks):
                yield tile(images, scale=scale)
            progress.advance(len(part))


def command() -> None:
    """Run it as an installed command."""
    run(main)


if __name__ == "__main__":
    command()
