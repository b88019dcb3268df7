"""The exceptions for what a person can mend."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user: one line that names the thing, the value and the remedy.

    Commands print it without a traceback and exit with status 2 (`shards.common.command_line.run`).
    """


class OneRankError(UserError):
    """A UserError that one rank of a distributed run meets alone: printed whatever the rank, with its name."""
