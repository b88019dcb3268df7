"""A conversion that is killed at any moment goes on with the same command, and ends in the same bytes.

`--all` runs more random kills, KILLS=200 as many as it says.
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
from shards.manifest import MANIFEST_NAME
from shards.verify import verify
from tests.support.commands import module, start
from tests.support.forks import status_of
from tests.support.shards_fixtures import (
    contents,
    convert_here,
    encoded,
    error_of,
    numbered,
    output_of,
    picture,
    run_shards,
    write_lmdb,
)

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
def kills(request: pytest.FixtureRequest) -> int:
    """The number of random kills."""
    return int(os.environ.get("KILLS", 40 if request.config.getoption("--all", default=False) else 10))


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


def test_random_kills_cost_nothing_but_time(source: Path, golden: dict[str, bytes], tmp_path: Path, kills: int) -> None:
    rng = random.Random(0)
    out = tmp_path / "data"
    finished = kept = 0
    for kill in range(kills):
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
    assert finished >= 1 and kept >= kills // 10  # else no kill met a conversion that went on


def test_a_kill_at_any_file_operation_costs_nothing(source: Path, golden: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "data"
    options = ("--samples-per-shard", "60", *OPTIONS[2:])
    convert_here(source, tmp_path / "expected", *options)
    expected = contents(tmp_path / "expected")
    words = ["convert", str(source), "--out", str(out), *options, "--workers", "1"]
    for at in count(1):
        status = status_of(convert_killed_at, at, out, words)
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
    assert changed == {"shard-000004.tar"} and len(kept) == 10
    assert convert_here(source, out, *OPTIONS[:-1], 16).image_size == 16  # another command replaces all
    assert verify(out, 1)[1] == []


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


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1)])
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
