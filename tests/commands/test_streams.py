"""Training and its standard streams: it goes on without them, and a terminal that hangs up has it save.

Promises 8 (stopping) and 11 (errors) of dist_dcgan/README.md.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.commands import SECONDS, environment, metrics, module, train_command
from tests.support.forks import Forked
from tests.support.waiting import rows_so_far, wait_until

ROOT = Path(__file__).parents[2]
STEPS = 12
SMALL = ["--preset", "debug", "--width", 4, "--global-batch", 8, "--quality.extractor", "none", "--wandb", "disabled"]
ENDLESS = [*SMALL, "--max-steps", 1_000_000, "--checkpoint.every-steps", 1_000_000]


def reader_exits() -> int:
    """Return the end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def disk_is_full() -> int:
    """Return a descriptor that takes no byte."""
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("stream", [reader_exits, disk_is_full])
def test_training_without_output_ends_well_with_every_row(
    stream: Callable[[], int], demo_shards: Path, tmp_path: Path
) -> None:
    words = train_command(1, *SMALL, "--max-steps", STEPS, "--data", demo_shards, "--run-dir", tmp_path / "run")
    descriptor = stream()
    process = Forked(words, environment(), streams=(descriptor, descriptor))
    os.close(descriptor)
    assert process.wait(SECONDS) == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert (tmp_path / "run" / "generator_ema.safetensors").exists()


def test_a_command_that_leaves_files_goes_on_without_output(demo_lmdb: Path, tmp_path: Path) -> None:
    descriptor = reader_exits()
    command = module("shards", "convert", demo_lmdb, "--out", tmp_path / "set", "--workers", 1)
    assert Forked(command, environment(), streams=(descriptor, descriptor)).wait(SECONDS) == 0
    assert (tmp_path / "set" / "manifest.json").exists()


def hang_up(process: subprocess.Popen[bytes]) -> None:
    """Send SIGHUP to all of its session, as the end of a login does."""
    os.killpg(process.pid, signal.SIGHUP)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "nohup"),
    [(launcher, nohup) for launcher in ("alone", "launch/torchrun.sh") for nohup in (False, True)]
    + [("torchrun", False)],
)
def test_a_session_that_ends_has_training_save_unless_it_is_to_outlive_it(
    launcher: str, nohup: bool, demo_shards: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = [str(word) for word in [*ENDLESS, "--data", demo_shards, "--run-dir", run_dir]]
    command = {
        "alone": [sys.executable, "-m", "dist_dcgan.train", "--world-size", "1", *words],
        "launch/torchrun.sh": ["bash", str(ROOT / launcher), *words],
        "torchrun": train_command(2, *words),
    }[launcher]
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            ["nohup", *command] if nohup else command,
            env=environment() | {"RANKS": "2", "RESTARTS": "0", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    wait_until(lambda: rows_so_far(run_dir) >= 2)
    hang_up(process)
    if nohup:
        seen = rows_so_far(run_dir)
        wait_until(lambda: rows_so_far(run_dir) >= seen + 2)
        process.send_signal(signal.SIGTERM)
    process.wait(SECONDS)
    assert (run_dir / "STOPPED").exists(), (tmp_path / "output").read_text()
    assert len(list((run_dir / "checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_a_terminal_that_is_closed_has_training_save(demo_shards: Path, tmp_path: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        words = [str(word) for word in [*ENDLESS, "--data", demo_shards, "--run-dir", tmp_path / "run"]]
        command = [sys.executable, "-m", "dist_dcgan.train", "--world-size", "1", *words]
        os.execve(sys.executable, command, environment() | {"PYTHONPATH": str(ROOT)})
    wait_until(lambda: rows_so_far(tmp_path / "run") >= 2)
    os.close(terminal)  # the kernel sends SIGHUP, and every write fails
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / "run" / "STOPPED").exists()
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", ["bash launch/torchrun.sh", "torchrun --standalone --nproc_per_node=2 -m dist_dcgan.train"]
)
def test_two_ranks_whose_log_is_cut_by_head_train_to_the_end(launcher: str, demo_shards: Path, tmp_path: Path) -> None:
    words = [*SMALL, "--max-steps", 50, "--data", demo_shards, "--run-dir", tmp_path / "run"]
    command = f"{launcher} {' '.join(map(str, words))} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
    env = environment() | {"RANKS": "2", "RESTARTS": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert metrics(tmp_path / "run")[-1]["step"] == 50
