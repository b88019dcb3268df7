"""Score the generator of a run against a data set.

python -m dist_dcgan.evaluate runs/default --data data/bedroom_train
COMMAND=evaluate RANKS=8 bash launch/torchrun.sh runs/default --data data/bedroom_train --json
python -m dist_dcgan.evaluate runs/default --data data/bedroom_train --nearest 5 --out nearest.png
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from pydantic_settings import CliPositionalArg
from torch import Tensor

from dist_dcgan.config import CONSENT, ExtractorName, LocationOptions
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.opening import open_location
from dist_dcgan.distributed.collectives import from_rank_zero, require_same
from dist_dcgan.distributed.world import SLOW_SECONDS, process_group, run_rank
from dist_dcgan.drawing import check_out, reported_as, save_png, tile, to_pixels
from dist_dcgan.metrics.extractors import Extractor, load_extractor
from dist_dcgan.metrics.features import beside_nearest, extract, real_features
from dist_dcgan.metrics.quality import Quality, coverage, quality
from dist_dcgan.run.export import sampling_config
from dist_dcgan.trained import CHANGED_MEANWHILE, load_trained
from dist_dcgan.training.ema import sample_images
from shards.common.command_line import Options, UserPath, build, parse_flags
from shards.common.errors import UserError
from shards.common.messages import say
from shards.manifest import Manifest

SHORT_FLAGS = {"--data": "--data.path", "--num": "--fakes", "--json": "--as-json", **CONSENT}
_SHEET_ROWS = 12


class Evaluate(Options):
    """Score the generator of a run against a data set."""

    run_dir: CliPositionalArg[UserPath]
    """Folder of the run."""
    data: LocationOptions = LocationOptions()
    """Shards to score against: the training split, as is usual for LSUN."""
    allow_commands: bool = False
    """Allow `pipe:COMMAND` as --data: the shell command prints the file whose name replaces `{}` in it."""
    best: bool = False
    """Score the best generator so far by KID instead of the latest."""
    fakes: int = Field(50_000, ge=4)
    """Generated images (`--num` for short, except under torchrun, which takes it for an option of its own)."""
    reals: int = Field(50_000, ge=4)
    """Real images; all if the data set has fewer."""
    extractor: ExtractorName = "efficientnet-lite0"
    """Feature network; inception, with its 2015 weights, gives FID."""
    weights: UserPath | None = None
    """File of Inception's weights (weights-inception-2015-12-05-6726825d.pth of torch-fidelity)."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of z."""
    nearest: int | None = Field(None, ge=1, le=32)
    """Also draw samples beside this many of their nearest real images, into --out, to detect copies."""
    out: UserPath | None = None
    """PNG to write with --nearest."""
    as_json: bool = False
    """Print one line of JSON (`--json` for short)."""


def main(argv: Sequence[str]) -> None:
    """Compute the scores and print them."""
    options = build(Evaluate, parse_flags(Evaluate, argv, "python -m dist_dcgan.evaluate", SHORT_FLAGS, __doc__))
    check_sheet(options)
    trained = load_trained(options.run_dir, options.best, torch.device("cpu"))
    generator, description = trained.network, trained.description
    reader = ShardReader(open_location(options.data, options.allow_commands))
    check_data(options.data.name, reader.manifest, description["architecture"]["image_size"])
    with process_group(SLOW_SECONDS) as world:
        require_same(f"step {description['step']}", f"the generator of {options.run_dir}", CHANGED_MEANWHILE)
        extractor = load_extractor(options.extractor, options.weights, world.device)
        generator.to(world.device).to(memory_format=torch.channels_last)
        config = sampling_config(description, options.seed)

        def draw(slots: range) -> Tensor:
            return to_pixels(sample_images(generator, config, slots, world.device, stream="evaluation"))

        real = real_features(reader, extractor, options.reals, world, "real images")
        fake = extract(draw, options.fakes, extractor, world, "generated images")

        def report() -> None:
            name = f"{options.run_dir}, {'best' if options.best else 'latest'}"
            context = circumstances(name, description, options.data.name, reader.manifest, extractor)
            scores = quality(real, fake, extractor, world.device) | coverage(real, fake)
            show(scores, context, options.as_json)
            if options.nearest is not None and options.out is not None:
                rows = range(min(_SHEET_ROWS, len(fake)))
                count = min(options.nearest, len(real))
                tiles = beside_nearest(draw(rows).cpu(), fake[: len(rows)], real, reader, count)
                with reported_as(options.out):
                    save_png(tile(tiles, 1 + count), options.out)

        from_rank_zero(report)


def check_sheet(options: Evaluate) -> None:
    """Raise UserError if the sheet of nearest images cannot be written, before anything is computed."""
    if (options.nearest is None) != (options.out is None):
        raise UserError("--nearest K and --out X.png belong together: give both or none")
    if options.out is not None:
        check_out(options.out, [".png"])


def check_data(name: str, manifest: Manifest, image_size: int) -> None:
    """Raise UserError if a data set cannot be compared with images of `image_size`."""
    if manifest.samples < 4:
        raise UserError(f"{name} has {manifest.samples} images, too few to score against: use more")
    if manifest.image_size != image_size:
        raise UserError(
            f"the generator draws {image_size} pixels, {name} holds {manifest.image_size}: "
            "name the data set that it was trained on with --data"
        )


def circumstances(
    run: str, description: dict[str, Any], data: str, manifest: Manifest, extractor: Extractor
) -> dict[str, str]:
    """Return the generator, data set and extractor of a score; `description` is the exported generator's JSON."""
    return {
        "generator": f"{run}, step {description['step']}",
        "generator_sha256": description["sha256"],
        "data": data,
        "data_digest": manifest.digest(),
        "extractor": extractor.name,
        "extractor_sha256": extractor.weights_sha256,
        "resize": extractor.resize,
    }


def show(scores: Quality, context: dict[str, str], as_json: bool) -> None:
    """Print scores and their context, as a table or as one line of JSON."""
    if as_json:
        finite = {name: value if math.isfinite(value) else None for name, value in scores.items()}
        say(json.dumps(finite | context))
        return
    for name, value in (scores | context).items():
        say(f"{name:32} {value:.6g}" if isinstance(value, float) else f"{name:32} {value}")


def command() -> None:
    """Run it as an installed command."""
    run_rank(main)


if __name__ == "__main__":
    command()
