"""Score the generator of a run against a data set.

python -m dist_dcgan.evaluate RUN_DIR --data DIR
torchrun --nproc_per_node=8 -m dist_dcgan.evaluate RUN_DIR --data DIR
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from pydantic_settings import CliPositionalArg
from torch import Tensor

from dist_dcgan.data.places import Folder
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.distributed import from_rank_zero, process_group
from dist_dcgan.metrics.extractors import Extractor, load_extractor
from dist_dcgan.metrics.features import extract, real_features, to_pixels
from dist_dcgan.metrics.nearest import beside_nearest
from dist_dcgan.metrics.quality import Quality, coverage, quality
from dist_dcgan.training.ema import sample_images
from dist_dcgan.training.export import load_generator, sampling_config
from dist_dcgan.training.loggers import check_png, save_grid
from dist_dcgan.training.run_directory import RunDirectory
from shards.command_line import Options, build, parse_flags, run
from shards.errors import UserError

SHORT_FLAGS = {"--num": "--fakes", "--json": "--as-json"}
_TIMEOUT_SECONDS = 1800  # ranks wait for rank 0, whose distances take minutes with 50,000 images
_SHEET_ROWS = 12


class Evaluate(Options):
    """Score the generator of a run against a data set."""

    run_dir: CliPositionalArg[Path]
    """Folder of the run."""
    data: Path
    """Folder of shards to score against: the training split, as is usual for LSUN."""
    best: bool = False
    """Score the best generator so far by KID instead of the latest."""
    fakes: int = Field(50_000, ge=4)
    """Generated images (`--num` for short, but not under torchrun, which takes that for an option of its own)."""
    reals: int = Field(50_000, ge=4)
    """Real images; all, where the data set has fewer."""
    extractor: Literal["efficientnet-lite0", "inception"] = "efficientnet-lite0"
    """Feature network; inception, with its 2015 weights, gives FID."""
    weights: Path | None = None
    """File of Inception's weights (weights-inception-2015-12-05-6726825d.pth of torch-fidelity)."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of z."""
    nearest: int | None = Field(None, ge=1, le=32)
    """Also draw samples beside that many of their nearest real images, into --out: a look for copies."""
    out: Path | None = None
    """PNG to write with --nearest."""
    as_json: bool = False
    """Print one line of JSON (`--json` for short)."""


def main(argv: Sequence[str]) -> None:
    """Score and print."""
    flags = parse_flags(Evaluate, argv, "python -m dist_dcgan.evaluate", SHORT_FLAGS)
    options = build(Evaluate, flags)
    check_sheet(options)
    run_directory = RunDirectory(options.run_dir)
    generator, description = load_generator(run_directory.best if options.best else run_directory.generator)
    reader = ShardReader(Folder(options.data))
    if reader.manifest.samples < 4:
        raise UserError(f"{options.data} has {reader.manifest.samples} images, too few to score against: use more")
    if description["architecture"]["image_size"] != reader.manifest.image_size:
        raise UserError(
            f"the generator draws {description['architecture']['image_size']} pixels, {options.data} holds "
            f"{reader.manifest.image_size}: name the data set that it was trained on with --data"
        )
    with process_group(_TIMEOUT_SECONDS) as world:
        extractor = load_extractor(options.extractor, options.weights, world.device)
        generator.to(world.device).to(memory_format=torch.channels_last)
        config = sampling_config(description, options.seed)

        def draw(slots: range) -> Tensor:
            return to_pixels(sample_images(generator, config, slots, world.device, stream="evaluation"))

        real = real_features(reader, extractor, options.reals, world)
        fake = extract(draw, options.fakes, extractor, world)

        def report() -> None:
            found = quality(real, fake, extractor) | coverage(real, fake)
            show(options, found, describe(options, description, reader, extractor))
            if options.nearest is not None and options.out is not None:
                rows = range(min(_SHEET_ROWS, len(fake)))
                count = min(options.nearest, len(real))
                tiles = beside_nearest(draw(rows).cpu(), fake[: len(rows)], real, reader, count)
                save_grid(tiles.float() / 127.5 - 1, options.out, columns=1 + count)

        from_rank_zero(report)


def check_sheet(options: Evaluate) -> None:
    """Raise UserError where the sheet of nearest images cannot be written, before anything is computed."""
    if (options.nearest is None) != (options.out is None):
        raise UserError("--nearest K and --out X.png belong together: give both or none")
    if options.out is not None:
        check_png(options.out)


def describe(
    options: Evaluate, description: dict[str, Any], reader: ShardReader, extractor: Extractor
) -> dict[str, str]:
    """Return what must be known to compare the scores with others."""
    return {
        "generator": f"{options.run_dir}, {'best' if options.best else 'latest'}, step {description['step']}",
        "generator_sha256": description["sha256"],
        "data": str(options.data),
        "data_digest": reader.manifest.digest(),
        "extractor": extractor.name,
        "extractor_sha256": extractor.weights_sha256,
        "resize": extractor.resize,
    }


def show(options: Evaluate, found: Quality, context: dict[str, str]) -> None:
    """Print the scores and what they were taken with."""
    if options.as_json:
        finite = {name: value if math.isfinite(value) else None for name, value in found.items()}
        print(json.dumps(finite | context))
        return
    for name, value in (found | context).items():
        print(f"{name:32} {value:.6g}" if isinstance(value, float) else f"{name:32} {value}")


if __name__ == "__main__":
    run(main)
