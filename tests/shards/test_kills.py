"""Conversions that do not end well: killed at any moment, interrupted, without room, or beside another one.

The same command goes on, and ends in the same bytes.

KILLS=200 runs as many random kills as it says.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from shards.common.errors import UserError
from shards.conversion.output_dir import claim
from shards.conversion.reports import FOLDER_NAME, Part
from shards.manifest import MANIFEST_NAME
from shards.verify import verify
from tests.support.commands import module, start
from tests.support.forks import status_of
from tests.support.shards_fixtures import (
    ROOT,
    contents,
    convert_here,
    encoded,
    error_of,
    killed_at,
    largest_file,
    numbered,
    output_of,
    picture,
    run_shards,
    write_files,
    write_lmdb,
)

KILLS = int(os.environ.get("KILLS", "20"))
OPTIONS = ("--samples-per-shard", "8", "--max-rejected", "0.1", "--image-size", "32")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 entries in 20 shards, with renamed and rejected ones."""
    entries = numbered(156) | {b"a.b": encoded(picture(1)), b"z/z": encoded(picture(2))}
    entries |= {b"broken": b"no image", b"image0100x": encoded(picture(3))[:200]}
    return write_lmdb(tmp_path_factory.mktemp("kills") / "source", entries)


@pytest.fixture(scope="module")
def golden(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The data set of a conversion that nobody disturbed."""
    out = tmp_path_factory.mktemp("golden") / "data"
    convert_here(source, out, *OPTIONS)
    assert sorted(contents(out))[:3] == ["keys.jsonl", MANIFEST_NAME, "rejected.jsonl"]
    return contents(out)


def without_reports(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(out).items() if not name.startswith(FOLDER_NAME)}


def shard_count(out: Path) -> int:
    return len(list(out.glob("shard-*.tar")))


@pytest.mark.slow
def test_random_kills_cost_nothing_but_time(source: Path, golden: dict[str, bytes], tmp_path: Path) -> None:
    rng = random.Random(0)
    out = tmp_path / "data"
    finished = kept = 0
    for kill in range(KILLS):
        workers = 1 + kill % 2
        before = shard_count(out)
        new_shards = rng.randrange(8)  # by shards, not by the clock: the same on a machine of any speed
        process = start(module("shards", "convert", source, "--out", out, *OPTIONS, "--workers", workers))
        while shard_count(out) < before + new_shards and process.poll() is None:
            time.sleep(0.002)
        with suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.0, 0.1 if new_shards else 0.5))
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL)
        kept += before > 0
        if (out / MANIFEST_NAME).exists():  # whole, whether or not it was killed while it cleaned up
            assert without_reports(out) == golden
        if process.returncode == 0:
            assert contents(out) == golden
            finished += 1
            shutil.rmtree(out)
        time.sleep(0.05)  # workers see that their parent is gone
    convert_here(source, out, *OPTIONS)
    assert contents(out) == golden
    assert finished >= 1 and kept >= KILLS // 10  # else no kill met a conversion that went on


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_file_operation_costs_nothing(source: Path, tmp_path: Path, stride: int) -> None:
    out = tmp_path / "data"
    options = ("--samples-per-shard", "60", *OPTIONS[2:])
    convert_here(source, tmp_path / "expected", *options)
    expected = contents(tmp_path / "expected")
    words = ["convert", str(source), "--out", str(out), *options, "--workers", "1"]
    for at in count(1, stride):
        status = status_of(killed_at, at, out, words)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if (out / MANIFEST_NAME).exists():
            assert without_reports(out) == expected
        output_of(*words)
        assert contents(out) == expected, at
        shutil.rmtree(out)
    assert at > 30  # the operations were met one after the other


def test_what_a_kill_left_is_not_written_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    half = ("convert", source, "--out", out, *OPTIONS, "--part", "1/2")
    output_of(*half)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    (out / "shard-000004.tar").write_bytes(b"half a shard")
    output_of(*half)
    changed = {name for name, time in kept.items() if (out / name).stat().st_mtime_ns != time}
    rejecting = {"shard-000000.tar", "shard-000012.tar"}
    assert changed == {"shard-000004.tar", *rejecting} and len(kept) == 10
    assert convert_here(source, out, *OPTIONS[:-1], 16).image_size == 16  # another command replaces all
    assert verify(out, 1)[1] == []


def test_an_image_that_was_mended_is_looked_at_again(tmp_path: Path) -> None:
    images = {f"{key.decode()}.jpg": data for key, data in numbered(16).items()}
    folder = write_files(tmp_path / "images", images | {"image0009.jpg": b""})
    options = ("--samples-per-shard", 8, "--image-size", 32)
    whole, parts = (("convert", folder, "--out", tmp_path / name, *options) for name in ("data", "parts"))
    assert "1 of 16 source entries are unusable" in run_shards(*whole).stderr
    for number in ("1/2", "2/2"):
        output_of(*parts, "--part", number)
    assert "1 of 16 source entries are unusable" in error_of("merge", tmp_path / "parts")
    first = (tmp_path / "data" / "shard-000000.tar").stat().st_mtime_ns
    write_files(folder, images)
    output_of(*parts, "--part", "2/2")
    for line in (output_of(*whole), output_of("merge", tmp_path / "parts")):
        assert line.startswith("16 images in 2 shards, 0 rejected")
    assert (tmp_path / "data" / "shard-000000.tar").stat().st_mtime_ns == first


def test_another_source_of_the_same_name_and_keys_is_not_taken_for_the_first(tmp_path: Path) -> None:
    first = write_lmdb(tmp_path / "first" / "photos", numbered(16))
    second = write_lmdb(tmp_path / "second" / "photos", {key: encoded(picture(99)) for key in numbered(16)})
    convert_here(second, tmp_path / "expected", *OPTIONS)
    output_of("convert", first, "--out", tmp_path / "data", *OPTIONS, "--part", "1/2")
    convert_here(second, tmp_path / "data", *OPTIONS)
    assert contents(tmp_path / "data") == contents(tmp_path / "expected")


def test_the_same_command_on_a_complete_data_set_changes_nothing_and_another_is_refused(
    source: Path, golden: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "data"
    (tmp_path / "keys.txt").write_bytes(b"image0000\n")
    words = ("convert", source, "--out", out, *OPTIONS)
    output_of(*words)
    for part in ([], ["--part", "1/2"]):
        assert output_of(*words, *part).startswith("nothing to do: 158 images in 20 shards")
        assert contents(out) == golden
    for other in (["--max-images", 9], ["--fast"], ["--exclude", tmp_path / "keys.txt"], ["--samples-per-shard", 9]):
        assert error_of(*words, *other).startswith(f"{out} already holds another data set")
    assert contents(out) == golden


@pytest.mark.parametrize(
    "order", [(3, 1, 2), *(pytest.param(order, marks=pytest.mark.slow) for order in [(1, 2, 3), (2, 3, 1)])]
)
def test_parts_in_any_order_and_a_merge_make_the_same_bytes(
    source: Path, golden: dict[str, bytes], tmp_path: Path, order: tuple[int, ...]
) -> None:
    out = tmp_path / "data"
    for number in order:
        assert "is not complete" in run_shards("merge", out).stderr or number == order[0]
        summary = output_of("convert", source, "--out", out, *OPTIONS, "--part", f"{number}/3")
        assert summary == f"part {number}/3 at {out}; after the last: python -m shards merge {out}\n"
    for _ in range(2):
        output_of("merge", out)
        assert contents(out) == golden


def test_parts_of_different_conversions_are_not_merged(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    words = ("convert", source, "--out", out, *OPTIONS, "--part")
    output_of(*words, "1/2")
    output_of(*words, "2/2", "--fast")
    assert "part 2/2 at" in error_of("merge", out)
    output_of(*words, "2/2")
    (out / FOLDER_NAME / "shard-000004.json").unlink()
    assert "run convert --part 1/2 again" in error_of("merge", out)
    assert not (out / MANIFEST_NAME).exists()


def start_conversion(source: Path, out: Path, workers: int) -> subprocess.Popen[str]:
    """Start a conversion that takes long enough to be cut short, and wait for its first shard."""
    command = [sys.executable, "-m", "shards", "convert", source, "--out", out, "--workers", str(workers)]
    process = subprocess.Popen(
        [*map(str, command), "--samples-per-shard", "5"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that starts jobs in the background, as CI's may, has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for(lambda: (out / "shard-000000.tar").exists())
    return process


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def long_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 entries of 1000 x 1000 pixels: several seconds of work."""
    images = [encoded(picture(i, 1000, 1000)) for i in range(4)]
    return write_lmdb(tmp_path_factory.mktemp("long") / "source", {b"%04d" % i: images[i % 4] for i in range(400)})


def ended(session: int) -> bool:
    """Whether no process of a session is left, but for those that nobody has waited for."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            state, _, _, of_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(of_session) == session and state != "Z":
                return False
    return True


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_ends_a_conversion_at_once_and_quietly(long_source: Path, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "data"
    process = start_conversion(long_source, out, workers)
    os.killpg(process.pid, signal.SIGINT)
    begin = time.monotonic()
    stdout, stderr = process.communicate(timeout=20)
    assert time.monotonic() - begin < 5
    assert (process.returncode, stdout) == (130, "")
    assert "Traceback" not in stderr and len(stderr.splitlines()) == 1  # how far it was
    wait_for(lambda: ended(process.pid))
    left = set(contents(out))
    assert f"{FOLDER_NAME}/lock" in left and "manifest.json" not in left
    assert not any(name.endswith(".tmp") for name in left)


def test_workers_die_with_a_killed_parent_and_the_next_conversion_replaces_what_is_left(
    long_source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data"
    process = start_conversion(long_source, out, workers=2)
    process.kill()
    process.communicate(timeout=20)
    wait_for(lambda: ended(process.pid))
    left = contents(out)
    assert "manifest.json" not in left and "shard-000000.tar" in left
    (out / "shard-000399.tar").write_bytes(b"of a conversion into more shards")
    small = write_lmdb(tmp_path / "small", numbered(3))
    assert convert_here(small, out).samples == 3
    assert sorted(contents(out)) == ["manifest.json", "shard-000000.tar"]


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(
            UserError, match=r"no room at .*: the shards take 1,000,000,000,000,000,000 bytes, .*: make room$"
        ),
        claim(tmp_path / "data", Part(), 10**18),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fills_up_is_one_line_and_leaves_no_half_file(tmp_path: Path, workers: int) -> None:
    small, out = write_lmdb(tmp_path / "small", numbered(30)), tmp_path / "data"
    full = pytest.raises(
        UserError, match=rf"^cannot write to {out} \(File too large\): mend that and give the same command"
    )
    with largest_file(100 << 10), full:  # of the 134 KiB that a shard of 10 takes
        convert_here(small, out, "--samples-per-shard", 10, workers=workers)
    assert sorted(contents(out)) == [f"{FOLDER_NAME}/lock"]


@pytest.mark.slow
def test_parts_that_start_together_share_the_folder_and_other_counts_are_refused(tmp_path: Path) -> None:
    out, small = tmp_path / "data", write_lmdb(tmp_path / "small", numbered(24))
    words = ["convert", small, "--out", out, "--samples-per-shard", 1]
    parts = [start(module("shards", *words, "--part", f"{n}/6")) for n in range(1, 7)]
    assert [part.wait(timeout=60) for part in parts] == [0] * 6
    with claim(out, Part(1, 6)):
        for part in ("1/6", "1/3", "1/1"):
            assert error_of(*words, "--part", part).startswith(f"another conversion is writing to {out}")
        assert "another conversion is writing" in error_of("merge", out)
    assert output_of("merge", out).startswith("24 images in 24 shards")
