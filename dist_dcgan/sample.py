"""Draw a grid of images from the averaged generator of a run, on any machine.

python -m dist_dcgan.sample runs/default --out bedrooms.png
python -m dist_dcgan.sample runs/default --out bedrooms.png --num 16 --seed 7
python -m dist_dcgan.sample runs/default --out bedrooms.png --best
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from pydantic_settings import CliPositionalArg

from dist_dcgan.loggers.pictures import check_png, save_out
from dist_dcgan.run.directory import RunDirectory
from dist_dcgan.run.export import load_generator, sampling_config
from dist_dcgan.training.ema import sample_images
from shards.common.command_line import Options, UserPath, build, parse_flags, run
from shards.common.messages import say
from shards.common.streams import output_is_optional


class Sample(Options):
    """Draw a grid of images from the averaged generator of a run."""

    run_dir: CliPositionalArg[UserPath]
    """Folder of the run."""
    out: UserPath
    """PNG to write."""
    num: int = Field(64, ge=1)
    """Number of images."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of z."""
    best: bool = False
    """Sample from the best generator so far by KID instead of the latest."""


def main(argv: Sequence[str]) -> None:
    """Write the grid and print its path."""
    options = build(Sample, parse_flags(Sample, argv, "python -m dist_dcgan.sample", about=__doc__))
    output_is_optional()
    check_png(options.out)
    run_directory = RunDirectory(options.run_dir)
    generator, description = load_generator(run_directory.best if options.best else run_directory.generator)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = sampling_config(description, options.seed)
    images = sample_images(generator.to(device), config, range(options.num), device)
    save_out(images, options.out)
    say(f"{options.num} images of step {description['step']} in {options.out}")


def command() -> None:
    """Run it as an installed command."""
    run(main)


if __name__ == "__main__":
    command()
