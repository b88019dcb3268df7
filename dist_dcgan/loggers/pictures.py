"""Grids of samples and the curves of a run, as PNG files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from torch import Tensor

from dist_dcgan.drawing import save_grid
from dist_dcgan.loggers.base import Logger, reported
from dist_dcgan.run.history import MOST_BYTES
from shards.common.environment import in_safe_directory
from shards.common.files import atomic_file, read_plain


class SampleFiles(Logger):
    """Writes grids as PNG."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def samples(self, step: int, draw: Callable[[], Tensor]) -> None:
        """Write the grid of this step."""
        self._directory.mkdir(parents=True, exist_ok=True)
        save_grid(draw(), self._directory / f"step-{step:08d}.png")


def import_matplotlib() -> None:
    """Import matplotlib, which reads `matplotlibrc` of the working directory, away from there.

    Call it before there are threads that open files by relative paths.
    """
    if "matplotlib" not in sys.modules:
        with in_safe_directory():
            import_module("matplotlib")


def draw_curves(metrics: Path, path: Path) -> None:
    """Plot losses, D's scores and gradient norms from metrics.jsonl into a PNG; a failure is reported, not raised."""
    with reported("curves"):
        import_matplotlib()
        from matplotlib.figure import Figure  # not pyplot: it looks for a screen and takes a second

        lines = read_plain(metrics, MOST_BYTES).splitlines()
        rows = [row for line in lines if "images_seen" in (row := json.loads(line))]
        groups = ("loss", "score", "logit", "grad_norm", "diversity", "quality/kid")
        found = [group for group in groups if any(key.startswith(group) for row in rows for key in row)]
        figure = Figure(figsize=(9, 2.2 * len(found)), dpi=110)
        panels = figure.subplots(len(found), sharex=True, squeeze=False)[:, 0]
        figure.subplots_adjust(left=0.1, right=0.98, bottom=0.5 / figure.get_figheight(), top=0.99, hspace=0.1)
        for panel, group in zip(panels, found, strict=True):
            keys = dict.fromkeys(key for row in rows for key in row if key.startswith(group))
            for key in (key for key in keys if not key.endswith("_std")):
                points = [(row["images_seen"] / 1000, row[key]) for row in rows if key in row]
                panel.plot(*zip(*points, strict=True), ".-" if len(points) < 50 else "-", label=key, lw=1)
            panel.set_ylabel(group)
            panel.yaxis.set_label_coords(-0.08, 0.5)
            panel.grid(alpha=0.3)
            panel.legend(loc="upper right")
        panels[-1].set_xlabel("thousand images seen")
        with atomic_file(path, durable=False) as file:  # a full disk leaves the curves that were there
            figure.savefig(file, format="png")
