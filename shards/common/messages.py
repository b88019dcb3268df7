"""What commands print. Every line goes through one of these, as names and errors in it may come from anybody."""

from __future__ import annotations

import sys

from shards.common.redaction import one_line


def say(text: object) -> None:
    """Print a line of the command's result on standard output."""
    print(one_line(text), flush=True)


def tell(text: object) -> None:
    """Print a line about the command's course on standard error."""
    print(one_line(text), file=sys.stderr, flush=True)


def warn(text: object) -> None:
    """Print a line of warning on standard error."""
    tell(f"warning: {text}")
