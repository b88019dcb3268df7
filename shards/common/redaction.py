"""Addresses as they may be printed and stored: without user, password, query and fragment, which may be credentials."""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"\b([a-z][a-z0-9+.-]*://?)(?:[^\s/?#]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?", re.IGNORECASE)
"""One slash: as a Path of an address is printed."""
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:/", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """Return a message without the credentials of the addresses in it."""
    return _ADDRESS.sub(r"\1\2", text)


def public_address(location: str) -> str:
    """Return the address of a data set without credentials; a folder and a command are returned as they are."""
    if location.startswith("pipe:") or not _SCHEME.match(location):
        return location
    return without_secrets(re.split(r"[?#]", location, maxsplit=1)[0])
