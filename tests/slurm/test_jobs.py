"""train.sbatch on a real cluster of two nodes: a job that is disturbed ends with the results of one that is not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

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
from tests.slurm.cluster import PROBE, PROGRAMS, Cluster
from tests.slurm.needs import require
from tests.support.commands import environment
from tests.support.shards_fixtures import contents

pytestmark = pytest.mark.system
RANKS_PER_NODE = 2
NO_GPUS = {"CONTAINER": "env CUDA_VISIBLE_DEVICES="}
"""Those of the cluster are pretended, and training refuses to take the CPU for a GPU that it was given."""
RESOURCES = (f"--gpus-per-node={RANKS_PER_NODE}", "--cpus-per-task=2")
HOLD_SECONDS = 300
"""Seconds that the ranks wait for the one that is held."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    require(PROGRAMS, PROBE)
    with TemporaryDirectory(prefix="slurm") as folder, Cluster(Path(folder)) as cluster:
        yield cluster


class Job:
    """A run as a user submits it, on nodes of two ranks, and what happens to it."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        data: Path,
        faults: Sequence[Fault] = (),
        nodes: int = 2,
        options: Sequence[str] = (),
        flags: Sequence[object] = (),
        names_variables: bool = False,
        **variables: str,
    ) -> None:
        self.cluster, self.folder, self.outcome = cluster, folder, Outcome(folder)
        self._env = cluster.in_job(launcher_environment(folder, faults, RANKS_PER_NODE) | NO_GPUS | variables)
        self._options = [f"--nodes={nodes}", *RESOURCES, f"--output={folder}/output.txt", *options]
        if names_variables:  # then SLURM hands on no others
            self._options.append(f"--export={','.join(self._env)}")
        waits = ("--distributed.timeout-seconds", HOLD_SECONDS)
        self._words = command(data, folder / "run", *waits, *flags)
        self.submit()

    def submit(self) -> None:
        """Submit the same command (again)."""
        self.number = self.cluster.submit(*self._options, "launch/train.sbatch", *self._words, env=self._env, cwd=ROOT)

    def wait_for_fault(self, index: int) -> None:
        """Wait until a fault has begun."""

        def begun() -> bool:
            assert self.cluster.show(self.number)["JobState"] not in ("FAILED", "COMPLETED"), self.output
            return (self.folder / f"fault-{index:03d}").exists()

        self.cluster.wait_until(begun, 180)

    @property
    def output(self) -> str:
        """What it has printed."""
        return (self.folder / "output.txt").read_text()

    def end(self) -> Outcome:
        """Wait for its end, after which nothing lives on a node, and return what the run left."""
        state = self.cluster.wait(self.number)
        assert self.cluster.leftovers() == []
        self.outcome.starts.append(Start(0 if state == "COMPLETED" else 1, self.output, time.time(), []))
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
    job = Job(cluster, tmp_path, bench.data, faults, options=options)
    for index, (_, disturb) in enumerate(story):
        job.wait_for_fault(index)
        disturb(job)
    outcome = job.end()
    require_golden(outcome, golden(bench.work, bench.data, ranks=2 * RANKS_PER_NODE))
    crashes = sum(disturb is crash_node for _, disturb in story)
    assert outcome.repeated_steps() <= crashes * CHECKPOINT_EVERY, outcome.output
    logs = list((outcome.run_dir / "logs").glob("*/*/*/attempt_*/*/stderr.log"))
    assert len(logs) == (1 + len(story)) * 2 * RANKS_PER_NODE
    print(f"{name}: {outcome.repeated_steps()} steps done again")


def test_a_failure_is_tried_again_after_a_checkpoint_only(cluster: Cluster, bench: Bench, tmp_path: Path) -> None:
    """Of a job that exports some variables only; before it is submitted again its folders move to another disk."""
    faults = [Fault("exception", "D step", step) for step in (2, 6)]
    job = Job(cluster, tmp_path, bench.data, faults, names_variables=True, RESTARTS="0")
    assert job.end().starts[0].code != 0
    assert "injected mistake" in job.output and "queues itself again" not in job.output
    for name in ("checkpoints", "logs"):
        folder = tmp_path / "run" / name
        folder.mkdir(exist_ok=True)  # no checkpoint yet
        folder.symlink_to(folder.rename(tmp_path / name))
    job.submit()
    outcome = job.end()
    assert "queues itself again: a failure after step-00000004" in job.output
    require_golden(outcome, golden(bench.work, bench.data, ranks=2 * RANKS_PER_NODE))


def test_a_mistake_is_said_before_the_nodes_start(cluster: Cluster, bench: Bench, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, bench.data, flags=["--widht", 4])
    assert job.end().starts[0].code != 0
    lines = job.output.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "--width" in lines[0]


def test_a_job_whose_gpus_are_not_seen_does_not_train_on_cpus(cluster: Cluster, bench: Bench, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, bench.data, nodes=1, CONTAINER="")
    assert job.end().starts[0].code != 0
    assert "CUDA_VISIBLE_DEVICES=0,1 on host n1, but torch sees no GPU" in job.output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


ARTEFACTS = {"generator_ema.safetensors", "curves.png", "metrics.jsonl", "samples", "checkpoints", "logs"}


def test_the_chain_from_photographs_to_scores(cluster: Cluster, bench: Bench, tmp_path: Path) -> None:
    data, run_dir = tmp_path / "with space" / "data", tmp_path / "run"
    source = next((bench.work / "data_source").rglob("data.mdb")).parent
    resources = " ".join(RESOURCES)
    variables = {"RANKS": "2", "PARTS": "4", "SBATCH_OUTPUT": f"{tmp_path}/job-%A-%a.txt", "PYTHONPATH": str(ROOT)}
    variables |= {"CONVERT": "--cpus-per-task=1", "TRAIN": f"--nodes=2 {resources}", "EVALUATE": resources}
    env = cluster.in_job(environment() | NO_GPUS | variables)
    training = command(data, run_dir)
    training = training[: training.index("--data")]
    words = [data, run_dir, source, "--samples-per-shard", 10, "--", *training, "--", "--fakes", 64, "--reals", 64]

    def submit(*flags: str) -> list[str]:
        return cluster.run("bash", "launch/submit.sh", *flags, *map(str, words), env=env, cwd=ROOT).splitlines()

    assert [line.split()[0] for line in submit("--dry-run")] == ["sbatch"] * 4
    assert cluster.run("squeue", "--noheader") == "" and not data.exists()

    numbers = {line.split()[2]: line.split()[1].rstrip(":") for line in submit()}
    assert list(numbers) == ["convert", "merge", "train", "evaluate"]
    assert cluster.wait(numbers["evaluate"]) == "COMPLETED", "".join(p.read_text() for p in tmp_path.glob("job-*"))
    cluster.wait_until(lambda: cluster.leftovers() == [], 10)  # the launcher looks at torchrun once a second
    assert contents(data) == contents(bench.data)
    assert {path.name for path in run_dir.iterdir()} >= ARTEFACTS
    assert "kid_efficientnet_lite0" in (run_dir / "evaluation.txt").read_text()

    left = [line.split()[3].partition("=")[0] for line in submit("--dry-run")]
    assert left == ["--nodes", "--dependency"]  # the data are there
