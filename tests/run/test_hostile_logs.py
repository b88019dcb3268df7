"""Launchers write nothing in a run directory of somebody else's: torchrun and SLURM follow links."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_dcgan.run import directory
from tests.support.hostile import NOBODY, foreign, foreign_link, secret
from tests.support.mistakes import refusal

ROOT = Path(__file__).parents[2]
FLAGS = ["--preset", "debug", "--data", "data", "--run-dir"]
THEIRS = (
    " belongs to another user, who could lead the job's output away: copy the run with cp -r, and name the copy "
    "with --run-dir"
)


def test_a_launcher_gets_a_run_directory_of_the_users_own_with_a_folder_for_logs(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    run = tmp_path / "runs" / "new"
    directory.main([*FLAGS, str(run)])
    assert not run.exists()
    for _ in range(2):
        directory.main(["logs", *FLAGS, str(run)])
        assert [path.name for path in run.iterdir()] == ["logs"]
        run.chmod(0o775)  # a group that works together
        (run / "logs").chmod(0o2770)
    (tmp_path / "disk").mkdir()
    (run / "logs").rmdir()
    (run / "logs").symlink_to(tmp_path / "disk")
    directory.main(["logs", *FLAGS, str(run)])
    assert capfdbinary.readouterr().out == f"{run}\n".encode() * 4


@pytest.mark.parametrize("name", ["", "logs"])
def test_a_launcher_gets_no_folder_of_another_user(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    foreign(run / name, monkeypatch)
    for words in (FLAGS, ["logs", *FLAGS]):
        message = refusal(directory.main, *words, run)
        assert message == f"{run / name if os.geteuid() == 0 else run}{THEIRS}"


@pytest.mark.parametrize("name", ["run", "run/logs"])
def test_a_launcher_follows_no_link_of_another_user(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, link = tmp_path / "mine", tmp_path / name
    mine.mkdir()
    link.parent.mkdir(exist_ok=True)
    foreign_link(link, mine, monkeypatch)
    message = refusal(directory.main, "logs", *FLAGS, tmp_path / "run")
    assert message == f"{link} is a link of another user: name what it leads to, or remove it"
    assert list(mine.iterdir()) == []


@pytest.mark.parametrize("name", ["runs/mine", "runs/mine/logs"])
@pytest.mark.parametrize("mode", [0o777, 0o1777])  # with either, others could make what a job makes
def test_a_launcher_gets_no_folder_in_which_all_users_write(name: str, mode: int, tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine" / "logs").mkdir(parents=True)
    (tmp_path / name).chmod(mode)
    message = refusal(directory.main, "logs", *FLAGS, tmp_path / "runs" / "mine")
    assert message.startswith(f"{tmp_path / name} can be written by all users, who could ") and "chmod o-w" in message


@pytest.mark.parametrize("name", ["runs", "disk"])
def test_a_launcher_is_warned_of_a_folder_above_that_all_users_could_exchange(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, disk = tmp_path / "runs" / "mine", tmp_path / "disk"
    run.mkdir(parents=True)
    (disk / "logs").mkdir(parents=True)
    (run / "logs").symlink_to(disk / "logs")
    (tmp_path / name).chmod(0o777)
    directory.main(["logs", *FLAGS, str(run)])
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path / name} can be written by all users, who could")
    (tmp_path / name).chmod(0o1777)
    directory.main(["logs", *FLAGS, str(run)])
    assert capsys.readouterr().err == ""


def _slurm(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a script of launch/ with commands of SLURM that only leave their names."""
    commands = folder / "commands"
    commands.mkdir(exist_ok=True)
    for name in ("sbatch", "scontrol", "srun"):
        (commands / name).write_text(f'#!/bin/sh\necho {name} >> "{folder}/called"\necho 7\n')
        (commands / name).chmod(0o755)
    environment = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "n1",
    }
    return subprocess.run(
        ["bash", *map(str, words)], env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.system
def test_a_job_in_a_run_directory_of_another_user_starts_and_submits_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    os.chown(run, NOBODY, NOBODY)
    for words in (
        ("launch/train.sbatch", *FLAGS, run),
        ("launch/submit.sh", tmp_path / "data", run, "source", "--", "--preset", "debug"),
    ):
        done = _slurm(tmp_path, *words)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {run}{THEIRS}\n")
    assert not (tmp_path / "called").exists() and list(run.iterdir()) == []
    os.chown(run, os.geteuid(), os.getegid())
    assert _slurm(tmp_path, "launch/train.sbatch", *FLAGS, run).returncode == 0
    assert (tmp_path / "called").read_text().split() == ["scontrol", "srun"]
    assert [path.name for path in run.iterdir()] == ["logs"]


@pytest.mark.parametrize("make", [lambda path, file: path.symlink_to(file), lambda path, file: os.mkfifo(path)])
def test_scores_are_not_appended_to_a_link_or_a_fifo(make: Callable[[Path, Path], None], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    make(run / "evaluation.txt", secret(tmp_path))
    words = ("launch/submit.sh", tmp_path / "data", run, "source", "--", "--preset", "debug")
    done = _slurm(tmp_path, *words)
    message = f"error: {run}/evaluation.txt, to which scores are appended, is a link or no plain file: remove it\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    assert not (tmp_path / "called").exists()
    (run / "evaluation.txt").unlink()
    assert _slurm(tmp_path, *words).stdout.splitlines()[-1] == "submitted 7: evaluate"
