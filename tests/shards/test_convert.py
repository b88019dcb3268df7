"""Conversion by the real command: the same bytes for any number of workers, and anybody can read them.

Promise 1 (the shard format) of dist_dcgan/README.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from shards.common.errors import UserError
from shards.conversion.images import decode_image, prepare
from shards.conversion.sources.lmdb_source import LmdbSource
from shards.manifest import Manifest, Origin, read_manifest
from shards.reader import read_sample
from tests.support.shards_fixtures import (
    contents,
    convert_here,
    encoded,
    numbered,
    photographs,
    picture,
    rejected_in,
    run_shards,
    samples_in,
    shards_of,
    write_files,
    write_lmdb,
    write_tar,
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


def manifest_but_for_its_sources(directory: Path) -> dict[str, object]:
    return read_manifest(directory).model_dump(exclude={"sources"})


def originals(source: Path) -> dict[str, bytes]:
    with LmdbSource(source) as opened:
        return {key.decode(): opened.read(key, place) for key, place in opened.walk()}


@pytest.fixture(scope="module")
def as_lsun_exports_it(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs named `.webp`, each six folders deep."""
    files = {"/".join([*key[:6], f"{key}.webp"]): data for key, data in originals(source).items()}
    return write_files(tmp_path_factory.mktemp("exported") / "images", files)


def test_lsun_s_own_export_gives_the_shards_of_its_lmdb(
    as_lsun_exports_it: Path, converted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data"
    (as_lsun_exports_it / "readme.txt").write_text("not an image")
    process = run_shards("convert", as_lsun_exports_it, "--out", out, "--samples-per-shard", 25, "--workers", 2)
    assert process.returncode == 0, process.stderr
    assert "1 files without the extension of an image were left out" in process.stdout
    assert shards_of(out) == shards_of(converted)
    assert manifest_but_for_its_sources(out) == manifest_but_for_its_sources(converted)
    count = read_manifest(converted).samples
    assert read_manifest(out).sources == (Origin(kind="folder", name="images", entries=count),)


def test_a_folder_for_each_class_gives_the_same_pixels_under_its_own_keys(
    source: Path, converted: Path, tmp_path: Path
) -> None:
    files = {f"class-{i % 3}/{key}.jpg": data for i, (key, data) in enumerate(originals(source).items())}
    convert_here(write_files(tmp_path / "classes", files), tmp_path / "data", "--samples-per-shard", 25)
    found, expected = samples_in(tmp_path / "data"), samples_in(converted)
    assert list(found) == sorted(name.removesuffix(".jpg") for name in files)
    assert all(np.array_equal(pixels, expected[key.partition("/")[2]]) for key, pixels in found.items())


def test_shards_of_webdataset_s_writer_give_the_pixels_of_the_lmdb(
    source: Path, converted: Path, tmp_path: Path
) -> None:
    images = list(originals(source).items())
    (tmp_path / "tars").mkdir()
    for start in range(0, len(images), 25):
        with webdataset.TarWriter(str(tmp_path / "tars" / f"{start:04d}.tar")) as writer:
            for key, data in images[start : start + 25]:
                writer.write({"__key__": key, "jpg": data, "cls": 7, "json": {"width": 256}})
    process = run_shards("convert", tmp_path / "tars", "--out", tmp_path / "data", "--samples-per-shard", 25)
    assert process.returncode == 0, process.stderr
    assert f"{2 * len(images)} files without the extension of an image were left out" in process.stdout
    assert shards_of(tmp_path / "data") == shards_of(converted)
    assert manifest_but_for_its_sources(tmp_path / "data") == manifest_but_for_its_sources(converted)


def test_one_tar_of_several_formats_is_read(tmp_path: Path) -> None:
    images = {f"{format}.v1.{format.lower()}": encoded(picture(3), format) for format in ("JPEG", "PNG", "WEBP", "PPM")}
    convert_here(write_tar(tmp_path / "images.tar", images), tmp_path / "data")
    found = samples_in(tmp_path / "data")
    assert list(found) == ["JPEG", "PNG", "WEBP", "PPM"]
    assert np.array_equal(found["PNG"], found["PPM"])


def test_several_sources_make_one_data_set_in_their_order(tmp_path: Path) -> None:
    entries = numbered(7)
    images = {key.decode() + ".jpg": data for key, data in entries.items()}
    sources = [
        write_tar(tmp_path / "z.tar", images),
        write_lmdb(tmp_path / "lmdb", entries),
        write_files(tmp_path / "a", images),
    ]
    out = tmp_path / "data"
    process = run_shards("convert", *sources, "--out", out, "--samples-per-shard", 5, "--workers", 2)
    assert process.returncode == 0, process.stderr
    samples = list(samples_of(out))
    assert [key for key, _ in samples] == [f"{i}_{key.decode()}" for i in range(3) for key in entries]
    for i, (_, pixels) in enumerate(samples):
        assert np.array_equal(pixels, samples[i % 7][1])
    assert read_manifest(out).sources == tuple(
        Origin(kind=kind, name=name, entries=7) for kind, name in (("tar", "z.tar"), ("lmdb", "lmdb"), ("folder", "a"))
    )
    assert [shard.samples for shard in read_manifest(out).shards] == [5, 5, 5, 5, 1]
    assert run_shards("verify", out).returncode == 0


def test_the_first_images_only(tmp_path: Path) -> None:
    entries = numbered(7)
    sources = [write_lmdb(tmp_path / name, entries) for name in "abc"]
    manifest = convert_here(sources, tmp_path / "data", "--max-images", 9, "--samples-per-shard", 4)
    assert [origin.entries for origin in manifest.sources] == [7, 2, 0]
    assert list(samples_in(tmp_path / "data"))[-3:] == ["0_image0006", "1_image0000", "1_image0001"]
    folder = write_files(tmp_path / "folder", {key.decode() + ".jpg": data for key, data in entries.items()})
    assert convert_here(folder, tmp_path / "fewer", "--max-images", 3).samples == 3
    assert convert_here(folder, tmp_path / "more", "--max-images", 99).samples == 7


def test_excluded_keys_are_left_out_and_their_shards_filled_up(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"image0001\r\nimage0003\n\nnowhere\n")
    options = ("--exclude", tmp_path / "keys", "--samples-per-shard", 4, "--max-rejected", 0)
    entries = numbered(10) | {b"image0003": b"damaged"}
    process = run_shards("convert", write_lmdb(tmp_path / "source", entries), "--out", tmp_path / "data", *options)
    assert process.returncode == 0, process.stderr
    assert ", 0 rejected, 2 excluded, at " in process.stdout
    manifest = read_manifest(tmp_path / "data")
    assert [shard.samples for shard in manifest.shards] == [4, 4]
    assert (manifest.excluded, manifest.sources[0].entries) == (2, 8)
    assert "image0001" not in samples_in(tmp_path / "data") and "image0002" in samples_in(tmp_path / "data")


def test_two_files_of_one_name_are_one_sample_and_a_rejection(tmp_path: Path) -> None:
    files = {"a.jpg": encoded(picture(0)), "a.png": encoded(picture(1), "PNG"), "b.jpg": encoded(picture(2))}
    convert_here(write_files(tmp_path / "images", files), tmp_path / "data", "--max-rejected", 0.4)
    assert list(samples_in(tmp_path / "data")) == ["a", "b"]
    assert rejected_in(tmp_path / "data") == {"a": "its name a is taken by an entry before it"}


def folder_of_twenty(tmp_path: Path) -> Path:
    """As `spoiled`, in a folder, whose number of images nobody knows before its end."""
    images = numbered(20) | {b"image0001": b"no image", b"image0011": b""}
    return write_files(tmp_path / "folder", {key.decode() + ".jpg": data for key, data in images.items()})


def test_the_budget_of_a_folder_is_counted_at_its_end(tmp_path: Path) -> None:
    folder = folder_of_twenty(tmp_path)
    for budget in (0.1, 1):
        assert convert_here(folder, tmp_path / str(budget), "--max-rejected", budget).rejected == 2
    with pytest.raises(UserError, match=r"^2 of 20 source entries are unusable, more than --max-rejected 0.09 allows "):
        convert_here(folder, tmp_path / "fewer", "--max-rejected", 0.09)
    assert not (tmp_path / "fewer" / "manifest.json").exists()


def test_a_damaged_image_ends_a_conversion_that_is_told_so(tmp_path: Path) -> None:
    for source in (folder_of_twenty(tmp_path), spoiled(tmp_path)):
        process = run_shards("convert", source, "--out", tmp_path / source.name / "data", "--damaged", "fail")
        assert process.returncode == 2
        assert "image0001: not a readable JPEG" in process.stderr.splitlines()[-1]


@pytest.mark.parametrize("files", [{}, {"notes.txt": b"", "a.gif": b""}])
def test_a_folder_without_images_is_one_line(files: dict[str, bytes], tmp_path: Path) -> None:
    folder = write_files(tmp_path / "folder", files)
    for options in ((), ("--max-images", 5)):
        process = run_shards("convert", folder, "--out", tmp_path / "data", *options)
        assert process.returncode == 2 and process.stdout == ""
        assert process.stderr.splitlines()[-1] == "error: no images in folder: nothing to convert"
        assert "Traceback" not in process.stderr and not (tmp_path / "data" / "manifest.json").exists()


def test_a_damaged_container_is_one_line_whatever_the_workers(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "images.tar", {key.decode() + ".jpg": data for key, data in numbered(20).items()})
    path.write_bytes(path.read_bytes()[:-15_000])
    options = ("--workers", 2, "--samples-per-shard", 3)
    process = run_shards("convert", path, "--out", tmp_path / "data", *options)
    assert process.returncode == 2 and process.stdout == ""
    assert re.fullmatch(rf"error: {path} ends .*: an incomplete copy", process.stderr.splitlines()[-1])
    assert "Traceback" not in process.stderr and "shard-000000.tar" in contents(tmp_path / "data")


def test_a_fifo_under_the_name_of_an_image_is_waited_for_by_nobody(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "folder", {"a.jpg": encoded(picture(0))})
    os.mkfifo(folder / "b.jpg")
    out = tmp_path / "data"
    process = run_shards("convert", folder, "--out", out, "--max-rejected", 0.5, "--workers", 2)
    assert process.returncode == 0, process.stderr
    assert rejected_in(out) == {"b": "not a plain file"}
