"""What the tests of `shards` share: small sources, real photographs if there are any, the real commands."""

from __future__ import annotations

import functools
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import lmdb
import numpy as np
from PIL import Image

from shards.convert import Settings, convert
from shards.demo import write_demo
from shards.lmdb_source import LmdbSource
from shards.manifest import Manifest, read_manifest

ROOT = Path(__file__).resolve().parents[1]


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


def run_shards(*words: object) -> subprocess.CompletedProcess[str]:
    """Run `python -m shards` as a user would."""
    command = [sys.executable, "-m", "shards", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, to see that nothing changed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error_of(process: subprocess.CompletedProcess[str]) -> str:
    """The one line that a mistake gets; asserts that there is nothing else and that the exit status is 2."""
    assert process.returncode == 2, process
    assert process.stdout == "", process
    lines = process.stderr.splitlines()
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")
