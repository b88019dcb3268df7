"""The shard format: names, sizes, offsets and the manifest that lists the shards of a data set.

A data set is a folder with `manifest.json` and `shard-NNNNNN.tar` files. Every shard is a plain USTAR archive
of `<key>.ppm` members of equal size, so the offset of sample `i` can be computed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from shards.common.command_line import Options, build, shortened
from shards.common.errors import UserError
from shards.common.files import publish, read_plain

FORMAT = "dist_dcgan-shards"
FORMAT_VERSION = 2
ORDER_VERSION = 1
MANIFEST_NAME = "manifest.json"

MOST_MANIFEST_BYTES = 1 << 24
"""Largest manifest read: JSON of one byte takes up to 30 bytes of memory."""
MOST_SHARDS = 80_000
"""About as many have a manifest of that size."""
MOST_SAMPLES = 1 << 32

TAR_BLOCK = 512
TAR_END = 2 * TAR_BLOCK
"""Two blocks of zeros end a tar archive."""

_PLAIN_KEY = re.compile(rb"[A-Za-z0-9_-]{1,90}")


class Layout:
    """Byte layout of a shard for one image size (pixels per side)."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size
        self.ppm_header = b"P6\n%d %d\n255\n" % (image_size, image_size)
        """The PPM header before the pixels: 13 bytes at 64x64."""
        self.pixel_bytes = 3 * image_size * image_size
        """Bytes of one image: height x width x RGB."""
        self.member_bytes = len(self.ppm_header) + self.pixel_bytes
        """Bytes of one PPM file: 12,301 at 64x64."""
        self.stride = TAR_BLOCK + -(-self.member_bytes // TAR_BLOCK) * TAR_BLOCK
        """Bytes per sample: tar header, file, padding to whole blocks; 13,312 at 64x64."""
        self.pixel_offset = TAR_BLOCK + len(self.ppm_header)
        """Offset of the first pixel from the start of its sample."""

    def shard_bytes(self, samples: int) -> int:
        """Size of a shard file that holds `samples` images."""
        return samples * self.stride + TAR_END


def member_key(key: bytes) -> str:
    """Return the name of `key` in a shard: the key itself if it is plain, else its SHA-1 in hex.

    A plain key is 1 to 90 letters, digits, `_` and `-`: webdataset splits names at dots, and longer or other
    names need extra tar blocks, which would break the constant stride.
    """
    return key.decode() if _PLAIN_KEY.fullmatch(key) else hashlib.sha1(key).hexdigest()


def shard_name(index: int) -> str:
    """Return the file name of shard `index`, counted from 0."""
    return f"shard-{index:06d}.tar"


class ShardEntry(Options):
    """Manifest entry of one shard."""

    name: str = Field(pattern=r"^shard-\d{6,}\.tar$")
    """File name, in the manifest's folder."""
    samples: int = Field(ge=1, le=MOST_SAMPLES)
    """Images in the shard."""
    bytes: int = Field(ge=1)
    """Size of the file in bytes."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the file, in hex."""


class Origin(Options):
    """One source of a data set."""

    kind: Literal["lmdb", "folder", "tar"]
    """Type of the source."""
    name: str
    """File or folder name, without its path."""
    entries: int = Field(ge=0)
    """Entries taken from it, rejected ones included."""


class Preparation(Options):
    """How the source images were converted to pixels."""

    crop: str = "center-square"
    """Crop before resizing."""
    filter: str = "lanczos"
    """Resampling filter."""
    decoding: Literal["full", "reduced"] = "full"
    """JPEGs decoded at full scale or, with `--fast`, at the smallest scale of at least twice `image_size`."""
    decoder: str = ""
    """Decoding libraries with their versions."""


class Manifest(Options):
    """A data set: its shards, their sources and preparation. The keys are only in the shards."""

    format: str = FORMAT
    """Always `dist_dcgan-shards`."""
    format_version: int = FORMAT_VERSION
    """Version of the shard format."""
    order_version: int = ORDER_VERSION
    """Version of the sample order in training."""
    image_size: int = Field(ge=8, le=1024)
    """Width and height in pixels."""
    samples_per_shard: int = Field(ge=1)
    """Source entries per shard, except the last; a shard has fewer samples if some were rejected."""
    sources: tuple[Origin, ...] = Field(min_length=1)
    """Sources of the images, in order."""
    preparation: Preparation = Preparation()
    """How the images were converted to pixels."""
    rejected: int = Field(0, ge=0)
    """Source entries that are not usable images; `rejected.jsonl` lists them with the reasons."""
    excluded: int = Field(0, ge=0)
    """Source entries left out by `--exclude`."""
    exclude_sha256: str | None = None
    """SHA-256, in hex, of the sorted keys given to `--exclude`, one per line."""
    max_images: int | None = None
    """Value of `--max-images`."""
    lists: Mapping[str, str] = {}
    """SHA-256, in hex, of `keys.jsonl` and `rejected.jsonl`, if present."""
    shards: tuple[ShardEntry, ...] = Field(min_length=1)
    """The shards in order."""

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        layout, sizes = Layout(self.image_size), dict[str, int]()
        for index, shard in enumerate(self.shards):
            if shard.name != shard_name(index):
                raise ValueError(f"shard {index} is named {shard.name}, expected {shard_name(index)}")
            if shard.bytes != layout.shard_bytes(shard.samples):
                raise ValueError(
                    f"{shard.name} says {shard.bytes} bytes, but {shard.samples} samples of "
                    f"{self.image_size} pixels make {layout.shard_bytes(shard.samples)}"
                )
            if sizes.setdefault(shard.sha256, shard.bytes) != shard.bytes:
                raise ValueError(f"{shard.name} has the SHA-256 of another shard, but not its size")
        return self

    @property
    def samples(self) -> int:
        """Number of images in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def layout(self) -> Layout:
        """Byte layout of the shards."""
        return Layout(self.image_size)

    def digest(self) -> str:
        """Return the identity of the data set: SHA-256, in hex, of the canonical JSON of its fields."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest atomically and durably; it must be the last file written of a data set."""
    content = manifest.model_dump(mode="json") | {"samples": manifest.samples, "digest": manifest.digest()}
    encoded = (json.dumps(content, indent=1) + "\n").encode()
    if len(encoded) > MOST_MANIFEST_BYTES:
        raise too_many_shards(len(manifest.shards))
    publish(directory / MANIFEST_NAME, encoded)


def too_many_shards(count: int) -> UserError:
    """Return the error of a data set whose manifest nobody would read."""
    return UserError(f"{count:,} shards are more than some {MOST_SHARDS:,} that may be: give more --samples-per-shard")


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of the data set in `directory`; the only error raised is UserError."""
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise UserError(f"no data set at {directory}: no such directory (python -m shards convert makes one)")
    if not path.is_file():
        raise UserError(f"no data set at {directory}: it has no {MANIFEST_NAME} (python -m shards convert makes one)")
    try:
        content = json.loads(read_plain(path, MOST_MANIFEST_BYTES))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): copy it again") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    if content.get("format") != FORMAT or content.get("format_version") != FORMAT_VERSION:
        found = shortened(f"{content.get('format')!r} version {content.get('format_version')!r}")
        raise UserError(f"{path} is {found}; this version reads {FORMAT!r} version {FORMAT_VERSION}: convert again")
    digest, samples = content.pop("digest", None), content.pop("samples", None)
    try:
        manifest = build(Manifest, content)
    except UserError as error:
        raise _damaged(path, error) from None
    if manifest.digest() != digest or manifest.samples != samples:
        raise _damaged(path, "its digest does not match its content")
    return manifest


def _damaged(path: Path, why: object) -> UserError:
    return UserError(f"{path} is damaged: {why}; {remedy_of(path.parent)}")


def remedy_of(directory: Path) -> str:
    """Return what to do about a damaged data set; `convert` replaces no file of one that has a manifest."""
    return f"copy it again, or remove {directory} and convert again"


def check_files(directory: Path, manifest: Manifest) -> None:
    """Raise UserError for the first shard that is missing or whose size differs from the manifest."""
    for shard in manifest.shards:
        path = directory / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(f"shard {path} {found}, the manifest says {shard.bytes} bytes: {remedy_of(directory)}")
