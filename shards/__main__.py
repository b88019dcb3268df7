"""Prepare data for training: python -m shards COMMAND ..."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, HttpUrl
from pydantic_settings import CliPositionalArg

from shards.common.command_line import Options, build, nearest, parse_flags, run
from shards.common.errors import UserError
from shards.common.progress import Progress
from shards.conversion.convert import Settings, convert, convert_part
from shards.conversion.merge import merge
from shards.conversion.reports import Part
from shards.conversion.sources.entries import Selection, read_keys
from shards.conversion.sources.kinds import open_source
from shards.conversion.sources.lmdb_source import LmdbSource
from shards.demo.dataset import write_demo
from shards.lsun.catalog import ADDRESS, CATEGORIES, lmdb_names
from shards.lsun.export import EXTENSIONS, UNKNOWN, ExportReport, export
from shards.manifest import MANIFEST_NAME, Manifest
from shards.preview import preview
from shards.verify import verify

PROG = "python -m shards"


class DownloadOptions(Options):
    """Bring LSUN's scenes from their publisher, unzipped; after a cut or a kill the same command goes on."""

    categories: CliPositionalArg[list[str]] = Field(default=[])
    """Categories, `test` for the test set, or `all`."""
    out: Path = Path("data")
    """Folder to put the LMDBs in."""
    split: Literal["train", "val"] | None = None
    """Only this split of each category; both by default."""
    address: HttpUrl = HttpUrl(ADDRESS)
    """Where the archives lie, for a mirror."""
    keep_zip: bool = False
    """Keep each archive beside its folder."""
    list_categories: bool = Field(False, alias="list")
    """Print the categories and do nothing else."""


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
    """Turn images into WebDataset shards under one manifest; after a kill the same command goes on."""

    sources: CliPositionalArg[list[Path]] = Field(min_length=1)
    """What to convert: LMDBs as LSUN publishes them, folders of images, tars or folders of tars."""
    out: Path
    """Folder to write the data set to, new or empty."""
    image_size: int = Field(64, ge=8, le=1024)
    """Pixels a side."""
    samples_per_shard: int = Field(4096, ge=1)
    """Source entries that go into one shard."""
    fast: bool = False
    """Decode JPEGs at the reduced scale that leaves the filter twice the size: nearly twice as fast, other pixels."""
    max_images: int | None = Field(None, ge=1)
    """Take only the first so many entries."""
    exclude: Path | None = None
    """File of keys to leave out, one a line."""
    damaged: Literal["skip", "fail"] = "skip"
    """What to do with an image that cannot be decoded: list it in rejected.jsonl, or end there."""
    max_rejected: float = Field(0.001, ge=0, le=1)
    """Fraction of the entries that may be skipped before the conversion fails."""
    workers: int = Field(0, ge=0, le=1024)
    """Worker processes; 0 means one for each available core. The bytes written do not depend on it."""
    part: str = Field("1/1", pattern=r"^[1-9]\d{0,4}/[1-9]\d{0,4}$")
    """Convert only part I of N (I/N), as one task of a job array; `merge` completes the data set after the last."""


class MergeOptions(Options):
    """Complete a data set whose parts have all been converted."""

    directory: CliPositionalArg[Path]
    """Folder that the parts were written to."""


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


def download_command(options: DownloadOptions) -> None:
    """Bring one LMDB after the other, and say of each that it is there."""
    if options.list_categories:
        print("\n".join(CATEGORIES))
        return
    if not options.categories:
        raise UserError("no category given: name some, or test or all (--list prints them)")
    from shards.lsun.download import download  # here, as HTTP takes as long to import as all the rest

    for name in lmdb_names(options.categories, options.split):
        is_new = download(name, options.out, str(options.address), options.keep_zip)
        with LmdbSource(options.out / name) as source:
            print(f"{source.entries():,} images {'' if is_new else 'already '}at {source.path}", flush=True)


def demo_command(options: DemoOptions) -> None:
    """Write the demo LMDB."""
    with Progress(options.images, "demo") as progress:
        path = write_demo(options.out, options.images, options.seed, options.workers, progress=progress.reach)
    print(f"{options.images:,} pictures at {path}; next: {PROG} convert {path} --out DIR")


def convert_command(options: ConvertOptions) -> None:
    """Convert, and say what came of it."""
    number, of = map(int, options.part.split("/"))
    if number > of:
        raise UserError(f"--part {options.part}: the first number counts from 1 to the second")
    sources = [open_source(path) for path in options.sources]
    settings = Settings(
        image_size=options.image_size,
        samples_per_shard=options.samples_per_shard,
        fast=options.fast,
        selection=Selection(read_keys(options.exclude) if options.exclude else frozenset(), options.max_images),
        max_rejected=options.max_rejected if options.damaged == "skip" else 0.0,
    )
    was_complete = (options.out / MANIFEST_NAME).is_file()
    if of == 1 or was_complete:
        manifest = convert(sources, options.out, settings, options.workers)
        print(("nothing to do: " if was_complete else "") + _converted(manifest, options.out))
    else:
        convert_part(sources, options.out, Part(number, of), settings, options.workers)
        print(f"part {options.part} at {options.out}; after the last: {PROG} merge {options.out}")
    ignored = sum(source.ignored for source in sources)
    if ignored:
        print(f"{ignored:,} files without the extension of an image were left out")


def merge_command(options: MergeOptions) -> None:
    """Merge, and say what came of it."""
    print(_converted(merge(options.directory), options.directory))


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
    "download": Command(DownloadOptions, download_command),
    "demo": Command(DemoOptions, demo_command),
    "convert": Command(ConvertOptions, convert_command),
    "merge": Command(MergeOptions, merge_command),
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


def _converted(manifest: Manifest, out: Path) -> str:
    excluded = f", {manifest.excluded:,} excluded" if manifest.excluded else ""
    return f"{_size(manifest)}, {manifest.rejected:,} rejected{excluded}, at {out}, digest {manifest.digest()}"


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
