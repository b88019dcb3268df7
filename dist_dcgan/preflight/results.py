"""Results of checks on each rank, and their combination over all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from dist_dcgan.config import Config, Invocation, Plan
from dist_dcgan.data.storage.location import DatasetLocation
from dist_dcgan.distributed.collectives import gather
from dist_dcgan.distributed.world import World
from dist_dcgan.training.train_state import TrainState
from shards.common.errors import OneRankError, UserError, joined
from shards.common.redaction import one_line

Level = Literal["ok", "skipped", "warning", "FAILED"]

_SEVERITY: tuple[Level, ...] = ("ok", "skipped", "warning", "FAILED")
_TEXTS_SHOWN = 3
_LONGEST_TEXT = 400


@dataclass(frozen=True)
class Finding:
    """Result of one check, on one rank or combined over all."""

    level: Level
    text: str
    """The result and, if it is not ok, the remedy."""
    same: Mapping[str, str] = field(default_factory=dict)
    """Values that must be the same on all ranks, by name."""
    remedy: str = ""
    """Remedy if `same` differs between ranks."""


@dataclass
class Subject:
    """Input of the checks, and objects that earlier checks have created for later ones."""

    config: Config
    invocation: Invocation
    world: World
    lost: str | None = None
    """Why this rank has no process group, None if it has one."""
    location: DatasetLocation = field(init=False)
    """Set by the check of the data set; a check that reads it needs that one, as with the next two."""
    plan: Plan = field(init=False)
    """Set by the check of the plan."""
    state: TrainState = field(init=False)
    """Set by the training step."""


class Check(NamedTuple):
    """One line of the table."""

    thing: str
    examine: Callable[[Subject], Finding | None]
    """Returns None on a rank with nothing to check; if all ranks do, the line is omitted."""
    needs: tuple[str, ...] = ()
    """Checks that must not have failed or been skipped."""
    ranks: Literal["all", "one per node", "rank 0"] = "all"
    """Ranks that run it; the others have nothing to check."""

    def runs_on(self, world: World) -> bool:
        """Return whether this rank runs the check."""
        return {"all": True, "one per node": world.local_rank == 0, "rank 0": world.is_main}[self.ranks]


def examine_all(checks: Sequence[Check], subject: Subject, tell: Callable[[str, Finding], None]) -> dict[str, Finding]:
    """Run the checks in order and return the combined results; `tell` is called with each result at once.

    Every rank runs the same checks, as skipping depends on combined results only. Raises OneRankError if the other
    ranks are gone.
    """
    found: dict[str, Finding] = {}
    for check in checks:
        lacking = [need for need in check.needs if found[need].level in ("FAILED", "skipped")]
        agreed: Finding | None = Finding("skipped", f"it needs this first: {', '.join(lacking)}")
        if not lacking:
            mine = attempt(check, subject)
            try:
                all_found = gathered(subject.world, None if mine is None else asdict(mine))
                agreed = agree([None if fields is None else Finding(**fields) for fields in all_found])
            except RuntimeError:  # a peer was killed: report this rank's own result
                text = "" if mine is None else f", and found: {mine.level}, {mine.text}"
                raise OneRankError(
                    f"{subject.world} lost the other ranks at the check of {check.thing}{text}"
                ) from None
        if agreed is not None:
            found[check.thing] = agreed
            tell(check.thing, agreed)
    return found


def attempt(check: Check, subject: Subject) -> Finding | None:
    """Return the result of a check on this rank, if it runs here; any exception becomes a failure."""
    try:
        return check.examine(subject) if check.runs_on(subject.world) else None
    except UserError as error:
        text = str(error)
    except Exception as error:  # the check exists to find it before training does
        text = f"{type(error).__name__}: {error}"
    return Finding("FAILED", one_line(" ".join(text.split()))[:_LONGEST_TEXT])


def gathered(world: World, value: Any) -> list[Any]:
    """Return the values of all ranks, which may call it minutes apart; without a process group only this rank's."""
    return gather(value, world.slow_group)


def agree(findings: Sequence[Finding | None]) -> Finding | None:
    """Return the most severe result of the ranks, naming the ranks unless all have the same."""
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
    return Finding(level, joined(named, _TEXTS_SHOWN))


def _difference(concerned: Mapping[int, Finding]) -> str | None:
    """Return the first value in `same` that differs between ranks, with the deviating ranks and the remedy."""
    having = {rank: finding for rank, finding in concerned.items() if finding.same}
    for name in dict.fromkeys(name for finding in having.values() for name in finding.same):
        values = {rank: finding.same.get(name, "none") for rank, finding in having.items()}
        usual = Counter(values.values()).most_common(1)[0][0]  # in a tie, that of the lowest rank
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
