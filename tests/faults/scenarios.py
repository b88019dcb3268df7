"""What happens to runs, and what must be true afterwards: each row of the bench's table."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_dcgan.training.checkpoint import load_newest
from tests.commands import metrics
from tests.faults import harness
from tests.faults.harness import CHECKPOINT_EVERY, Flags, Outcome, golden, launch, require_golden, run
from tests.faults.rank import Fault

STOPS = ("SIGTERM to a rank", "SIGUSR1 to a rank", "SIGTERM to torchrun", "SIGUSR1 to torchrun")
SHORT_TIMEOUT = 5
EVALUATION: Flags = ("--quality.extractor", "efficientnet-lite0", "--quality.every-images", 16)
EVALUATION = (*EVALUATION, "--quality.fakes", 16, "--quality.reals", 16)


class Bench(NamedTuple):
    """Where the bench works, and on what."""

    work: Path
    data: Path
    """Shards of 96 images or more."""
    other: Path
    """Another data set, in one shard."""
    limits: bool = True
    """Whether times are held to their limits."""


@dataclass(frozen=True)
class Scenario:
    """Something that happens, by what it is told in the table, and the check that raises where a promise is broken."""

    row: str
    name: str
    check: Callable[[Bench, Path], str]
    """Takes the bench and a folder; returns what was measured."""
    always: bool = True
    """Whether it belongs to the short part."""


def scenarios() -> list[Scenario]:
    """Return all of them, in the order of the table."""
    return [*kills(), *stops(), *hangs(), *numbers(), *shapes(), *disks(), *damages()]


# Processes that die


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
from dist_dcgan.training.checkpoint import Retention, load_newest, save_checkpoint

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


# Signals


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


# Ranks that hang or fail


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
    outcome = run(folder, bench.data, [Fault("SIGSTOP of torchrun, kill -9 of ranks", "D step", 6, 0)])
    assert "torchrun hangs" in outcome.starts[0].output
    assert len(outcome.starts) == 2 and outcome.starts[0].survivors == []
    require_golden(outcome, golden(bench.work, bench.data))
    return f"killed {outcome.starts[0].ended - outcome.fault_time():.1f} s after its ranks ended"


# Numbers that are none


def numbers() -> Iterator[Scenario]:
    """Yield a gradient that is not finite on one rank."""
    yield Scenario("NaN gradient on one rank", "NaN gradient, rank 1, D step 6", skips)


def skips(bench: Bench, folder: Path) -> str:
    """All ranks skip together: they hold the same afterwards, all of it finite."""
    outcome = run(folder, bench.data, [Fault("NaN gradient", "D step", 6)], most_starts=1)
    undisturbed = golden(bench.work, bench.data)
    assert outcome.starts[-1].code == 0, outcome.output
    assert outcome.samples() == undisturbed.samples()
    assert outcome.state() != undisturbed.state()
    held = [[json.loads(line) for line in path.open()] for path in sorted(folder.glob("holds-*.jsonl"))]
    assert len(held) == 2 and len(held[0]) == 3 and held[0] == held[1]
    found = load_newest(outcome.run_dir / "checkpoints")
    assert found is not None and all(tensor.isfinite().all() for tensor in found.tensors.values())
    assert [row["step"] for row in metrics(outcome.run_dir) if row["grad_norm/d"] is None] == [6]
    return "skipped by both ranks, equal and finite afterwards"


# Numbers of ranks, shards and images


def shapes() -> Iterator[Scenario]:
    """Yield runs whose ranks change, or do not fit."""
    yield Scenario("another number of ranks", "1, 2, 4, 1 ranks in float64", elastic)
    yield Scenario("another number of ranks", "3 ranks for a batch of 8", does_not_divide)
    yield Scenario("fewer shards than ranks, N mod B not 0", "2 ranks, 1 shard, over an epoch's end", few_shards)


def elastic(bench: Bench, folder: Path) -> str:
    """The same samples in the same order, and the same values up to rounding."""
    fp64: Flags = ("--precision", "fp64")
    undisturbed = golden(bench.work, bench.data, 1, fp64)
    flags = [str(flag) for flag in fp64]
    outcome = Outcome(folder)
    for ranks, steps in ((1, 3), (2, 6), (4, 9), (1, 12)):
        outcome.starts += run(folder, bench.data, (), [*flags, "--max-steps", steps], ranks, most_starts=1).starts
        assert outcome.starts[-1].code == 0, outcome.output
    assert len(outcome.samples()) == 12
    assert outcome.samples() == undisturbed.samples()
    ours, theirs = (load_newest(each.run_dir / "checkpoints") for each in (outcome, undisturbed))
    assert ours is not None and theirs is not None
    furthest = max(float((ours.tensors[name] - theirs.tensors[name]).abs().max()) for name in ours.tensors)
    assert furthest <= 1e-9
    return f"same samples; values differ by {furthest:.0e} at most"


def does_not_divide(bench: Bench, folder: Path) -> str:
    """One line, and nothing is begun or tried again."""
    outcome = run(folder, bench.data, ranks=3, most_starts=1)
    assert outcome.starts[0].code != 0
    assert outcome.output.count("error: global_batch 8 is not divisible by 3 ranks: use --global-batch 6 or 9") == 1
    assert not outcome.run_dir.exists()
    return "one line"


def few_shards(bench: Bench, folder: Path) -> str:
    """Both ranks take equal steps, each epoch uses every image at most once, and a kill changes nothing."""
    flags = ("--global-batch", 20, "--max-steps", 9)
    outcome = run(folder, bench.other, [Fault("kill -9 of a rank", "D step", 6)], flags, most_starts=1)
    require_golden(outcome, golden(bench.work, bench.other, flags=flags))
    steps = list(outcome.samples().values())
    for epoch in (steps[:4], steps[4:8]):
        assert len(set(np.concatenate(epoch))) == 80
    assert len(list(bench.other.glob("*.tar"))) == 1
    return "equal steps, no hang"


# Disks


def disks() -> Iterator[Scenario]:
    """Yield disks that are full, or cannot be written."""
    yield Scenario("disk full, read-only, little shared memory", "a disk that fills up", disk_full)
    yield Scenario("disk full, read-only, little shared memory", "output that is read-only", read_only)
    yield Scenario("disk full, read-only, little shared memory", "1 MiB of /dev/shm", little_shared_memory)


def mounted(folder: Path, size: str) -> bool:
    """Mount a small disk at `folder`; return whether that is allowed here."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(words, capture_output=True).returncode == 0


def unmount(folder: Path) -> None:
    """Take the disk away."""
    subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def disk_full(bench: Bench, folder: Path) -> str:
    """The checkpoint before stays, nothing else does; with room the same command goes on."""
    disk = folder / "run"
    if not mounted(disk, "2m"):
        return "not tried: no disk can be mounted here"
    try:
        outcome = Outcome(folder)  # there is room for one checkpoint, not for a second
        outcome.starts += run(folder, bench.data, most_starts=1).starts
        first = outcome.starts[0]
        assert first.code != 0
        assert f"checkpoint {disk}/checkpoints/step-" in first.output and "No space left on device" in first.output
        assert load_newest(disk / "checkpoints") is not None
        assert not list((disk / "checkpoints").glob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True, capture_output=True)
        outcome.starts += run(folder, bench.data).starts
        require_golden(outcome, golden(bench.work, bench.data))
    finally:
        unmount(disk)
    return "the one before stays, no litter"


def read_only(bench: Bench, folder: Path) -> str:
    """One line that names the path."""
    disk = folder / "disk"
    if not mounted(disk, "1m"):
        return "not tried: no disk can be mounted here"
    try:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, capture_output=True)
        words = harness.command(bench.data, disk / "run")
        started = launch(folder, words, [], ranks=2)
        assert started.code != 0
        assert started.output.count(f"error: run directory {disk}/run cannot be used: ") == 1
        assert "Read-only file system" in started.output
    finally:
        unmount(disk)
    return "one line that names the path"


def little_shared_memory(bench: Bench, folder: Path) -> str:
    """Training needs none of it."""
    words = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*words, "true"], capture_output=True).returncode:
        return "not tried: no disk can be mounted here"
    outcome = Outcome(folder)
    folder.mkdir(parents=True, exist_ok=True)
    outcome.starts.append(launch(folder, harness.command(bench.data, folder / "run"), [], ranks=2, within=words))
    require_golden(outcome, golden(bench.work, bench.data))
    return "trains"


# Damaged and foreign checkpoints


def damages() -> Iterator[Scenario]:
    """Yield what may have become of the newest checkpoint."""
    for name, damage in DAMAGES.items():
        yield Scenario(
            "checkpoint damaged or foreign",
            name,
            lambda bench, folder, damage=damage: passed_over(bench, folder, damage),
            always=damage in (_flip, _pickle),
        )
    yield Scenario("checkpoint damaged or foreign", "of another configuration", of_another_configuration)
    yield Scenario("checkpoint damaged or foreign", "all of them damaged", none_sound)


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.path,))


def _cut(newest: Path) -> None:
    content = (newest / "tensors.safetensors").read_bytes()
    (newest / "tensors.safetensors").write_bytes(content[: len(content) // 2])


def _flip(newest: Path) -> None:
    content = bytearray((newest / "tensors.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "tensors.safetensors").write_bytes(content)


def _flip_values(newest: Path) -> None:
    content = (newest / "values.json").read_text()
    (newest / "values.json").write_text(content.replace('"step": 8', '"step": 9'))


def _pickle(newest: Path) -> None:
    payload = pickle.dumps(_Payload(newest.parent.parent.parent / "pwned"))
    for name in ("tensors.safetensors", "values.json"):
        (newest / name).write_bytes(payload)


def _empty(newest: Path) -> None:
    for path in newest.iterdir():
        path.unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut short": _cut,
    "a bit flipped in the tensors": _flip,
    "a number changed in the values": _flip_values,
    "a pickle in its place": _pickle,
    "an empty folder": _empty,
}


def interrupted(bench: Bench, folder: Path) -> Outcome:
    """Return a run that was killed at step 10, with checkpoints of steps 4 and 8; it is made once and copied."""
    original = bench.work / "interrupted"
    if not (original / "done").exists():
        shutil.rmtree(original, ignore_errors=True)
        run(original, bench.data, [Fault("kill -9 of all", "D step", 10, 0)], most_starts=1)
        found = sorted(path.name for path in (original / "run" / "checkpoints").iterdir())
        assert found == ["step-00000004", "step-00000008"]
        (original / "done").touch()
    shutil.copytree(original, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("bin"))
    return Outcome(folder)


def passed_over(bench: Bench, folder: Path, damage: Callable[[Path], None]) -> str:
    """The one before it is taken, and nothing in it is run."""
    outcome = interrupted(bench, folder)
    damage(folder / "run" / "checkpoints" / "step-00000008")
    outcome.starts += run(folder, bench.data, most_starts=1).starts
    assert "step-00000008 is passed over: " in outcome.output
    require_golden(outcome, golden(bench.work, bench.data))
    assert not (folder / "pwned").exists()
    return "the older one is taken"


def of_another_configuration(bench: Bench, folder: Path) -> str:
    """It is refused with what differs, and stays."""
    outcome = interrupted(bench, folder)
    flags = ("--seed", 1, "--max-steps", 4)
    other = golden(bench.work, bench.data, flags=flags)
    shutil.copytree(other.run_dir / "checkpoints" / "step-00000004", folder / "run" / "checkpoints" / "step-00000011")
    outcome.starts += run(folder, bench.data, most_starts=1).starts
    assert outcome.starts[-1].code != 0
    assert outcome.starts[-1].output.count("is of another configuration (seed: 1 -> 0)") == 1
    assert (folder / "run" / "checkpoints" / "step-00000011").is_dir()
    return "refused, with what differs"


def none_sound(bench: Bench, folder: Path) -> str:
    """The run does not begin again from nothing."""
    outcome = interrupted(bench, folder)
    for name in ("step-00000004", "step-00000008"):
        _cut(folder / "run" / "checkpoints" / name)
    outcome.starts += run(folder, bench.data, most_starts=1).starts
    assert outcome.starts[-1].code != 0
    assert "none of the 2 checkpoints" in outcome.starts[-1].output
    return "refused"
