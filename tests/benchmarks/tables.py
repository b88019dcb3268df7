"""Tables as the README has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Row = Mapping[str, object]


def markdown(rows: Sequence[Row]) -> str:
    """Return rows of the same keys as a markdown table; numbers with three digits."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def turned(rows: Sequence[Row]) -> list[Row]:
    """Return a row for each key but the first, whose values head the columns: for few rows of many keys."""
    head, *keys = rows[0]
    return [{head: key, **{_cell(row[head]): row[key] for row in rows}} for key in keys]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if type(value) is int else str(value)
