"""What commands print. Every line goes through one of these, as names and errors in it may come from anybody."""

from __future__ import annotations

import sys
import traceback
from types import TracebackType

from shards.common.redaction import one_line, printable, without_secrets


def say(text: object) -> None:
    """Print a line of the command's result on standard output."""
    print(one_line(text), flush=True)


def tell(text: object) -> None:
    """Print a line about the command's course on standard error."""
    print(one_line(text), file=sys.stderr, flush=True)


def tell_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Print an error that nobody expected, as `sys.excepthook`."""
    print(traceback_of(error), file=sys.stderr, flush=True)


def traceback_of(error: BaseException) -> str:
    """Return an error's traceback, in which all lines of a message but the first have an indent."""
    parts = [part.rstrip("\n").replace("\n", "\n  ") for part in traceback.format_exception(error)]
    return printable(without_secrets("\n".join(parts)), kept="\n")


def warn(text: object) -> None:
    """Print a line of warning on standard error."""
    tell(f"warning: {text}")
