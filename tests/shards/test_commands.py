"""The commands as a user runs them: what they print, and one line with status 2 for every mistake.

Promise 11 (errors) of dist_dcgan/README.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from shards.manifest import read_manifest
from shards.reader import locate, read_sample
from tests.support.shards_fixtures import ROOT, contents, data_set, error_of, numbered, run_shards, write_lmdb


def test_help_lists_the_commands() -> None:
    process = run_shards("--help")
    assert process.returncode == 0
    for command in ("demo", "convert", "export", "verify", "preview"):
        assert sum(line.strip().startswith(f"{command} ") for line in process.stdout.splitlines()) == 1


def test_no_command_lists_them_too_but_is_a_mistake() -> None:
    process = run_shards()
    assert process.returncode == 2 and process.stdout == run_shards("--help").stdout


def test_help_of_a_command_lists_its_options() -> None:
    process = run_shards("convert", "--help")
    assert process.returncode == 0
    for option in ("SOURCE", "--out", "--image-size", "--samples-per-shard", "--workers", "--max-rejected"):
        assert option in process.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convrt"], "unknown command convrt; did you mean convert?"),
        (["xyzzy"], "unknown command xyzzy (--help lists them all)"),
        (
            ["convert", "SOURCE", "--out", "OUT", "--imagesize", "64"],
            "unknown option --imagesize; did you mean --image-size?",
        ),
        (
            ["convert", "SOURCE", "--out", "OUT", "--image-size", "0"],
            "image_size: input should be greater than or equal to 8, got '0'",
        ),
        (
            ["convert", "SOURCE", "--out", "OUT", "--image-size", "big"],
            "image_size: input should be a valid integer",
        ),
        (
            ["convert", "SOURCE", "--out", "OUT", "--image-size", "2048"],
            "image_size: input should be less than or equal to 1024",
        ),
        (
            ["convert", "SOURCE", "--out", "OUT", "--samples-per-shard", "0"],
            "samples_per_shard: input should be greater",
        ),
        (["convert", "SOURCE", "--out", "OUT", "--workers", "-1"], "workers: input should be greater"),
        (["convert", "SOURCE", "--out", "OUT", "--max-rejected", "2"], "max_rejected: input should be less"),
        (["convert", "SOURCE"], "the following arguments are required: --out"),
        (["convert", "--out", "OUT"], "the following arguments are required: SOURCES"),
        (["convert", "SOURCE", "nowhere", "--out", "OUT"], "no source at nowhere: no such file or directory"),
        (["convert", "EMPTY", "--out", "OUT"], "is empty: it has no entries"),
        (["convert", "FILE", "--out", "OUT"], "is a file, not the folder of an LMDB"),
        (["convert", "SOURCE", "--out", "DATA"], "already holds another data set: give another --out"),
        (["convert", "SOURCE", "--out", "OUT", "--part", "3/2"], "--part 3/2: the first number counts from 1"),
        (["convert", "SOURCE", "--out", "OUT", "--exclude", "nowhere"], "cannot read nowhere: No such file"),
        (["merge", "FOLDER"], "nothing to merge at"),
        (["convert", "SOURCE", "--out", "FOLDER"], "is not empty (it holds shard-000000.tar)"),
        (["convert", "SOURCE", "--out", "SOURCE"], "is not empty (it holds data.mdb)"),
        (["convert", "SOURCE", "--out", "FILE"], "is a file: give a folder that is new or empty"),
        (["verify", "nowhere"], "no data set at nowhere: no such directory"),
        (["verify", "FOLDER"], "no manifest.json"),
        (["verify"], "the following arguments are required: DIRECTORY"),
        (["preview", "DATA", "--out", "FILE"], "exists: give another name, or remove it first"),
        (["preview", "DATA", "--out", "OUT"], "no place for a picture: give a name ending in .png"),
        (["preview", "DATA", "--out", "nowhere/sheet.png"], "no place for a picture"),
        (["preview", "FOLDER", "--out", "OUT.png"], "no manifest.json"),
        (
            ["preview", "DATA", "--out", "OUT.png", "--num", "0"],
            "num: input should be greater than or equal to 1",
        ),
        (["demo", "--out", "OUT", "--images", "0"], "images: input should be greater than or equal to 1"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(workplace: Path, words: list[str], message: str) -> None:
    places = {
        "SOURCE": "source",
        "OUT": "out",
        "OUT.png": "out.png",
        "EMPTY": "empty",
        "FOLDER": "folder",
        "DATA": "data",
        "FILE": "file.png",
    }
    before = contents(workplace)
    process = run_shards(*[workplace / places[word] if word in places else word for word in words])
    assert message in error_of(process)
    assert contents(workplace) == before
    assert not (workplace / "out").exists()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, an empty LMDB, a folder with somebody's shard, a data set and a file."""
    folder = tmp_path_factory.mktemp("workplace")
    write_lmdb(folder / "source", numbered(3))
    data_set(folder)
    lmdb.open(str(folder / "empty")).close()
    (folder / "folder").mkdir()
    (folder / "folder" / "shard-000000.tar").write_bytes(b"somebody's")
    (folder / "file.png").write_bytes(b"somebody's")
    return folder


def test_verify_says_that_an_intact_data_set_is_intact(workplace: Path) -> None:
    process = run_shards("verify", workplace / "data")
    digest = read_manifest(workplace / "data").digest()
    assert (process.returncode, process.stdout) == (
        0,
        f"10 images in 3 shards, all intact, at {workplace}/data, digest {digest}\n",
    )


def test_verify_prints_every_problem_and_fails_with_the_first(tmp_path: Path) -> None:
    out, _ = data_set(tmp_path)
    (out / "shard-000000.tar").unlink()
    content = bytearray((out / "shard-000002.tar").read_bytes())
    content[600] ^= 1
    (out / "shard-000002.tar").write_bytes(content)
    process = run_shards("verify", out)
    assert process.returncode == 2
    first, second = process.stdout.splitlines()
    assert first == "shard-000000.tar: is missing"
    assert second.startswith("shard-000002.tar: its SHA-256 is ")
    assert process.stderr.splitlines()[-1] == (
        f"error: {out} is damaged: 2 problems, the first: {first}; convert or copy it again"
    )


@pytest.mark.parametrize(("num", "grid"), [(9, (3, 3)), (10, (4, 3)), (64, (4, 3)), (1, (1, 1)), (2, (2, 1))])
def test_preview_lays_evenly_spread_samples_out_in_rows(tmp_path: Path, num: int, grid: tuple[int, int]) -> None:
    out, manifest = data_set(tmp_path)
    process = run_shards("preview", out, "--out", tmp_path / "sheet.png", "--num", num)
    count = min(num, 10)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == f"{count} images of {out} on {tmp_path}/sheet.png\n"
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (16 * grid[1], 16 * grid[0], 3)
    for place in range(count):
        name, index = locate(manifest, place * 10 // count)
        row, column = 16 * (place // grid[0]), 16 * (place % grid[0])
        pixels = read_sample(out / name, manifest.layout, index)[1]
        assert np.array_equal(sheet[row : row + 16, column : column + 16], pixels)


def test_preview_of_a_data_set_without_a_shard_is_one_line(tmp_path: Path) -> None:
    out, _ = data_set(tmp_path)
    (out / "shard-000001.tar").unlink()
    error = error_of(run_shards("preview", out, "--out", tmp_path / "sheet.png"))
    assert error.startswith(f"shard {out}/shard-000001.tar is missing")
    assert not (tmp_path / "sheet.png").exists()


def test_demo_convert_verify_and_preview_follow_each_other(tmp_path: Path) -> None:
    demo = run_shards("demo", "--out", tmp_path / "demo", "--images", 5, "--seed", 3, "--workers", 1)
    assert demo.returncode == 0, demo.stderr
    source = tmp_path / "demo" / "demo_train_lmdb"
    assert demo.stdout == f"5 pictures at {source}; next: python -m shards convert {source} --out DIR\n"
    assert run_shards("convert", source, "--out", tmp_path / "data").returncode == 0
    assert run_shards("verify", tmp_path / "data").returncode == 0
    assert run_shards("preview", tmp_path / "data", "--out", tmp_path / "sheet.png").returncode == 0
    assert read_manifest(tmp_path / "data").samples == 5


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"env -u PYTHONUNBUFFERED {sys.executable} -m shards --help | true; exit ${{PIPESTATUS[0]}}"
    process = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("word", ["--help", "export"])
def test_an_output_that_cannot_be_written_is_one_line(
    workplace: Path, tmp_path: Path, word: str, unbuffered: str
) -> None:
    words = [word] if word == "--help" else [word, str(workplace / "source"), "--out", str(tmp_path / "out")]
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "shards", *words],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert process.returncode == 2
    lines = [line for line in process.stderr.splitlines() if not line.startswith("export: 100%")]
    assert len(lines) == 1 and "output (No space left on device)" in lines[0]


@pytest.mark.parametrize("command", ["convert", "export", "verify", "preview", "demo"])
def test_a_path_that_no_disk_takes_is_one_line(workplace: Path, tmp_path: Path, command: str) -> None:
    place = tmp_path / ("line\nbreak" + "x" * 300)
    words = {
        "convert": [workplace / "source", "--out", place],
        "export": [workplace / "source", "--out", place],
        "verify": [place],
        "preview": [place, "--out", tmp_path / "sheet.png"],
        "demo": ["--out", place, "--images", 1, "--workers", 1],
    }
    process = run_shards(command, *words[command])
    lines = [line for line in process.stderr.splitlines() if not line.startswith("demo:")]
    assert process.returncode == 2 and process.stdout == ""
    assert len(lines) == 1 and lines[0].startswith("error: ") and "File name too long" in lines[0]


def test_a_folder_whose_name_is_not_utf8_serves_as_well(tmp_path: Path) -> None:
    source = write_lmdb(tmp_path / "source", numbered(3))
    out = tmp_path / os.fsdecode(b"\xff")
    out.mkdir()
    assert run_shards("demo", "--out", out / "demo", "--images", 1, "--workers", 1).returncode == 0
    assert run_shards("export", source, "--out", out / "files").returncode == 0
    assert run_shards("convert", source, "--out", out / "data").returncode == 0
    process = run_shards("verify", out / "data")
    assert process.returncode == 0 and f"all intact, at {tmp_path}/\\udcff/data, digest" in process.stdout


def test_the_package_imports_no_torch() -> None:
    code = "import sys, shards.__main__, shards.preview, shards.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
