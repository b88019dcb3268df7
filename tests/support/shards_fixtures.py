"""What the tests of `shards` share: small sources, real photographs if there are any, the commands in this process."""

from __future__ import annotations

import functools
import io
import json
import os
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from types import FrameType

import lmdb
import numpy as np
import pytest
from PIL import Image

from shards.__main__ import main
from shards.common.command_line import run
from shards.common.errors import UserError
from shards.conversion.convert import Settings, convert
from shards.conversion.images import ImageError
from shards.conversion.sources.entries import Source
from shards.conversion.sources.kinds import open_source
from shards.conversion.sources.lmdb_source import LmdbSource
from shards.demo.dataset import write_demo
from shards.manifest import Manifest, read_manifest
from shards.reader import read_sample

ROOT = Path(__file__).resolve().parents[2]


PLAIN_KEYS = [b"a", b"0123456789abcdef" * 2, b"A-Z_9", b"x" * 90, b"-", b"-rf", b"__meta__"]
"""Keys that name their sample."""

ODD_KEYS = [
    *[b"a.b", b"a.b.c", b".hidden", b"name.jpg", b".", b"..", b"a/b", b"/etc/x", b"../x", b"/" * 500],
    *[b"../../../../../../../../tmp/escaped", b"~", b"$HOME", b" ", b"a b", b"a\n", b"\n", b"\0", b"a\0b"],
    *[b"\xff\xfe", "schön".encode(), b"k" * 91, b"k" * 200, b"k" * 511],
]
"""Keys whose SHA-1 names it."""


def picture(seed: int, width: int = 90, height: int = 120) -> Image.Image:
    """A smooth random picture, RGB: it survives JPEG as a photograph does."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def numbered(count: int) -> dict[bytes, bytes]:
    """Entries of a small source: `count` JPEGs under plain keys."""
    return {b"image%04d" % i: encoded(picture(i)) for i in range(count)}


def write_lmdb(path: Path, entries: Mapping[bytes, bytes]) -> Path:
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=1 << 28) as environment, environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)
    return path


def data_set(tmp_path: Path, count: int = 10, samples_per_shard: int = 4) -> tuple[Path, Manifest]:
    """A small data set of 16 pixels a side to damage: shards of 4, 4 and 2 samples unless told otherwise."""
    out = tmp_path / "data"
    shutil.copytree(Path(_prototype(count, samples_per_shard).name) / "data", out)
    return out, read_manifest(out)


@functools.cache
def _prototype(count: int, samples_per_shard: int) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    with LmdbSource(write_lmdb(Path(folder.name) / "source", numbered(count))) as source:
        out = Path(folder.name) / "data"
        convert([source], out, Settings(image_size=16, samples_per_shard=samples_per_shard), workers=1)
    return folder


def photographs(tmp_path: Path) -> Path:
    """Real photographs as an LSUN LMDB from the folder $DIST_DCGAN_PHOTOS; rendered bedrooms without it."""
    folder = os.environ.get("DIST_DCGAN_PHOTOS")
    if not folder:
        return write_demo(tmp_path, images=60, workers=1)
    with zipfile.ZipFile(Path(folder) / "clothing_val_lmdb.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path / "clothing_val_lmdb"


def run_shards(*words: object) -> CompletedProcess[str]:
    """Run `python -m shards` in this process, for at most 60 seconds."""
    output, errors, status = io.StringIO(), io.StringIO(), 0
    command = [str(word) for word in words]
    with redirect_stdout(output), redirect_stderr(errors), within(60):
        try:
            run(main, command)
        except SystemExit as end:
            status = int(end.code or 0)
    return CompletedProcess(command, status, output.getvalue(), errors.getvalue())


def output_of(*words: object) -> str:
    """What a command prints that must succeed."""
    done = run_shards(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def error_of(*words: object) -> str:
    """The one line that a mistake gets; asserts that there is nothing else and that the exit status is 2."""
    done = run_shards(*words)
    assert (done.returncode, done.stdout) == (2, ""), done
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def killed_at(operation: int, folder: Path, words: Sequence[str]) -> None:
    """Run a command in this process, which is killed before the file operation of this number in `folder`."""
    operations = 0

    def hook(event: str, arguments: Sequence[object]) -> None:
        nonlocal operations
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            operations += any(str(folder) in place_of(argument) for argument in arguments)
            if operations == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    main(words)


def place_of(argument: object) -> str:
    """Return the path that an operation was given, or that of the folder whose descriptor it was given."""
    if isinstance(argument, (str, bytes, os.PathLike)):
        return os.path.realpath(os.fsdecode(argument))  # may be one of an open folder, /dev/fd/N/NAME
    is_descriptor = isinstance(argument, int) and os.path.lexists(f"/proc/self/fd/{argument}")
    return os.readlink(f"/proc/self/fd/{argument}") if is_descriptor else ""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, to see that nothing changed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def convert_here(sources: Path | Iterable[Path], out: Path, *options: object, workers: int = 1) -> Manifest:
    """Convert as the command does, in this process and for at most 60 seconds; raises UserError."""
    given = [sources] if isinstance(sources, Path) else sources
    with within(60):
        main(["convert", *map(str, given), "--out", str(out), "--workers", str(workers), *map(str, options)])
    return read_manifest(out)


def rejected_in(out: Path) -> dict[str, str]:
    """The reason for every key in `rejected.jsonl`; keys that are no text stand in hex."""
    return {key: line["reason"] for key, line in _lines_of(out / "rejected.jsonl")}


def renamed_in(out: Path) -> dict[str, str]:
    """The original key of every sample in `keys.jsonl`; keys that are no text stand in hex."""
    return {line["member"]: key for key, line in _lines_of(out / "keys.jsonl")}


def _lines_of(path: Path) -> list[tuple[str, dict[str, str]]]:
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return [(line["key"] if "key" in line else line["key_hex"], line) for line in lines]


def samples_in(out: Path) -> dict[str, np.ndarray]:
    """The pixels of every sample under its original key; keys that are no text stand in hex."""
    manifest, renamed = read_manifest(out), renamed_in(out)
    samples = [
        read_sample(out / shard.name, manifest.layout, index)
        for shard in manifest.shards
        for index in range(shard.samples)
    ]
    return {renamed.get(member, member): pixels for member, pixels in samples}


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write files under their paths below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def as_lmdb(path: Path, images: Mapping[str, bytes]) -> Path:
    """Write an LMDB of the files `images`, whose keys are their names up to the dot."""
    return write_lmdb(path, {name.partition(".")[0].encode(): data for name, data in images.items()})


def write_tar(path: Path, files: Mapping[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    """Write a tar of plain files."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail rather than wait for something that hangs."""

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the disk fail if a file would grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def entries_of(source: Source, seconds: float = 20) -> list[tuple[bytes, bytes | str]]:
    """Every key of a source with its bytes, or with the reason for which it is rejected."""
    found: list[tuple[bytes, bytes | str]] = []
    with within(seconds):
        for key, place in source.walk():
            try:
                found.append((key, source.read(key, place)))
            except ImageError as error:
                found.append((key, str(error)))
    return found


def refusal(path: Path, seconds: float = 20) -> str:
    """The one line for which a source is refused; it names the source."""
    with pytest.raises(UserError) as caught:
        entries_of(open_source(path), seconds)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message
