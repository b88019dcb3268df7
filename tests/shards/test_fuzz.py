"""Bytes that hypothesis makes up: a picture, a list of members or entries, or a reason; never anything else.

`DIST_DCGAN_FUZZ_EXAMPLES=N` tries N times as many, other ones on each run.
"""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.common.errors import UserError
from shards.conversion import images
from shards.conversion.images import ImageError, decode_image, prepare
from shards.conversion.sources import tar_members
from shards.conversion.sources.lmdb_source import LmdbSource
from shards.conversion.sources.tar_source import TarSource
from tests.support.shards_fixtures import encoded, entries_of, picture, within, write_lmdb, write_tar

MORE = int(os.environ.get("DIST_DCGAN_FUZZ_EXAMPLES", 0))


def examples(count: int) -> settings:
    """The same `count` examples on every run, unless more are asked for."""
    return settings(
        max_examples=count * (MORE or 1),
        derandomize=not MORE,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class Mutation:
    """One change of some bytes, at a place given as a fraction of them."""

    kind: str
    place: float
    length: int
    filling: bytes

    def __call__(self, data: bytes) -> bytes:
        start = int(self.place * len(data))
        piece, rest = data[start : start + self.length], data[start + self.length :]
        instead = {
            "overwrite": self.filling[: len(piece)] + piece[len(self.filling) :],
            "insert": self.filling + piece,
            "delete": b"",
            "zero": bytes(len(piece)),
            "repeat": piece * 2,
            "cut": b"",
        }[self.kind]
        return data[:start] + instead + (b"" if self.kind == "cut" else rest)


extremes = st.sampled_from(
    [b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\xff\xff\xff\x7f", b"\xff\xda"]
)
mutations = st.builds(
    Mutation,
    st.sampled_from(["overwrite", "insert", "delete", "zero", "repeat", "cut"]),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([1, 1, 2, 4, 8, 30, 512]),
    st.one_of(st.binary(min_size=1, max_size=8), extremes),
)


def mutated(originals: list[bytes]) -> st.SearchStrategy[bytes]:
    """One of `originals` with one to four changes."""

    changes = st.lists(mutations, min_size=1, max_size=4)
    return st.builds(reduce, st.just(lambda data, change: change(data)), changes, st.sampled_from(originals))


# images


def sound_images() -> list[bytes]:
    """A small image of every kind that is read."""
    rgb, exif = picture(0, 24, 18), Image.Exif()
    exif[0x0112] = 6
    alpha = Image.merge("RGBA", [*rgb.split(), rgb.getchannel(0)])
    grey_16 = Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160)
    frames = {"save_all": True, "append_images": [picture(1, 24, 18)]}
    return [
        *(encoded(rgb, format, exif=exif) for format in ("JPEG", "WEBP", "PNG")),
        encoded(rgb, progressive=True),
        encoded(rgb.convert("CMYK")),
        encoded(rgb.convert("L")),
        encoded(rgb, "WEBP", lossless=True),
        encoded(alpha, "WEBP", **frames),
        encoded(rgb, "PNG", **frames),
        *(encoded(image, "PNG") for image in (alpha, alpha.convert("LA"), grey_16, rgb.convert("1"))),
        encoded(rgb.quantize(8), "PNG", transparency=b"\0\x80\xff"),
        encoded(rgb, "PNG", compress_level=0),
        *(encoded(image, "PPM") for image in (rgb, rgb.convert("L"), grey_16, rgb.convert("1"))),
        b"Pf\n2 2\n-1.0\n" + bytes(16),
        b"P6 2 2 1000\n" + bytes(24),
    ]


MAGIC = [
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    b"RIFF\x40\0\0\0WEBPVP8",
    b"P6 ",
    b"P5\n4 4\n",
    b"P7",
    b"Py",
]


@pytest.fixture
def small_images_only() -> Iterator[None]:
    """What may be decoded is small, so that a changed size costs no second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "MAX_PIXELS", 1 << 16)
        yield


def reason_or_picture(data: bytes, enough: int | None) -> str | bytes:
    try:
        with within(20):
            image = decode_image(data, enough)
    except ImageError as error:
        reason = str(error)
        assert reason.isprintable() and len(reason) < 250 and " at 0x" not in reason
        return reason
    assert image.mode == "RGB" and image.width * image.height <= 1 << 16
    assert prepare(image, 16).size == (16, 16)
    return image.tobytes()


@pytest.mark.usefixtures("small_images_only")
@examples(1500)
@given(mutated(sound_images()), st.sampled_from([None, 8]))
def test_a_damaged_image_is_a_picture_or_a_reason_and_the_same_again(data: bytes, enough: int | None) -> None:
    assert reason_or_picture(data, enough) == reason_or_picture(data, enough)


@pytest.mark.usefixtures("small_images_only")
@examples(500)
@given(st.sampled_from([b"", *MAGIC]), st.binary(max_size=200))
def test_any_bytes_are_a_picture_or_a_reason(magic: bytes, rest: bytes) -> None:
    reason_or_picture(magic + rest, None)


PNGS = [data for data in sound_images() if data.startswith(b"\x89PNG")]


@examples(300)
@given(st.sampled_from(PNGS), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_no_single_bit_changes_the_pixels_of_a_png_unseen(data: bytes, place: float, bit: int) -> None:
    changed = bytearray(data)
    changed[int(place * len(data))] ^= 1 << bit
    found = reason_or_picture(bytes(changed), None)
    assert isinstance(found, str) or found == reason_or_picture(data, None)


# tars


def listing(data: bytes) -> list[tar_members.Member] | str:
    """The members of a tar, or why there are none."""
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(data)
        try:
            with within(20):
                found = list(tar_members.members(file.fileno()))
        except tar_members.DamagedError as error:
            return str(error)
    assert all(member.offset > 0 and member.offset + member.size <= len(data) for member in found)
    assert [member.offset for member in found] == sorted({member.offset for member in found})
    return found


names = st.text(st.characters(blacklist_characters="\0/", blacklist_categories=["Cs"]), min_size=1, max_size=150)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
formats = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@examples(150)
@given(st.dictionaries(paths, st.binary(max_size=1500), max_size=6), formats)
def test_a_sound_tar_is_read_as_it_was_written(files: dict[str, bytes], format: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_tar(Path(folder) / "a.tar", files, format)
        data = path.read_bytes()
    found = listing(data)
    assert not isinstance(found, str)
    expected = [(os.fsencode(name), content) for name, content in files.items()]
    assert [(m.name, data[m.offset : m.offset + m.size]) for m in found] == expected
    assert all(member.is_file for member in found)


def sound_tars() -> list[bytes]:
    files = {"a.jpg": b"1" * 700, "n" * 120 + ".jpg": b"2" * 10, "ü.png": b"", "d/e.webp": b"3" * 512}
    with tempfile.TemporaryDirectory() as folder:
        made = [write_tar(Path(folder) / f"{format}.tar", files, format) for format in (1, 2)]
        plain = write_tar(Path(folder) / "0.tar", {"a.jpg": b"1" * 700, "b.jpg": b"2"}, tarfile.USTAR_FORMAT)
        return [path.read_bytes()[: 8 * 1024] for path in (*made, plain)]


def with_checksums(data: bytes) -> bytes:
    """The same, with the right checksum in every block that could be a header: else hardly one would be read on."""
    blocks = [data[start : start + 512] for start in range(0, len(data), 512)]
    for i, block in enumerate(blocks):
        if len(block) == 512 and block[257:262] == b"ustar":
            total = sum(block[:148]) + sum(block[156:]) + 8 * 32
            blocks[i] = block[:148] + b"%06o\0 " % total + block[156:]
    return b"".join(blocks)


@examples(400)
@given(mutated(sound_tars()), st.booleans())
def test_a_damaged_tar_has_members_within_it_and_gives_entries_or_one_line(data: bytes, right_checksums: bool) -> None:
    damaged = with_checksums(data) if right_checksums else data
    listing(damaged)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(damaged)
        entries_or_one_line(TarSource(path))


def entries_or_one_line(source: LmdbSource | TarSource) -> None:
    reason = str(source.path)
    try:
        entries_of(source)
    except UserError as error:
        reason = str(error)
    assert str(source.path) in reason and "\n" not in reason


# LMDBs


keys = st.binary(min_size=1, max_size=511)


@examples(60)
@given(st.dictionaries(keys, st.one_of(st.binary(max_size=60), st.binary(min_size=1900, max_size=5000)), min_size=1))
def test_any_keys_and_values_of_an_lmdb_come_back(entries: dict[bytes, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder, LmdbSource(write_lmdb(Path(folder) / "a", entries)) as source:
        assert entries_of(source) == sorted(entries.items())


def sound_lmdbs() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        made = [
            write_lmdb(Path(folder) / str(i), {b"%04d" % k: bytes([k % 256]) * (k * size) for k in range(count)})
            for i, (count, size) in enumerate([(3, 1000), (150, 3), (40, 100)])
        ]
        return [(path / "data.mdb").read_bytes() for path in made]


@examples(500)
@given(
    st.sampled_from(sound_lmdbs()),
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 160), st.binary(min_size=1, max_size=8)), max_size=5),
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=2),
    st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_a_damaged_lmdb_gives_entries_or_one_line(
    data: bytes, overwritten: list[tuple[int, int, bytes]], copied: list[tuple[int, int]], kept: float
) -> None:
    """Bytes at the beginning of pages, where the numbers are; whole pages; and the end are changed."""
    changed, pages = bytearray(data), len(data) // 4096
    for to, origin in copied:
        at, start = to % pages * 4096, origin % pages * 4096
        changed[at : at + 4096] = data[start : start + 4096]
    for page, offset, filling in overwritten:
        start = page % pages * 4096 + offset
        changed[start : start + len(filling)] = filling
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "data.mdb").write_bytes(changed[: int(kept * len(changed))])
        with LmdbSource(path) as source:
            entries_or_one_line(source)
