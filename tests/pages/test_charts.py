"""Curves of the report: what is left of many points, and where they are drawn."""

from __future__ import annotations

import math
import re

import pytest

from dist_dcgan.pages import charts
from dist_dcgan.pages.charts import Point


def test_thinning_keeps_extremes_and_gaps() -> None:
    values = [math.sin(step / 700) for step in range(100_000)]
    values[12_345], values[54_321], values[77_777] = 9.0, -9.0, math.nan
    kept = charts.thin([Point(step, step, value) for step, value in enumerate(values)])
    assert len(kept) <= 3 * charts.BUCKETS + 2
    assert {12_345, 54_321, 77_777, 0, 99_999} <= {point.images for point in kept}
    assert [point.images for point in kept] == sorted(point.images for point in kept)
    few = [Point(step, step, 1.0) for step in range(1000)]
    assert charts.thin(few) == few


def test_a_curve_is_drawn_where_its_values_are() -> None:
    panel = charts.Panel("x", "", [charts.Curve("x", 0, [Point(0, 0, 1), Point(50, 1, math.nan), Point(100, 2, 3)])])
    drawn = charts.draw(panel, 100)
    places = [tuple(map(float, part.split())) for part in re.findall(r"M([\d. ]+)", drawn.lines[0][1])]
    assert places[0][0] == charts.LEFT and places[1][0] == charts.WIDTH - charts.RIGHT  # two pieces
    assert places[0][1] > places[1][1]  # the larger value stands higher
    assert [label for _, label in drawn.across] == ["0", "20", "40", "60", "80", "100"]


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.0, 1.0, 0.2), (-3.0, 4.0, 2.0), (0.0, 1e9, 2e8), (0.001, 0.002, 0.0002)]
)
def test_ticks_are_round(low: float, high: float, expected: float) -> None:
    found = list(charts.ticks(low, high))
    assert 3 <= len(found) <= 8 and found[1] - found[0] == pytest.approx(expected)
