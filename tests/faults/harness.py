"""Starts a run in which something happens, as often as it takes, and tells what became of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_dcgan.run.checkpoint import load_newest
from tests.faults.rank import Fault, to_environment
from tests.support.commands import environment, metrics
from tests.support.rows import read_rows

ROOT = Path(__file__).parents[2]
STEPS, CHECKPOINT_EVERY = 12, 4
MOST_STARTS = 4
SECONDS = 180
TIMINGS = ("time/", "throughput/")

Flags = Sequence[object]


@dataclass
class Start:
    """One start of the launcher."""

    code: int
    output: str
    ended: float
    """Time of day at which it had ended."""
    survivors: list[int]
    """Processes of the run that were alive two seconds later."""


@dataclass
class Outcome:
    """What a run left, after as many starts as it took."""

    folder: Path
    starts: list[Start] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.folder / "run"

    @property
    def output(self) -> str:
        """What all starts printed."""
        return "".join(start.output for start in self.starts)

    def steps(self, rank: int = 0) -> list[dict[str, Any]]:
        """The steps that a rank began, in their order in time, with their samples."""
        return read_rows(self.folder / f"samples-{rank}.jsonl")

    def samples(self) -> dict[int, list[int]]:
        """The samples of each step, over all ranks; asserts that a step that was done again used the same."""
        found: dict[int, list[int]] = {}
        for rank in range(len(list(self.folder.glob("samples-*.jsonl")))):
            of_rank: dict[int, list[int]] = {}
            for row in self.steps(rank):
                assert of_rank.setdefault(row["step"], row["samples"]) == row["samples"], row["step"]
            for step, samples in of_rank.items():
                found.setdefault(step, []).extend(samples)
        return dict(sorted(found.items()))

    def state(self) -> str:
        """The SHA-256 of all that the last checkpoint holds."""
        found = load_newest(self.run_dir / "checkpoints")
        assert found is not None
        digest = hashlib.sha256()
        for name, tensor in sorted(found.tensors.items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        values = {key: value for key, value in found.values.items() if key not in ("wandb_run_id", "config")}
        digest.update(json.dumps(values, sort_keys=True).encode())
        return digest.hexdigest()

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, without what is measured in time."""
        return [
            {key: value for key, value in row.items() if not key.startswith(TIMINGS)} for row in metrics(self.run_dir)
        ]

    def fault_time(self) -> float:
        """The time of day at which the first fault happened."""
        return min(float(path.read_text()) for path in self.folder.glob("fault-*"))

    def faults(self) -> int:
        """How many faults have happened."""
        return len(list(self.folder.glob("fault-*")))

    def seconds_to_next_step(self) -> float:
        """Seconds from the first fault to the first step that begins after it in new processes."""
        first = self.steps()[0]["pid"]
        return float(next(row["time"] for row in self.steps() if row["pid"] != first)) - self.fault_time()

    def repeated_steps(self) -> int:
        """How many steps were begun more than once."""
        begun = [row["step"] for row in self.steps()]
        return len(begun) - len(set(begun))


def run(
    folder: Path,
    data: Path,
    faults: Sequence[Fault] = (),
    flags: Flags = (),
    ranks: int = 2,
    most_starts: int = MOST_STARTS,
) -> Outcome:
    """Start the same command until the run has ended well, or as often as is allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    outcome = Outcome(folder)
    for _ in range(most_starts):
        outcome.starts.append(launch(folder, command(data, folder / "run", *flags), faults, ranks))
        if outcome.starts[-1].code == 0 and not (outcome.run_dir / "STOPPED").exists():
            break
    return outcome


def command(data: Path, run_dir: Path, *flags: object) -> list[str]:
    """Return the flags of a short run."""
    usual = ["--preset", "debug", "--width", 4, "--global-batch", 8, "--max-steps", STEPS, "--wandb", "disabled"]
    usual += ["--checkpoint.every-steps", CHECKPOINT_EVERY]
    usual += ["--quality.extractor", "none", "--data", data, "--run-dir", run_dir]
    return [str(word) for word in (*usual, *flags)]


def launch(
    folder: Path,
    words: list[str],
    faults: Sequence[Fault],
    ranks: int,
    restarts: int = 3,
    within: Sequence[str] = (),
) -> Start:
    """Start launch/torchrun.sh once, by the command `within`, and wait for its end."""
    env = launcher_environment(folder, faults, ranks) | {"RESTARTS": str(restarts), "ORPHANED_SECONDS": "10"}
    with (folder / "output.txt").open("a+") as output:
        before = output.tell()
        process = subprocess.Popen(
            [*within, "bash", ROOT / "launch" / "torchrun.sh", *words],
            env=env,
            cwd=ROOT,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = -999
        ended = time.time()
        while (survivors := processes_of(folder)) and time.time() < ended + 2:
            time.sleep(0.1)
        for pid in survivors:
            os.kill(pid, signal.SIGKILL)
        output.seek(before)
        return Start(code, output.read(), ended, survivors)


def launcher_environment(folder: Path, faults: Sequence[Fault], ranks: int) -> dict[str, str]:
    """Return the variables by which a launcher starts `ranks` ranks, to whom the faults happen."""
    env = environment() | to_environment(list(faults), folder) | {"RANKS": str(ranks), "PYTHONPATH": str(ROOT)}
    return env | {"PATH": f"{stand_in(folder)}:{env['PATH']}"}


def stand_in(folder: Path) -> Path:
    """Return a folder for the PATH in which torchrun starts ranks that something happens to."""
    bin_folder = folder / "bin"
    if not bin_folder.exists():
        bin_folder.mkdir()
        script = f'#!/bin/sh\nexec "{sys.executable}" -m tests.faults.torchrun "$@"\n'
        (bin_folder / "torchrun").write_text(script)
        (bin_folder / "torchrun").chmod(0o755)
    return bin_folder


def processes_of(folder: Path) -> list[int]:
    """Return the living processes that were started with the run directory in `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes()
            if os.fsencode(folder / "run") in words and b"State:\tZ" not in (entry / "status").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it has ended
            continue
    return found


def golden(work: Path, data: Path, ranks: int = 2, flags: Flags = ()) -> Outcome:
    """Return a run that nothing disturbed, made once per folder."""
    words = "-".join(str(flag).strip("-").replace("/", "_") for flag in flags)
    folder = work / f"golden-{ranks}-{words}"
    outcome = Outcome(folder)
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        outcome = run(folder, data, flags=flags, ranks=ranks, most_starts=1)
        assert outcome.starts[0].code == 0, outcome.output
        (folder / "done").touch()
    return outcome


def require_golden(outcome: Outcome, undisturbed: Outcome) -> None:
    """Assert that a run ended as if nothing had happened: state, samples in order, and rows of metrics."""
    assert outcome.starts[-1].code == 0, outcome.output
    assert outcome.samples() == undisturbed.samples()
    assert outcome.state() == undisturbed.state()
    assert outcome.rows() == undisturbed.rows()
