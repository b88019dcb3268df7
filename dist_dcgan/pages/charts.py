"""Curves of one run or several: which are drawn, thinned without losing extremes, and drawn before any script runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from dist_dcgan.run.history import Row, is_kid

BUCKETS = 400
"""Of a thinned curve: each keeps its lowest and its highest value."""
WIDTH, HEIGHT = 720, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 10, 26
"""Margins of a panel, whose size is `WIDTH` by `HEIGHT`."""


class Point(NamedTuple):
    """A value of a metric; NaN is drawn as a gap."""

    images: int
    seconds: float
    value: float


@dataclass(frozen=True)
class Curve:
    """A metric of a run."""

    label: str
    colour: int
    """Number of a colour of the style sheet, from 0."""
    points: list[Point]


@dataclass(frozen=True)
class Panel:
    """Curves over one axis."""

    title: str
    meaning: str
    """What a reader should know of it."""
    curves: list[Curve]
    spans_orders: bool = False
    """Whether its values may differ by orders of magnitude, so that they are better seen on a logarithmic axis."""

    @property
    def is_log(self) -> bool:
        """Whether its axis is logarithmic."""
        values = [point.value for curve in self.curves for point in curve.points if math.isfinite(point.value)]
        return self.spans_orders and bool(values) and min(values) > 0 and max(values) > 30 * min(values)


class Wanted(NamedTuple):
    """A panel as it is asked for: its curves are metrics by name, multiplied by `factor`."""

    title: str
    meaning: str
    metrics: dict[str, str]
    """Labels by the names of metrics in the log."""
    factor: float = 1.0
    spans_orders: bool = False


WANTED = (
    Wanted(
        "Loss",
        "cross-entropy on logits; neither falls for long while both learn",
        {"loss/d": "D", "loss/g": "G"},
        spans_orders=True,
    ),
    Wanted(
        "KID x 1000",
        "distance of generated from real images by a feature network: less is better, 0 is no difference",
        {"kid": "KID"},
        1000.0,
    ),
    Wanted(
        "D's verdict",
        "how probable D finds it that images are real: real ones, generated ones, and these again after its update",
        {"score/real": "real", "score/fake": "generated", "score/fake_updated": "generated, after D's update"},
    ),
    Wanted(
        "D's logit",
        "the same before the sigmoid: how sure D is",
        {"logit/real": "real", "logit/fake": "generated", "logit/fake_updated": "generated, after D's update"},
    ),
    Wanted(
        "Norm of gradients",
        "near 0, a network learns nothing",
        {"grad_norm/d": "D", "grad_norm/g": "G"},
        spans_orders=True,
    ),
    Wanted(
        "Diversity of a batch",
        "spread of layouts; generated images far below real ones look alike",
        {"diversity/real": "real", "diversity/fake": "generated"},
    ),
    Wanted("Images per second", "over all ranks", {"throughput/images_per_second": "images/s"}),
    Wanted(
        "Waiting, % of the time",
        "for data, and for shards to be checked",
        {"time/data_wait": "for data", "time/shard_checks": "for checks"},
        100.0,
    ),
    Wanted("Steps skipped", "because gradients were not finite, since the beginning", {"steps/skipped": "steps"}),
)


def panels_of(rows: Sequence[Row]) -> list[Panel]:
    """Return the panels of one run; metrics that it does not have are left out."""
    panels = []
    for wanted in WANTED:
        metrics = {label: points(rows, name, wanted.factor) for name, label in wanted.metrics.items()}
        panels += _shown(wanted.title, wanted, metrics)
    return panels


def panels_over(runs: dict[str, Sequence[Row]]) -> list[Panel]:
    """Return the panels of several runs by their names: one per metric, in which each run has its curve."""
    panels = []
    for wanted in WANTED:
        for name, label in wanted.metrics.items():
            title = wanted.title if len(wanted.metrics) == 1 else f"{wanted.title}: {label}"
            panels += _shown(title, wanted, {run: points(rows, name, wanted.factor) for run, rows in runs.items()})
    return panels


def _shown(title: str, wanted: Wanted, found: dict[str, list[Point]]) -> list[Panel]:
    """Return the panel of some curves by their labels, coloured by their places; nothing if they show nothing."""
    curves = [Curve(label, place, thin(found[label])) for place, label in enumerate(found) if found[label]]
    values = [point.value for curve in curves for point in curve.points if math.isfinite(point.value)]
    return [Panel(title, wanted.meaning, curves, wanted.spans_orders)] if any(values) else []


def points(rows: Sequence[Row], name: str, factor: float = 1.0) -> list[Point]:
    """Return the values of a metric; `kid` is that of the extractor that the run had last."""
    if name == "kid":
        name = next((key for row in reversed(rows) for key in row.values if is_kid(key)), name)
    return [Point(row.images, row.seconds, factor * row.values[name]) for row in rows if name in row.values]


def thin(points: Sequence[Point], buckets: int = BUCKETS) -> list[Point]:
    """Return points of which each bucket of equally many keeps first gap, lowest and highest value; ends stay."""
    if len(points) <= 3 * buckets:
        return list(points)
    kept = {0, len(points) - 1}
    for bucket in range(buckets):
        places = range(bucket * len(points) // buckets, (bucket + 1) * len(points) // buckets)
        finite = [place for place in places if math.isfinite(points[place].value)]
        kept.update(next(([place] for place in places if not math.isfinite(points[place].value)), []))
        if finite:
            kept.add(min(finite, key=lambda place: points[place].value))
            kept.add(max(finite, key=lambda place: points[place].value))
    return [points[place] for place in sorted(kept)]


def as_json(panel: Panel) -> dict[str, Any]:
    """Return a panel as the page's script takes it: numbers of five digits, None for a gap."""
    curves = [
        {
            "label": curve.label,
            "colour": curve.colour,
            "images": [point.images for point in curve.points],
            "hours": [_short(point.seconds / 3600) for point in curve.points],
            "y": [_short(point.value) for point in curve.points],
        }
        for curve in panel.curves
    ]
    return {"log": panel.is_log, "curves": curves}


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


class Drawn(NamedTuple):
    """A panel in pixels, over images."""

    lines: list[tuple[int, str]]
    """Colour and path of each curve."""
    across: list[tuple[float, str]]
    """Places and labels of ticks."""
    up: list[tuple[float, str]]


def draw(panel: Panel, last: int) -> Drawn:
    """Return a panel whose axis of images ends at `last`."""
    values = [point.value for curve in panel.curves for point in curve.points if math.isfinite(point.value)]
    change: Callable[[float], float] = math.log10 if panel.is_log else float
    low, high = change(min(values)), change(max(values))
    room = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
    low, high = low - room, high + room

    x = partial(place_of, last=last)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (change(value) - low) / (high - low), 1)

    lines = []
    for curve in panel.curves:
        path, pen = [], "M"
        for point in curve.points:
            if not math.isfinite(point.value):
                pen = "M"
                continue
            path.append(f"{pen}{x(point.images)} {y(point.value)}")
            pen = "L"
        lines.append((curve.colour, "".join(path) + ("h0.01" if path and path[-1][0] == "M" else "")))
    ups = powers(low, high) if panel.is_log else list(ticks(low, high))
    return Drawn(lines, [(x(tick), label(tick)) for tick in ticks(0, last)], [(y(tick), label(tick)) for tick in ups])


def place_of(images: float, last: int) -> float:
    """Return where a number of images stands on an axis that ends at `last`."""
    return round(LEFT + (WIDTH - LEFT - RIGHT) * images / last, 1)


def ticks(low: float, high: float, about: int = 5) -> Iterator[float]:
    """Yield round numbers from `low` to `high`."""
    rough = (high - low) / about
    unit = 10 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
    for index in range(math.ceil(low / step), math.floor(high / step) + 1):
        yield index * step


def powers(low: float, high: float) -> list[float]:
    """Return powers of ten between two exponents, every so many of them."""
    exponents = range(max(-307, math.ceil(low)), min(308, math.floor(high)) + 1)  # of those that a float can be
    return [10.0**exponent for exponent in exponents[:: max(1, len(exponents) // 4)]]


def label(value: float) -> str:
    """Return a number as it stands beside an axis."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{letter}"
    return f"{value:.4g}" if value and abs(value) >= 1e-12 else "0"
