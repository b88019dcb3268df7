"""Long runs at full and half width with the training command itself, several at once.

A run whose result is there is skipped, an interrupted one is resumed, and a failed one leaves no result.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from shards.common.files import publish
from tests.support.commands import module
from tests.support.rows import read_rows

PRESETS = ("paper", "narrow")
FAKES, REALS = 1000, 2000
"""Images of a score, generated and real, as elsewhere in this study."""
ROOT = Path(__file__).parents[2]

Row = dict[str, Any]
"""Result of a run."""


class LongRun(NamedTuple):
    """A run to train."""

    data: str
    preset: str
    seed: int
    batch: int
    rate: float
    """Of both networks."""
    precision: str
    """Resolved: never auto."""
    device: str

    @property
    def name(self) -> str:
        """Name of its run directory."""
        return f"{self.data}-{self.preset}-{self.batch}-{self.rate:.0e}-{self.precision}-{self.seed}"


@dataclass(frozen=True)
class Places:
    """Folders and files of the study."""

    shards: Path
    held_out: Path | None
    """Shards of images that runs are not trained on."""
    work: Path
    results: Path


def measure(places: Places, runs: Sequence[LongRun], images: int, every: int, at_once: int, seconds: float) -> None:
    """Train each run on `images` images, with a score `every` so many, and write its row; all stop after `seconds`."""
    deadline, lock = time.monotonic() + seconds, Lock()
    threads = str(max(1, (os.cpu_count() or 1) // at_once))

    def take(run: LongRun) -> None:
        if time.monotonic() > deadline or any(row["images"] >= images for row in known(places.results, run)):
            return
        folder = places.work / run.name
        status = train(run, places, images, every, deadline, threads)
        if status != 0:
            print(f"{run.name} ended with status {status}: see {folder}.txt", flush=True)
            return
        row = told(run, folder)
        if places.held_out is not None:
            row["trained_on"] = evaluate(folder, places.shards, places.held_out, threads)
            row["held_out"] = evaluate(folder, places.held_out, places.held_out, threads)
        with lock:
            keep(places.results, run, row)
        print(f"{time.strftime('%H:%M:%S')} {run.name}: {row['images']:,} images, KID {row['kid'][-1:]}", flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(take, runs))


def train(run: LongRun, places: Places, images: int, every: int, deadline: float, threads: str) -> int:
    """Train, stop at the deadline, and return the exit status."""
    words = ["--preset", run.preset, "--data", places.shards, "--run-dir", places.work / run.name, "--seed", run.seed]
    words += ["--global-batch", run.batch, "--max-steps", -(-images // run.batch), "--wandb", "disabled"]
    words += ["--precision", run.precision, "--optimizer.lr-g", run.rate, "--optimizer.lr-d", run.rate]
    words += ["--quality.every-images", every, "--quality.fakes", FAKES, "--quality.reals", REALS]
    words += ["--quality.time-share", 1, "--log.samples-every-images", every]
    command = module("dist_dcgan.train", "--world-size", 1, *words)
    places.work.mkdir(parents=True, exist_ok=True)
    with (places.work / f"{run.name}.txt").open("a") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, env=_environment(threads))
        try:
            return process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()
            return process.wait()


def evaluate(folder: Path, shards: Path, as_many_as: Path, threads: str) -> Row:
    """Return the scores of a run against as many images of `shards` as `as_many_as` holds."""
    reals = json.loads((as_many_as / "manifest.json").read_text())["samples"]
    words = [folder, "--data", shards, "--fakes", FAKES, "--reals", reals, "--json"]
    done = subprocess.run(
        module("dist_dcgan.evaluate", *words), capture_output=True, text=True, cwd=ROOT, env=_environment(threads)
    )
    assert done.returncode == 0, done.stderr
    scores: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return {name: value for name, value in scores.items() if isinstance(value, float) or name == "reals"}


def told(run: LongRun, folder: Path) -> Row:
    """Return images, KID by images seen, alerts of the watchdog and the last diversity from the log of a run."""
    rows = read_rows(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss/d" in row]
    scores = [(row["images_seen"], name, value) for row in rows for name, value in row.items() if "quality/" in name]
    return run._asdict() | {
        "images": steps[-1]["images_seen"],
        "kid": [[seen, value] for seen, name, value in scores if "kid" in name and not name.endswith("_std")],
        "alerts": [str(row["alert"]).splitlines()[0] for row in rows if "alert" in row],
        "skipped_steps": steps[-1]["steps/skipped"],
        "diversity": steps[-1]["diversity/fake"] / steps[-1]["diversity/real"],
    }


def known(results: Path, run: LongRun) -> Iterator[Row]:
    """Yield the rows of a run."""
    for row in read_rows(results):
        if all(row[name] == value for name, value in run._asdict().items()):
            yield row


def keep(results: Path, run: LongRun, row: Row) -> None:
    """Write the row of a run, replacing an earlier one."""
    replaced = list(known(results, run))
    rows = [other for other in read_rows(results) if other not in replaced] + [row]
    results.parent.mkdir(parents=True, exist_ok=True)
    publish(results, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _environment(threads: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": threads}


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of a less that of b (Welch 1947); both have two values or more."""
    errors = [statistics.variance(values) / len(values) for values in (a, b)]
    degrees = sum(errors) ** 2 / sum(error**2 / (len(values) - 1) for error, values in zip(errors, (a, b), strict=True))
    middle, half = statistics.mean(a) - statistics.mean(b), _student(degrees) * math.sqrt(sum(errors))
    return middle - half, middle + half


def _student(degrees: float) -> float:
    """Return the value that Student's t exceeds with a probability of 0.025, by a sum over its density."""
    t, width = np.linspace(0, 13, 1_300_001, retstep=True)  # 12.7 for one degree
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    inner = 2 * scale * width * np.cumsum((1 + t * t / degrees) ** (-(degrees + 1) / 2))
    return float(t[np.searchsorted(inner, 0.95)])
