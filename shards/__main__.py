"""Prepare data for training: python -m shards COMMAND ..."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field
from pydantic_settings import CliPositionalArg

from shards.command_line import Options, build, nearest, parse_flags, run
from shards.convert import convert
from shards.demo import write_demo
from shards.errors import UserError
from shards.export import EXTENSIONS, UNKNOWN, ExportReport, export
from shards.manifest import Manifest
from shards.preview import preview
from shards.progress import Progress
from shards.sources import LmdbSource
from shards.verify import verify

PROG = "python -m shards"


class DemoOptions(Options):
    """Write an LMDB of rendered bedrooms, in LSUN's format, to try everything without a download."""

    out: Path
    """Folder to write the LMDB to."""
    images: int = Field(4000, ge=1)
    """Number of pictures."""
    seed: int = Field(0, ge=0)
    """Another seed gives other pictures."""
    workers: int = Field(0, ge=0, le=1024)
    """Worker processes; 0 means one for each available core."""


class ConvertOptions(Options):
    """Turn an LMDB of images into WebDataset shards: centre crop, resize, one manifest."""

    source: CliPositionalArg[Path]
    """Folder of the LMDB, as unzipped from LSUN's archive."""
    out: Path
    """Folder to write the data set to, new or empty."""
    image_size: int = Field(64, ge=8, le=1024)
    """Pixels a side."""
    samples_per_shard: int = Field(4096, ge=1)
    """Source entries that go into one shard."""
    workers: int = Field(0, ge=0, le=1024)
    """Worker processes; 0 means one for each available core. The bytes written do not depend on it."""
    max_rejected: float = Field(0.001, ge=0, le=1)
    """Fraction of the source's entries that may be unusable before the conversion fails."""


class ExportOptions(Options):
    """Write the images of an LMDB as files, byte for byte, in the folders of LSUN's own export."""

    source: CliPositionalArg[Path]
    """Folder of the LMDB, as unzipped from LSUN's archive."""
    out: Path
    """Folder to write to. Files that are there already with the same bytes stay; others are never replaced."""
    flat: bool = False
    """All files in one folder, not in folders of their names' first six characters."""
    limit: int | None = Field(None, ge=1)
    """Export only so many, the first in key order."""


class VerifyOptions(Options):
    """Check every byte of a data set against its manifest and the format."""

    directory: CliPositionalArg[Path]
    """Folder of the data set."""
    workers: int = Field(0, ge=0, le=1024)
    """Worker processes; 0 means one for each available core."""


class PreviewOptions(Options):
    """Draw a contact sheet of a data set."""

    directory: CliPositionalArg[Path]
    """Folder of the data set."""
    out: Path
    """PNG file to write."""
    num: int = Field(64, ge=1, le=10_000)
    """Number of images, evenly spread over the data set."""


def demo_command(options: DemoOptions) -> None:
    """Write the demo LMDB."""
    with Progress(options.images, "demo") as progress:
        path = write_demo(options.out, options.images, options.seed, options.workers, progress=progress.reach)
    print(f"{options.images:,} pictures at {path}; next: {PROG} convert {path} --out DIR")


def convert_command(options: ConvertOptions) -> None:
    """Convert, and say what came of it."""
    with LmdbSource(options.source) as source:
        manifest = convert(source, **options.model_dump(exclude={"source"}))
    print(f"{_size(manifest)}, {manifest.rejected:,} rejected, at {options.out}, digest {manifest.digest()}")


def export_command(options: ExportOptions) -> None:
    """Export, and say how many of which kind."""
    with LmdbSource(options.source) as source:
        report = export(source, **options.model_dump(exclude={"source"}))
    print(f"{report.extensions.total():,} files at {options.out}: {_kinds(report)}")


def verify_command(options: VerifyOptions) -> None:
    """Print every problem on stdout; damage is a UserError, so that the exit status is 2."""
    manifest, problems = verify(options.directory, options.workers)
    for problem in problems:
        print(problem)
    if problems:
        count = f"{len(problems)} problems, the first: " if len(problems) > 1 else ""
        raise UserError(f"{options.directory} is damaged: {count}{problems[0]}; convert or copy it again")
    print(f"{_size(manifest)}, all intact, at {options.directory}, digest {manifest.digest()}")


def preview_command(options: PreviewOptions) -> None:
    """Draw the contact sheet."""
    count = preview(options.directory, options.out, options.num)
    print(f"{count:,} images of {options.directory} on {options.out}")


class Command(NamedTuple):
    """What a command word stands for."""

    options: type[Options]
    function: Callable[[Any], None]


COMMANDS = {
    "demo": Command(DemoOptions, demo_command),
    "convert": Command(ConvertOptions, convert_command),
    "export": Command(ExportOptions, export_command),
    "verify": Command(VerifyOptions, verify_command),
    "preview": Command(PreviewOptions, preview_command),
}


def main(argv: Sequence[str]) -> None:
    """Run the command that the first word names; without one, or with --help, list them."""
    try:
        _run_command(argv)
    except BrokenPipeError:
        raise
    except OSError as error:  # of a path too long, say, or one that only another user may read
        where = error.filename or "the output"
        raise UserError(f"cannot use {where} ({error.strerror or error}): give another place") from None


def _run_command(argv: Sequence[str]) -> None:
    word = argv[0] if argv else ""
    if word in ("", "-h", "--help"):
        print(_overview())
        sys.exit(0 if word else 2)
    if word not in COMMANDS:
        raise UserError(f"unknown command {word}{nearest(word, COMMANDS)} (--help lists them all)")
    command = COMMANDS[word]
    command.function(build(command.options, parse_flags(command.options, argv[1:], f"{PROG} {word}")))


def _size(manifest: Manifest) -> str:
    shards = len(manifest.shards)
    return f"{manifest.samples:,} images in {shards:,} {'shard' if shards == 1 else 'shards'}"


def _kinds(report: ExportReport) -> str:
    found = [extension for extension in EXTENSIONS if report.extensions[extension]]
    kinds = ", ".join(f"{report.extensions[extension]:,} {extension}" for extension in found)
    unknown = " (unknown content)" if UNKNOWN in found else ""
    renamed = f"; {report.renamed:,} named by the SHA-1 of their key" if report.renamed else ""
    present = f"; {report.present:,} were there already" if report.present else ""
    return kinds + unknown + renamed + present


def _overview() -> str:
    lines = [f"  {word:<8} {command.options.__doc__}" for word, command in COMMANDS.items()]
    return "\n".join([f"usage: {PROG} COMMAND ...", "", *lines, "", f"{PROG} COMMAND --help explains its options."])


if __name__ == "__main__":  # a worker process imports this module, too
    run(main)
