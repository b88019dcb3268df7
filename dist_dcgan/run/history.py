"""What a run directory tells of its run: rows of its log, alerts, grids, and how it stands.

All of it may come from anybody, and may be written to while it is read: what is no row is passed over.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from dist_dcgan.run.directory import RunDirectory, is_locked, may_look_at_lock
from dist_dcgan.run.export import read_description
from shards.common.errors import UserError
from shards.common.files import open_plain

MOST_BYTES = 1 << 32
"""Largest log that is read."""
_MOST_LINE_BYTES = 1 << 20
_TAIL_BYTES = 1 << 20
_MOST_STEP_SECONDS = 1e9
"""Longer ones are an error of whoever wrote the log, and their sums would be infinite."""
_GRID = re.compile(r"step-(\d{1,16})\.png")
_NAME = re.compile(r"[a-z0-9_]{1,40}(/[a-z0-9_]{1,60})?")
_KID = re.compile(r"quality/kid(_\w+)?(?<!_std)")

State = Literal["running", "finished", "stopped", "died", "unknown"]
"""`stopped` by a signal; `died` is any end that training could not put down, `unknown` if it may be running as well."""


class Row(NamedTuple):
    """Metrics of a step."""

    step: int
    images: int
    """Images seen by then."""
    seconds: float = 0.0
    """Of training by then, all starts together."""
    kid: float | None = None
    """The last score so far."""
    values: Mapping[str, float] = MappingProxyType({})
    """By their names in the log; NaN for what was not finite."""

    @property
    def score(self) -> float | None:
        """The score that was taken at this step, if there was one."""
        return next((value for name, value in self.values.items() if is_kid(name)), None)


class Alert(NamedTuple):
    """What the watchdog said at a step."""

    step: int
    text: str
    """Some lines."""


@dataclass(frozen=True)
class Log:
    """Content of metrics.jsonl, by steps."""

    rows: list[Row]
    alerts: list[Alert]


def read_log(run: RunDirectory) -> Log:
    """Return rows and alerts; a line that a death cut is passed over. Raises OSError."""
    found, alerts = dict[int, Row](), []
    for entry in _entries(_lines(run.metrics) if run.metrics.is_file() else []):
        if isinstance(entry.get("alert"), str):
            alerts.append(Alert(entry["step"], entry["alert"]))
        elif _is_count(entry.get("images_seen")):
            metrics = ((name, value) for name, value in entry.items() if _NAME.fullmatch(name) and _is_metric(value))
            # a name is kept once, and not once for each row
            values = {sys.intern(name): _number(value) for name, value in metrics}
            found[entry["step"]] = Row(entry["step"], entry["images_seen"], values=values)
    rows, last, seconds, kid = list[Row](), 0, 0.0, None
    for step, row in sorted(found.items()):
        took = row.values.get("time/step", 0.0)
        seconds += (step - last) * took if 0 <= took <= _MOST_STEP_SECONDS else 0.0
        if row.score is not None and math.isfinite(row.score):
            kid = row.score
        rows.append(row._replace(seconds=seconds, kid=kid))
        last = step
    return Log(rows, sorted(alerts))


@contextmanager
def reported_reading(path: Path) -> Iterator[None]:
    """Raise a UserError with what of a run in `path` cannot be read, such as a file of another user."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None


def last_step(run: RunDirectory) -> int:
    """Return the last step of the log, 0 if there is none, from its end alone. Raises OSError."""
    if not run.metrics.is_file():
        return 0
    with open_plain(run.metrics) as file:
        file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
        return max((entry["step"] for entry in _entries(file.read().splitlines())), default=0)


def ending(run: RunDirectory, total_steps: int | None) -> tuple[State, int] | None:
    """Return how a run that is not running ended, and after which step; None if it has not begun. Raises OSError.

    `total_steps`, if they are known, tell the export of the end from that of an earlier stop.
    """
    step = last_step(run)
    if run.stopped.is_file():
        return "stopped", step
    if run.generator.is_file() and _exported_step(run) >= max(step, total_steps or 0):  # it is exported at the end
        return "finished", step
    return ("died", step) if step else None


def state(run: RunDirectory, total_steps: int | None) -> State:
    """Return how a run of so many steps, if they are known, stands. Raises OSError."""
    if is_locked(run):
        return "running"
    found = ending(run, total_steps)
    if found is not None and found[0] != "died":
        return found[0]
    return "died" if may_look_at_lock(run) else "unknown"


def is_kid(name: str) -> bool:
    """Return whether this is the name of a kernel distance in the log, and not of its standard deviation."""
    return _KID.fullmatch(name) is not None


def grids_of(run: RunDirectory) -> dict[int, Path]:
    """Return the grids of a run by their steps, in their order."""
    names = sorted(run.samples.iterdir()) if run.samples.is_dir() else []
    return {int(found[1]): path for path in names if (found := _GRID.fullmatch(path.name))}


def said_of(step: int, seen: Sequence[Row]) -> str:
    """Return the caption of a step: images seen, and the last KID if there was one."""
    position = bisect_right(seen, step, key=lambda row: row.step)
    if position == 0:
        return f"step {step:,}"
    row = seen[position - 1]
    images = row.images if row.step == step else round(row.images * step / row.step)
    return f"{images:,} images" + ("" if row.kid is None else f"   1000 KID {1000 * row.kid:.0f}")


def _exported_step(run: RunDirectory) -> int:
    try:
        return int(read_description(run.generator)["step"])
    except UserError:
        return -1


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a log, longer ones in parts: it takes the memory of a line. Raises OSError."""
    with open_plain(path) as file:
        if os.fstat(file.fileno()).st_size > MOST_BYTES:
            raise OSError(errno.EFBIG, f"larger than {MOST_BYTES:,} bytes", str(path))
        buffered = io.BufferedReader(file)  # type: ignore[type-var]  # a FileIO
        while line := buffered.readline(_MOST_LINE_BYTES):
            yield line


def _entries(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and _is_count(entry.get("step")):
            yield entry


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 < value < 2**53


def _is_metric(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _number(value: float | None) -> float:
    """Return a metric; JSON has null where it was not finite, and Python reads what is too large as infinite."""
    return math.nan if value is None or not abs(value) < 1e300 else float(value)
