"""A conversion that is killed at any moment goes on with the same command, and ends in the same bytes.

KILLS=200 python -m pytest tests/shards/test_kills.py runs more of them.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from shards.__main__ import main
from shards.conversion.reports import FOLDER_NAME
from shards.manifest import MANIFEST_NAME, read_manifest
from shards.verify import verify
from tests.support.commands import module, start
from tests.support.forks import status_of
from tests.support.shards_fixtures import contents, encoded, error_of, numbered, picture, run_shards, write_lmdb

KILLS = int(os.environ.get("KILLS", "100"))
OPTIONS = ("--samples-per-shard", "8", "--max-rejected", "0.1", "--image-size", "32")


def convert_killed_at(operation: int, out: Path, words: Sequence[str]) -> None:
    """Convert in this process, which is killed before the file operation of this number in `out`."""
    operations = 0

    def hook(event: str, arguments: Sequence[object]) -> None:
        nonlocal operations
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            names = [os.fsdecode(name) for name in arguments if isinstance(name, (str, bytes, os.PathLike))]
            operations += any(str(out) in name for name in names)
            if operations == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    main(list(words))


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
    assert run_shards("convert", source, "--out", out, *OPTIONS, "--workers", 1).returncode == 0
    assert sorted(contents(out))[:3] == ["keys.jsonl", MANIFEST_NAME, "rejected.jsonl"]
    return contents(out)


def without_reports(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(out).items() if not name.startswith(FOLDER_NAME)}


def shard_count(out: Path) -> int:
    return len(list(out.glob("shard-*.tar")))


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
    assert run_shards("convert", source, "--out", out, *OPTIONS).returncode == 0
    assert contents(out) == golden
    assert finished >= 1 and kept >= KILLS // 10  # else no kill met a conversion that went on


def test_a_kill_at_any_file_operation_costs_nothing(source: Path, golden: dict[str, bytes], tmp_path: Path) -> None:
    small = tmp_path / "small"
    shutil.copytree(source, small)
    out = tmp_path / "data"
    options = ("--samples-per-shard", "60", *OPTIONS[2:])
    assert run_shards("convert", small, "--out", out, *options, "--workers", 1).returncode == 0
    expected = contents(out)
    shutil.rmtree(out)
    words = ["convert", str(small), "--out", str(out), *options, "--workers", "1"]
    for at in count(1):
        status = status_of(convert_killed_at, at, out, words)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if (out / MANIFEST_NAME).exists():
            assert without_reports(out) == expected
        assert run_shards(*words).returncode == 0
        assert contents(out) == expected, at
        shutil.rmtree(out)
    assert at > 30  # the operations were met one after the other


def test_what_a_kill_left_is_not_written_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    assert run_shards("convert", source, "--out", out, *OPTIONS, "--part", "1/2").returncode == 0
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    (out / "shard-000004.tar").write_bytes(b"half a shard")
    assert run_shards("convert", source, "--out", out, *OPTIONS, "--part", "1/2").returncode == 0
    changed = {name for name, time in kept.items() if (out / name).stat().st_mtime_ns != time}
    assert changed == {"shard-000004.tar"} and len(kept) == 10
    other = [*OPTIONS[:-1], "16"]
    assert run_shards("convert", source, "--out", out, *other).returncode == 0  # another command replaces all
    assert read_manifest(out).image_size == 16 and verify(out, 1)[1] == []


def test_another_source_of_the_same_name_and_keys_is_not_taken_for_the_first(tmp_path: Path) -> None:
    first = write_lmdb(tmp_path / "first" / "photos", numbered(16))
    second = write_lmdb(tmp_path / "second" / "photos", {key: encoded(picture(99)) for key in numbered(16)})
    assert run_shards("convert", second, "--out", tmp_path / "expected", *OPTIONS).returncode == 0
    assert run_shards("convert", first, "--out", tmp_path / "data", *OPTIONS, "--part", "1/2").returncode == 0
    assert run_shards("convert", second, "--out", tmp_path / "data", *OPTIONS).returncode == 0
    assert contents(tmp_path / "data") == contents(tmp_path / "expected")


def test_the_same_command_on_a_complete_data_set_changes_nothing_and_another_is_refused(
    source: Path, golden: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "data"
    (tmp_path / "keys.txt").write_bytes(b"image0000\n")
    assert run_shards("convert", source, "--out", out, *OPTIONS).returncode == 0
    for part in ([], ["--part", "1/2"]):
        process = run_shards("convert", source, "--out", out, *OPTIONS, *part)
        assert process.returncode == 0 and process.stdout.startswith("nothing to do: 158 images in 20 shards")
        assert contents(out) == golden
    for other in (["--max-images", 9], ["--fast"], ["--exclude", tmp_path / "keys.txt"], ["--samples-per-shard", 9]):
        error = error_of(run_shards("convert", source, "--out", out, *OPTIONS, *other))
        assert error.startswith(f"{out} already holds another data set")
    assert contents(out) == golden


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1)])
def test_parts_in_any_order_and_a_merge_make_the_same_bytes(
    source: Path, golden: dict[str, bytes], tmp_path: Path, order: tuple[int, ...]
) -> None:
    out = tmp_path / "data"
    for number in order:
        assert "is not complete" in run_shards("merge", out).stderr or number == order[0]
        process = run_shards("convert", source, "--out", out, *OPTIONS, "--part", f"{number}/3")
        assert process.returncode == 0, process.stderr
        assert process.stdout == f"part {number}/3 at {out}; after the last: python -m shards merge {out}\n"
    assert run_shards("merge", out).returncode == 0
    assert contents(out) == golden
    assert run_shards("merge", out).returncode == 0
    assert contents(out) == golden


def test_parts_of_different_conversions_are_not_merged(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    assert run_shards("convert", source, "--out", out, *OPTIONS, "--part", "1/2").returncode == 0
    assert run_shards("convert", source, "--out", out, *OPTIONS, "--part", "2/2", "--fast").returncode == 0
    assert "part 2/2 at" in error_of(run_shards("merge", out))
    assert run_shards("convert", source, "--out", out, *OPTIONS, "--part", "2/2").returncode == 0
    (out / FOLDER_NAME / "shard-000004.json").unlink()
    assert "run convert --part 1/2 again" in error_of(run_shards("merge", out))
    assert not (out / MANIFEST_NAME).exists()
