"""Draw a grid of images from the averaged generator of a run, on any machine.

python -m dist_dcgan.sample RUN_DIR --out X.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field
from pydantic_settings import CliPositionalArg

from dist_dcgan.config import Config, ModelOptions
from dist_dcgan.training.ema import sample_images
from dist_dcgan.training.export import load_generator
from dist_dcgan.training.loggers import save_grid
from dist_dcgan.training.run_directory import RunDirectory
from shards.command_line import Options, build, parse_flags, run
from shards.errors import UserError


class Sample(Options):
    """Draw a grid of images from the averaged generator of a run."""

    run_dir: CliPositionalArg[Path]
    """Folder of the run."""
    out: Path
    """PNG to write."""
    num: int = Field(64, ge=1)
    """Number of images."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of z."""


def main(argv: Sequence[str]) -> None:
    """Write the grid and say where it is."""
    options = build(Sample, parse_flags(Sample, argv, "python -m dist_dcgan.sample"))
    if options.out.exists():
        raise UserError(f"{options.out} exists: name another with --out")
    if options.out.suffix != ".png":
        raise UserError(f"--out {options.out} is no PNG: give it a name that ends in .png")
    if not options.out.parent.is_dir():
        raise UserError(f"no folder {options.out.parent} for --out {options.out.name}: make it first")
    generator, description = load_generator(RunDirectory(options.run_dir).generator)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    latent = ModelOptions(latent_dim=description["architecture"]["latent_dim"], latent=description["latent"])
    images = sample_images(generator.to(device), Config(seed=options.seed, model=latent), options.num, device)
    save_grid(images, options.out)
    print(f"{options.num} images of step {description['step']} in {options.out}")


if __name__ == "__main__":
    run(main)
