"""Exceptions for errors that the user can fix."""

from __future__ import annotations

from collections.abc import Sequence

from shards.common.redaction import one_line


class UserError(Exception):
    """An error that the user can fix; the message is one line with the thing, the value and the remedy.

    Commands print it without a traceback and exit with status 2 (`shards.common.command_line.run`). Secrets in the
    message are masked and control characters escaped, as it is printed, logged and sent to other ranks.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class OneRankError(UserError):
    """A UserError that only one rank of a distributed run raises; every such rank prints it, with its name."""


def joined(reasons: Sequence[str], most: int = 5) -> str:
    """Return the first `most` reasons in one line, and the number of further ones."""
    more = f"; and {len(reasons) - most} more" if len(reasons) > most else ""
    return "; ".join(reasons[:most]) + more
