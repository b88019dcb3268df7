"""The stability study: python -m tests.stability COMMAND

run PHASE    train the trials of a phase, some at once, one thread each: one that was killed goes on, one that is done
             is left, as are long ones whose results are there; then gather their results
gather PHASE add those trials of a phase that are done so far to its results
long         train the paper's width and half of it on many images, as people do, with the command itself
evidence     train the usual loop and this project at both widths, 40 minutes each, by turns
jump         measure how far one update of D moves its logit
jpegs        store the photographs of 32x32 as small JPEGs, their colours at half of the resolution and at all of it
clue         find out what D tells small JPEGs by
report       write the tables of README.md and its plots from the results
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dist_dcgan.training.train_state import resolve_precision
from shards.common.locks import Lock
from tests.stability import clue, evidence, jpegs, jump, long, report, results
from tests.stability.experiment import run_trial
from tests.stability.recipes import JPEGS, PHASES, Trial


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.stability", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "gather", "long", "evidence", "jump", "jpegs", "clue", "report"])
    parser.add_argument("phase", nargs="?", choices=sorted(PHASES))
    parser.add_argument("--photos", type=Path, default=Path("data/photos"), help="shards of photographs")
    parser.add_argument("--rooms", type=Path, default=Path("data/demo_train"), help="shards of rendered bedrooms")
    parser.add_argument("--photos32", type=Path, default=Path("data/photos32"), help="photographs at 32x32")
    parser.add_argument("--cifar", type=Path, default=Path("data/cifar"), help="shards of CIFAR-10")
    for name, colours in JPEGS.items():
        parser.add_argument(f"--{name}", type=Path, default=Path("data", name), help=f"photographs as JPEGs, {colours}")
    parser.add_argument("--work", type=Path, default=Path("runs/stability"), help="folder of the trials")
    parser.add_argument("--minutes", type=float, default=40, help="of training, for each run of the evidence")
    parser.add_argument("--data", choices=["photos", "rooms"], default="photos", help="of the long runs")
    parser.add_argument("--held-out", type=Path, help="shards of photographs that long runs are not trained on")
    parser.add_argument("--images", type=int, default=300_000, help="of a long run")
    parser.add_argument("--every", type=int, default=20_000, help="images between scores of a long run")
    parser.add_argument("--seeds", default="1,2,3", help="of the long runs")
    parser.add_argument("--batch", type=int, default=128, help="of the long runs")
    parser.add_argument("--rate", type=float, default=2e-4, help="of both networks in the long runs")
    parser.add_argument("--precision", default="auto", help="of the long runs")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which long runs are asked to end")
    parser.add_argument("--out", type=Path, default=results.FOLDER / "long.jsonl", help="results of the long runs")
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--trial", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.command == "report":
        report.main()
    elif options.command == "evidence":
        evidence.measure(options.photos, options.minutes, options.work / "evidence")
        report.show_grids(results.gather_evidence(options.work / "evidence"), report.PLOTS / "evidence_grids.jpg")
    elif options.command == "jump":
        jump.measure(options.photos)
    elif options.command == "jpegs":
        for name, colours in JPEGS.items():
            jpegs.store(options.photos32, getattr(options, name), colours)
    elif options.command == "clue":
        clue.measure(options.cifar, options.work)
    elif options.command == "long":
        run_long(options)
    elif options.phase is None:
        parser.error("run which phase?")
    elif options.trial is not None:
        run_locked(next(trial for trial in PHASES[options.phase]() if trial.name == options.trial), options)
    else:
        if options.command == "run":
            there = results.kept(options.phase) if options.phase in results.SUMMED_UP else {}
            left = [trial for trial in PHASES[options.phase]() if trial not in there]
            with ThreadPoolExecutor(options.at_once) as pool:
                list(pool.map(lambda trial: start(trial, options), left))
        gathered, grids = results.gather(options.phase, options.work)
        if grids:
            report.show_grids(grids, report.PLOTS / f"{options.phase}_grids.jpg")
        print(f"{gathered} trials gathered")


def run_long(options: argparse.Namespace) -> None:
    """Train at both widths with each seed."""
    shards = options.photos if options.data == "photos" else options.rooms
    places = long.Places(shards, options.held_out, options.work / "long", options.out)
    seeds = map(int, options.seeds.split(","))
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else "CPU"
    precision = resolve_precision(options.precision, torch.device("cuda" if gpu else "cpu"))
    runs = [
        long.LongRun(options.data, preset, seed, options.batch, options.rate, precision, device)
        for seed in seeds
        for preset in long.PRESETS
    ]
    long.measure(places, runs, options.images, options.every, options.at_once, options.seconds)


def start(trial: Trial, options: argparse.Namespace) -> None:
    """Run one trial in a process of its own, with its output in a file."""
    folder = options.work / trial.name
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.stability", "run", options.phase, "--trial", trial.name]
    command += ["--work", options.work, f"--{trial.data}", getattr(options, trial.data)]
    with (folder / "output.txt").open("a") as output:
        code = subprocess.run(command, stdout=output, stderr=output).returncode
    print(f"{time.strftime('%H:%M:%S')} {trial.name}: {'done' if code == 0 else f'exit {code}'}", flush=True)


def run_locked(trial: Trial, options: argparse.Namespace) -> None:
    """Run one trial, unless another process is at it."""
    folder = options.work / trial.name
    with Lock(folder / "lock") as lock:
        if lock.take():
            run_trial(trial, getattr(options, trial.data), folder)
        else:
            print(f"{trial.name} is being run by another process")


if __name__ == "__main__":
    main()
