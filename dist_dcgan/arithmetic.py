"""Calculate with images, as in section 6.3.2 of the paper: groups of seeds are averaged, added and subtracted.

Choose seeds from a sheet: python -m dist_dcgan.sample runs/default --out sheet.png --seeds 0-99 --labels

python -m dist_dcgan.arithmetic runs/default --add 3,17,40 --subtract 5,9,12 --add 8,21,33 --out sum.png
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from pydantic_settings import CliPositionalArg
from torch import Tensor

from dist_dcgan.drawing import beside, check_out, reported_as, save_png, tile
from dist_dcgan.random_streams import stream_seed, uniform
from dist_dcgan.trained import Trained, load_trained, parse_seeds
from shards.common.command_line import Options, UserPath, build, parse_flags, run
from shards.common.errors import UserError
from shards.common.messages import say
from shards.common.streams import output_is_optional

SIGNS = {"--add": "+", "--subtract": "-"}
NOISE = 0.25
"""Reach of the uniform noise of the images around the result (paper, section 6.3.2)."""


class Arithmetic(Options):
    """Calculate with images."""

    run_dir: CliPositionalArg[UserPath]
    """Folder of the run."""
    out: UserPath
    """PNG to write: the groups, each above its mean, and the result among eight that noise of 0.25 makes of it."""
    add: str = ""
    """Seeds of images whose mean z is added; may be given again for another group."""
    subtract: str = ""
    """Seeds of images whose mean z is subtracted; may be given again."""
    best: bool = False
    """Take the best generator so far by KID instead of the latest."""
    scale: int = Field(1, ge=1, le=32)
    """Repeat each pixel so many times in both directions."""


def main(argv: Sequence[str]) -> None:
    """Write the picture and print its path."""
    groups, others = split_groups(argv)
    options = build(Arithmetic, parse_flags(Arithmetic, others, "python -m dist_dcgan.arithmetic", about=__doc__))
    output_is_optional()
    if not groups:
        raise UserError("nothing to calculate: give --add with seeds, as in --add 3,17,40")
    check_out(options.out, [".png"])
    seeds = [parse_seeds(text, flag) for flag, text in groups]
    trained = load_trained(options.run_dir, options.best)
    means = torch.stack([trained.latents(group).mean(0) for group in seeds])
    signs = torch.tensor([1.0 if flag == "--add" else -1.0 for flag, _ in groups], device=means.device)
    sheets = []
    for (flag, _), group, mean in zip(groups, seeds, means, strict=True):
        images = trained.images(torch.cat([trained.latents(group), mean[None]]))
        labels = [f"{SIGNS[flag]}{seed}" for seed in group] + ["mean"]
        sheets.append(tile(images, 1, labels, options.scale))
    sheets.append(tile(around(trained, signs @ means), 3, scale=options.scale))
    with reported_as(options.out):
        save_png(beside(sheets), options.out)
    formula = " ".join(SIGNS[flag] + text for flag, text in groups)
    say(f"{formula} at step {trained.description['step']} in {options.out}")


def split_groups(argv: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the groups of seeds with their flags, in their order, and the other words."""
    groups, others = [], []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in SIGNS:
            others.append(word)
            continue
        found = value if equals else next(words, None)
        if found is None:
            raise UserError(f"{flag} needs seeds, as in {flag} 3,17,40")
        groups.append((flag, found))
    return groups, others


def around(trained: Trained, z: Tensor) -> Tensor:
    """Return the image of z in the middle of a 3x3 grid of its neighbours, uint8 (9, 3, size, size)."""
    noise = uniform(stream_seed(0, "arithmetic", 0), range(9), len(z), z.device).mul_(2 * NOISE).sub_(NOISE)
    noise[4] = 0
    return trained.images(z + noise)


def command() -> None:
    """Run it as an installed command."""
    run(main)


if __name__ == "__main__":
    command()
