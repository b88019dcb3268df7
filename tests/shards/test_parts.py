"""Parts that were not made from the same entries, leftovers of killed ones, and data sets that nobody could read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shards import manifest as manifest_module
from shards.common.errors import UserError
from shards.conversion import convert as convert_module
from shards.conversion import output_dir
from shards.conversion.convert import Settings, convert
from shards.conversion.reports import Part
from shards.conversion.sources.lmdb_source import LmdbSource
from shards.manifest import read_manifest, write_manifest
from tests.support.shards_fixtures import (
    contents,
    convert_here,
    data_set,
    encoded,
    error_of,
    numbered,
    output_of,
    picture,
    write_files,
    write_lmdb,
)

OPTIONS = ("--image-size", 16, "--samples-per-shard", 2, "--workers", 1)


def photos(folder: Path, names: str) -> Path:
    return write_files(folder, {f"{name}.jpg": encoded(picture(ord(name))) for name in names})


def part(number: int, source: Path, out: Path) -> str:
    return output_of("convert", source, "--out", out, *OPTIONS, "--part", f"{number}/2")


@pytest.mark.parametrize("kind", ["another folder", "the folder has changed", "another LMDB"])
def test_parts_of_different_entries_are_not_merged(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "another LMDB":
        sources = [write_lmdb(tmp_path / str(n) / "lmdb", dict(list(numbered(5).items())[n : n + 4])) for n in (0, 1)]
    else:
        sources = [photos(tmp_path / name / "photos", "abcd") for name in "xy"]
        (sources[1] / "a.jpg").rename(sources[1] / "z.jpg")
    part(1, sources[0], out)
    if kind == "the folder has changed":
        (sources[0] / "a.jpg").rename(sources[0] / "z.jpg")
        sources[1] = sources[0]
    part(2, sources[1], out)
    assert "part 2/2" in (message := error_of("merge", out)) and "was converted from other sources" in message
    part(1, sources[1], out)
    output_of("merge", out)
    convert_here(sources[1], tmp_path / "expected", *OPTIONS)
    assert contents(out) == contents(tmp_path / "expected")


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    source = photos(tmp_path / os.fsdecode(b"Fotos-\xfcber"), "ab")
    assert convert_here(source, tmp_path / "data", *OPTIONS).sources[0].name == r"Fotos-\xfcber"
    lmdb = write_lmdb(tmp_path / "lmdb", numbered(2)).rename(tmp_path / os.fsdecode(b"\xff"))
    assert convert_here(lmdb, tmp_path / "other", *OPTIONS).sources[0].name == r"\xff"
    assert output_of("convert", lmdb, "--out", tmp_path / "other", *OPTIONS).startswith("nothing to do: ")


def test_a_part_removes_what_a_killed_one_left_and_counts_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    required: list[int] = []
    monkeypatch.setattr(output_dir, "check_room", lambda out, count, *_: required.append(count))
    source, out = write_lmdb(tmp_path / "source", numbered(8)), tmp_path / "out"
    part(2, source, out)  # shards 1 and 3
    left, others = (out / f"shard-00000{number}.tar.{'0' * 16}.tmp" for number in (0, 1))
    for path in (left, others):
        path.write_bytes(bytes(100))
    part(1, source, out)
    assert not left.exists() and others.exists()
    assert required[0] > 0 and required[1] == required[0] - 100  # that it removes before it writes
    part(2, source, out)
    own = sum((out / f"shard-00000{number}.tar").stat().st_size for number in (1, 3))
    assert not others.exists() and required[2] == required[0] - own - 100


@pytest.mark.parametrize("total", [0, 1, 2, 3, 17, 18, 19, 20, 36])
def test_the_parts_have_all_entries(total: int) -> None:
    counts = [Part(number, 3).entries_of(total, 6) for number in (1, 2, 3)]
    shards = [min(6, total - start) for start in range(0, total, 6)]
    assert counts == [sum(shards[number::3]) for number in range(3)]
    assert Part(2, 3).entries_of(10**18, 1) > 10**17  # without counting so far


def test_more_shards_than_a_manifest_holds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_module, "MOST_SHARDS", 3)
    with LmdbSource(write_lmdb(tmp_path / "source", numbered(4))) as source:
        with pytest.raises(UserError, match=r"4 shards are more than .* give more --samples-per-shard"):
            convert([source], tmp_path / "data", Settings(image_size=16, samples_per_shard=1), workers=1)
        assert not (tmp_path / "data").exists()
        convert([source], tmp_path / "data", Settings(image_size=16, samples_per_shard=2), workers=1)
    out = data_set(tmp_path / "other")[0]  # where the number was not known before
    before, found = contents(out), read_manifest(out)
    monkeypatch.setattr(manifest_module, "MOST_MANIFEST_BYTES", 100)
    with pytest.raises(UserError, match="give more --samples-per-shard"):
        write_manifest(out, found)
    assert contents(out) == before


def test_a_newer_decoder_is_no_other_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_lmdb(tmp_path / "source", numbered(3)), tmp_path / "data"
    convert_here(source, out, *OPTIONS)
    before = contents(out)
    monkeypatch.setattr(convert_module, "decoder_version", lambda: "of tomorrow")
    assert output_of("convert", source, "--out", out, *OPTIONS).startswith("nothing to do: ")
    message = error_of("convert", source, "--out", out, *OPTIONS, "--image-size", 32)
    assert "holds another data set (image_size: 16 -> 32): give" in message
    manifest = read_manifest(out)
    named = manifest.sources[0].model_copy(update={"name": "a b " * 10**6})
    write_manifest(out, manifest.model_copy(update={"sources": (named,)}))
    before = contents(out)
    assert len(error_of("convert", source, "--out", out, *OPTIONS)) < 1000
    assert contents(out) == before
