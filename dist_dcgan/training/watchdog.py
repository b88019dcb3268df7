"""Detects training failures from the metrics of each step.

The bounds were chosen on the screening runs of `tests/stability`, those of "fading" on its runs by width. The rules are
pure functions of the metrics averaged over ranks, so that all ranks agree without communication.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

Row = Mapping[str, float]


@dataclass(frozen=True)
class Rule:
    """A failure mode, reported once `holds` was true in `steps` more steps than it was false."""

    mode: str
    holds: Callable[[Row], bool]
    steps: int
    meaning: str
    remedy: str
    fatal: bool = False
    """Whether training stops regardless of `on_collapse`, because it makes no progress."""


class Collapse(NamedTuple):
    """A failure: its rule, the step since which it holds, and the step at which it was reported."""

    rule: Rule
    since: int
    step: int

    def __str__(self) -> str:
        return (
            f"{self.rule.mode}, since step {self.since} (named at step {self.step})\n"
            f"  what it is: {self.rule.meaning}\n"
            f"  what to try: {self.rule.remedy}"
        )


def was_skipped(row: Row) -> bool:
    """Return whether a network was not updated because its gradients were not finite."""
    return not (math.isfinite(row["grad_norm/d"]) and math.isfinite(row["grad_norm/g"]))


RULES = (
    Rule(
        "not finite",
        lambda row: not (math.isfinite(row["loss/d"]) and math.isfinite(row["loss/g"])),
        3,
        "losses are infinite or not a number; what they ask for is not done",
        "--precision fp32, or a smaller --optimizer.lr-g and --optimizer.lr-d; earlier checkpoints are sound",
    ),
    Rule(
        "most steps are skipped",
        was_skipped,
        50,
        "gradients are infinite or not a number in most steps, so that the networks hardly learn",
        "--precision fp32, or a smaller --optimizer.lr-g and --optimizer.lr-d, from an earlier checkpoint",
        fatal=True,
    ),
    Rule(
        "the discriminator has won",
        lambda row: row["grad_norm/g"] < 1e-2 and row["score/fake"] < 0.5,
        3,
        "D is so sure that the generator's gradient is gone: G cannot learn any more",
        "the default preset, whose --loss logits keeps the gradient alive",
    ),
    Rule(
        "the generator has won",
        lambda row: row["score/fake"] > 0.9 and row["loss/g"] < 0.2,
        30,
        "D takes every generated image for real and so tells G nothing",
        "equal --optimizer.lr-g and --optimizer.lr-d, as in the default preset",
    ),
    Rule(
        "mode collapse",
        lambda row: row["diversity/fake"] < 0.1 * row["diversity/real"],
        250,
        "the images of a batch have one layout, whatever z is; so they have before training, but not for long",
        "the rates of the default preset, --noise.sigma 0.3, or an earlier checkpoint with another --seed",
    ),
    Rule(
        "fading",
        lambda row: row["growth/grad_norm/g"] > 3 and row["kept/diversity"] < 0.8,
        100,
        "G's gradient grows while its images get paler: D knows them by something that G can only draw less of",
        "a new run with --noise.sigma 0.05, which hides what gives small JPEGs away; --best draws with an earlier G",
    ),
    Rule(
        "oscillation",
        lambda row: abs(row["logit/fake_updated"] - row["logit/fake"]) > 10,
        150,
        "each step of D turns its verdict over, so that G chases noise",
        "--noise.sigma 0.5, or a smaller --optimizer.lr-d",
    ),
)


@dataclass
class Trend:
    """Averages over some 500 steps, and their extremes once they have settled: what "fading" shows in."""

    steps: int = 0
    gradient: float = 0.0
    """Of G."""
    fake: float = 0.0
    """Diversity of generated images; `real` is that of real ones."""
    real: float = 0.0
    least_gradient: float = 0.0
    most_diversity: float = 0.0
    """Relative to that of real images."""

    def extend(self, row: Row) -> Row:
        """Add a step; return its row with the growth of G's gradient, and with the share of diversity that is kept.

        Both are 1 in the first 1,000 steps, in which G's gradient falls and its images gain contrast.
        """
        if not was_skipped(row):
            self.steps += 1
            weight = max(1 / self.steps, 1 / 500)
            self.gradient += weight * (row["grad_norm/g"] - self.gradient)
            self.fake += weight * (row["diversity/fake"] - self.fake)
            self.real += weight * (row["diversity/real"] - self.real)
        growth = kept = 1.0
        if self.steps >= 1000 and self.gradient > 0 and self.real > 0:  # one image per rank has no diversity
            self.least_gradient = min(self.least_gradient or math.inf, self.gradient)
            self.most_diversity = max(self.most_diversity, self.fake / self.real)
            growth, kept = self.gradient / self.least_gradient, self.fake / self.real / self.most_diversity
        return {**row, "growth/grad_norm/g": growth, "kept/diversity": kept}


class Watchdog:
    """Watches the metrics of consecutive steps; reports each failure mode once, and again only after it has ended."""

    def __init__(self) -> None:
        self._trend = Trend()
        self._level = {rule.mode: 0 for rule in RULES}
        self._since = dict(self._level)
        self._named = {rule.mode: False for rule in RULES}

    def observe(self, rows: Sequence[Row]) -> list[Collapse]:
        """Add the rows of the next steps; return the failures newly reported."""
        found = [self._observe(rule, row) for row in map(self._trend.extend, rows) for rule in RULES]
        return [collapse for collapse in found if collapse is not None]

    def values(self) -> dict[str, Any]:
        """Return the state as JSON types."""
        state = {"level": dict(self._level), "since": dict(self._since), "named": dict(self._named)}
        return state | {"trend": asdict(self._trend)}

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Load the state of a checkpoint; rules that it does not contain keep their initial state."""
        self._trend = Trend(**values.get("trend", {}))
        for mode in self._level.keys() & values["level"].keys():
            self._level[mode], self._since[mode] = values["level"][mode], values["since"][mode]
            self._named[mode] = values["named"][mode]

    def _observe(self, rule: Rule, row: Row) -> Collapse | None:
        mode, step = rule.mode, int(row["step"])
        holds = rule.holds(row)
        if holds and self._level[mode] == 0:
            self._since[mode] = step
        self._level[mode] = min(self._level[mode] + 1, rule.steps) if holds else max(self._level[mode] - 1, 0)
        if self._level[mode] == 0:
            self._named[mode] = False
        if self._level[mode] < rule.steps or self._named[mode]:
            return None
        self._named[mode] = True
        return Collapse(rule, self._since[mode], step)
