"""What a check finds on a rank, and what all ranks make of it together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch.distributed as dist

from dist_dcgan.config import Config, Invocation, Plan
from dist_dcgan.data.storage.location import DatasetLocation
from dist_dcgan.distributed.world import World
from dist_dcgan.training.train_state import TrainState
from shards.common.errors import OneRankError, UserError

Level = Literal["ok", "skipped", "warning", "FAILED"]

_SEVERITY: tuple[Level, ...] = ("ok", "skipped", "warning", "FAILED")
_TEXTS_SHOWN = 3
_LONGEST_TEXT = 400


@dataclass(frozen=True)
class Finding:
    """What one check found: on one rank, or on all of them."""

    level: Level
    text: str
    """What was found and, where it is not ok, the remedy."""
    same: Mapping[str, str] = field(default_factory=dict)
    """What must be the same on all ranks, by name."""
    remedy: str = ""
    """What to do where it is not."""


@dataclass
class Subject:
    """What is examined, and what the checks so far have made of it for the later ones."""

    config: Config
    invocation: Invocation
    world: World
    lost: str | None = None
    """Why this rank stands alone, where it did not find the others."""
    location: DatasetLocation | None = None
    plan: Plan | None = None
    state: TrainState | None = None


class Check(NamedTuple):
    """One line of the table."""

    thing: str
    examine: Callable[[Subject], Finding | None]
    """None on a rank that has nothing to look at; where all say so, the line is left out."""
    needs: tuple[str, ...] = ()
    """Things without which it makes no sense."""


def examine_all(checks: Sequence[Check], subject: Subject, tell: Callable[[str, Finding], None]) -> dict[str, Finding]:
    """Make the checks, one after the other, and return what all ranks found; `tell` hears of each at once.

    Every rank makes the same ones, for whether one is skipped follows from what all have found. Raises OneRankError
    where the others are gone.
    """
    found: dict[str, Finding] = {}
    for check in checks:
        lacking = [need for need in check.needs if found[need].level in ("FAILED", "skipped")]
        agreed: Finding | None = Finding("skipped", f"it needs this first: {', '.join(lacking)}")
        if not lacking:
            mine = attempt(check, subject)
            try:
                agreed = agree(gather(subject.world, mine))
            except RuntimeError:  # a peer was killed: what this rank knows is all that anybody will learn
                text = "" if mine is None else f", and found: {mine.level}, {mine.text}"
                raise OneRankError(
                    f"{subject.world} lost the other ranks at the check of {check.thing}{text}"
                ) from None
        if agreed is not None:
            found[check.thing] = agreed
            tell(check.thing, agreed)
    return found


def attempt(check: Check, subject: Subject) -> Finding | None:
    """Return what a check finds on this rank: whatever it raises is a failure, and no reason to stop."""
    try:
        return check.examine(subject)
    except UserError as error:
        text = str(error)
    except Exception as error:  # the purpose of the check is to meet it here and not in training
        text = f"{type(error).__name__}: {error}"
    return Finding("FAILED", " ".join(text.split())[:_LONGEST_TEXT])


def gather(world: World, value: Any) -> list[Any]:
    """Return the values of all ranks; they may come minutes apart. A rank that stands alone has only its own."""
    if not dist.is_initialized() or world.world_size == 1:
        return [value]
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value, group=world.slow_group)
    return values


def agree(findings: Sequence[Finding | None]) -> Finding | None:
    """Return the worst of what the ranks found, with the ranks named unless all found the same."""
    concerned = {rank: finding for rank, finding in enumerate(findings) if finding is not None}
    if not concerned:
        return None
    level = max((finding.level for finding in concerned.values()), key=_SEVERITY.index)
    difference = _difference(concerned)
    if level != "FAILED" and difference is not None:
        return Finding("FAILED", difference)
    ranks_of: dict[str, list[int]] = {}
    for rank, finding in concerned.items():
        if finding.level == level:
            ranks_of.setdefault(finding.text, []).append(rank)
    texts = list(ranks_of)
    if level == "ok" or ranks_of[texts[0]] == list(concerned):
        return Finding(level, texts[0])
    named = [f"{_name(ranks)}: {text}" for text, ranks in ranks_of.items()]
    more = f"; and {len(named) - _TEXTS_SHOWN} more" if len(named) > _TEXTS_SHOWN else ""
    return Finding(level, "; ".join(named[:_TEXTS_SHOWN]) + more)


def _difference(concerned: Mapping[int, Finding]) -> str | None:
    """Return which rank has something else than most others, and the remedy."""
    having = {rank: finding for rank, finding in concerned.items() if finding.same}
    for name in dict.fromkeys(name for finding in having.values() for name in finding.same):
        values = {rank: finding.same.get(name, "none") for rank, finding in having.items()}
        usual = Counter(values.values()).most_common(1)[0][0]  # of equally many, that of the lowest rank
        others = [rank for rank, value in values.items() if value != usual]
        if others:
            most = next(rank for rank, value in values.items() if value == usual)
            return (
                f"{name} differs: {_name(others)} has {values[others[0]]}, rank {most} has {usual}: "
                f"{having[others[0]].remedy}"
            )
    return None


def counted(number: int, thing: str) -> str:
    """Return `1 rank`, `2 ranks`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _name(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_TEXTS_SHOWN])) + (", …" if len(ranks) > _TEXTS_SHOWN else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
