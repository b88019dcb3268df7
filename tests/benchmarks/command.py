"""What the commands of the benchmarks have in common: options, turns of their variants, output."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from shards.common.command_line import Options, build, parse_flags

Result = TypeVar("Result")


class Benchmark(Options):
    """Base of the options."""

    json_: Path | None = Field(None, alias="json")
    """File for the figures."""

    def keep(self, figures: object) -> None:
        """Write the figures to the file that was asked for."""
        if self.json_ is not None:
            self.json_.write_text(json.dumps(figures, indent=1) + "\n")

    def tell(self, figures: Mapping[str, float | str]) -> None:
        """Print figures by name, and write them to the file."""
        for name, value in figures.items():
            number = value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
            print(f"{name:48} {number:>12}")
        self.keep(figures)


Model = TypeVar("Model", bound=Benchmark)


def options_of(model: type[Model], argv: Sequence[str]) -> Model:
    """Return the options of the command that is the module of `model`."""
    module = sys.modules[model.__module__].__spec__
    assert module is not None
    return build(model, parse_flags(model, argv, f"python -m {module.name}"))


def medians(rounds: int, variants: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Return the median of what each variant measures, over rounds in which all take a turn."""
    found = [{name: measure() for name, measure in variants.items()} for _ in range(rounds)]
    return {name: statistics.median(turn[name] for turn in found) for name in variants}


def seconds_of(function: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    return clocked(function)[1]


def clocked(function: Callable[[], Result]) -> tuple[Result, float]:
    """Return what a call returns, and its seconds."""
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started
