"""What a scenario of the bench is, and what it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Bench(NamedTuple):
    """Where the bench works, and on what."""

    work: Path
    data: Path
    """Shards of 96 images or more."""
    other: Path
    """Another data set, in one shard."""
    limits: bool = True
    """Whether times are held to their limits."""


@dataclass(frozen=True)
class Scenario:
    """Something that happens, by what it is told in the table, and the check that raises where a promise is broken."""

    row: str
    name: str
    check: Callable[[Bench, Path], str]
    """Takes the bench and a folder; returns what was measured."""
    always: bool = True
    """Whether it belongs to the short part."""
    by_default: bool = False
    """Whether the default test run holds it; other tests of the short part are slow."""
