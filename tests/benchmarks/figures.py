"""Figures as the README files have them; needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes

pyplot.switch_backend("Agg")


@contextmanager
def figure(path: Path, lines: int = 1, columns: int = 1, dpi: int = 90, **options: Any) -> Iterator[list[Axes]]:
    """Yield the panels of a figure, which is then written to `path`."""
    drawing, panels = pyplot.subplots(lines, columns, squeeze=False, layout="constrained", **options)
    for panel in panels.flat:
        panel.grid(alpha=0.3)
    yield list(panels.flat)
    drawing.savefig(path, dpi=dpi)
    pyplot.close(drawing)
