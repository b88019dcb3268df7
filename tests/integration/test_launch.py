"""train.sbatch against a stand-in for SLURM: what is queued again and what is not."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.shards_fixtures import contents, numbered, write_lmdb

LAUNCH = Path(__file__).parents[2] / "launch"
STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then echo n1; else echo "$@" >> requeued; fi',
    "scancel": 'echo "$@" >> passed_on; exit 1',  # fails, as it does while the controller is busy
    # runs until it is told to stop, then leaves the marker that training would
    "srun": """touch started
while [ ! -e passed_on ]; do sleep 0.05; done
[ -z "$MARKER" ] || touch run/STOPPED
exit 1""",
}


def submit(folder: Path, number: signal.Signals | None, marker: bool, earlier: bool) -> tuple[int, bool]:
    """Run the script, send it a signal, and return its exit status and whether it queued the job again.

    `marker`: training leaves one; `earlier`: an earlier start has left one.
    """
    (folder / "run").mkdir()
    if earlier:
        (folder / "run" / "STOPPED").touch()
    (folder / "bin").mkdir()
    for name, body in STAND_INS.items():
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    env = os.environ | {
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "1",
        "MARKER": "yes" if marker else "",
    }
    process = subprocess.Popen(["bash", LAUNCH / "train.sbatch", "--run-dir", "run"], cwd=folder, env=env)
    while not (folder / "started").exists():
        assert process.poll() is None
        time.sleep(0.02)
    if number is None:
        (folder / "passed_on").touch()
    else:
        process.send_signal(number)
    return process.wait(timeout=30), (folder / "requeued").exists()


def test_a_run_that_saved_itself_before_the_limit_is_queued_again(tmp_path: Path) -> None:
    assert submit(tmp_path, signal.SIGUSR1, marker=True, earlier=False) == (0, True)
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert (tmp_path / "passed_on").read_text() == "--signal=USR1 7\n"


OTHERS = {
    "cancelled": (signal.SIGTERM, True, False),
    "not saved": (signal.SIGUSR1, False, False),
    "crashed after an earlier stop": (None, False, True),
}


@pytest.mark.parametrize(("number", "marker", "earlier"), OTHERS.values(), ids=OTHERS)
def test_no_other_run_is(tmp_path: Path, number: signal.Signals | None, marker: bool, earlier: bool) -> None:
    assert submit(tmp_path, number, marker, earlier) == (1, False)


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch")))
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)


def test_the_tasks_of_an_array_and_the_merge_that_the_first_submits_make_the_data_set(tmp_path: Path) -> None:
    source, out = write_lmdb(tmp_path / "source", numbered(20)), tmp_path / "with space" / "data"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" >> submitted\n')
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(LAUNCH.parent)}
    options = [str(source), "--samples-per-shard", "4", "--out"]
    for task in (5, 1, 3):
        array = {"ID": task, "MIN": 1, "MAX": 5, "STEP": 2, "COUNT": 3}
        variables = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()}
        command = ["bash", LAUNCH / "convert.sbatch", *options, str(out)]
        subprocess.run(command, env=env | variables | {"SLURM_ARRAY_JOB_ID": "7"}, cwd=tmp_path, check=True)
    submitted = (tmp_path / "submitted").read_text().splitlines()
    assert submitted[:2] == ["--job-name=dist_dcgan-merge", "--dependency=afterok:7"] and submitted[-2] == "--wrap"
    subprocess.run(["bash", "-c", submitted[-1]], env=env, cwd=tmp_path, check=True)
    command = ["bash", LAUNCH / "convert.sbatch", *options, str(tmp_path / "whole")]
    subprocess.run(command, env=env, cwd=tmp_path, check=True)
    assert contents(out) == contents(tmp_path / "whole")
