"""Conversion by the real command: the same bytes for any number of workers, and anybody can read them."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from shards.images import decode_image, prepare
from shards.lmdb_source import LmdbSource
from shards.manifest import Manifest, Origin, read_manifest
from shards.reader import read_sample
from tests.shards_fixtures import (
    contents,
    encoded,
    numbered,
    photographs,
    picture,
    run_shards,
    write_lmdb,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs as the command converts them, in shards of 25, by two workers."""
    out = tmp_path_factory.mktemp("converted") / "data"
    process = run_shards("convert", source, "--out", out, "--samples-per-shard", 25, "--workers", 2)
    assert process.returncode == 0, process.stderr
    return out


def samples_of(directory: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every sample as this project's reader gives it."""
    manifest = read_manifest(directory)
    for shard in manifest.shards:
        for index in range(shard.samples):
            yield read_sample(directory / shard.name, manifest.layout, index)


def test_every_source_image_is_a_sample_in_key_order(source: Path, converted: Path) -> None:
    with LmdbSource(source) as opened:
        originals = [(key, opened.read(key, place)) for key, place in opened.walk()]
    samples = list(samples_of(converted))
    assert [key for key, _ in samples] == [key.decode() for key, _ in originals]
    for (_, pixels), (_, data) in zip(samples, originals, strict=True):
        assert np.array_equal(pixels, np.asarray(prepare(decode_image(data), 64)))


def test_one_and_two_workers_write_the_same_bytes(source: Path, converted: Path, tmp_path: Path) -> None:
    process = run_shards("convert", source, "--out", tmp_path / "data", "--samples-per-shard", 25, "--workers", 1)
    assert process.returncode == 0, process.stderr
    assert len(list(converted.glob("shard-*.tar"))) >= 3
    assert contents(tmp_path / "data") == contents(converted)


def test_webdataset_reads_every_sample(converted: Path) -> None:
    paths = [str(path) for path in sorted(converted.glob("shard-*.tar"))]
    read = webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8").to_tuple("__key__", "ppm")
    expected = list(samples_of(converted))
    found = list(read)
    assert [key for key, _ in found] == [key for key, _ in expected]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(found, expected, strict=True))


def test_plain_tar_unpacks_every_sample(converted: Path, tmp_path: Path) -> None:
    for path in converted.glob("shard-*.tar"):
        subprocess.run(["tar", "-x", "-f", path, "-C", tmp_path], check=True)
    expected = dict(samples_of(converted))
    assert {path.name for path in tmp_path.iterdir()} == {f"{key}.ppm" for key in expected}
    for key, pixels in expected.items():
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{key}.ppm")), pixels)


def test_the_command_ends_with_one_line_that_says_what_it_wrote(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "data"
    process = run_shards("convert", source, "--out", out, "--image-size", 32)
    manifest = read_manifest(out)
    assert manifest.image_size == 32
    assert process.stdout == (
        f"{manifest.samples} images in 1 shard, 0 rejected, at {out}, digest {manifest.digest()}\n"
    )
    assert re.fullmatch(
        r"convert: 100% \d+/\d+ \[.*img/s, 0 rejected\]\n", process.stderr
    )  # no control characters in a log
    assert sorted(contents(out)) == ["manifest.json", "shard-000000.tar"]


def test_renamed_keys_are_kept(tmp_path: Path) -> None:
    odd = [b"a.b", b"folder/name", b"k" * 200, b"\xff\xfe", "schön".encode()]
    entries = numbered(3) | {key: encoded(picture(i)) for i, key in enumerate(odd)}
    out = tmp_path / "data"
    process = run_shards("convert", write_lmdb(tmp_path / "source", entries), "--out", out, "--workers", 1)
    assert process.returncode == 0, process.stderr
    lines = [json.loads(line) for line in (out / "keys.jsonl").read_text().splitlines()]
    assert {line["member"]: line.get("key", line.get("key_hex")) for line in lines} == {
        hashlib.sha1(key).hexdigest(): key.hex() if key == b"\xff\xfe" else key.decode() for key in odd
    }
    names = {key for key, _ in samples_of(out)}
    assert names == {key.decode() for key in numbered(3)} | {hashlib.sha1(key).hexdigest() for key in odd}
    assert run_shards("verify", out).returncode == 0


def test_the_second_entry_of_a_name_in_its_shard_is_rejected(tmp_path: Path) -> None:
    twin = hashlib.sha1(b"a.b").hexdigest().encode()
    path = write_lmdb(tmp_path / "source", numbered(2) | {b"a.b": encoded(picture(7)), twin: encoded(picture(8))})
    out = tmp_path / "data"
    process = run_shards("convert", path, "--out", out, "--workers", 1, "--max-rejected", 0.5)
    assert process.returncode == 0, process.stderr
    (line,) = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert line["reason"] == f"its name {twin.decode()} is taken by an entry before it"
    assert read_manifest(out).samples == 3 and run_shards("verify", out).returncode == 0


def spoiled(tmp_path: Path) -> Path:
    """20 entries of which the second and the twelfth are no images."""
    entries = numbered(20) | {b"image0001": b"no image", b"image0011": encoded(picture(0))[:300]}
    return write_lmdb(tmp_path / "source", entries)


def test_rejects_within_the_budget_are_listed_and_counted(tmp_path: Path) -> None:
    out = tmp_path / "data"
    options = ("--max-rejected", 0.1, "--samples-per-shard", 8, "--workers", 2)
    process = run_shards("convert", spoiled(tmp_path), "--out", out, *options)
    assert process.returncode == 0, process.stderr
    manifest = read_manifest(out)
    assert (manifest.samples, manifest.rejected) == (18, 2)
    assert [shard.samples for shard in manifest.shards] == [7, 7, 4]  # entries keep their shard
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["image0001", "image0011"]
    assert lines[0]["reason"] == "not a readable JPEG, WebP, PNG or PPM image"
    assert lines[1]["reason"].startswith("damaged: ")


def test_rejects_over_the_budget_fail_and_name_reasons(tmp_path: Path) -> None:
    out = tmp_path / "data"
    process = run_shards("convert", spoiled(tmp_path), "--out", out, "--max-rejected", 0.05, "--workers", 1)
    assert process.returncode == 2
    error = process.stderr.splitlines()[-1]
    assert error.startswith("error: 2 of 20 source entries are unusable, more than --max-rejected 0.05 allows (")
    assert "image0001: not a readable JPEG, WebP, PNG or PPM image; image0011: damaged: " in error
    assert not any(name.startswith(("manifest", "rejected")) for name in contents(out))


def test_a_shard_that_would_be_empty_is_an_error(tmp_path: Path) -> None:
    options = ("--max-rejected", 1, "--samples-per-shard", 1, "--workers", 1)
    process = run_shards("convert", spoiled(tmp_path), "--out", tmp_path / "data", *options)
    assert process.returncode == 2
    assert "a run of 1 source entries has no usable image" in process.stderr
    assert "--samples-per-shard" in process.stderr
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_the_manifest_says_how_the_pixels_were_made(converted: Path, source: Path) -> None:
    manifest: Manifest = read_manifest(converted)
    assert manifest.sources == (Origin(kind="lmdb", name=source.name, entries=manifest.samples),)
    assert (manifest.preparation.crop, manifest.preparation.filter) == ("center-square", "lanczos")
    assert manifest.preparation.decoder.startswith("Pillow ")
    assert str(source.parent) not in (converted / "manifest.json").read_text()


@pytest.mark.parametrize("layout", [[], ["--flat"]], ids=["folders", "flat"])
def test_exported_photographs_make_the_same_shards(
    source: Path, converted: Path, tmp_path: Path, layout: list[str]
) -> None:
    assert run_shards("export", source, "--out", tmp_path / "files", *layout).returncode == 0
    process = run_shards("convert", tmp_path / "files", "--out", tmp_path / "data", "--samples-per-shard", 25)
    assert process.returncode == 0, process.stderr
    assert read_manifest(tmp_path / "data").shards == read_manifest(converted).shards


def test_photographs_in_tars_make_the_same_shards(source: Path, converted: Path, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    with LmdbSource(source) as opened:
        for number, entries in enumerate(zip(*[opened.walk()] * 30, strict=False)):
            with webdataset.TarWriter(str(tmp_path / "tars" / f"{number:03d}.tar")) as writer:
                for key, place in entries:
                    writer.write({"__key__": key.decode(), "jpg": opened.read(key, place), "cls": b"3"})
        count = 30 * (number + 1)
    process = run_shards("convert", tmp_path / "tars", "--out", tmp_path / "data", "--samples-per-shard", 25)
    assert process.returncode == 0, process.stderr
    assert f"{count} files without the extension of an image were left out" in process.stdout
    expected = list(samples_of(converted))[:count]
    found = list(samples_of(tmp_path / "data"))
    assert [key for key, _ in found] == [key for key, _ in expected]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(found, expected, strict=True))
