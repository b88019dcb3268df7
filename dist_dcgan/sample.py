"""Draw images from the averaged generator of a run, on any machine: a seed is an image.

python -m dist_dcgan.sample runs/default --out bedrooms.png
python -m dist_dcgan.sample runs/default --out bedrooms.png --seeds 0-15,100 --labels --scale 2
COMMAND=sample RANKS=8 bash launch/torchrun.sh runs/default --separate images --seeds 0-49999
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import Field
from pydantic_settings import CliPositionalArg

from dist_dcgan.distributed.collectives import from_rank_zero, require_same
from dist_dcgan.distributed.launch import launched
from dist_dcgan.distributed.world import SLOW_SECONDS, World, process_group, run_rank
from dist_dcgan.drawing import check_out, reported_as, save_png, tile
from dist_dcgan.trained import BATCH, CHANGED_MEANWHILE, Trained, load_trained, parse_seeds
from shards.common.command_line import Options, UserPath, build, parse_flags
from shards.common.errors import OneRankError, UserError
from shards.common.files import final_name, publish, read_plain, remove_leftovers
from shards.common.messages import say
from shards.common.progress import Progress
from shards.common.streams import output_is_optional

_SOURCE = "source.json"
"""Of a folder of separate images: what they are of."""
_LEFT_SECONDS = 3600
"""Age from which an unfinished image was left by a killed process, and is not being written by another."""


class Sample(Options):
    """Draw images from the averaged generator of a run."""

    run_dir: CliPositionalArg[UserPath]
    """Folder of the run."""
    out: UserPath | None = None
    """PNG of a grid to write."""
    separate: UserPath | None = None
    """Folder for one PNG per image, new or of the same generator: images that are there already are kept."""
    seeds: str = "0-63"
    """Seeds of the images: numbers and ranges. An image depends on nothing but its seed."""
    labels: bool = False
    """Print the seed below each image of the grid."""
    scale: int = Field(1, ge=1, le=32)
    """Repeat each pixel so many times in both directions."""
    best: bool = False
    """Sample from the best generator so far by KID instead of the latest."""


def main(argv: Sequence[str]) -> None:
    """Write the images and print where they are."""
    options = build(Sample, parse_flags(Sample, argv, "python -m dist_dcgan.sample", about=__doc__))
    output_is_optional()
    seeds = parse_seeds(options.seeds, "--seeds")
    if (options.out is None) == (options.separate is None):
        raise UserError("give --out X.png for a grid, or --separate DIR for a PNG per image")
    if options.out is not None:
        check_out(options.out, [".png"])
        if launched().world_size > 1:
            raise UserError("--out is drawn by one process: leave out torchrun, or use --separate DIR")
    if options.separate is not None and options.labels:
        raise UserError("--labels belongs to the grid of --out: with --separate the seed is in the file's name")
    with process_group(SLOW_SECONDS) as world:
        trained = load_trained(options.run_dir, options.best, world.device)
        require_same(f"step {trained.description['step']}", f"the generator of {options.run_dir}", CHANGED_MEANWHILE)
        if options.out is not None:
            labels = [str(seed) for seed in seeds] if options.labels else []
            picture = tile(trained.images(trained.latents(seeds)), labels=labels, scale=options.scale)
            with reported_as(options.out):
                save_png(picture, options.out)
            say(f"{len(seeds):,} images of step {trained.description['step']} in {options.out}")
        elif options.separate is not None:
            save_separately(trained, seeds, options.separate, options.scale, world)


def save_separately(trained: Trained, seeds: Sequence[int], folder: Path, scale: int, world: World) -> None:
    """Write those images that are not there yet, each rank a part of them."""
    from_rank_zero(lambda: _claim(folder, trained, scale), world.slow_group)
    own = list(dict.fromkeys(seeds))[world.rank :: world.world_size]
    missing = [seed for seed in own if not (folder / _name(seed)).exists()]
    written = len(own) - len(missing)
    with (
        _written_by(world, folder),
        Progress(len(own), "images", start=written, shown=world.rank == 0) as progress,
    ):
        for first in range(0, len(missing), BATCH):
            part = missing[first : first + BATCH]
            for seed, image in zip(part, trained.images(trained.latents(part)), strict=True):
                pixels = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
                save_png(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), folder / _name(seed))
            progress.advance(len(part))
    from_rank_zero(lambda: None, world.slow_group)  # when all have come so far
    if world.rank == 0:
        say(f"{len(set(seeds)):,} images of step {trained.description['step']} in {folder}")


@contextmanager
def _written_by(world: World, folder: Path) -> Iterator[None]:
    """Raise a OneRankError, or a UserError of the only rank, if the disk fails: that of another node may be full."""
    try:
        with reported_as(folder, "--separate"):
            yield
    except UserError as error:
        if world.world_size == 1:
            raise
        raise OneRankError(f"{world}: {error}") from None


def _name(seed: int) -> str:
    return f"seed-{seed:08d}.png"


def _claim(folder: Path, trained: Trained, scale: int) -> None:
    """Make the folder; raises UserError if it holds other files than images of this generator."""
    source: dict[str, Any] = {"scale": scale, **trained.description}
    with reported_as(folder, "--separate"):
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / _SOURCE).exists():
            if _parsed(read_plain(folder / _SOURCE, 1 << 20)) != json.loads(json.dumps(source)):
                raise UserError(f"--separate {folder} holds images of another generator or scale: name a new folder")
            remove_leftovers(folder, lambda name: name.startswith("seed-"), _LEFT_SECONDS)
        elif any(final_name(name) != _SOURCE for name in os.listdir(folder)):
            raise UserError(f"--separate {folder} holds other files: name a new or empty folder")
        publish(folder / _SOURCE, json.dumps(source, indent=1).encode() + b"\n")


def _parsed(content: bytes) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def command() -> None:
    """Run it as an installed command."""
    run_rank(main)


if __name__ == "__main__":
    command()
