"""Does it learn here? The default at the paper's width on the photographs, then the narrow net for as many images."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_dcgan.metrics.extractors import missing_packages
from tests.gpu import commands
from tests.gpu.items import Context, Figures, Item, Skipped

Row = Mapping[str, Any]

_SECONDS_TO_END = 12.0
"""Left of an item's time for the last checkpoint and the curves."""
_TOY_IMAGES = 80


def train_paper(context: Context) -> Figures:
    """Train at the paper's width until the time is over."""
    deadline = time.monotonic() + context.seconds - _SECONDS_TO_END
    run_dir = context.folder / "paper"

    def enough() -> bool:
        return time.monotonic() > deadline or (context.rehearsing and seen(commands.rows(run_dir)) >= _TOY_IMAGES)

    words = commands.train(context, "paper", *flags(context), *context.sized((), ("--width", 8)), "--max-steps", 10**7)
    status = commands.run_until(context, words, enough, signal.SIGTERM)
    assert status == 0, f"training ended with status {status}"
    return told(context, run_dir)


def train_narrow(context: Context) -> Figures:
    """Train the narrow net for as many images as the paper's width has had."""
    batch = context.sized(128, 8)
    steps = max(1, seen(commands.rows(context.folder / "paper")) // batch) or context.sized(2000, 10)
    width = context.sized(("--preset", "narrow"), ("--width", 4))
    deadline = time.monotonic() + context.seconds - _SECONDS_TO_END
    scored = context.sized(True, False)  # a score takes seconds of a CPU
    words = commands.train(context, "narrow", *flags(context, scored), *width, "--max-steps", steps)
    status = commands.run_until(context, words, lambda: time.monotonic() > deadline, signal.SIGTERM)
    assert status == 0, f"training ended with status {status}"
    return told(context, context.folder / "narrow")


def draw_distances(context: Context) -> Figures:
    """Plot the kernel distance of both against images and against time."""
    if importlib.util.find_spec("matplotlib") is None:
        raise Skipped("matplotlib is not installed")
    curves = {name: distances(commands.rows(context.folder / name)) for name in ("paper", "narrow")}
    if not any(curves.values()):
        raise Skipped("there is no score to plot")
    from tests.benchmarks.figures import figure

    with figure(context.folder / "kid.png", 1, 2, figsize=(10, 4), sharey=True) as panels:
        for panel, column, label in zip(panels, (0, 1), ("images seen", "seconds of training"), strict=True):
            for name, points in curves.items():
                panel.plot([point[column] for point in points], [point[2] for point in points], ".-", label=name)
            panel.set(xlabel=label, title=context.machine.name)
            panel.legend()
        panels[0].set_ylabel("KID (EfficientNet-Lite0)")
    return {f"{name}_scores": len(points) for name, points in curves.items()}


def flags(context: Context, scored: bool = True) -> list[object]:
    """Return the flags that both trainings have; images are scored if that is wanted and the packages are there."""
    every, count, batch = context.sized((250_000, 2000, 128), (80, 16, 8))
    quality = ["--quality.every-images", every, "--quality.fakes", count, "--quality.reals", count]
    quality += ["--quality.extractor", "none" if missing_packages() or not scored else "efficientnet-lite0"]
    return [*quality, "--log.samples-every-images", every, "--global-batch", batch, "--on-collapse", "warn"]


def told(context: Context, run_dir: Path) -> Figures:
    """Return what a run has come to, and keep its last grid; raises AssertionError if the watchdog gave an alert."""
    rows = commands.rows(run_dir)
    scores = distances(rows)
    grids = sorted((run_dir / "samples").glob("*.png"))
    if grids:
        shutil.copyfile(grids[-1], context.folder / f"grid-{run_dir.name}.png")
    steps = [row for row in rows if "loss/d" in row]
    alerts = [str(row["alert"]).splitlines()[0] for row in rows if "alert" in row]
    assert not alerts, f"the watchdog found: {'; '.join(alerts)}"
    assert all(row[name] is not None for row in steps for name in ("loss/d", "loss/g")), "a loss is not finite"
    figures = {"steps": steps[-1]["step"], "images": seen(rows), "seconds": seconds_of(rows)[-1]}
    figures["images_per_second"] = figures["images"] / figures["seconds"]
    kids = {"kid_first": scores[0][2], "kid_last": scores[-1][2], "scores": scores} if scores else {}
    return figures | kids | {"skipped_steps": steps[-1]["steps/skipped"]}


def distances(rows: Sequence[Row]) -> list[tuple[int, float, float]]:
    """Return images seen, seconds of training without scores, and kernel distance of each score."""
    found = []
    for row, seconds in zip(rows, seconds_of(rows), strict=True):
        names = [name for name in row if name.startswith("quality/kid") and not name.endswith("_std")]
        found += [(int(row["images_seen"]), seconds, float(row[name])) for name in names if row[name] is not None]
    return found


def seconds_of(rows: Sequence[Row]) -> list[float]:
    """Return the seconds of training up to each row: of the steps since the row before, at the pace that it gives."""
    total, step, found = 0.0, 0, []
    for row in rows:
        if "time/step" in row:
            total += float(row["time/step"]) * (int(row["step"]) - step)
            step = int(row["step"])
        found.append(total)
    return found


def seen(rows: Sequence[Row]) -> int:
    """Return the images that training has seen."""
    return max((int(row["images_seen"]) for row in rows if "images_seen" in row), default=0)


ITEMS = [
    Item("train/paper", train_paper, 92, "train"),
    Item("train/narrow", train_narrow, 52, "train"),
    Item("train/kid", draw_distances, 6, "train"),
]
