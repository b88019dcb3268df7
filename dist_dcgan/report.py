"""Tell a run, or compare several, in one HTML file that opens anywhere: curves, pictures, scores, how to repeat it.

python -m dist_dcgan.report runs/default
python -m dist_dcgan.report runs/default --data data/bedroom_train --out bedrooms.html
python -m dist_dcgan.report runs/full runs/half --out compared.html
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from dist_dcgan.config import LocationOptions
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.opening import open_location
from dist_dcgan.distributed.world import World
from dist_dcgan.drawing import reported_as, tile
from dist_dcgan.evaluate import check_data
from dist_dcgan.metrics.extractors import load_extractor, missing_packages
from dist_dcgan.metrics.features import beside_nearest, extract, read_images, real_features, scored_samples
from dist_dcgan.pages.page import MARK, Shown, grids_with_captions, render
from dist_dcgan.pages.pictures import embed, read_grids
from dist_dcgan.pages.told import NothingYetError, Run, names_of, read_run
from dist_dcgan.run.history import grids_of, reported_reading
from dist_dcgan.trained import Trained, load_trained
from shards.common.command_line import Options, UserPath, build, parse_flags, run
from shards.common.errors import UserError
from shards.common.files import open_plain, publish
from shards.common.messages import say, tell
from shards.common.streams import output_is_optional

_IMAGES = 64
"""Of the sheets of best, latest and real images."""
_NEAREST, _ROWS = 6, 8
_WATCH_SECONDS = 30


class Report(Options):
    """Tell a run, or compare several, in one HTML file."""

    run_dirs: CliPositionalArg[list[UserPath]] = Field(min_length=1)
    """Folders of runs."""
    out: UserPath | None = None
    """File to write; none: report.html in the folder of the run, or here if there are several. A report that is there
    is replaced, another file is not."""
    data: UserPath | None = None
    """Folder of shards: also show real images, and those nearest to generated ones."""
    watch: bool = False
    """Write it again every 30 seconds until the runs have ended; the page then loads itself again."""


def main(argv: Sequence[str]) -> None:
    """Write the file and print its path."""
    options = build(Report, parse_flags(Report, argv, "python -m dist_dcgan.report", about=__doc__))
    output_is_optional()
    out = options.out or (options.run_dirs[0] if len(options.run_dirs) == 1 else Path()) / "report.html"
    check_replaced(out)
    while write(options, out):
        time.sleep(_WATCH_SECONDS)
    say(f"{'this run' if len(options.run_dirs) == 1 else f'{len(options.run_dirs)} runs'} in {out}")


def check_replaced(out: Path) -> None:
    """Raise UserError if the file exists and is no report, or cannot be made."""
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {out}: give it a name that ends in .html")
    if not out.parent.is_dir():
        raise UserError(f"no folder {out.parent} for --out {out.name}: make it first")
    if not os.path.lexists(out):
        return
    with reported_as(out), open_plain(out) as file:
        if MARK not in file.read(1000):
            raise UserError(f"{out} exists and is no report: name another with --out")


def write(options: Report, out: Path) -> bool:
    """Write the report; return whether it is to be written again."""
    names = names_of(options.run_dirs)
    try:
        runs = [read_run(path, name) for path, name in zip(options.run_dirs, names, strict=True)]
    except NothingYetError as error:
        if not options.watch:
            raise
        tell(f"{error}; again in {_WATCH_SECONDS} seconds")
        return True
    again = options.watch and any(each.state == "running" for each in runs)
    content = render([shown(each, options.data) for each in runs], again)
    check_replaced(out)  # it may have come while pictures were drawn
    with reported_as(out):
        publish(out, content)
    if again:
        tell(f"{out}: step {', '.join(f'{each.last.step:,}' for each in runs)}; again in {_WATCH_SECONDS} seconds")
    return again


def shown(run: Run, data: Path | None) -> Shown:
    """Return a run with its pictures; raises UserError if `data` cannot be used."""
    with reported_reading(run.directory.path):
        found = Shown(run, grids_with_captions(run, read_grids(grids_of(run.directory))))
    if run.directory.best.is_file():
        _add_drawn(found, "best generator by KID", True)
    latest = _add_drawn(found, "latest generator", False)
    if data is not None:
        _add_real(found, latest, data)
    return found


def _add_drawn(found: Shown, which: str, best: bool) -> Trained | None:
    """Add images of a generator and return it; a note and None if there is none that can be used."""
    try:
        trained = load_trained(found.run.directory.path, best)
    except UserError as error:
        found.notes.append(str(error))
        return None
    images = trained.images(trained.latents(range(_IMAGES)))
    caption = f"the {which}, step {trained.description['step']:,}: seeds 0 to {_IMAGES - 1}"
    found.pictures.append((caption, embed(tile(images))))
    return trained


def _add_real(found: Shown, trained: Trained | None, data: Path) -> None:
    """Add a sheet of real images and, if features can be had, generated ones beside the nearest real ones."""
    reader = ShardReader(open_location(LocationOptions(path=data), False))
    if trained is not None:
        check_data(str(data), reader.manifest, trained.description["architecture"]["image_size"])
    sheet = tile(read_images(reader, scored_samples(reader, _IMAGES)))
    found.pictures.append((f"real images of {data}", embed(sheet)))
    missing = missing_packages()
    if missing:
        found.notes.append(f"The nearest real images are not looked for without {', '.join(missing)}.")
    if trained is None or missing:
        return
    world = World(0, 0, 1, trained.device)
    extractor = load_extractor("efficientnet-lite0", None, world.device)
    tell(f"looking for the nearest images in {data}; their features are kept for other reports")
    reals = real_features(reader, extractor, found.run.config.quality.reals, world)  # as in training, which kept them
    images = trained.images(trained.latents(range(_ROWS)))
    features = extract(lambda slots: images[slots.start : slots.stop].to(world.device), _ROWS, extractor, world)
    count = min(_NEAREST, len(reals))
    caption = f"left, generated (seeds 0 to {_ROWS - 1}); then the nearest of {len(reals):,} real images by features"
    found.pictures.append((caption, embed(tile(beside_nearest(images, features, reals, reader, count), 1 + count))))


def command() -> None:
    """Run it as an installed command."""
    run(main)


if __name__ == "__main__":
    command()
