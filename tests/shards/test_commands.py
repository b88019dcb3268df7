"""The commands as a user runs them: what they print, and one line with status 2 for every mistake.

Promise 11 (errors) of dist_dcgan/README.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from shards.lsun.catalog import CATEGORIES
from shards.manifest import read_manifest
from shards.reader import locate, read_sample
from tests.support.commands import module, one_line_error, succeed
from tests.support.shards_fixtures import (
    ROOT,
    contents,
    data_set,
    error_of,
    numbered,
    output_of,
    run_shards,
    write_files,
    write_lmdb,
)

HUGE = "9" * 20
NOWHERE = "--out OUT --address http://127.0.0.1:1"


def test_each_command_runs_as_a_process_of_its_own(tmp_path: Path) -> None:
    def typed(*words: object) -> str:
        return succeed(module("shards", *words), cwd=ROOT).stdout

    source, data = tmp_path / "demo" / "demo_train_lmdb", tmp_path / "data"
    assert typed("demo", "--out", tmp_path / "demo", "--images", 5, "--seed", 3, "--workers", 1) == (
        f"5 pictures at {source}; next: python -m shards convert {source} --out DIR\n"
    )
    for part in ("1/2", "2/2"):
        typed("convert", source, "--out", data, "--samples-per-shard", 3, "--part", part)
    assert typed("merge", data).startswith(f"5 images in 2 shards, 0 rejected, at {data}, digest ")
    digest = read_manifest(data).digest()
    assert typed("verify", data) == f"5 images in 2 shards, all intact, at {data}, digest {digest}\n"
    assert typed("export", source, "--out", tmp_path / "files").startswith("5 files at ")
    assert typed("preview", data, "--out", tmp_path / "sheet.png").startswith("5 images of ")
    assert typed("download", "--list").splitlines() == list(CATEGORIES)
    mistake = one_line_error(module("shards", "verify", tmp_path), cwd=ROOT)
    assert mistake.startswith(f"error: no data set at {tmp_path}: ")


def test_help_lists_the_commands_and_no_command_does_but_is_a_mistake() -> None:
    lines = output_of("--help").splitlines()
    for command in ("download", "demo", "convert", "merge", "export", "verify", "preview"):
        assert sum(line.strip().startswith(f"{command} ") for line in lines) == 1
    process = run_shards()
    assert process.returncode == 2 and process.stdout == output_of("--help")


def test_help_of_a_command_lists_its_options() -> None:
    options = ("SOURCE", "--out", "--image-size", "--samples-per-shard", "--workers", "--max-rejected")
    text = output_of("convert", "--help")
    assert all(option in text for option in options)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources, a folder with somebody's shard, data sets, sound and damaged, and a file."""
    folder = tmp_path_factory.mktemp("workplace")
    write_lmdb(folder / "source", numbered(3))
    write_lmdb(folder / "above" / "unzipped" / "bedroom_lmdb", numbered(1))
    out, _ = data_set(folder)
    sound = contents(out)
    write_files(folder / "partial", {name: data for name, data in sound.items() if name != "shard-000001.tar"})
    write_files(folder / "short", sound | {"shard-000001.tar": bytes(5)})
    write_files(folder / "damaged", sound | {"manifest.json": b"{"})
    lmdb.open(str(folder / "empty")).close()
    write_files(folder, {"folder/shard-000000.tar": b"somebody's", "file.png": b"somebody's"})
    write_files(folder, {"archives/a_lmdb.zip": b"", "junk/data.mdb": b"junk" * 5000, "zeros/data.mdb": bytes(8192)})
    write_files(folder, {"mixed/a.jpg": b"", "mixed/old.tar": b""})
    with zipfile.ZipFile(folder / "bedroom.zip", "w") as archive:
        archive.writestr("bedroom_lmdb/data.mdb", b"")
    return folder


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("convrt", "unknown command convrt; did you mean convert?"),
        ("xyzzy", "unknown command xyzzy (--help lists them all)"),
        (f"download tower bedrom {NOWHERE}", "unknown category 'bedrom'; did you mean bedroom? (--list prints them"),
        (f"download ../tower {NOWHERE}", "unknown category '../tower'; did you mean tower? (--list prints them all)"),
        (f"download {NOWHERE}", "no category given: name some, or test or all (--list prints them)"),
        ("download tower --out OUT --address ftp://x", "address: URL scheme should be 'http' or 'https', got 'ftp:"),
        (f"download tower --split test {NOWHERE}", "split: input should be 'train' or 'val', got 'test'"),
        ("convert SOURCE --out OUT --imagesize 64", "unknown option --imagesize; did you mean --image-size?"),
        ("convert SOURCE --out OUT --image-size 0", "image_size: input should be greater than or equal to 8, got '0'"),
        ("convert SOURCE --out OUT --image-size big", "image_size: input should be a valid integer"),
        ("convert SOURCE --out OUT --image-size 2048", "image_size: input should be less than or equal to 1024"),
        ("convert SOURCE --out OUT --samples-per-shard 0", "samples_per_shard: input should be greater"),
        (f"convert SOURCE --out OUT --samples-per-shard {HUGE}", f"equal to 4294967296, got '{HUGE}'"),
        (
            f"convert SOURCE --out OUT --max-images {HUGE}",
            "max_images: input should be less than or equal to 4294967296",
        ),
        (f"export SOURCE --out OUT --limit {HUGE}", "limit: input should be less than or equal to 4294967296"),
        (f"preview DATA --out OUT.PNG --num {HUGE}", "num: input should be less than or equal to 10000"),
        (f"demo --out OUT --images {HUGE}", "images: input should be less than or equal to 1073741824"),
        ("convert SOURCE --out OUT --workers -1", "workers: input should be greater"),
        ("convert SOURCE --out OUT --max-rejected 2", "max_rejected: input should be less"),
        ("convert SOURCE --out OUT --part 3/2", "--part 3/2: the first number counts from 1"),
        ("convert SOURCE --out OUT --exclude nowhere", "cannot read nowhere: No such file or directory"),
        ("convert SOURCE --out OUT --exclude a --exclude=b", "--exclude is given twice"),
        ("convert SOURCE", "the following arguments are required: --out"),
        ("convert --out OUT", "the following arguments are required: SOURCES"),
        ("convert SOURCE nowhere --out OUT", "no source at nowhere: no such file or directory"),
        ("convert /dev/null --out OUT", "/dev/null is neither a file nor a folder"),
        ("convert MIXED --out OUT", "/mixed holds both images (a.jpg) and tars (old.tar): part them"),
        ("convert EMPTY --out OUT", "/empty is empty: it has no entries"),
        ("convert JUNK --out OUT", "/junk/data.mdb is not an LMDB"),
        ("convert ZEROS --out OUT", "/zeros/data.mdb is not an LMDB"),
        ("convert FILE.PNG --out OUT", "/file.png is one image: give the folder that holds it"),
        ("convert SOURCE/DATA.MDB --out OUT", "not the folder of an LMDB: give the folder that holds data.mdb"),
        ("convert BEDROOM.ZIP --out OUT", "is a file, not the folder of an LMDB: unzip it first"),
        ("convert ARCHIVES --out OUT", "/archives is not the folder of an LMDB: no data.mdb in it; unzip "),
        ("convert ABOVE/UNZIPPED --out OUT", "/unzipped/bedroom_lmdb does: give that folder"),
        (
            "convert SOURCE --out DATA",
            "data set (image_size: 16 -> 64; samples_per_shard: 4 -> 4096): give",
        ),
        ("convert SOURCE --out FOLDER", "is not empty (it holds shard-000000.tar)"),
        ("convert SOURCE --out SOURCE", "is not empty (it holds data.mdb)"),
        ("convert SOURCE --out FILE.PNG", "is a file: give a folder that is new or empty"),
        (
            "convert SOURCE --out FILE.PNG/BELOW",
            "/file.png/below (Not a directory): mend that and give the same command",
        ),
        (
            "convert SOURCE --out SHORT --image-size 16 --samples-per-shard 4",
            "the manifest says 7168 bytes: copy it again",
        ),
        ("convert SOURCE --out DAMAGED", "; copy it again, or remove "),
        ("convert SOURCE --out PARTIAL --part 1/2", "/shard-000001.tar is missing, the manifest says 7168 bytes: copy"),
        ("merge SHORT", "/short/shard-000001.tar has 5 bytes, the manifest says 7168 bytes: copy it again, or remove "),
        (
            "merge PARTIAL",
            "/partial/shard-000001.tar is missing, the manifest says 7168 bytes: copy it again, or remove",
        ),
        ("merge FOLDER", "nothing to merge at"),
        ("export nowhere --out OUT", "no LMDB at nowhere: no such directory"),
        ("export ABOVE --out OUT", "/unzipped/bedroom_lmdb does: give that folder"),
        ("export SOURCE", "the following arguments are required: --out"),
        ("export SOURCE --out OUT --limit 0", "limit: input should be greater than or equal to 1, got '0'"),
        ("export SOURCE --out OUT --limit x", "limit: input should be a valid integer"),
        ("export SOURCE --out OUT --flatt", "unknown option --flatt; did you mean --flat?"),
        ("export SOURCE --out FILE.PNG", "is a file: give a folder"),
        ("export SOURCE --out FILE.PNG/BELOW", "/below (Not a directory): mend that and give the same command again"),
        ("verify nowhere", "no data set at nowhere: no such directory"),
        ("verify FOLDER", "/folder: it has no manifest.json"),
        ("verify DAMAGED", "/damaged/manifest.json is damaged: "),
        ("verify", "the following arguments are required: DIRECTORY"),
        ("preview DATA --out FILE.PNG", "exists: give another name, or remove it first"),
        ("preview DATA --out OUT", "no place for a picture: give a name ending in .png"),
        ("preview DATA --out nowhere/sheet.png", "no place for a picture"),
        ("preview FOLDER --out OUT.PNG", "no manifest.json"),
        ("preview SHORT --out OUT.PNG", "/short/shard-000001.tar has 5 bytes, the manifest says 7168"),
        ("preview PARTIAL --out OUT.PNG", "/partial/shard-000001.tar is missing"),
        ("preview DATA --out OUT.PNG --num 0", "num: input should be greater than or equal to 1"),
        ("demo --out OUT --images 0", "images: input should be greater than or equal to 1"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(workplace: Path, command: str, message: str) -> None:
    """Capitals stand for what is, or could be, in the workplace."""
    before = contents(workplace)
    assert message in error_of(*[workplace / word.lower() if word.isupper() else word for word in command.split()])
    assert contents(workplace) == before
    assert not (workplace / "out").exists()


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
        f"error: {out} is damaged: 2 problems, the first: {first}; copy it again, or remove {out} and convert again"
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


def test_a_preview_too_large_for_memory_names_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = data_set(tmp_path)
    monkeypatch.setattr("shards.preview.MOST_PIXELS", 9 * 16**2)
    words = ("preview", out, "--out", tmp_path / "sheet.png", "--num")
    line = "--num 10 images of 16 pixels a side make more than 2,304 pixels: give --num 9 or less"
    assert error_of(*words, 64) == line and not (tmp_path / "sheet.png").exists()
    assert output_of(*words, 9).startswith("9 images")


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
    lines = [line for line in process.stderr.splitlines() if not line.startswith("export: 100%")]
    if word == "--help":  # nothing else is wanted
        line = "error: cannot write to standard output (No space left on device): redirect it to another place"
        assert (process.returncode, lines) == (2, [line])
    else:
        assert (process.returncode, lines) == (
            0,
            ["warning: going on without standard output: No space left on device"],
        )
        assert len(list((tmp_path / "out").iterdir())) > 0


@pytest.mark.parametrize("command", ["convert", "export", "verify", "preview", "demo"])
def test_a_path_that_no_disk_takes_is_one_line(workplace: Path, tmp_path: Path, command: str) -> None:
    place = tmp_path / ("line\nbreak" + "x" * 300)
    words: dict[str, list[object]] = {
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
    output_of("demo", "--out", out / "demo", "--images", 1, "--workers", 1)
    output_of("export", source, "--out", out / "files")
    output_of("convert", source, "--out", out / "data")
    shown = succeed(module("shards", "verify", out / "data"), cwd=ROOT).stdout
    assert f"all intact, at {tmp_path}/\\udcff/data, digest" in shown


def test_the_package_imports_no_torch() -> None:
    code = "import sys, shards.__main__, shards.preview, shards.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
