"""Processes that die, are signalled, hang or fail: what must be true afterwards."""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from functools import partial
from itertools import count
from pathlib import Path
from unittest import mock

import torch

from dist_dcgan.run.checkpoint import Retention, load_newest, save_checkpoint
from tests.faults import harness
from tests.faults.harness import CHECKPOINT_EVERY, Flags, Outcome, golden, launch, require_golden, run
from tests.faults.rank import Fault
from tests.faults.scenario import Bench, Scenario
from tests.support.forks import status_of
from tests.support.shards_fixtures import place_of

STOPS = ("SIGTERM to a rank", "SIGUSR1 to a rank", "SIGTERM to torchrun", "SIGUSR1 to torchrun")
SHORT_TIMEOUT = 5
EVALUATION = ["--quality.extractor", "efficientnet-lite0", "--quality.fakes", 16, "--quality.reals", 16]


def kills() -> Iterator[Scenario]:
    """Yield deaths of ranks, of torchrun and of all, each at a step."""
    for place, step, rank in [("before step", 1, 1), ("D step", 6, 1), ("G step", 6, 0), ("save", 8, 0)]:
        fault = Fault("kill -9 of a rank", place, step, rank)
        yield Scenario(fault.act, str(fault), partial(restarted, fault=fault), always=place != "G step")
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
            partial(started_again, fault=fault),
            always=place != "save" or act == "kill -9 of all",
            by_default=place == "G step",
        )
    yield Scenario("death within a save", "between any two file operations", dies_within_a_save, by_default=True)


def restarted(bench: Bench, folder: Path, fault: Fault) -> str:
    """The launcher starts the ranks again by itself, from the newest checkpoint."""
    outcome = run(folder, bench.data, [fault], most_starts=1)
    repeated = steps_done_again(bench, outcome, fault)
    seconds = outcome.seconds_to_next_step()
    assert seconds <= 15 or not bench.limits, f"{seconds:.1f} s to the next step"
    return f"{seconds:.1f} s to the next step, {repeated} done again"


def started_again(bench: Bench, folder: Path, fault: Fault) -> str:
    """Nobody survives; the same command goes on."""
    outcome = run(folder, bench.data, [fault])
    assert len(outcome.starts) == 2
    assert outcome.starts[0].survivors == []
    return f"0 survivors after 2 s, {steps_done_again(bench, outcome, fault)} steps done again"


def steps_done_again(bench: Bench, outcome: Outcome, fault: Fault) -> int:
    """Return how many steps are done again after one death: at most those since the last checkpoint."""
    require_golden(outcome, golden(bench.work, bench.data))
    assert outcome.faults() == 1
    # A checkpoint is written beside training, which is some steps further when it is there.
    assert outcome.repeated_steps() <= CHECKPOINT_EVERY * (2 if fault.place == "save" else 1)
    return outcome.repeated_steps()


def dies_within_a_save(bench: Bench, folder: Path) -> str:
    """Die before each file operation of three saves in turn: what is there is sound, and never older than before."""
    saves, warnings = folder / "saves", io.StringIO()
    newest: list[int] = []
    for operation in count(1):
        shutil.rmtree(saves, ignore_errors=True)
        status = status_of(save_until_killed, saves, operation)
        assert status in (0, -signal.SIGKILL)
        with redirect_stderr(warnings):
            found = load_newest(saves)
        newest.append(0 if found is None else found.values["step"])
        assert found is None or (found.tensors["a"] == newest[-1]).all()
        if status == 0:
            break
    assert newest == sorted(newest) and set(newest) == {0, 1, 2, 3}
    assert len(newest) > 20 and warnings.getvalue() == ""
    return f"{len(newest) - 1} deaths, 0 wrong loads"


def save_until_killed(folder: Path, operation: int) -> None:
    """Save three times in this process, which is killed before the file operation of this number in `folder`."""
    operations = 0

    def hook(event: str, arguments: Sequence[object]) -> None:
        nonlocal operations
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            operations += any(str(folder) in place_of(argument) for argument in arguments)
            if operations == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    for step in (1, 2, 3):
        save_checkpoint(folder, {"a": torch.full((1000,), float(step))}, {"step": step}, Retention(2))


def stops() -> Iterator[Scenario]:
    """Yield each signal at each moment: once in the short part, and five times in one run."""
    short = {("D step", 0), ("save", 1), ("evaluation", 2), ("start", 3), ("import", 0)}
    for index, act in enumerate(STOPS):
        for place in ("import", "start", "D step", "save", "evaluation"):
            for times in (1, 5) if (place, index) in short else (5,):
                steps = [6] if times == 1 else [2, 4, 6, 8, 10]
                if place in ("import", "start"):
                    steps = [0] * times
                faults = [
                    Fault(act, place, step, 0 if place == "save" else number % 2) for number, step in enumerate(steps)
                ]
                yield Scenario(
                    "SIGTERM or SIGUSR1, to a rank or to torchrun",
                    f"{act}, {place}, {'once' if times == 1 else 'five times'}",
                    partial(stopped, faults=faults),
                    always=times == 1,
                    by_default=times == 1 and place == "D step",
                )


def stopped(bench: Bench, folder: Path, faults: Sequence[Fault]) -> str:
    """No step is lost: each is begun once, however often the command is started."""
    every = ("--quality.every-images", 8 * faults[0].step)
    scored: Flags = (*EVALUATION, *every) if faults[0].place == "evaluation" else ()
    flags = ("--checkpoint.every-steps", 2, *scored)
    outcome = run(folder, bench.data, faults, flags, most_starts=2 + len(faults))
    require_golden(outcome, golden(bench.work, bench.data, flags=scored))
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
