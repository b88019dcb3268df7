"""Command line of the data tools: python -m shards COMMAND ..."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, HttpUrl
from pydantic_settings import CliPositionalArg

from shards.common.command_line import Options, UserPath, build, nearest, parse_flags, run
from shards.common.errors import UserError
from shards.common.messages import say, warn
from shards.common.progress import Progress
from shards.common.streams import output_is_optional
from shards.conversion.convert import Settings, convert, convert_part
from shards.conversion.merge import merge
from shards.conversion.reports import Part
from shards.conversion.sources.entries import Selection, as_text, read_keys
from shards.conversion.sources.kinds import open_sources
from shards.conversion.sources.lmdb_source import LmdbSource
from shards.demo.dataset import MOST_IMAGES, write_demo
from shards.lsun.catalog import ADDRESS, CATEGORIES, lmdb_names
from shards.lsun.export import EXTENSIONS, UNKNOWN, ExportReport, export
from shards.manifest import MANIFEST_NAME, MOST_SAMPLES, Manifest, remedy_of
from shards.preview import preview
from shards.verify import verify

PROG = "python -m shards"


class DownloadOptions(Options):
    """Download and unzip LSUN's scene LMDBs; if interrupted, rerun the same command to resume."""

    categories: CliPositionalArg[list[str]] = Field(default=[])
    """Categories, `test` for the test set, or `all`."""
    out: UserPath = Path("data")
    """Output folder for the LMDBs."""
    split: Literal["train", "val"] | None = None
    """Only this split of each category; both by default."""
    address: HttpUrl = HttpUrl(ADDRESS)
    """Base URL of the archives, for a mirror."""
    keep_zip: bool = False
    """Keep each zip archive next to its folder."""
    list_categories: bool = Field(False, alias="list")
    """Print the categories and exit."""


class DemoOptions(Options):
    """Write an LMDB of rendered bedrooms in LSUN's format, to try the tools without a download."""

    out: UserPath
    """Output folder for the LMDB."""
    images: int = Field(4000, ge=1, le=MOST_IMAGES)
    """Number of images."""
    seed: int = Field(0, ge=0)
    """Random seed of the images."""
    workers: int = Field(0, ge=0, le=1024)
    """Worker processes; 0 means one per available core."""


class ConvertOptions(Options):
    """Convert images to WebDataset shards with one manifest; if interrupted, rerun the same command to resume."""

    sources: CliPositionalArg[list[UserPath]] = Field(min_length=1)
    """What to convert: LMDBs as published by LSUN, folders of images, tars or folders of tars."""
    out: UserPath
    """Output folder for the data set, new or empty."""
    image_size: int = Field(64, ge=8, le=1024)
    """Width and height in pixels."""
    samples_per_shard: int = Field(4096, ge=1, le=MOST_SAMPLES)
    """Source entries per shard."""
    fast: bool = False
    """Decode JPEGs at the smallest scale of at least twice --image-size: nearly twice as fast, different pixels."""
    max_images: int | None = Field(None, ge=1, le=MOST_SAMPLES)
    """Convert at most this many entries, the first ones."""
    exclude: UserPath | None = None
    """File with keys to leave out, one per line."""
    damaged: Literal["skip", "fail"] = "skip"
    """If an image cannot be decoded: skip it and list it in rejected.jsonl, or fail."""
    max_rejected: float = Field(0.001, ge=0, le=1)
    """Fraction of the entries that may be skipped before the conversion fails."""
    workers: int = Field(0, ge=0, le=1024)
    """Worker processes; 0 means one per available core. The bytes written do not depend on it."""
    part: str = Field("1/1", pattern=r"^[1-9]\d{0,4}/[1-9]\d{0,4}$")
    """Convert only part I of N (I/N), as one task of a job array; run `merge` after the last part."""


class MergeOptions(Options):
    """Complete a data set after all of its parts have been converted."""

    directory: CliPositionalArg[UserPath]
    """Output folder of the parts."""


class ExportOptions(Options):
    """Write the images of an LMDB as files, byte for byte, in the folder layout of LSUN's own export."""

    source: CliPositionalArg[UserPath]
    """Folder of the LMDB, as unzipped from LSUN's archive."""
    out: UserPath
    """Output folder. Existing files with the same bytes are kept; others are never replaced."""
    flat: bool = False
    """Write all files to one folder, not to nested folders named by their first six characters."""
    limit: int | None = Field(None, ge=1, le=MOST_SAMPLES)
    """Export at most this many images, the first in key order."""


class VerifyOptions(Options):
    """Check every byte of a data set against its manifest and the format."""

    directory: CliPositionalArg[UserPath]
    """Folder of the data set."""
    workers: int = Field(0, ge=0, le=1024)
    """Worker processes; 0 means one per available core."""


class PreviewOptions(Options):
    """Draw a contact sheet of a data set."""

    directory: CliPositionalArg[UserPath]
    """Folder of the data set."""
    out: UserPath
    """PNG file to write."""
    num: int = Field(64, ge=1, le=10_000)
    """Number of images, evenly spaced over the data set."""


def download_command(options: DownloadOptions) -> None:
    """Download the LMDBs one by one and print the location of each."""
    if options.list_categories:
        for category in CATEGORIES:
            say(category)
        return
    if not options.categories:
        raise UserError("no category given: name some, or test or all (--list prints them)")
    from shards.lsun.download import download  # here: requests takes as long to import as the rest

    for name in lmdb_names(options.categories, options.split):
        is_new = download(name, options.out, str(options.address), options.keep_zip)
        with LmdbSource(options.out / name) as source:
            say(f"{source.entries():,} images {'' if is_new else 'already '}at {source.path}")


def demo_command(options: DemoOptions) -> None:
    """Write the demo LMDB."""
    with Progress(options.images, "demo") as progress:
        path = write_demo(options.out, options.images, options.seed, options.workers, advance=progress.advance)
    say(f"{options.images:,} pictures at {path}; next: {PROG} convert {path} --out DIR")


def convert_command(options: ConvertOptions) -> None:
    """Convert and print a summary."""
    number, of = map(int, options.part.split("/"))
    if number > of:
        raise UserError(f"--part {options.part}: the first number counts from 1 to the second")
    sources = open_sources(options.sources)
    exclude = read_keys(options.exclude) if options.exclude else frozenset()
    if options.exclude and not exclude:
        warn(f"{options.exclude} has no keys: nothing is excluded")
    settings = Settings(
        image_size=options.image_size,
        samples_per_shard=options.samples_per_shard,
        fast=options.fast,
        selection=Selection(exclude, options.max_images),
        max_rejected=options.max_rejected if options.damaged == "skip" else 0.0,
    )
    was_complete = (options.out / MANIFEST_NAME).is_file()
    if of == 1 or was_complete:
        manifest = convert(sources, options.out, settings, options.workers)
        done = _converted(manifest, options.out)
        say(f"nothing to do: {done}; what the sources hold now was not looked at" if was_complete else done)
    else:
        convert_part(sources, options.out, Part(number, of), settings, options.workers)
        say(f"part {options.part} at {options.out}; after the last: {PROG} merge {options.out}")
    if left_out := sum(source.left_out.count for source in sources):
        say(f"{left_out:,} files without the extension of an image were left out")
    for source in sources:
        if source.left_out.archive:
            say(f"{as_text(source.left_out.archive)} was not looked into: {source.archive_rule}")


def merge_command(options: MergeOptions) -> None:
    """Merge and print a summary."""
    say(_converted(merge(options.directory), options.directory))


def export_command(options: ExportOptions) -> None:
    """Export and print the number of files by type."""
    with LmdbSource(options.source) as source:
        report = export(source, **options.model_dump(exclude={"source"}))
    say(f"{report.extensions.total():,} files at {options.out}: {_kinds(report)}")


def verify_command(options: VerifyOptions) -> None:
    """Print the problems on stdout; raise UserError if there are any, so that the exit status is 2."""
    manifest, problems = verify(options.directory, options.workers)
    for problem in problems:
        say(problem)
    if problems:
        count = f"{len(problems)} problems, the first: " if len(problems) > 1 else ""
        raise UserError(f"{options.directory} is damaged: {count}{problems[0]}; {remedy_of(options.directory)}")
    say(f"{_size(manifest)}, all intact, at {options.directory}, digest {manifest.digest()}")


def preview_command(options: PreviewOptions) -> None:
    """Write the contact sheet."""
    count = preview(options.directory, options.out, options.num)
    say(f"{count:,} images of {options.directory} on {options.out}")


class Command(NamedTuple):
    """Options and function of a command."""

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
    """Run the command named by the first argument; without one, or with --help, list the commands."""
    try:
        _run_command(argv)
    except OSError as error:  # for example a path that is too long or not readable
        where = error.filename or "the output"
        raise UserError(f"cannot use {where} ({error.strerror or error}): give another place") from None


def _run_command(argv: Sequence[str]) -> None:
    word = argv[0] if argv else ""
    if word in ("", "-h", "--help"):
        for line in _overview():
            say(line)
        sys.exit(0 if word else 2)
    if word not in COMMANDS:
        raise UserError(f"unknown command {word}{nearest(word, COMMANDS)} (--help lists them all)")
    if [flag.partition("=")[0] for flag in argv].count("--exclude") > 1:
        raise UserError("--exclude is given twice, and only one would count: put all keys into one file")
    command = COMMANDS[word]
    options = build(command.options, parse_flags(command.options, argv[1:], f"{PROG} {word}"))
    if command.function is not verify_command:  # the others leave files
        output_is_optional()
    command.function(options)


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


def _overview() -> list[str]:
    lines = [f"  {word:<8} {command.options.__doc__}" for word, command in COMMANDS.items()]
    return [f"usage: {PROG} COMMAND ...", "", *lines, "", f"{PROG} COMMAND --help explains its options."]


def command() -> None:
    """Run it as an installed command."""
    run(main)


if __name__ == "__main__":  # spawned workers import this module, too
    command()
