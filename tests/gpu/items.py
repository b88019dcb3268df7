"""What an item is, what it may use, and how it says that it does not apply to this machine."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch

from dist_dcgan.config import DistributedOptions
from dist_dcgan.distributed.world import World, process_group
from dist_dcgan.models.batchnorm import make_norm
from shards.common.errors import UserError
from tests.benchmarks.tables import cell

PART_SECONDS = {"check": 120.0, "speed": 100.0, "train": 150.0}
"""Parts in order of value, and the seconds that each has."""

Figures = dict[str, Any]
"""What an item found, by name, as JSON knows it; numbers and short texts make up its line."""
Value = TypeVar("Value")


class Skipped(Exception):  # noqa: N818  # no error
    """An item does not apply here; the message says why."""


@dataclass(frozen=True)
class Machine:
    """What the items run on."""

    name: str
    """The GPU's, or `cpu-rehearsal`."""
    gpus: int
    cores: int
    versions: dict[str, str]


@dataclass
class Context:
    """What an item may use, in the process that runs its group."""

    machine: Machine
    rehearsing: bool
    folder: Path
    """Scratch space that all items share."""
    seconds: float = 0.0
    """Seconds that the item has."""
    stack: ExitStack = field(default_factory=ExitStack)
    """Left when the group is done."""

    @property
    def data(self) -> Path:
        """Folder of the shards."""
        return self.folder / "shards"

    @property
    def device(self) -> torch.device:
        """The first GPU, or the CPU in a rehearsal."""
        return torch.device("cuda", 0) if self.machine.gpus else torch.device("cpu")

    @cached_property
    def world(self) -> World:
        """A world of this process alone, as training without torchrun has it."""
        return self.stack.enter_context(process_group(60, self.device.type))

    def sized(self, full: Value, toy: Value) -> Value:
        """Return a size for the GPU, or the one for the rehearsal."""
        return toy if self.rehearsing else full


@dataclass(frozen=True)
class Item:
    """One thing that a GPU has to tell."""

    name: str
    """PART/NAME."""
    run: Callable[[Context], Figures]
    """Raises Skipped if it does not apply, and whatever else if it fails."""
    seconds: float
    """Most seconds that it may take in the usual budget of its part."""
    group: str
    """Items of a group run one after the other in one process."""

    @property
    def part(self) -> str:
        """The part that it belongs to."""
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class Outcome:
    """What became of an item."""

    name: str
    status: Literal["PASS", "FAIL", "SKIP"]
    seconds: float
    reason: str
    """One line."""
    figures: Figures = field(default_factory=dict)
    details: str = ""
    """Traceback of a failure."""

    def __str__(self) -> str:
        return f"{self.status} {self.name:34} {self.seconds:6.1f} s  {self.reason}"


def norm_kinds() -> tuple[str, ...]:
    """Return the kinds of cross-rank batch norm that the configuration knows."""
    choices = get_args(DistributedOptions.model_fields["batchnorm"].annotation)
    return tuple(kind for kind in choices if kind != "auto")


def runs_on(kind: str, device: torch.device) -> bool:
    """Return whether batch norm of this kind runs on the device."""
    try:
        make_norm(kind, device)
    except UserError:
        return False
    return True


def kinds_on(device: torch.device) -> list[str]:
    """Return the kinds of batch norm that run on the device."""
    return [kind for kind in norm_kinds() if runs_on(kind, device)]


def need_norm(kind: str, device: torch.device) -> None:
    """Raise Skipped if batch norm of this kind does not run on the device."""
    if not runs_on(kind, device):
        raise Skipped("needs CUDA")


def need_compiler(device: torch.device) -> None:
    """Raise Skipped if what compiles networks for the device is missing."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise Skipped("Triton is not installed")
    if not any(map(shutil.which, ("g++", "gcc", "clang"))):
        raise Skipped("there is no C++ compiler")


def in_words(figures: Figures) -> str:
    """Return the numbers and short texts of an item as one line."""
    shown = {name: value for name, value in figures.items() if isinstance(value, int | float | str)}
    return ", ".join(f"{name.replace('_', ' ')} {cell(value)}" for name, value in shown.items())


def selected(items: Sequence[Item], parts: Iterable[str], names: str | None) -> list[Item]:
    """Return the items of some parts that have one of `names`, comma-separated, in theirs; raises UserError if none."""
    wanted = None if names is None else names.split(",")
    found = [
        item for item in items if item.part in parts and (wanted is None or any(word in item.name for word in wanted))
    ]
    if not found:
        known = ", ".join(item.name for item in items if item.part in parts)
        raise UserError(f"--only {names} names no item of {', '.join(parts)}: use parts of {known}")
    return found
