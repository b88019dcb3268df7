"""Random damages to a data set: `verify` names the damaged file in every one, and passes when it is mended."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from shards.common.errors import UserError
from shards.conversion.convert import Settings, convert
from shards.conversion.sources.lmdb_source import LmdbSource
from shards.manifest import MANIFEST_NAME, Layout, read_manifest, shard_name
from shards.verify import verify
from shards.writer import KEYS_NAME, REJECTED_NAME
from tests.support.shards_fixtures import encoded, numbered, picture, write_lmdb

Damage = Callable[[random.Random, Path], list[str]]
"""Damages the folder of a data set and returns the names of files that `verify` must report."""

Change = Callable[[random.Random, bytes], bytes]
"""Changes the content of a file."""

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


def changed(name: str, change: Change) -> Damage:
    """Change a file, by default a random shard, until it means something else."""

    def damage(rng: random.Random, folder: Path) -> list[str]:
        path = folder / (name or shard_name(rng.randrange(SHARDS)))
        before = after = path.read_bytes()
        while after == before or (path.suffix != ".tar" and meaning(after) == meaning(before)):
            after = change(rng, before)
        path.write_bytes(after)
        return [path.name]

    return damage


def flipped(rng: random.Random, content: bytes, places: range) -> bytes:
    place = rng.choice(places)
    return content[:place] + bytes([content[place] ^ rng.randrange(1, 256)]) + content[place + 1 :]


def flip(rng: random.Random, content: bytes) -> bytes:
    return flipped(rng, content, range(len(content)))


def flip_at_end(rng: random.Random, content: bytes) -> bytes:
    return flipped(rng, content, range(len(content) - 1024, len(content)))


def flip_in_sample(first: int, end: int) -> Change:
    """One byte of a random sample, between two offsets in its stride."""

    def flip(rng: random.Random, content: bytes) -> bytes:
        start = rng.randrange(len(content) // LAYOUT.stride) * LAYOUT.stride
        return flipped(rng, content, range(start + first, start + end))

    return flip


def truncate(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def append(rng: random.Random, content: bytes) -> bytes:
    more = rng.randbytes(rng.randrange(1, 2000))
    return content + rng.choice([more, bytes(len(more))])


JSON_FILES = {"the manifest": MANIFEST_NAME, "the renamed keys": KEYS_NAME, "the rejects": REJECTED_NAME}

DAMAGES: dict[str, Damage] = {
    "a byte of a tar header": changed("", flip_in_sample(0, 512)),
    "a byte of a member's name": changed("", flip_in_sample(0, 100)),
    "a byte of a PPM header": changed("", flip_in_sample(512, PPM)),
    "a byte of pixels": changed("", flip_in_sample(PPM, PADDING)),
    "a byte of padding": changed("", flip_in_sample(PADDING, LAYOUT.stride)),
    "a byte of the end": changed("", flip_at_end),
    "a truncated shard": changed("", truncate),
    "a longer shard": changed("", append),
    **{f"a byte of {what}": changed(name, flip) for what, name in JSON_FILES.items()},
    **{f"{what}, truncated": changed(name, truncate) for what, name in JSON_FILES.items()},
    **{f"{what}, longer": changed(name, append) for what, name in JSON_FILES.items()},
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_random_damage_is_named_and_mending_it_passes(sound: Path, damaged: Path, kind: str) -> None:
    rng = random.Random(kind)
    assert problems_of(damaged) == []
    for case in range(CASES):
        names = DAMAGES[kind](rng, damaged)
        problems = problems_of(damaged)
        assert all(is_named(name, problems) for name in names), (case, names, problems)
        shutil.rmtree(damaged)
        shutil.copytree(sound, damaged)
        assert problems_of(damaged) == [], case


@pytest.mark.parametrize("name", [KEYS_NAME, REJECTED_NAME])
def test_a_list_that_is_removed_is_named(damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    assert problems_of(damaged) == [f"{name}: is missing"]


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
            with pytest.raises(UserError) if meaning(after) != meaning(whole) else nullcontext():
                read_manifest(damaged)
