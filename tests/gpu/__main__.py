"""Runs the items and writes what they told; `run.sh` starts it.

Parts go in order of value. Each has its share of the budget, and what one leaves the next ones have. Items of *check*
run several groups at a time, those of the others alone, as they are timed.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from shards.common.command_line import Options, build, parse_flags, run
from shards.common.errors import UserError
from tests.gpu import check, speed, train
from tests.gpu.commands import ROOT
from tests.gpu.groups import Budget, outcome_of, run_items
from tests.gpu.items import PART_SECONDS, Context, Figures, Item, Machine, Outcome, selected
from tests.gpu.results import Results
from tests.support.commands import module as command

ITEMS = [*check.ITEMS, *speed.ITEMS, *train.ITEMS]
REHEARSAL = "cpu-rehearsal"
_REHEARSAL_SECONDS, _REHEARSAL_SCALE = 900.0, 5.0
"""A rehearsal may share a slow machine with other tests."""
_SECONDS_FOR_DATA = 60.0
_CORES_PER_GROUP = 4
_EXTRAS = ("wandb", "matplotlib", "pytest", "triton", "efficientnet_lite_pytorch")


class Lent(Options):
    """Run everything that a GPU has to tell, in parts, in order of value."""

    out: Path = Path("gpu-results")
    """Folder for the results: at most 8 files, named by the device."""
    photos: Path | None = None
    """Tar or LMDB of photographs to train on; rendered bedrooms by default."""
    part: Literal["check", "speed", "train"] | None = None
    """Only this part."""
    only: str | None = None
    """Only items with one of these in their name, separated by commas."""
    budget: float | None = Field(None, gt=0)
    """Seconds for everything; by default 120 for check, 100 for speed, 150 for train."""
    rehearse: bool = False
    """Run every item at toy size on the CPU."""


def main(argv: Sequence[str]) -> None:
    """Run the items, print a line for each, and end with status 1 if one failed."""
    options = build(Lent, parse_flags(Lent, argv, "bash tests/gpu/run.sh"))
    parts = [options.part] if options.part else list(PART_SECONDS)
    items = selected(ITEMS, parts, options.only)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left behind
    if options.rehearse:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    machine = machine_here(options.rehearse)
    print(f"{machine.name}, {machine.gpus} GPUs, {machine.cores} cores, {machine.versions}", flush=True)
    results = Results(options.out, machine, ["data", *(item.name for item in ITEMS)])
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as folder:
        context = Context(machine, options.rehearse, Path(folder))
        failed = 0
        for outcome in outcomes(options, items, context):
            print(outcome, flush=True)
            results.add(outcome)
            results.keep_pictures(context.folder)
            failed += outcome.status == "FAIL"
    print(f"{failed} failed; results are in {options.out}", flush=True)
    if failed:
        sys.exit(1)


def outcomes(options: Lent, items: Sequence[Item], context: Context) -> Iterator[Outcome]:
    """Yield the outcome of the data set and of each item, part by part, each part within its share of the budget."""
    parts = {part: found for part in PART_SECONDS if (found := [item for item in items if item.part == part])}
    end = time.monotonic() + (options.budget or sum(PART_SECONDS[part] for part in parts))
    context.seconds = _SECONDS_FOR_DATA
    yield outcome_of(Item("data", partial(make_data, photos=options.photos), _SECONDS_FOR_DATA, "data"), context)
    if context.rehearsing:  # the limits are not those of a GPU, and nothing is timed
        budget = Budget(time.monotonic() + _REHEARSAL_SECONDS, _REHEARSAL_SCALE)
        yield from run_items(items, context, budget, at_once=2)
        return
    while parts:
        later = sum(PART_SECONDS[part] for part in parts)
        part, found = next(iter(parts.items()))
        share = PART_SECONDS[part] / later * (end - time.monotonic())
        at_once = max(2, context.machine.cores // _CORES_PER_GROUP) if part == "check" else 1
        yield from run_items(found, context, Budget(time.monotonic() + share, share / PART_SECONDS[part]), at_once)
        del parts[part]


def make_data(context: Context, photos: Path | None) -> Figures:
    """Convert the photographs, or render bedrooms and convert these."""
    source = photos
    if source is None:
        source = context.folder / "demo_train_lmdb"
        images = str(context.sized(2000, 96))
        _quietly(command("shards", "demo", "--out", context.folder, "--images", images))
    _quietly(command("shards", "convert", source, "--out", context.data, "--samples-per-shard", 500))
    return {"photographs": str(photos or "rendered")}


def _quietly(words: list[str]) -> None:
    done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1])


def machine_here(rehearse: bool) -> Machine:
    """Return what the items run on; raises UserError if there is no GPU and this is no rehearsal."""
    with get_context("fork").Pool(1) as pool:  # this process must not touch CUDA: others are forked from it
        name, gpus, versions = pool.apply(_look)
    if not gpus and not rehearse:
        raise UserError("no GPU is seen here: use --rehearse to try every item at toy size on the CPU")
    return Machine(REHEARSAL if rehearse else name, 0 if rehearse else gpus, os.cpu_count() or 1, versions)


def _look() -> tuple[str, int, dict[str, str]]:
    gpus = torch.cuda.device_count()
    versions = {"Python": platform.python_version(), "torch": torch.__version__}
    if gpus:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        versions |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
        versions |= {"compute capability": capability}
    versions |= {name: "there" if importlib.util.find_spec(name) else "missing" for name in _EXTRAS}
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True, capture_output=True)
    versions["commit"] = commit.stdout.strip() or "unknown"
    return torch.cuda.get_device_name() if gpus else "", gpus, versions


if __name__ == "__main__":
    run(main)
