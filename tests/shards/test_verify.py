"""`verify`: every kind of damage is found and named with its shard and place."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.manifest import Layout, Manifest, shard_name, write_manifest
from shards.verify import verify
from shards.writer import KEYS_NAME
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


FIELDS = {
    100: "mode",
    108: "uid",
    116: "gid",
    124: "size",
    136: "mtime",
    156: "type",
    157: "link name",
    257: "magic",
    265: "user name",
    297: "group name",
    329: "device",
    345: "prefix",
    500: "reserved",
}
"""The constant fields of a tar header by the place where each begins; the checksum begins at 148."""


def problem_of_flip(place: int) -> list[str]:
    """What is said of the lowest bit of a byte in the header of image0005.ppm, but for the checksum."""
    if place in (0, 1, 3, 4, 5, 6, 7) or 148 <= place < 156:
        return []  # another name that is allowed; the checksum itself
    if place < 100:
        return ["its key image0004 came before" if place == 8 else "its name "]
    return [f"header field {FIELDS[max(start for start in FIELDS if start <= place)]} is "]


def test_a_flipped_bit_in_any_byte_of_a_header_is_named_with_its_field(tmp_path: Path) -> None:
    out, _ = data_set(tmp_path)
    sound = (out / SHARD).read_bytes()
    for place in range(512):
        (out / SHARD).write_bytes(sound)
        flip(out / SHARD, HEADER + place)
        content, *named = problems_of(out)
        assert content.startswith(f"{SHARD}: its SHA-256 is ")
        for problem, words in zip(named, [*problem_of_flip(place), "header checksum is "], strict=True):
            assert problem.startswith(f"{SHARD}: sample 1 at byte 1536: {words}"), place


@pytest.mark.parametrize(
    ("place", "named"),
    [
        (PPM_HEADER, "sample 1 at byte 1536: its PPM header is "),
        (PPM_HEADER + 12, "sample 1 at byte 1536: its PPM header is "),
        (HEADER + 512 + LAYOUT.member_bytes, "sample 1 at byte 1536: its padding is not all zero"),
        (2 * HEADER - 1, "sample 1 at byte 1536: its padding is not all zero"),
        (4 * 1536 + 1000, "the 1024 bytes at its end are not all zero"),
    ],
)
def test_a_shard_that_breaks_the_format_is_named_with_its_place(tmp_path: Path, place: int, named: str) -> None:
    out, _ = data_set(tmp_path)
    flip(out / SHARD, place)
    update_checksum(out, SHARD)
    [problem] = problems_of(out)
    assert problem.startswith(f"{SHARD}: {named}")


def swap(directory: Path) -> None:
    first, second, aside = directory / shard_name(0), directory / SHARD, directory / "aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def cut(length: int) -> Callable[[Path], None]:
    """Cut a shard, or lengthen it by zeros."""
    return lambda directory: os.truncate(directory / SHARD, length)


LENGTH = f"{SHARD}: has {{}} bytes, the manifest says 7168: "

DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (lambda d: (d / SHARD).unlink(), [f"{SHARD}: is missing"]),
    "swapped": (
        swap,
        [f"shard-000000.tar: its content is that of {SHARD}", f"{SHARD}: its content is that of shard-000000.tar"],
    ),
    "emptied": (cut(0), [LENGTH.format(0) + "cut off in sample 0 of 4"]),
    "cut between samples": (cut(1536), [LENGTH.format(1536) + "cut off in sample 1 of 4"]),
    "cut in a sample": (cut(4000), [LENGTH.format(4000) + "cut off in sample 2 of 4"]),
    "cut at the end": (cut(7167), [LENGTH.format(7167) + "cut off in the zeros at its end"]),
    "longer": (cut(7680), [LENGTH.format(7680) + "512 bytes follow its end"]),
    "stray": (lambda d: (d / "shard-000003.tar").touch(), ["shard-000003.tar: not in the manifest"]),
    "stray list": (lambda d: (d / KEYS_NAME).touch(), [f"{KEYS_NAME}: not in the manifest"]),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_to_a_whole_file_is_named(tmp_path: Path, kind: str) -> None:
    out, _ = data_set(tmp_path)
    damage, expected = DAMAGES[kind]
    damage(out)
    assert problems_of(out) == expected


def test_a_shard_full_of_damage_does_not_flood_the_terminal(tmp_path: Path) -> None:
    out, _ = data_set(tmp_path, count=30, samples_per_shard=30)
    path = out / shard_name(0)
    path.write_bytes(bytes(len(path.read_bytes())))
    problems = problems_of(out)
    assert len(problems) == 21
    assert problems[-1].startswith("shard-000000.tar: and ") and problems[-1].endswith(" problems more")


def test_two_workers_find_the_same_as_one(tmp_path: Path) -> None:
    out, _ = data_set(tmp_path)
    flip(out / SHARD, PIXEL)
    flip(out / shard_name(2), HEADER + 140)
    assert verify(out, workers=2) == verify(out, workers=1)
