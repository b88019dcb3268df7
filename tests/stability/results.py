"""Results of trials as they are committed: a line of JSON per trial, its rows as columns."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_dcgan.training.watchdog import Collapse, Watchdog
from tests.stability.recipes import PHASES, Trial
from tests.support.rows import read_rows

FOLDER = Path(__file__).parent / "results"
MEDIANS = (
    "loss/d",
    "loss/g",
    "score/real",
    "score/fake",
    "grad_norm/d",
    "grad_norm/g",
    "diversity/fake",
    "diversity/real",
)
SUMMED_UP = ("factors", "widths", "quickstart")
"""Phases of trials that are long: their results hold no single step."""
LAYERS_EVERY = 50
"""Steps between norms and ratios of single layers."""

Value = float | str | None
"""A number; "nan" for one that was not finite; None where a step has no such number."""


@dataclass(frozen=True)
class Result:
    """What a trial recorded."""

    trial: Trial
    columns: dict[str, list[Value]]
    layers: dict[str, list[Value]]
    """Norms and ratios of single layers, at the steps of its own column `step`."""

    def rows(self) -> Iterator[dict[str, float]]:
        """Yield the steps as the watchdog sees them; a network that was not updated keeps its last numbers."""
        last: dict[str, float] = {}
        for index, step in enumerate(self.columns["step"]):
            here = ((key, column[index]) for key, column in self.columns.items())
            last |= {key: float(value) for key, value in here if value is not None}
            if step and "loss/d" in last and "loss/g" in last:
                yield dict(last)

    def points(self, key: str) -> list[tuple[int, float]]:
        """Return the (step, value) of a column that are there."""
        pairs = zip(self.columns["step"], self.columns[key], strict=True)
        return [(int(step), float(value)) for step, value in pairs if step is not None and value is not None]

    def collapses(self) -> list[Collapse]:
        """Return what the watchdog names, step by step."""
        return Watchdog().observe(list(self.rows()))


def gather(phase: str, work: Path) -> tuple[int, dict[str, Path]]:
    """Add the finished trials in `work` to the results of a phase; return their number and all last grids by name.

    No grids if some of them lie elsewhere: the picture that was made of them stays. Of long trials: those of seed 0.
    """
    trials = PHASES[phase]()
    finished = [trial for trial in trials if (work / trial.name / "done").exists()]
    result = _summary if phase in SUMMED_UP else _whole
    found = kept(phase) | {trial: result(trial, read_rows(work / trial.name / "rows.jsonl")) for trial in finished}
    lines = [found[trial] for trial in trials if trial in found]
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{phase}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = [trial for trial in trials if trial in found and (trial.seed == 0 or phase not in SUMMED_UP)]
    grids = {
        f"{trial.recipe}\n{trial.data}, seed {trial.seed}, {trial.steps:,} steps of {trial.batch}": max(
            (work / trial.name).glob("step-*.png")
        )
        for trial in shown
        if trial in finished
    }
    return len(finished), grids if len(grids) == len(shown) else {}


def kept(phase: str) -> dict[Trial, dict[str, Any]]:
    """Return the results of a phase that are there already."""
    return {Trial(**line["trial"]): line for line in read_rows(FOLDER / f"{phase}.jsonl")}


def _summary(trial: Trial, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return scores by images seen, what the watchdog names, and the last tenth's medians of a long trial."""
    last: dict[str, float] = {}
    steps = []
    for row in rows:
        last |= {key: math.nan if value is None else value for key, value in row.items()}
        steps += [dict(last)] if "loss/g" in last else []
    collapses = Watchdog().observe(steps)
    tail = steps[-len(steps) // 10 :]
    return {
        "trial": trial._asdict(),
        "kid": [[trial.batch * row["step"], row["kid"]] for row in rows if "kid" in row],
        "named": [f"{collapse.rule.mode} since {collapse.since}" for collapse in collapses],
        "medians": {key: statistics.median(row[key] for row in tail) for key in MEDIANS},
        "images_per_second": trial.batch / statistics.median(row["seconds"] for row in rows if "seconds" in row),
    }


def gather_evidence(folder: Path) -> dict[str, Path]:
    """Write the results of the evidence; return the last grids by what each is."""
    rows = (folder / "rows.jsonl").read_text()
    (FOLDER / "evidence.jsonl").write_text(rows)
    names = dict.fromkeys(json.loads(row)["name"] for row in rows.splitlines())
    return {name: max(folder.glob(f"{name}, *.png")) for name in names}


def read(phase: str) -> list[Result]:
    """Return the committed results of a phase."""
    found = read_rows(FOLDER / f"{phase}.jsonl")
    return [Result(Trial(**item["trial"]), item["columns"], item["layers"]) for item in found]


def _whole(trial: Trial, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return every step of a trial."""
    of_layers = [row for row in rows if any(map(_of_layer, row)) and (row["step"] - 1) % LAYERS_EVERY == 0]
    keys = dict.fromkeys(key for row in rows for key in row)
    return {
        "trial": trial._asdict(),
        "columns": {key: [_value(row, key) for row in rows] for key in keys if not _of_layer(key)},
        "layers": {key: [_value(row, key) for row in of_layers] for key in keys if key == "step" or _of_layer(key)},
    }


def _of_layer(key: str) -> bool:
    return key.count("/") > 1


def _value(row: Mapping[str, Any], key: str) -> Value:
    return "nan" if key in row and row[key] is None else row.get(key)
