"""train.sbatch on a real cluster of two nodes: whatever befalls the job, it is one run, as if nothing had happened."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.commands import environment
from tests.faults.__main__ import make_bench
from tests.faults.harness import (
    CHECKPOINT_EVERY,
    ROOT,
    Outcome,
    Start,
    command,
    golden,
    launcher_environment,
    require_golden,
)
from tests.faults.rank import Fault
from tests.faults.scenario import Bench
from tests.shards_fixtures import contents
from tests.slurm.cluster import Cluster, missing

pytestmark = pytest.mark.system
RANKS_PER_NODE = 2
PLACES = ("--data", "DATA", "--run-dir", "RUN_DIR")
HOLD_SECONDS = 300
"""Seconds that the ranks wait for the one that is held."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with TemporaryDirectory(prefix="slurm") as folder, Cluster(Path(folder)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("slurm"))


class Job:
    """A run as a user submits it, and what befalls it."""

    def __init__(self, cluster: Cluster, folder: Path, data: Path, faults: Sequence[Fault], *options: str) -> None:
        self.cluster, self.folder, self.outcome = cluster, folder, Outcome(folder)
        self._env = cluster.environment | launcher_environment(folder, faults, RANKS_PER_NODE)
        self._env |= {"SLURM_CONF": str(cluster.configuration)}
        self._options = [
            "--nodes=2",
            "--gpus-per-node=2",
            "--cpus-per-task=2",
            f"--output={folder}/output.txt",
            *options,
        ]
        flags = ["--distributed.timeout-seconds", HOLD_SECONDS]
        self._words = command(data, folder / "run", *flags)
        self.submit()

    def submit(self) -> None:
        """Submit the same command (again)."""
        self.number = self.cluster.submit(*self._options, "launch/train.sbatch", *self._words, env=self._env, cwd=ROOT)

    def wait_for_fault(self, index: int) -> None:
        """Wait until the ranks are held."""
        fault, output = self.folder / f"fault-{index:03d}", self.folder / "output.txt"

        def held() -> bool:
            assert self.cluster.show(self.number)["JobState"] not in ("FAILED", "COMPLETED"), output.read_text()
            return fault.exists()

        self.cluster.wait_until(held, 180)

    def end(self) -> Outcome:
        """Wait for the end and return what the run left."""
        state = self.cluster.wait(self.number)
        output = (self.folder / "output.txt").read_text()
        leftovers = self.cluster.leftovers()
        assert leftovers == []
        self.outcome.starts.append(Start(0 if state == "COMPLETED" else 1, output, time.time(), []))
        return self.outcome


def preempt(job: Job) -> None:
    """Signal the batch script, as SLURM does before a time limit or a preemption."""
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.number)


def crash_node(job: Job) -> None:
    """Switch the second node off, and on again once SLURM has noticed."""
    job.cluster.crash("n2")
    job.cluster.wait_until(lambda: job.cluster.show(job.number)["JobState"] != "RUNNING")
    job.cluster.start("n2")


def cancel_and_submit(job: Job) -> None:
    """Cancel the job as a user does, see that it stays cancelled, and submit it again."""
    job.cluster.run("scancel", job.number)
    assert job.cluster.wait(job.number) == "CANCELLED"
    assert job.cluster.leftovers() == []
    job.submit()


def requeue(job: Job) -> None:
    """Have the administrator queue it again."""
    job.cluster.run("scontrol", "requeue", job.number)


def reach_the_limit(job: Job) -> None:
    """Wait for the time limit to come near."""


Befalling = Callable[[Job], None]
LIMITED = ("--time=2", "--signal=B:USR1@45")
STORIES: dict[str, tuple[list[tuple[int, Befalling]], tuple[str, ...]]] = {
    "everything": ([(2, preempt), (6, crash_node), (7, cancel_and_submit), (9, requeue)], ()),
    "preempted": ([(6, preempt)], ()),
    "preempted three times": ([(3, preempt), (6, preempt), (9, preempt)], ()),
    "node crash": ([(6, crash_node)], ()),
    "cancelled and submitted again": ([(6, cancel_and_submit)], ()),
    "requeued three times": ([(3, requeue), (6, requeue), (9, requeue)], ()),
    "time limit": ([(6, reach_the_limit)], LIMITED),
}


@pytest.mark.parametrize("name", STORIES)
def test_it_is_one_run(
    name: str, cluster: Cluster, bench: Bench, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if name != "everything" and not request.config.getoption("--long"):
        pytest.skip("minutes: run with --long")
    story, options = STORIES[name]
    faults = [Fault("hold", "D step", step, index % 4) for index, (step, _) in enumerate(story)]
    job = Job(cluster, tmp_path, bench.data, faults, *options)
    for index, (_, befall) in enumerate(story):
        job.wait_for_fault(index)
        befall(job)
    outcome = job.end()
    require_golden(outcome, golden(bench.work, bench.data, ranks=2 * RANKS_PER_NODE))
    crashes = sum(befall is crash_node for _, befall in story)
    assert outcome.repeated_steps() <= crashes * CHECKPOINT_EVERY, outcome.output
    logs = list((outcome.run_dir / "logs").glob("*/*/*/attempt_*/*/stderr.log"))
    assert len(logs) == (1 + len(story)) * 2 * RANKS_PER_NODE
    print(f"{name}: {outcome.repeated_steps()} steps done again")


def test_a_job_that_gets_no_further_ends(cluster: Cluster, bench: Bench, tmp_path: Path) -> None:
    """Neither a mistake nor a failure before the first checkpoint is tried for ever."""
    options = ["--nodes=1", "--gpus-per-node=2", "--cpus-per-task=2", f"--output={tmp_path}/output.txt"]
    env = launcher_environment(tmp_path, [Fault("exception", "D step", 2, 0)], 2)
    env |= {"SLURM_CONF": str(cluster.configuration), "RESTARTS": "0"}
    words = command(bench.data, tmp_path / "run")
    job = cluster.submit(*options, "launch/train.sbatch", *words, env=env, cwd=ROOT)
    assert cluster.wait(job) == "FAILED"
    assert "injected mistake" in (tmp_path / "output.txt").read_text()
    job = cluster.submit(*options, "launch/train.sbatch", *words, "--widht", "4", env=env, cwd=ROOT)
    assert cluster.wait(job) == "FAILED"
    assert "--width" in (tmp_path / "output.txt").read_text().splitlines()[-1]


def test_a_failure_after_a_checkpoint_is_tried_again(cluster: Cluster, bench: Bench, tmp_path: Path) -> None:
    env = launcher_environment(tmp_path, [Fault("exception", "D step", 6, 1)], RANKS_PER_NODE)
    env |= {"SLURM_CONF": str(cluster.configuration), "RESTARTS": "0"}
    options = ["--nodes=1", "--gpus-per-node=2", "--cpus-per-task=2", f"--output={tmp_path}/output.txt"]
    job = cluster.submit(*options, "launch/train.sbatch", *command(bench.data, tmp_path / "run"), env=env, cwd=ROOT)
    state = cluster.wait(job)
    output = (tmp_path / "output.txt").read_text()
    assert state == "COMPLETED" and "queues itself again: a failure after step-00000004" in output
    outcome = Outcome(tmp_path, [Start(0, output, 0, [])])
    require_golden(outcome, golden(bench.work, bench.data))


ARTEFACTS = {"generator_ema.safetensors", "curves.png", "metrics.jsonl", "samples", "checkpoints", "logs"}


def test_the_chain_from_photographs_to_scores(cluster: Cluster, bench: Bench, tmp_path: Path) -> None:
    data, run_dir = tmp_path / "with space" / "data", tmp_path / "run"
    source = next((bench.work / "data_source").rglob("data.mdb")).parent
    env = environment() | {
        "SLURM_CONF": str(cluster.configuration),
        "RANKS": "2",
        "PARTS": "4",
        "PYTHONPATH": str(ROOT),
    }
    env |= {"CONVERT": "--cpus-per-task=1", "TRAIN": "--nodes=2 --gpus-per-node=2 --cpus-per-task=2"}
    env |= {"EVALUATE": "--gpus-per-node=2 --cpus-per-task=2", "SBATCH_OUTPUT": str(tmp_path / "job-%A-%a.txt")}
    words = [data, run_dir, source, "--samples-per-shard", 10, "--", *command(data, run_dir)[: -len(PLACES)]]
    words += ["--", "--fakes", 64, "--reals", 64]
    submit = ["bash", "launch/submit.sh"]
    planned = cluster.run(*submit, "--dry-run", *map(str, words), env=env, cwd=ROOT).splitlines()
    assert [line.split()[0] for line in planned] == ["sbatch"] * 4
    assert cluster.run("squeue", "--noheader") == "" and not data.exists()

    submitted = cluster.run(*submit, *map(str, words), env=env, cwd=ROOT).splitlines()
    numbers = {line.split()[2]: line.split()[1].rstrip(":") for line in submitted}
    assert list(numbers) == ["convert", "merge", "train", "evaluate"]
    assert cluster.wait(numbers["evaluate"]) == "COMPLETED", "".join(p.read_text() for p in tmp_path.glob("job-*"))
    assert cluster.leftovers() == []
    assert contents(data) == contents(bench.data)
    assert {path.name for path in run_dir.iterdir()} >= ARTEFACTS
    assert "kid_efficientnet_lite0" in (run_dir / "evaluation.txt").read_text()

    again = cluster.run(*submit, "--dry-run", *map(str, words), env=env, cwd=ROOT).splitlines()
    assert [line.split()[3].partition("=")[0] for line in again] == ["--nodes", "--dependency"]  # the data are there
