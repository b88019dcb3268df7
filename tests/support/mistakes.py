"""What a user or a disk does wrong, and what a command says of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from shards.common.errors import UserError


def refusal(main: Callable[[Sequence[str]], None], *words: object) -> str:
    """Call the `main` of a command in this process, and return the one line with which it refuses `words`.

    That the command prints such a line and exits with status 2 is shown in `tests/commands/test_errors.py`.
    """
    with pytest.raises(UserError) as caught:
        main([str(word) for word in words])
    message = str(caught.value)
    assert "\n" not in message
    return message


def flip_bit(path: Path, offset: int) -> None:
    """Flip a bit of a file at `offset`, from its end if that is negative."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
