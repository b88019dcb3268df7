"""What rank 0 tells the world: metrics.jsonl (the source of truth), Weights & Biases, the console, pictures.

Nothing here may stop training: what fails is reported once and left. The other ranks hold a `NullLogger`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from tqdm import tqdm

from dist_dcgan.config import Config, Plan
from dist_dcgan.distributed import World
from dist_dcgan.training.notices import reported, warn
from dist_dcgan.training.run_directory import RunDirectory
from dist_dcgan.training.wandb_logger import WandbLogger
from shards.errors import UserError
from shards.files import atomic_file, publish

Row = Mapping[str, float]


class Logger(Protocol):
    """Receives what happens in a run."""

    def metrics(self, row: Row) -> None:
        """Take the metrics of a step."""

    def samples(self, step: int, draw: Callable[[], Tensor]) -> None:
        """Take a grid: `draw` returns images (N, 3, size, size) in [-1, 1] and costs time."""

    def alert(self, step: int, text: str) -> None:
        """Take what a person should know at once, some lines."""

    def close(self) -> None:
        """Finish within seconds."""


class NullLogger:
    """The logger of every rank but 0."""

    def metrics(self, row: Row) -> None:
        """Do nothing."""

    def samples(self, step: int, draw: Callable[[], Tensor]) -> None:
        """Do nothing."""

    def alert(self, step: int, text: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class CompositeLogger:
    """Passes on to several loggers; one that fails is reported and dropped."""

    def __init__(self, loggers: list[Logger]) -> None:
        self._loggers = loggers

    def metrics(self, row: Row) -> None:
        """Pass on."""
        self._each("metrics", row)

    def samples(self, step: int, draw: Callable[[], Tensor]) -> None:
        """Pass on."""
        self._each("samples", step, draw)

    def alert(self, step: int, text: str) -> None:
        """Pass on."""
        self._each("alert", step, text)

    def close(self) -> None:
        """Pass on."""
        self._each("close")

    def _each(self, method: str, *arguments: Any) -> None:
        for logger in list(self._loggers):
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:  # whatever a logger meets, training goes on
                warn(f"{type(logger).__name__} failed and is turned off: {error!r}")
                self._loggers.remove(logger)


class JsonlLogger:
    """Appends a line to metrics.jsonl per row, after cutting off what lies behind `step`."""

    def __init__(self, path: Path, step: int) -> None:
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            publish(path, "".join(line + "\n" for line in kept).encode())
        self._file = path.open("a", buffering=1)

    def metrics(self, row: Row) -> None:
        """Append the row; what is not finite becomes null, as JSON knows no infinity."""
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._file.write(json.dumps(finite) + "\n")

    def samples(self, step: int, draw: Callable[[], Tensor]) -> None:
        """Do nothing."""

    def alert(self, step: int, text: str) -> None:
        """Append a row of its own."""
        self._file.write(json.dumps({"step": step, "alert": text}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class SampleFiles:
    """Writes grids as PNG."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def metrics(self, row: Row) -> None:
        """Do nothing."""

    def samples(self, step: int, draw: Callable[[], Tensor]) -> None:
        """Write the grid of this step."""
        self._directory.mkdir(parents=True, exist_ok=True)
        save_grid(draw(), self._directory / f"step-{step:08d}.png")

    def alert(self, step: int, text: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class ConsoleLogger:
    """One line of progress: live on a terminal; elsewhere plain lines, at most one a second."""

    def __init__(self, plan: Plan, step: int) -> None:
        self._plan, self._first_step, self._started = plan, step, time.perf_counter()
        self._last_line = float("-inf")
        self._bar = tqdm(total=plan.total_steps, initial=step, unit="step") if sys.stderr.isatty() else None

    def metrics(self, row: Row) -> None:
        """Show the row."""
        step = int(row["step"])
        text = (
            f"{row['images_seen'] / 1000:.1f} kimg  {row['throughput/images_per_second']:.1f} images/s  "
            f"loss D {row['loss/d']:.3f} G {row['loss/g']:.3f}  "
            f"D(x) {row['score/real']:.2f} D(G(z)) {row['score/fake']:.2f}  "
            f"{_kid(row)}"
            f"data wait {100 * row['time/data_wait']:.0f}%"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.perf_counter()
        if step < self._plan.total_steps and now - self._last_line < 1:
            return
        self._last_line = now
        per_step = (now - self._started) / (step - self._first_step)
        left = tqdm.format_interval((self._plan.total_steps - step) * per_step)
        share = 100 * step / self._plan.total_steps
        print(f"{share:5.1f}%  step {step}/{self._plan.total_steps}  {text}  ETA {left}", file=sys.stderr, flush=True)

    def samples(self, step: int, draw: Callable[[], Tensor]) -> None:
        """Do nothing."""

    def alert(self, step: int, text: str) -> None:
        """Show it."""
        warn(text)

    def close(self) -> None:
        """Leave the last line."""
        if self._bar is not None:
            self._bar.close()


def make_logger(config: Config, plan: Plan, world: World, run: RunDirectory, step: int, wandb_run_id: str) -> Logger:
    """Return the logger of this rank, which goes on after `step`."""
    if not world.is_main:
        return NullLogger()
    loggers: list[Logger] = []
    with reported("metrics.jsonl"):
        loggers.append(JsonlLogger(run.metrics, step))
    loggers += [SampleFiles(run.samples), ConsoleLogger(plan, step)]
    if config.wandb.mode != "disabled":
        with reported("W&B"):
            loggers.append(WandbLogger(config, run, wandb_run_id))
    return CompositeLogger(loggers)


def check_png(path: Path) -> None:
    """Raise UserError where a picture cannot be written to `path` for --out."""
    if path.exists():
        raise UserError(f"{path} exists: name another with --out")
    if path.suffix != ".png":
        raise UserError(f"--out {path} is no PNG: give it a name that ends in .png")
    if not path.parent.is_dir():
        raise UserError(f"no folder {path.parent} for --out {path.name}: make it first")


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """Write images (N, 3, size, size) in [-1, 1] as a PNG grid, about square where `columns` is not given."""
    from torchvision.utils import save_image  # imported here: it takes seconds, and only one rank ever draws

    columns = columns or max(1, round(len(images) ** 0.5))
    with atomic_file(path, durable=False) as file:  # W&B's process may look at any time
        save_image(images.float(), file, format="png", nrow=columns, normalize=True, value_range=(-1, 1))


def draw_curves(metrics: Path, path: Path) -> None:
    """Plot losses, D's scores and gradient norms from metrics.jsonl into a PNG; a failure is reported, not raised."""
    with reported("curves"):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        rows = [row for line in metrics.read_text().splitlines() if "images_seen" in (row := json.loads(line))]
        groups = ("loss", "score", "logit", "grad_norm", "diversity", "quality/kid")
        found = [group for group in groups if any(key.startswith(group) for row in rows for key in row)]
        figure, panels = pyplot.subplots(len(found), sharex=True, figsize=(9, 2.2 * len(found)), layout="constrained")
        for panel, group in zip(panels, found, strict=True):
            keys = dict.fromkeys(key for row in rows for key in row if key.startswith(group))
            for key in (key for key in keys if not key.endswith("_std")):
                points = [(row["images_seen"] / 1000, row[key]) for row in rows if key in row]
                panel.plot(*zip(*points, strict=True), ".-" if len(points) < 50 else "-", label=key, lw=1)
            panel.set_ylabel(group)
            panel.grid(alpha=0.3)
            panel.legend(loc="upper right")
        panels[-1].set_xlabel("thousand images seen")
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


def _kid(row: Row) -> str:
    """Return the kernel distance of a row that has one."""
    found = [key for key in row if key.startswith("quality/kid") and not key.endswith("_std")]
    return "".join(f"{key.removeprefix('quality/')} {row[key]:.4f}  " for key in found)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the torn last line of a killed process
