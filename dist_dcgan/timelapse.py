"""A film of how a run learned to draw: its grids of samples, with images seen and KID in the corner.

python -m dist_dcgan.timelapse runs/default --out lapse.mp4
python -m dist_dcgan.timelapse runs/default --out lapse.gif --fps 5
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path

from PIL import Image
from pydantic import Field
from pydantic_settings import CliPositionalArg

from dist_dcgan.drawing import FILMS, caption, check_out, read_png, reported_as, save_film
from dist_dcgan.run.directory import RunDirectory
from dist_dcgan.run.history import Row, grids_of, read_log, reported_reading, said_of
from shards.common.command_line import Options, UserPath, build, parse_flags, run
from shards.common.errors import UserError
from shards.common.messages import say
from shards.common.progress import Progress
from shards.common.streams import output_is_optional

_LAST_SECONDS = 2
"""For which the last grid stands still."""


class Timelapse(Options):
    """A film of how a run learned to draw."""

    run_dir: CliPositionalArg[UserPath]
    """Folder of the run."""
    out: UserPath
    """Film to write: MP4 (with the extra `video`), GIF or WebP."""
    fps: int = Field(10, ge=1, le=60)
    """Grids in a second."""


def main(argv: Sequence[str]) -> None:
    """Write the film and print its path."""
    options = build(Timelapse, parse_flags(Timelapse, argv, "python -m dist_dcgan.timelapse", about=__doc__))
    output_is_optional()
    check_out(options.out, FILMS)
    run_directory = RunDirectory(options.run_dir)
    with reported_reading(options.run_dir):
        grids, rows = grids_of(run_directory), read_log(run_directory).rows
    if not grids:
        raise UserError(f"no grids in {run_directory.samples}: a run writes one every --log.samples-every-images")
    with reported_as(options.out):
        save_film(frames(grids, rows, options.fps), options.out, options.fps)
    say(f"{len(grids)} grids, up to step {max(grids)}, in {options.out}")


def frames(grids: dict[int, Path], seen: Sequence[Row], fps: int) -> Iterator[Image.Image]:
    """Yield the grids with what the run had seen by then, all of the size of the largest."""
    sizes = [read_png(path).size for path in grids.values()]  # they are read again below: all at once may not fit
    size = max(width for width, _ in sizes), max(height for _, height in sizes)
    with Progress(len(grids), "grids", "grid") as progress:
        for step, path in grids.items():
            picture, canvas = read_png(path), Image.new("RGB", size)
            canvas.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
            frame = caption(canvas, said_of(step, seen))
            yield from repeat(frame, 1 + _LAST_SECONDS * fps if step == max(grids) else 1)
            progress.advance(1)


def command() -> None:
    """Run it as an installed command."""
    run(main)


if __name__ == "__main__":
    command()
