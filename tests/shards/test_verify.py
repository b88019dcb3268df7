"""`verify`: every kind of damage is found and named with its shard and place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.common.errors import UserError
from shards.manifest import Layout, Manifest, ShardEntry, shard_name, write_manifest
from shards.verify import verify
from shards.writer import tar_header
from tests.support.shards_fixtures import data_set

LAYOUT = Layout(16)
HEADER, PPM_HEADER, PIXEL, PADDING = 1536, 1536 + 512, 1536 + 525 + 100, 2 * 1536 - 5  # places in sample 1
SHARD = "shard-000001.tar"


def problems_of(directory: Path) -> list[str]:
    return verify(directory, workers=1)[1]


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x01
    path.write_bytes(content)


def update_checksum(directory: Path, name: str) -> None:
    """Make the manifest agree with a damaged shard, so that only the format itself can tell."""
    content = json.loads((directory / "manifest.json").read_bytes())
    del content["digest"], content["samples"]
    manifest = Manifest.model_validate(content)
    sha256 = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    shards = tuple(s.model_copy(update={"sha256": sha256}) if s.name == name else s for s in manifest.shards)
    write_manifest(directory, manifest.model_copy(update={"shards": shards}))


def test_an_intact_data_set_has_no_problems(tmp_path: Path) -> None:
    out, manifest = data_set(tmp_path)
    assert verify(out, workers=1) == (manifest, [])


@pytest.mark.parametrize("place", [HEADER, HEADER + 137, PPM_HEADER, PIXEL, PADDING, 4 * 1536 + 7])
def test_any_flipped_bit_breaks_the_sha256(tmp_path: Path, place: int) -> None:
    out, _ = data_set(tmp_path)
    flip(out / SHARD, place)
    assert problems_of(out)[0].startswith(f"{SHARD}: its SHA-256 is ")


@pytest.mark.parametrize(
    ("place", "named"),
    [
        (HEADER, ["header checksum"]),
        (HEADER + 50, ["its name", "header checksum"]),
        (HEADER + 95, ["its name", "header checksum"]),
        (HEADER + 104, ["header field mode", "header checksum"]),
        (HEADER + 112, ["header field uid", "header checksum"]),
        (HEADER + 120, ["header field gid", "header checksum"]),
        (HEADER + 130, ["header field size", "header checksum"]),
        (HEADER + 140, ["header field mtime", "header checksum"]),
        (HEADER + 150, ["header checksum"]),
        (HEADER + 156, ["header field type", "header checksum"]),
        (HEADER + 200, ["header field link name", "header checksum"]),
        (HEADER + 260, ["header field magic", "header checksum"]),
        (HEADER + 270, ["header field user name", "header checksum"]),
        (HEADER + 300, ["header field group name", "header checksum"]),
        (HEADER + 340, ["header field device", "header checksum"]),
        (HEADER + 400, ["header field prefix", "header checksum"]),
        (HEADER + 511, ["header field reserved", "header checksum"]),
        (PPM_HEADER, ["its PPM header"]),
        (PPM_HEADER + 12, ["its PPM header"]),
        (HEADER + 512 + LAYOUT.member_bytes, ["its padding is not all zero"]),
        (2 * HEADER - 1, ["its padding is not all zero"]),
    ],
)
def test_a_shard_that_breaks_the_format_is_named_with_its_place(tmp_path: Path, place: int, named: list[str]) -> None:
    out, _ = data_set(tmp_path)
    flip(out / SHARD, place)
    update_checksum(out, SHARD)
    problems = problems_of(out)
    assert len(problems) == len(named)
    for problem, words in zip(problems, named, strict=True):
        assert problem.startswith(f"{SHARD}: sample 1 at byte 1536: {words}")


def test_every_byte_of_a_header_is_checked(tmp_path: Path) -> None:
    out, _ = data_set(tmp_path, count=1)
    path = out / shard_name(0)
    sound = path.read_bytes()
    for place in range(512):
        path.write_bytes(sound)
        flip(path, place)
        problems = problems_of(out)
        assert len(problems) >= 2, place  # the SHA-256, and what the format says of it
        if place >= 100 and not 148 <= place < 156:  # neither in the name, which may well stay legal, nor the checksum
            assert "header field" in problems[1], place


def test_bytes_in_the_end_blocks_are_found(tmp_path: Path) -> None:
    out, _ = data_set(tmp_path)
    flip(out / SHARD, 4 * 1536 + 1000)
    update_checksum(out, SHARD)
    assert problems_of(out) == [f"{SHARD}: the 1024 bytes at its end are not all zero"]


def test_a_key_that_comes_twice_is_found(tmp_path: Path) -> None:
    out, _ = data_set(tmp_path)
    content = bytearray((out / SHARD).read_bytes())
    content[1536 : 2 * 1536] = content[:1536]
    (out / SHARD).write_bytes(content)
    update_checksum(out, SHARD)
    assert problems_of(out) == [f"{SHARD}: sample 1 at byte 1536: its key image0004 came before"]


def swap(directory: Path) -> None:
    first, second = directory / shard_name(0), directory / SHARD
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


def cut(bytes_left: int) -> Callable[[Path], None]:
    def truncate(directory: Path) -> None:
        with (directory / SHARD).open("r+b") as file:
            file.truncate(bytes_left)

    return truncate


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda d: (d / SHARD).unlink(), [f"{SHARD}: is missing"]),
        (
            swap,
            [
                f"shard-000000.tar: its content is that of {SHARD}",
                f"{SHARD}: its content is that of shard-000000.tar",
            ],
        ),
        (cut(0), [f"{SHARD}: has 0 bytes, the manifest says 7168: cut off in sample 0 of 4"]),
        (cut(1536), [f"{SHARD}: has 1536 bytes, the manifest says 7168: cut off in sample 1 of 4"]),
        (cut(4000), [f"{SHARD}: has 4000 bytes, the manifest says 7168: cut off in sample 2 of 4"]),
        (cut(7167), [f"{SHARD}: has 7167 bytes, the manifest says 7168: cut off in the zeros at its end"]),
        (
            lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes() + bytes(512)),
            [f"{SHARD}: has 7680 bytes, the manifest says 7168: 512 bytes follow its end"],
        ),
        (lambda d: (d / "shard-000003.tar").touch(), ["shard-000003.tar: not in the manifest"]),
    ],
    ids=[
        "missing",
        "swapped",
        "emptied",
        "cut between samples",
        "cut in a sample",
        "cut at the end",
        "longer",
        "stray",
    ],
)
def test_damage_to_a_whole_shard_is_named(
    tmp_path: Path, damage: Callable[[Path], object], expected: list[str]
) -> None:
    out, _ = data_set(tmp_path)
    damage(out)
    assert problems_of(out) == expected


def test_a_shard_full_of_damage_does_not_flood_the_terminal(tmp_path: Path) -> None:
    out, _ = data_set(tmp_path, count=30, samples_per_shard=30)
    path = out / shard_name(0)
    path.write_bytes(bytes(len(path.read_bytes())))
    problems = problems_of(out)
    assert len(problems) == 21
    assert problems[-1].startswith("shard-000000.tar: and ") and problems[-1].endswith(" problems more")


def test_a_foreign_shard_of_the_same_size_is_found(tmp_path: Path) -> None:
    out, manifest = data_set(tmp_path)
    other = b"".join(tar_header(f"k{i}", 781) + bytes(1024) for i in range(4)) + bytes(1024)
    assert len(other) == manifest.shards[1].bytes
    (out / SHARD).write_bytes(other)
    update_checksum(out, SHARD)
    assert [problem.split(": ", 2)[2].split(" is ")[0] for problem in problems_of(out)] == ["its PPM header"] * 4


def test_a_damaged_manifest_is_an_error(tmp_path: Path) -> None:
    out, _ = data_set(tmp_path)
    (out / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        verify(out)


def test_two_workers_find_the_same_as_one(tmp_path: Path) -> None:
    out, _ = data_set(tmp_path)
    flip(out / SHARD, PIXEL)
    flip(out / shard_name(2), HEADER + 140)
    assert verify(out, workers=2) == verify(out, workers=1)


def test_entries_of_the_manifest_are_what_the_files_are(tmp_path: Path) -> None:
    out, manifest = data_set(tmp_path)
    for index, shard in enumerate(manifest.shards):
        content = (out / shard_name(index)).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        assert shard == ShardEntry(name=shard_name(index), samples=[4, 4, 2][index], bytes=len(content), sha256=sha256)
