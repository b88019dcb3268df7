"""Conversion as the command does it: the same bytes for any number of workers, and anybody can read them.

Promise 1 (the shard format) of dist_dcgan/README.md.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from shards.common.errors import UserError
from shards.conversion.images import decode_image, prepare
from shards.conversion.sources.lmdb_source import LmdbSource
from shards.manifest import Origin, read_manifest
from shards.verify import verify
from tests.support.shards_fixtures import (
    ODD_KEYS,
    PLAIN_KEYS,
    as_lmdb,
    contents,
    convert_here,
    encoded,
    numbered,
    output_of,
    photographs,
    picture,
    rejected_in,
    renamed_in,
    run_shards,
    samples_in,
    write_files,
    write_lmdb,
    write_tar,
)

RUNS = ("--samples-per-shard", 25)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def originals(source: Path) -> dict[str, bytes]:
    """The images of the source by key, in their order."""
    with LmdbSource(source) as opened:
        return {key.decode(): opened.read(key, place) for key, place in opened.walk()}


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs in shards of 25, by two workers."""
    out = tmp_path_factory.mktemp("converted") / "data"
    convert_here(source, out, *RUNS, workers=2)
    return out


def images_of(entries: dict[bytes, bytes]) -> dict[str, bytes]:
    """Entries of an LMDB as files."""
    return {key.decode() + ".jpg": data for key, data in entries.items()}


def test_every_source_image_is_a_sample_in_key_order(originals: dict[str, bytes], converted: Path) -> None:
    samples = samples_in(converted)
    assert list(samples) == list(originals)
    for key, pixels in samples.items():
        assert np.array_equal(pixels, np.asarray(prepare(decode_image(originals[key]), 64)))


def test_one_and_two_workers_write_the_same_bytes(source: Path, converted: Path, tmp_path: Path) -> None:
    assert len(convert_here(source, tmp_path / "data", *RUNS).shards) >= 3
    assert contents(tmp_path / "data") == contents(converted)


def test_webdataset_reads_every_sample(converted: Path) -> None:
    paths = [str(path) for path in sorted(converted.glob("shard-*.tar"))]
    found = list(webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8").to_tuple("__key__", "ppm"))
    expected = samples_in(converted)
    assert [key for key, _ in found] == list(expected)
    assert all(np.array_equal(pixels, expected[key]) for key, pixels in found)


def test_plain_tar_unpacks_every_sample(converted: Path, tmp_path: Path) -> None:
    for path in converted.glob("shard-*.tar"):
        subprocess.run(["tar", "-x", "-f", path, "-C", tmp_path], check=True)
    expected = samples_in(converted)
    assert {path.name for path in tmp_path.iterdir()} == {f"{key}.ppm" for key in expected}
    for key, pixels in expected.items():
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{key}.ppm")), pixels)


def test_the_command_ends_with_one_line_that_says_what_it_wrote(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "data"
    process = run_shards("convert", source, "--out", out, "--image-size", 32)
    manifest = read_manifest(out)
    assert manifest.image_size == 32
    summary = f"{manifest.samples} images in 1 shard, 0 rejected, at {out}, digest {manifest.digest()}\n"
    assert process.stdout == summary
    line = r"convert: 100% \d+/\d+ \[.*img/s, 0 rejected\]\n"  # no control characters in a log
    assert re.fullmatch(line, process.stderr)
    assert sorted(contents(out)) == ["manifest.json", "shard-000000.tar"]


@pytest.mark.parametrize(
    ("format", "options", "size", "count", "warned"),
    [
        ("JPEG", {}, 64, 3, True),
        ("JPEG", {"subsampling": "4:2:2"}, 64, 3, True),
        ("JPEG", {"subsampling": "4:4:4"}, 64, 3, False),
        ("JPEG", {}, 32, 3, False),
        ("JPEG", {}, 64, 2, False),
        ("WEBP", {}, 64, 3, True),
        ("WEBP", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}, 64, 3, True),
        ("WEBP", {"lossless": True}, 64, 3, False),
        ("PNG", {}, 64, 3, False),
    ],
)
def test_colours_at_a_part_of_the_resolution_are_named_if_most_images_are_small_and_such(
    tmp_path: Path,
    format: str,
    options: dict[str, object],
    size: int,
    count: int,
    warned: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Their sides are 90 and 120 pixels; the rest of four images are large."""
    files = {f"{i}.{format.lower()}": encoded(picture(i), format, **options) for i in range(count)}
    files |= {f"{i}.jpg": encoded(picture(i, 300, 300)) for i in range(count, 4)}
    words = ("--image-size", size, "--samples-per-shard", 2)
    convert_here(write_files(tmp_path / "images", files), tmp_path / "data", *words)
    found = capsys.readouterr().err
    named = (
        "3 of 4 images have a side of less than twice 64 pixels and store colours at half of their resolution" in found
    )
    assert named == ("warning" in found) == warned


def test_plain_keys_name_their_samples_and_the_others_are_kept_in_a_list(tmp_path: Path) -> None:
    texts = {key: key.hex() if key == b"\xff\xfe" else key.decode() for key in [*PLAIN_KEYS, *ODD_KEYS]}
    out = tmp_path / "data"
    convert_here(write_lmdb(tmp_path / "source", dict.fromkeys(texts, encoded(picture(0)))), out)
    assert renamed_in(out) == {hashlib.sha1(key).hexdigest(): texts[key] for key in ODD_KEYS}
    assert samples_in(out).keys() == set(texts.values())
    assert verify(out, workers=1)[1] == []


def test_the_second_entry_of_a_name_in_its_shard_is_rejected(tmp_path: Path) -> None:
    twin = hashlib.sha1(b"a.b").hexdigest()
    entries = numbered(2) | {b"a.b": encoded(picture(7)), twin.encode(): encoded(picture(8))}
    out = tmp_path / "data"
    assert convert_here(write_lmdb(tmp_path / "source", entries), out, "--max-rejected", 0.5).samples == 3
    assert list(rejected_in(out).values()) == [
        f"the key of a.b is taken by {twin} before it; one of them is named by the SHA-1 of its key: rename it"
    ]
    assert verify(out, workers=1)[1] == []
    files = {"a.jpg": encoded(picture(0)), "a.png": encoded(picture(1), "PNG"), "b.jpg": encoded(picture(2))}
    convert_here(write_files(tmp_path / "images", files), tmp_path / "files", "--max-rejected", 0.4)
    assert list(samples_in(tmp_path / "files")) == ["a", "b"]
    rule = "a key is the path without the extension: rename one of them"
    assert rejected_in(tmp_path / "files") == {"a": f"the key of a.png is taken by a.jpg before it; {rule}"}


SPOILED = images_of(numbered(20)) | {"image0001.jpg": b"no image", "image0011.jpg": encoded(picture(0))[:300]}


@pytest.mark.parametrize("write", [as_lmdb, write_files])
@pytest.mark.parametrize("budget", [0.1, 1])
def test_rejects_within_the_budget_are_listed_and_counted(
    write: Callable[[Path, dict[str, bytes]], Path], budget: float, tmp_path: Path
) -> None:
    path, out = write(tmp_path / "source", SPOILED), tmp_path / "data"
    manifest = convert_here(path, out, "--max-rejected", budget, "--samples-per-shard", 8, workers=2)
    assert (manifest.samples, manifest.rejected) == (18, 2)
    assert [shard.samples for shard in manifest.shards] == [7, 7, 4]  # entries keep their shard
    reasons = rejected_in(out)
    assert list(reasons) == ["image0001", "image0011"]
    assert reasons["image0001"] == "not a readable JPEG, WebP, PNG or PPM image"
    assert reasons["image0011"].startswith("damaged: ")


@pytest.mark.parametrize("write", [as_lmdb, write_files])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--max-rejected", 0.09),
            r"^2 of 20 source entries are unusable, more than --max-rejected 0.09 allows "
            r"\(image0001: not a readable JPEG, WebP, PNG or PPM image; image0011: damaged: ",
        ),
        (("--damaged", "fail"), r"image0001: not a readable JPEG"),
        (("--max-rejected", 1, "--samples-per-shard", 1), r"a run of 1 source entries has .* --samples-per-shard$"),
    ],
)
def test_more_rejects_than_allowed_fail_and_name_reasons(
    write: Callable[[Path, dict[str, bytes]], Path], options: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        convert_here(write(tmp_path / "source", SPOILED), tmp_path / "data", *options)
    assert not any(name.startswith(("manifest", "rejected")) for name in contents(tmp_path / "data"))


def test_the_manifest_says_how_the_pixels_were_made(converted: Path, source: Path) -> None:
    manifest = read_manifest(converted)
    assert manifest.sources == (Origin(kind="lmdb", name=source.name, entries=manifest.samples),)
    assert (manifest.preparation.crop, manifest.preparation.filter) == ("center-square", "lanczos")
    assert manifest.preparation.decoder.startswith("Pillow ") and "libjpeg" in manifest.preparation.decoder
    assert str(source.parent) not in (converted / "manifest.json").read_text()


def exported(source: Path, originals: dict[str, bytes], folder: Path, *layout: str) -> int:
    output_of("export", source, "--out", folder, *layout)
    return 0


def exported_flat(source: Path, originals: dict[str, bytes], folder: Path) -> int:
    return exported(source, originals, folder, "--flat")


def exported_by_lsun(source: Path, originals: dict[str, bytes], folder: Path) -> int:
    """JPEGs named `.webp`, each six folders deep, and a file that is no image."""
    files = {"/".join([*key[:6], f"{key}.webp"]): data for key, data in originals.items()}
    write_files(folder, files | {"readme.txt": b"no image"})
    return 1


def tars_of_webdataset(source: Path, originals: dict[str, bytes], folder: Path) -> int:
    """Shards of webdataset's writer, with two labels for each image."""
    folder.mkdir()
    images = list(originals.items())
    for start in range(0, len(images), 25):
        with webdataset.TarWriter(str(folder / f"{start:04d}.tar")) as writer:
            for key, data in images[start : start + 25]:
                writer.write({"__key__": key, "jpg": data, "cls": 7, "json": {"width": 256}})
    return 2 * len(images)


@pytest.mark.parametrize("write", [exported, exported_flat, exported_by_lsun, tars_of_webdataset])
def test_the_same_images_make_the_same_shards_from_any_source(
    write: Callable[[Path, dict[str, bytes], Path], int],
    source: Path,
    originals: dict[str, bytes],
    converted: Path,
    tmp_path: Path,
) -> None:
    """`write` returns the number of files that are no images."""
    ignored, out = write(source, originals, tmp_path / "images"), tmp_path / "data"
    summary = output_of("convert", tmp_path / "images", "--out", out, *RUNS)
    assert (f"\n{ignored} files without the extension of an image were left out\n" in summary) == bool(ignored)
    found, expected = (read_manifest(directory) for directory in (out, converted))
    assert found.model_dump(exclude={"sources"}) == expected.model_dump(exclude={"sources"})
    kind = "tar" if write is tars_of_webdataset else "folder"
    assert found.sources == (Origin(kind=kind, name="images", entries=len(originals)),)


def test_a_folder_for_each_class_gives_the_same_pixels_under_its_own_keys(
    originals: dict[str, bytes], converted: Path, tmp_path: Path
) -> None:
    files = {f"class-{i % 3}/{key}.jpg": data for i, (key, data) in enumerate(originals.items())}
    convert_here(write_files(tmp_path / "classes", files), tmp_path / "data", *RUNS)
    found, expected = samples_in(tmp_path / "data"), samples_in(converted)
    assert list(found) == sorted(name.removesuffix(".jpg") for name in files)
    assert all(np.array_equal(pixels, expected[key.partition("/")[2]]) for key, pixels in found.items())


def test_several_sources_make_one_data_set_in_their_order(tmp_path: Path) -> None:
    entries, out = numbered(7), tmp_path / "data"
    sources = [
        write_tar(tmp_path / "z.tar", images_of(entries)),
        write_lmdb(tmp_path / "lmdb", entries),
        write_files(tmp_path / "a", images_of(entries)),
    ]
    manifest = convert_here(sources, out, "--samples-per-shard", 5, workers=2)
    samples = samples_in(out)
    assert list(samples) == [f"{i}_{key.decode()}" for i in range(3) for key in entries]
    assert all(np.array_equal(pixels, samples["0" + key[1:]]) for key, pixels in samples.items())
    origins = [(origin.kind, origin.name, origin.entries) for origin in manifest.sources]
    assert origins == [("tar", "z.tar", 7), ("lmdb", "lmdb", 7), ("folder", "a", 7)]
    assert [shard.samples for shard in manifest.shards] == [5, 5, 5, 5, 1]
    assert verify(out, workers=1)[1] == []


def test_the_first_images_only(tmp_path: Path) -> None:
    entries = numbered(7)
    sources = [write_lmdb(tmp_path / name, entries) for name in "abc"]
    manifest = convert_here(sources, tmp_path / "data", "--max-images", 9, "--samples-per-shard", 4)
    assert [origin.entries for origin in manifest.sources] == [7, 2, 0]
    assert list(samples_in(tmp_path / "data"))[-3:] == ["0_image0006", "1_image0000", "1_image0001"]
    folder = write_files(tmp_path / "folder", images_of(entries))
    assert convert_here(folder, tmp_path / "fewer", "--max-images", 3).samples == 3
    assert convert_here(folder, tmp_path / "more", "--max-images", 99).samples == 7


def test_excluded_keys_are_left_out_before_the_limit_and_their_shards_filled_up(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"image0001\r\nimage0003\n\nimage0009\nnowhere\n")
    source = write_lmdb(tmp_path / "source", numbered(11) | {b"image0003": b"damaged"})
    words = ("--exclude", tmp_path / "keys", "--samples-per-shard", 4, "--max-rejected", 0)
    assert ", 0 rejected, 3 excluded, at " in output_of("convert", source, "--out", tmp_path / "data", *words)
    manifest = read_manifest(tmp_path / "data")
    assert [shard.samples for shard in manifest.shards] == [4, 4]
    assert (manifest.excluded, manifest.sources[0].entries) == (3, 8)
    kept = [key.decode() for key in numbered(11) if key not in (b"image0001", b"image0003", b"image0009")]
    assert list(samples_in(tmp_path / "data")) == kept
    limited = convert_here(source, tmp_path / "limited", *words, "--max-images", 5)
    assert [shard.samples for shard in limited.shards] == [4, 1] and limited.excluded == 2


LISTED = {"absent": "image0001\nnowhere\n", "image": "image0001.jpg\n", "table": '"image0001",1\n', "nothing": "\n"}
LOOKS = "keys are written as those of the source, such as image0000"


@pytest.mark.parametrize("write", [as_lmdb, write_files])
def test_keys_to_exclude_that_no_entry_has_are_counted_and_named(
    write: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path
) -> None:
    source = write(tmp_path / "source", images_of(numbered(5)))
    write_files(tmp_path, {name: text.encode() for name, text in LISTED.items()})
    some = run_shards("convert", source, "--out", tmp_path / "some", "--exclude", tmp_path / "absent")
    assert f"warning: --exclude: no entry has 1 of the 2 keys (nowhere); {LOOKS}\n" in some.stderr
    assert ", 1 excluded, " in some.stdout
    for name in ("image", "table"):
        shown = re.escape(LISTED[name].strip())
        with pytest.raises(UserError, match=rf"^--exclude: no entry has 1 of the 1 keys \({shown}\); {LOOKS}$"):
            convert_here(source, tmp_path / "data", "--exclude", tmp_path / name)
        assert "manifest.json" not in contents(tmp_path / "data")
    none = run_shards("convert", source, "--out", tmp_path / "none", "--exclude", tmp_path / "nothing")
    assert f"warning: {tmp_path}/nothing has no keys: nothing is excluded\n" in none.stderr and none.returncode == 0


def test_a_line_leaves_out_the_key_with_its_blanks_and_no_other(tmp_path: Path) -> None:
    names = ("a", "a ", " a", "b")
    source = write_files(tmp_path / "source", {f"{name}.jpg": encoded(picture(0)) for name in names})
    (tmp_path / "keys").write_bytes(b"a \r\n")
    manifest = convert_here(source, tmp_path / "data", "--exclude", tmp_path / "keys")
    assert list(samples_in(tmp_path / "data")) == [" a", "a", "b"] and manifest.excluded == 1
    assert manifest.exclude_sha256 == hashlib.sha256(b"a ").hexdigest()
    (tmp_path / "keys").write_bytes(b"b \nb\n")
    done = run_shards("convert", source, "--out", tmp_path / "other", "--exclude", tmp_path / "keys")
    assert "warning: --exclude: no entry has 1 of the 2 keys ('b '); " in done.stderr


def test_keys_to_exclude_may_be_beyond_the_limit(tmp_path: Path) -> None:
    source = write_lmdb(tmp_path / "source", numbered(5))
    (tmp_path / "keys").write_text("image0004\n")
    words = ("--exclude", tmp_path / "keys", "--max-images", 2)
    done = run_shards("convert", source, "--out", tmp_path / "data", *words)
    assert done.returncode == 0 and done.stdout.startswith("2 images")
    assert "warning: --exclude: 1 of 1 keys are not in the part that --max-images leaves\n" in done.stderr


def test_a_list_that_no_lmdb_has_fails_before_an_image_is_read(tmp_path: Path) -> None:
    sources = [write_lmdb(tmp_path / name, numbered(5)) for name in "ab"]
    (tmp_path / "keys").write_text("1_image0004.jpg\n")
    with pytest.raises(UserError, match=r"^--exclude: no entry has 1 of the 1 keys"):
        convert_here(sources, tmp_path / "data", "--exclude", tmp_path / "keys")
    assert not any(name.startswith("shard") for name in contents(tmp_path / "data"))
    (tmp_path / "keys").write_text("1_image0004\n")
    assert convert_here(sources, tmp_path / "data", "--exclude", tmp_path / "keys").excluded == 1


@pytest.mark.parametrize("files", [{}, {"notes.txt": b"", "a.gif": b""}])
def test_a_folder_without_images_is_one_line(files: dict[str, bytes], tmp_path: Path) -> None:
    instead = r" \(it holds a.gif, notes.txt; images are named .jpeg .jpg .png .ppm .webp\)" if files else ""
    folder = write_files(tmp_path / "folder", files)
    for options in ((), ("--max-images", 5)):
        with pytest.raises(UserError, match=rf"^no images in folder: nothing to convert{instead}$"):
            convert_here(folder, tmp_path / "data", *options)
        assert not (tmp_path / "data" / "manifest.json").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_one_damaged_tar_of_many_fails_the_conversion_in_one_line(workers: int, tmp_path: Path) -> None:
    images = images_of(numbered(3))
    folder = write_files(tmp_path / "tars", {})
    paths = [write_tar(folder / f"{i}.tar", {f"{i}{name}": data for name, data in images.items()}) for i in range(6)]
    words = ("--samples-per-shard", 3)
    convert_here(folder, tmp_path / "sound", *words)
    paths[4].write_bytes(paths[4].read_bytes()[:-11_000])
    with pytest.raises(UserError, match=rf"^{paths[4]} ends .*: an incomplete copy$"):
        convert_here(folder, tmp_path / "data", *words, workers=workers)
    assert "shard-000000.tar" in contents(tmp_path / "data")
    assert not (tmp_path / "data" / "manifest.json").exists()
