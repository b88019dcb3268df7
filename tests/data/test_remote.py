"""Training from a real web server that stalls or dies: it goes on in order, or names what is wrong."""

from __future__ import annotations

import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.support.commands import SECONDS, start, succeed, train_command
from tests.support.http_server import web_server
from tests.support.waiting import rows_so_far, wait_until

STALL_SECONDS = 10  # longer than the loader takes a silence for


@pytest.fixture
def source(demo_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_shards, tmp_path / "source"))


def flags(data: object, run_dir: Path, steps: int) -> list[object]:
    small = ["--preset", "debug", "--width", 4, "--global-batch", 8, "--max-steps", steps, "--wandb", "disabled"]
    return ["--data", data, "--data.window-shards", 1, "--run-dir", run_dir, *small]


def staged(address: str, tmp_path: Path) -> list[object]:
    """So few shards fit in that they are fetched again and again."""
    return [*flags(address, tmp_path / "run", 150), "--data.cache-dir", tmp_path / "cache", "--data.cache-gb", 0.0008]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_server_that_stalls_changes_nothing(source: Path, tmp_path: Path, ranks: int) -> None:
    succeed(train_command(ranks, *flags(source, tmp_path / "expected", 150)))
    with web_server(source) as (server, address):
        process = start(train_command(ranks, *staged(address, tmp_path)))
        wait_until(lambda: rows_so_far(tmp_path / "run") >= 20, process)
        server.send_signal(signal.SIGSTOP)
        time.sleep(STALL_SECONDS)
        server.send_signal(signal.SIGCONT)
        output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output
    assert "trying again in" in output
    generators = [(tmp_path / run / "generator_ema.safetensors").read_bytes() for run in ("expected", "run")]
    assert generators[0] == generators[1]


def test_a_server_that_dies_ends_the_run_with_its_name(source: Path, tmp_path: Path) -> None:
    with web_server(source) as (server, address):
        process = start(train_command(2, *staged(address, tmp_path)))
        wait_until(lambda: rows_so_far(tmp_path / "run") >= 20, process)
        server.kill()
        output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert re.search(r"error: rank [01] of 2 on ", output)
    assert f"cannot get {address}/shard-" in output and "after 5 attempts without progress" in output
