"""Processes that die, are signalled, hang or fail: what must be true afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

from tests.faults import harness
from tests.faults.harness import CHECKPOINT_EVERY, Flags, Outcome, golden, launch, require_golden, run
from tests.faults.rank import Fault
from tests.faults.scenario import Bench, Scenario

STOPS = ("SIGTERM to a rank", "SIGUSR1 to a rank", "SIGTERM to torchrun", "SIGUSR1 to torchrun")
SHORT_TIMEOUT = 5
EVALUATION: Flags = ("--quality.extractor", "efficientnet-lite0", "--quality.every-images", 16)
EVALUATION = (*EVALUATION, "--quality.fakes", 16, "--quality.reals", 16)


def kills() -> Iterator[Scenario]:
    """Yield deaths of ranks, of torchrun and of all, each at a step."""
    places = [("before step", 1, 1), ("D step", 6, 1), ("G step", 6, 0), ("save", 8, 0)]
    for place, step, rank in places:
        fault = Fault("kill -9 of a rank", place, step, rank)
        yield Scenario(
            "kill -9 of a rank", str(fault), lambda bench, folder, fault=fault: restarted(bench, folder, fault)
        )
    for act, place, step in [
        ("kill -9 of torchrun", "D step", 6),
        ("kill -9 of torchrun", "save", 8),
        ("kill -9 of all", "G step", 7),
        ("kill -9 of all", "save", 8),
    ]:
        fault = Fault(act, place, step, 0)
        yield Scenario(
            "kill -9 of torchrun, or of all",
            str(fault),
            lambda bench, folder, fault=fault: started_again(bench, folder, fault),
            always=place != "save" or act == "kill -9 of all",
        )
    yield Scenario("death within a save", "between any two file operations", dies_within_a_save)


def restarted(bench: Bench, folder: Path, fault: Fault) -> str:
    """The launcher starts the ranks again by itself, from the newest checkpoint."""
    outcome = run(folder, bench.data, [fault], most_starts=1)
    require_golden(outcome, golden(bench.work, bench.data))
    assert outcome.faults() == 1
    # A checkpoint is written beside training, which is some steps further when it is there.
    assert outcome.repeated_steps() <= CHECKPOINT_EVERY * (2 if fault.place == "save" else 1)
    seconds = outcome.seconds_to_next_step()
    assert seconds <= 15 or not bench.limits, f"{seconds:.1f} s to the next step"
    return f"{seconds:.1f} s to the next step, {outcome.repeated_steps()} done again"


def started_again(bench: Bench, folder: Path, fault: Fault) -> str:
    """Nobody survives; the same command goes on."""
    outcome = run(folder, bench.data, [fault])
    assert len(outcome.starts) == 2 and outcome.faults() == 1
    assert outcome.starts[0].survivors == []
    require_golden(outcome, golden(bench.work, bench.data))
    assert outcome.repeated_steps() <= CHECKPOINT_EVERY * (2 if fault.place == "save" else 1)
    return f"0 survivors after 2 s, {outcome.repeated_steps()} steps done again"


DIES_AT = """
import os, shutil, signal, sys
from itertools import count
from pathlib import Path
import torch
from dist_dcgan.run.checkpoint import Retention, load_newest, save_checkpoint

folder = Path(sys.argv[1])

def save_three_times(at):
    operations = 0

    def hook(event, arguments):
        nonlocal operations
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            return
        names = [os.fsdecode(name) for name in arguments if isinstance(name, (str, bytes, os.PathLike))]
        operations += any(str(folder) in name for name in names)
        if operations == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    for step in (1, 2, 3):
        save_checkpoint(folder, {"a": torch.full((1000,), float(step))}, {"step": step}, Retention(2))
    os._exit(0)

for at in count(1):
    shutil.rmtree(folder, ignore_errors=True)
    child = os.fork()
    if child == 0:
        save_three_times(at)
    ended_well = os.waitpid(child, 0)[1] == 0
    found = load_newest(folder)  # warns where the newest is not sound
    newest = 0 if found is None else found.values["step"]
    assert found is None or (found.tensors["a"] == newest).all()
    print(newest)
    if ended_well:
        break
"""


def dies_within_a_save(bench: Bench, folder: Path) -> str:
    """Die before each file operation of three saves in turn: what is there is sound, and never older than before."""
    words = [sys.executable, "-c", DIES_AT, str(folder / "saves")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=harness.ROOT)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    newest = [int(line) for line in done.stdout.split()]
    assert newest == sorted(newest) and set(newest) == {0, 1, 2, 3}
    assert len(newest) > 20
    return f"{len(newest) - 1} deaths, 0 wrong loads"


def stops() -> Iterator[Scenario]:
    """Yield each signal at each moment: once in the short part, and five times in one run."""
    short = {("D step", 0), ("save", 1), ("evaluation", 2), ("start", 3), ("import", 0)}
    for index, act in enumerate(STOPS):
        for place in ("import", "start", "D step", "save", "evaluation"):
            for times in (1, 5) if (place, index) in short else (5,):
                steps = [0] * times if place in ("import", "start") else [2, 4, 6, 8, 10][:times]
                faults = [
                    Fault(act, place, step, 0 if place == "save" else number % 2) for number, step in enumerate(steps)
                ]
                yield Scenario(
                    "SIGTERM or SIGUSR1, to a rank or to torchrun",
                    f"{act}, {place}, {'once' if times == 1 else 'five times'}",
                    lambda bench, folder, faults=faults: stopped(bench, folder, faults),
                    always=times == 1,
                )


def stopped(bench: Bench, folder: Path, faults: Sequence[Fault]) -> str:
    """No step is lost: each is begun once, however often the command is started."""
    flags: Flags = ("--checkpoint.every-steps", 2)
    if faults[0].place == "evaluation":
        flags = (*flags, *EVALUATION)
    outcome = run(folder, bench.data, faults, flags, most_starts=2 + len(faults))
    require_golden(outcome, golden(bench.work, bench.data, flags=flags))
    assert outcome.faults() == len(faults)
    assert outcome.repeated_steps() == 0, outcome.repeated_steps()
    assert all(start.survivors == [] for start in outcome.starts)
    if faults[0].step:  # before the first there is nothing to save, and the process just ends
        # A signal may meet the last checkpoint of a run that another is stopping already.
        assert 2 <= len(outcome.starts) <= 1 + len(faults)
        assert outcome.output.count("going on after step") == len(outcome.starts) - 1
    seconds = outcome.starts[0].ended - outcome.fault_time()
    return f"0 steps lost, {len(outcome.starts)} starts, the first ended after {seconds:.1f} s"


def hangs() -> Iterator[Scenario]:
    """Yield a rank that stops answering, and one that raises."""
    yield Scenario("exception in one rank", "exception, rank 1, D step 6", raises)
    yield Scenario("SIGSTOP of one rank", "SIGSTOP, rank 1, G step 6", hangs_at_a_step)
    yield Scenario("SIGSTOP of one rank", "SIGSTOP, rank 0, save 8", restarts_after_a_hang)
    yield Scenario("torchrun hangs", "SIGSTOP of torchrun whose ranks have ended", torchrun_hangs)


def raises(bench: Bench, folder: Path) -> str:
    """Torchrun and the other rank name the rank and its error; the launcher goes on."""
    outcome = run(folder, bench.data, [Fault("exception", "D step", 6)], most_starts=1)
    require_golden(outcome, golden(bench.work, bench.data))
    host = os.uname().nodename
    assert f"cannot go on: rank 1 on {host}" in outcome.output
    assert "failed: ValueError: an injected mistake" in outcome.output
    return f"named, {outcome.seconds_to_next_step():.1f} s to the next step"


def hangs_at_a_step(bench: Bench, folder: Path) -> str:
    """The other rank names the one that hangs, and all has ended soon after the timeout."""
    flags = ("--distributed.timeout-seconds", SHORT_TIMEOUT)
    words = harness.command(bench.data, folder / "run", *flags)
    with_no_restart = launch(folder, words, [Fault("SIGSTOP", "G step", 6)], ranks=2, restarts=0)
    outcome = Outcome(folder, [with_no_restart])
    assert with_no_restart.code != 0 and with_no_restart.survivors == []
    assert "cannot go on: rank 1 on" in outcome.output and "does not answer and is killed" in outcome.output
    seconds = with_no_restart.ended - outcome.fault_time()
    assert seconds <= SHORT_TIMEOUT + 5 or not bench.limits, f"ended after {seconds:.1f} s"
    outcome.starts += run(folder, bench.data).starts
    require_golden(outcome, golden(bench.work, bench.data))
    return f"named, ended {seconds:.1f} s after it at a timeout of {SHORT_TIMEOUT} s"


def restarts_after_a_hang(bench: Bench, folder: Path) -> str:
    """The launcher goes on by itself."""
    flags = ("--distributed.timeout-seconds", 2 * SHORT_TIMEOUT)
    outcome = run(folder, bench.data, [Fault("SIGSTOP", "save", 8, 0)], flags, most_starts=1)
    require_golden(outcome, golden(bench.work, bench.data))
    assert "rank 0 on" in outcome.output and "does not answer and is killed" in outcome.output
    return f"named, {outcome.seconds_to_next_step():.1f} s to the next step"


def torchrun_hangs(bench: Bench, folder: Path) -> str:
    """The launcher's watch kills it."""
    # Ranks that are started, not forked: the watch knows them by the environment with which they began.
    with mock.patch.dict(os.environ):
        os.environ.pop("FORKED_RANKS", None)
        outcome = run(folder, bench.data, [Fault("SIGSTOP of torchrun, kill -9 of ranks", "D step", 6, 0)])
    assert "hangs and is killed: its ranks ended" in outcome.starts[0].output
    assert len(outcome.starts) == 2 and outcome.starts[0].survivors == []
    require_golden(outcome, golden(bench.work, bench.data))
    return f"killed {outcome.starts[0].ended - outcome.fault_time():.1f} s after its ranks ended"
