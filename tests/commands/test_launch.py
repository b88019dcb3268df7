"""The launchers against stand-ins for SLURM and torchrun: what is queued again and what is not."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.commands import environment
from tests.support.shards_fixtures import contents, numbered, write_lmdb
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then echo n1; else echo "$@" >> "$HERE/requeued"; fi',
    # runs until it is signalled or told to end, and leaves what training would
    "srun": """trap 'echo >> "$HERE/signalled"' USR1
printf '%s\\n' "$@" "HEAD=$HEAD" "LOGS=$LOGS" > "$HERE/called"
touch "$HERE/started"
while [ ! -e "$HERE/signalled" ] && [ ! -e "$HERE/ends" ]; do sleep 0.05; done
sleep "$SAVING"
for leaves in $LEAVES; do mkdir -p "$HERE/run/$leaves"; done
exit $STATUS""",
}


def script(path: Path, body: str, shell: str = "sh") -> None:
    """Write a command."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env {shell}\n{body}\n")
    path.chmod(0o755)


def launcher(name: str, *words: object) -> list[str]:
    return ["bash", str(LAUNCH / name), *map(str, words)]


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """The environment of a job whose SLURM is a stand-in."""
    for name, body in STAND_INS.items():
        script(tmp_path / "bin" / name, body, "bash")
    return os.environ | {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "HERE": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "1",
        "LEAVES": "",
        "STATUS": "0",
        "SAVING": "0",
    }


@dataclass
class Job:
    """What becomes of a job."""

    number: signal.Signals | None
    """The signal that it gets; None where it ends by itself."""
    leaves: str
    """What it leaves in the run directory."""
    status: int
    """What srun ends with."""
    expected: tuple[int, bool]
    """The status of the job, and whether it queues itself again."""
    earlier: str = ""
    """What an earlier job, or earlier starts of this one, have left."""


STARTS = " ".join(f"logs/7-{start}" for start in range(100, 109))
JOBS = {
    "it saved itself before the limit": Job(signal.SIGUSR1, "STOPPED", 1, (0, True)),
    "it saved itself, and torchrun ended well": Job(signal.SIGUSR1, "STOPPED", 0, (0, True)),
    "the limit came before it had anything to save": Job(signal.SIGUSR1, "", 1, (0, True)),
    "the limit came again and again before that": Job(signal.SIGUSR1, "", 1, (1, False), earlier=STARTS),
    "so it did, and once after a checkpoint": Job(
        signal.SIGUSR1, "", 1, (0, True), earlier=f"{STARTS} checkpoints/step-00000008"
    ),
    "so it did to another job": Job(signal.SIGUSR1, "", 1, (0, True), earlier=STARTS.replace("logs/7", "logs/77")),
    "it got further before the limit, as often before": Job(
        signal.SIGUSR1, "STOPPED checkpoints/step-00000008", 1, (0, True), earlier=STARTS
    ),
    "it ended as the limit came": Job(signal.SIGUSR1, "", 0, (0, False)),
    "it was cancelled": Job(signal.SIGTERM, "STOPPED", 1, (1, False)),
    "it was cancelled, after a checkpoint": Job(signal.SIGTERM, "checkpoints/step-00000008", 1, (1, False)),
    "it failed": Job(None, "", 1, (1, False)),
    "it failed, as far as before": Job(None, "", 1, (1, False), earlier="checkpoints/step-00000008"),
    "it failed after a checkpoint": Job(
        None, "checkpoints/step-00000012", 1, (0, True), earlier="checkpoints/step-00000008"
    ),
    "it failed after an earlier stop": Job(None, "", 1, (1, False), earlier="STOPPED"),
    "it stopped by a signal that only the ranks got": Job(None, "STOPPED checkpoints/step-00000008", 1, (1, False)),
    "so it did, and torchrun ended well": Job(None, "STOPPED checkpoints/step-00000008", 0, (1, False)),
    "it ended well, beside an old marker": Job(None, "", 0, (0, False), earlier="STOPPED"),
    "it ended well": Job(None, "checkpoints/step-00000008", 0, (0, False)),
}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_which_jobs_queue_themselves_again(job: Job, stand_ins: dict[str, str], tmp_path: Path) -> None:
    for name in job.earlier.split():
        (tmp_path / "run" / name).mkdir(parents=True)
    env = stand_ins | {"LEAVES": job.leaves, "STATUS": str(job.status)}
    process = subprocess.Popen(launcher("train.sbatch", "--run-dir", tmp_path / "run"), cwd=ROOT, env=env)
    wait_until((tmp_path / "started").exists, process)
    if job.number is not None:
        process.send_signal(job.number)
    if job.number != signal.SIGUSR1:  # where a job is cancelled, SLURM signals its tasks
        time.sleep(0.2)
        (tmp_path / "ends").touch()
    assert (process.wait(timeout=30), (tmp_path / "requeued").exists()) == job.expected
    assert not job.expected[1] or (tmp_path / "requeued").read_text() == "requeue Incomplete 7\n"


def test_a_signal_is_passed_on_once(stand_ins: dict[str, str], tmp_path: Path) -> None:
    """Torchrun gives up saving at the third; a job that is cancelled is signalled by SLURM itself."""
    env = stand_ins | {"LEAVES": "STOPPED", "STATUS": "1", "SAVING": "1"}
    process = subprocess.Popen(launcher("train.sbatch", "--run-dir", tmp_path / "run"), cwd=ROOT, env=env)
    wait_until((tmp_path / "started").exists, process)
    for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.3)
    assert process.wait(timeout=30) == 1  # it was cancelled
    assert (tmp_path / "signalled").read_text() == "\n" and not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_signal_before_anything_has_started(
    number: signal.Signals, requeued: bool, stand_ins: dict[str, str], tmp_path: Path
) -> None:
    script(tmp_path / "bin" / "python", f"touch {tmp_path}/asked\nsleep 1\necho {tmp_path}/run")
    process = subprocess.Popen(launcher("train.sbatch"), cwd=ROOT, env=stand_ins)
    wait_until((tmp_path / "asked").exists, process)
    process.send_signal(number)
    assert process.wait(timeout=30) == (0 if requeued else 1)
    assert (tmp_path / "requeued").exists() == requeued and not (tmp_path / "started").exists()


def test_a_run_directory_from_a_file_of_options(stand_ins: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"run_dir: {tmp_path}/with space\n")
    (tmp_path / "ends").touch()
    env = stand_ins | {"CONTAINER": "env INSIDE=yes", "SLURM_RESTART_COUNT": "2"}
    subprocess.run(launcher("train.sbatch", "--config", tmp_path / "run.yaml"), cwd=ROOT, env=env, check=True)
    called = (tmp_path / "called").read_text().splitlines()
    assert called[0] == "--export=ALL" and called[4:] == [
        *("env", "env", "INSIDE=yes", "bash", str(LAUNCH / "torchrun.sh"), "--config", str(tmp_path / "run.yaml")),
        *("HEAD=n1:20007", f"LOGS={tmp_path}/with space/logs/7-2"),
    ]


def test_a_mistake_is_found_before_the_nodes_start(stand_ins: dict[str, str], tmp_path: Path) -> None:
    words = launcher("train.sbatch", "--widht", 64)
    done = subprocess.run(words, cwd=ROOT, env=stand_ins, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "--width" in done.stderr
    assert not (tmp_path / "called").exists()


def test_help_needs_no_gpu(tmp_path: Path) -> None:
    env = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(launcher("torchrun.sh", "--help"), env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--global-batch" in done.stdout, done.stderr


def test_machines_that_do_not_meet_are_told_so(stand_ins: dict[str, str], tmp_path: Path) -> None:
    """Torchrun ends before it has started ranks."""
    script(tmp_path / "bin" / "torchrun", "exit 1")
    env = stand_ins | {"NODES": "2", "RANKS": "1"}
    words = launcher("torchrun.sh")
    done = subprocess.run(words, env=env | {"HEAD": "n1:20007"}, capture_output=True, text=True)
    assert done.returncode == 1 and "the 2 machines have not met at n1:20007" in done.stderr
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: NODES=2, HEAD=: they meet at HEAD=HOST:PORT")


def test_what_torchrun_is_told(stand_ins: dict[str, str], tmp_path: Path) -> None:
    script(tmp_path / "bin" / "torchrun", 'printf "%s\\n" "$@"')

    def told(**more: str) -> list[str]:
        words = launcher("torchrun.sh", "--run-dir", "with space")
        done = subprocess.run(
            words, env=stand_ins | {"RANKS": "3"} | more, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout.splitlines()

    alone = told()
    backend, endpoint, *others = alone
    assert backend == "--rdzv-backend=c10d" and not Path(endpoint.removeprefix("--rdzv-endpoint=")).parent.exists()
    meeting = ["--rdzv-conf=store_type=file", "--local-addr=localhost"]
    assert others[:4] == [*meeting, "--nproc_per_node=3", "--max-restarts=3"]
    assert alone[-4:] == [str(LAUNCH / "run_module.py"), "dist_dcgan.train", "--run-dir", "with space"]
    among = told(NODES="2", HEAD="n1:20007", JOB="7", LOGS="a b", RESTARTS="0", COMMAND="doctor")
    assert among[:4] == ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=n1:20007", "--rdzv-id=7"]
    assert among[4:8] == [f"--log-dir=a b/{os.uname().nodename}", "--tee=3", "--nproc_per_node=3", "--max-restarts=0"]
    assert among[-3] == "dist_dcgan.doctor"


@pytest.mark.parametrize("name", sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch")))
def test_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)


def test_the_tasks_of_an_array_and_the_merge_that_the_first_submits_make_the_data_set(tmp_path: Path) -> None:
    """Also with a name that only some shells read as bash quotes it: SLURM gives --wrap to sh."""
    source, out = write_lmdb(tmp_path / "source", numbered(20)), tmp_path / "it's \t$(touch pwned) & \\" / "däta"
    script(tmp_path / "bin" / "sbatch", 'printf "%s\\n" "$@" >> submitted')
    env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(LAUNCH.parent)}
    convert = launcher("convert.sbatch", source, "--samples-per-shard", 4, "--out")
    for task in (5, 1, 3):
        array = {"ID": task, "MIN": 1, "MAX": 5, "STEP": 2, "COUNT": 3}
        variables = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()}
        variables["SLURM_ARRAY_JOB_ID"] = "7"
        subprocess.run([*convert, str(out)], env=env | variables, cwd=tmp_path, check=True)
    submitted = (tmp_path / "submitted").read_text().splitlines()
    assert submitted[:2] == ["--job-name=dist_dcgan-merge", "--dependency=afterok:7"] and submitted[-2] == "--wrap"
    subprocess.run(["sh", "-c", submitted[-1]], env=env, cwd=tmp_path, check=True)
    assert not (tmp_path / "pwned").exists()
    subprocess.run([*convert, str(tmp_path / "whole")], env=env, cwd=tmp_path, check=True)
    assert contents(out) == contents(tmp_path / "whole")
