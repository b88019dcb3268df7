"""A conversion that does not end well: interrupted, killed, without room, or beside another one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from shards.common.errors import UserError
from shards.conversion.output_dir import claim
from shards.conversion.reports import FOLDER_NAME, Part
from tests.support.commands import module, start
from tests.support.shards_fixtures import (
    ROOT,
    contents,
    convert_here,
    encoded,
    error_of,
    largest_file,
    numbered,
    output_of,
    picture,
    write_lmdb,
)


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


def test_two_conversions_into_one_folder_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "data"
    small = write_lmdb(tmp_path / "small", numbered(3))
    with claim(out, Part()):
        assert error_of("convert", small, "--out", out).startswith(f"another conversion is writing to {out}")


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"no room at .*: the shards take 1,000,000,000,000,000,000 bytes"),
        claim(tmp_path / "data", Part(), 10**18),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fills_up_is_one_line_and_leaves_no_half_file(tmp_path: Path, workers: int) -> None:
    small, out = write_lmdb(tmp_path / "small", numbered(30)), tmp_path / "data"
    full = pytest.raises(UserError, match=rf"^cannot write to {out}: File too large$")
    with largest_file(100 << 10), full:  # of the 134 KiB that a shard of 10 takes
        convert_here(small, out, "--samples-per-shard", 10, workers=workers)
    assert sorted(contents(out)) == [f"{FOLDER_NAME}/lock"]


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
