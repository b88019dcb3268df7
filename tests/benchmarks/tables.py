"""Tables as the README files have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

Row = Mapping[str, object]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a markdown table, with the end of its last line."""
    first, *lines = (f"| {' | '.join(cells)} |\n" for cells in (list(head), *rows))
    return "".join([first, "|---" * first.count(" | ") + "|---|\n", *lines])


def markdown(rows: Sequence[Row]) -> str:
    """Return rows of the same keys as a markdown table."""
    return table(rows[0], ([cell(value) for value in row.values()] for row in rows)).rstrip("\n")


def turned(rows: Sequence[Row]) -> list[Row]:
    """Return a row for each key but the first, whose values head the columns: for few rows of many keys."""
    head, *keys = rows[0]
    return [{head: key, **{cell(row[head]): row[key] for row in rows}} for key in keys]


def put(text: str, start: str, end: str, content: str) -> str:
    """Return the text with `content` between two markers that occur once each."""
    before, rest = text.split(start)
    return before + start + content + end + rest.split(end, 1)[1]


def cell(value: object) -> str:
    """Return a value as tables have it: numbers with three digits."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if type(value) is int else str(value)
