"""Run a phase of the study: python -m tests.stability PHASE --photos DIR --rooms DIR [--work DIR] [--at-once N].

Trials run side by side, one thread each; a trial that was killed goes on, one that is done is left. Results of
finished trials are gathered into `tests/stability/results/`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout

from tests.stability.experiment import run_trial
from tests.stability.recipes import PHASES, Trial


def main() -> None:
    """Run the trials of a phase, or with --trial one of them in this process."""
    parser = argparse.ArgumentParser(prog="python -m tests.stability", description=__doc__)
    parser.add_argument("phase", choices=sorted(PHASES))
    parser.add_argument("--photos", type=Path, required=True, help="shards of photographs")
    parser.add_argument("--rooms", type=Path, required=True, help="shards of rendered bedrooms")
    parser.add_argument("--work", type=Path, default=Path("runs/stability"))
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--trial", help=argparse.SUPPRESS)
    options = parser.parse_args()
    trials = {trial.name: trial for trial in PHASES[options.phase]()}
    if options.trial is not None:
        run_locked(trials[options.trial], options)
        return
    with ThreadPoolExecutor(options.at_once) as pool:
        list(pool.map(lambda name: start(name, options), trials))


def start(name: str, options: argparse.Namespace) -> None:
    """Run one trial in a process of its own, with its output in a file."""
    folder = options.work / name
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.stability", options.phase, "--trial", name]
    command += ["--photos", options.photos, "--rooms", options.rooms, "--work", options.work]
    with (folder / "output.txt").open("a") as output:
        code = subprocess.run(command, stdout=output, stderr=output).returncode
    print(f"{time.strftime('%H:%M:%S')} {name}: {'done' if code == 0 else f'exit {code}'}", flush=True)


def run_locked(trial: Trial, options: argparse.Namespace) -> None:
    """Run one trial, unless another process is at it."""
    folder = options.work / trial.name
    try:
        with FileLock(folder / "lock", timeout=0):
            run_trial(trial, options.photos if trial.data == "photos" else options.rooms, folder)
    except Timeout:
        print(f"{trial.name} is being run by another process")


if __name__ == "__main__":
    main()
