"""Random damages to a data set: `verify` names the damaged file in every one, and passes when it is mended."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.common.errors import UserError
from shards.conversion.convert import Settings, convert
from shards.conversion.sources.lmdb_source import LmdbSource
from shards.manifest import MANIFEST_NAME, Layout, read_manifest, shard_name
from shards.verify import verify
from shards.writer import KEYS_NAME, REJECTED_NAME
from tests.support.shards_fixtures import contents, encoded, numbered, picture, write_lmdb

Damage = Callable[[random.Random, Path], list[str]]
"""Damages the folder of a data set and returns the names of files that `verify` must report."""

LAYOUT = Layout(16)
PPM = 512 + len(LAYOUT.ppm_header)
PADDING = 512 + LAYOUT.member_bytes
SHARDS = 4
RENAMED = [b"a b", b"\xff\xfe", "ä".encode(), b"image0003.jpg", b"k" * 200]
REJECTED = [b"image0002x", b"junk\xfe"]
CASES = 15
"""Cases of each kind of damage."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of four shards, of 4 samples or fewer, with renamed keys and rejected entries."""
    folder = tmp_path_factory.mktemp("sound")
    images = numbered(8) | {key: encoded(picture(9)) for key in RENAMED} | dict.fromkeys(REJECTED, b"no picture")
    with LmdbSource(write_lmdb(folder / "source", images)) as source:
        manifest = convert([source], folder / "data", Settings(16, 4, max_rejected=1), workers=1)
    assert [shard.samples for shard in manifest.shards] == [4, 3, 3, 3] and manifest.rejected == 2
    return folder / "data"


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "data"))


def problems_of(folder: Path) -> list[str]:
    """What `verify` reports, the error of an unreadable manifest included; each is one line."""
    try:
        problems = verify(folder, workers=1)[1]
    except UserError as error:
        problems = [str(error)]
    assert all(len(problem.splitlines()) == 1 for problem in problems)
    return problems


def is_named(name: str, problems: list[str]) -> bool:
    return any(problem.startswith(f"{name}: ") or f"/{name} is damaged: " in problem for problem in problems)


def restore(folder: Path, before: dict[str, bytes]) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name, content in before.items():
        (folder / name).write_bytes(content)


def meaning(content: bytes) -> object:
    """What a file of JSON, or of a JSON object a line, says: equal where only spaces or spelling differ."""
    try:
        return json.loads(content)
    except ValueError:
        pass
    try:
        return [json.loads(line) for line in content.split(b"\n") if line]
    except ValueError:
        return content


def change(path: Path, damage: Callable[[bytes], bytes]) -> list[str]:
    """Damage the content of `path`, again until it means something else, and return the file's name."""
    before = path.read_bytes()
    after = before
    while after == before or (path.suffix != ".tar" and meaning(after) == meaning(before)):
        after = damage(before)
    path.write_bytes(after)
    return [path.name]


def flipped(rng: random.Random, content: bytes, places: range) -> bytes:
    place = rng.choice(places)
    return content[:place] + bytes([content[place] ^ rng.randrange(1, 256)]) + content[place + 1 :]


def flip_in_sample(first: int, end: int) -> Damage:
    """One byte of a random sample, between two offsets in its stride."""

    def damage(rng: random.Random, folder: Path) -> list[str]:
        path = folder / shard_name(rng.randrange(SHARDS))
        start = rng.randrange(path.stat().st_size // LAYOUT.stride) * LAYOUT.stride
        return change(path, lambda content: flipped(rng, content, range(start + first, start + end)))

    return damage


def flip_at_end(rng: random.Random, folder: Path) -> list[str]:
    path = folder / shard_name(rng.randrange(SHARDS))
    return change(path, lambda content: flipped(rng, content, range(len(content) - 1024, len(content))))


def flip(name: str) -> Damage:
    def damage(rng: random.Random, folder: Path) -> list[str]:
        return change(folder / name, lambda content: flipped(rng, content, range(len(content))))

    return damage


def truncate(name: str) -> Damage:
    def damage(rng: random.Random, folder: Path) -> list[str]:
        path = folder / (name or shard_name(rng.randrange(SHARDS)))
        return change(path, lambda content: content[: rng.randrange(len(content))])

    return damage


def append(name: str) -> Damage:
    def damage(rng: random.Random, folder: Path) -> list[str]:
        path = folder / (name or shard_name(rng.randrange(SHARDS)))
        more = rng.randbytes(rng.randrange(1, 2000))
        return change(path, lambda content: content + rng.choice([more, bytes(len(more))]))

    return damage


def remove(name: str) -> Damage:
    def damage(rng: random.Random, folder: Path) -> list[str]:
        path = folder / (name or shard_name(rng.randrange(SHARDS)))
        path.unlink()
        return [path.name]

    return damage


def add_a_shard(rng: random.Random, folder: Path) -> list[str]:
    path = folder / shard_name(rng.randrange(SHARDS, 10_000_000))
    shutil.copy(folder / shard_name(rng.randrange(SHARDS)), path)
    return [path.name]


def swap_two_shards(rng: random.Random, folder: Path) -> list[str]:
    first, second = (folder / shard_name(index) for index in rng.sample(range(SHARDS), 2))
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    return [first.name, second.name]


DAMAGES: dict[str, Damage] = {
    "a byte of a tar header": flip_in_sample(0, 512),
    "a byte of a member's name": flip_in_sample(0, 100),
    "a byte of a PPM header": flip_in_sample(512, PPM),
    "a byte of pixels": flip_in_sample(PPM, PADDING),
    "a byte of padding": flip_in_sample(PADDING, LAYOUT.stride),
    "a byte of the end": flip_at_end,
    "a truncated shard": truncate(""),
    "a longer shard": append(""),
    "a removed shard": remove(""),
    "an extra shard": add_a_shard,
    "two swapped shards": swap_two_shards,
    "a byte of the manifest": flip(MANIFEST_NAME),
    "a truncated manifest": truncate(MANIFEST_NAME),
    "a longer manifest": append(MANIFEST_NAME),
    "a byte of the renamed keys": flip(KEYS_NAME),
    "truncated renamed keys": truncate(KEYS_NAME),
    "longer renamed keys": append(KEYS_NAME),
    "removed renamed keys": remove(KEYS_NAME),
    "removed rejects": remove(REJECTED_NAME),
    "a byte of the rejects": flip(REJECTED_NAME),
    "truncated rejects": truncate(REJECTED_NAME),
    "longer rejects": append(REJECTED_NAME),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_random_damage_is_named_and_mending_it_passes(damaged: Path, kind: str) -> None:
    rng, before = random.Random(kind), contents(damaged)
    assert problems_of(damaged) == []
    for case in range(CASES):
        names = DAMAGES[kind](rng, damaged)
        problems = problems_of(damaged)
        assert all(is_named(name, problems) for name in names), (case, names, problems)
        restore(damaged, before)
        assert problems_of(damaged) == [], case


def test_any_change_of_the_manifest_is_found_unless_it_means_the_same(damaged: Path) -> None:
    """Silent are only a space or line break that turns into another, and 0 that turns into -0."""
    path, rng = damaged / MANIFEST_NAME, random.Random(0)
    whole = path.read_bytes()
    assert sum(byte in b"0123456789" for byte in whole) > 100
    for place in range(len(whole)):
        other_digit = b"7" if whole[place] != ord("7") else b"8"
        changes = [flipped(rng, whole, range(place, place + 1)), whole[:place]]
        if whole[place] in b"0123456789":
            changes.append(whole[:place] + other_digit + whole[place + 1 :])
        for after in changes:
            path.write_bytes(after)
            assert refuses_manifest(damaged) == (meaning(after) != meaning(whole)), after


def refuses_manifest(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except UserError:
        return True
    return False
