"""LSUN's categories, splits and download address."""

from __future__ import annotations

from collections.abc import Sequence

from shards.common.command_line import nearest
from shards.common.errors import UserError

ADDRESS = "http://dl.yf.io/lsun/scenes/"
CATEGORIES = (
    "bedroom",
    "bridge",
    "church_outdoor",
    "classroom",
    "conference_room",
    "dining_room",
    "kitchen",
    "living_room",
    "restaurant",
    "tower",
)
SPLITS = ("train", "val")


def lmdb_names(words: Sequence[str], split: str | None = None) -> list[str]:
    """Return the names of the LMDBs for `words`: categories, `test`, or `all`.

    A category means both of its splits, or only `split`; `all` includes the test set if no split is given.
    Raises UserError for an unknown word.
    """
    names: list[str] = []
    for word in words:
        if word not in (*CATEGORIES, "test", "all"):
            near = nearest(word, [*CATEGORIES, "test", "all"])
            raise UserError(f"unknown category {word!r}{near} (--list prints them all)")
        if word != "test":
            categories = CATEGORIES if word == "all" else (word,)
            names += [f"{name}_{part}_lmdb" for name in categories for part in ((split,) if split else SPLITS)]
        if word == "test" or (word == "all" and not split):
            names.append("test_lmdb")
    return list(dict.fromkeys(names))
