"""LSUN's categories, splits and download address."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


class Published(NamedTuple):
    """Size in bytes and SHA-256, in hex, of an archive."""

    bytes: int
    sha256: str


_TABLE = """
bedroom_train_lmdb 45922737680 a15644c2e7153106867f0adb3491fc41224102d1f01b24494fb47d9f5d1f174e
bedroom_val_lmdb 4670661 5d022e781b241c25ec2e1f1f769afcdb8091d7fd58362667aec03137b8114b12
bridge_train_lmdb 16478644518 2701b2d421bbc4d8a5e9b0652ff7c3b57cd6495da8e0e85c39533275b5a925a3
bridge_val_lmdb 6176834 83216a2974d6068c2e1d18086006e7380ff58540216f955ce87fe049b460cb0d
church_outdoor_train_lmdb 2448463466 91128ae026840ac0c5982b4445ab5fc4e092d6847cca76793b2b1a0815c2e74a
church_outdoor_val_lmdb 5957308 34635b7547a3e51a15f942a4a4082dd6bc9cca381a953515cb2275c0eed50584
classroom_train_lmdb 3279497022 73a8a3e318819e1cc602f229673c3f51a68f3ece61e3764ce22df6abea4d0873
classroom_val_lmdb 5880261 5e0e9a375d94091dfe1fa3be87d4a92f41c03f1c0b8e376acc7e05651de512d7
conference_room_train_lmdb 4048461633 fa0a4cf72e7acfb103392eaf33640d5508a728e971f31877b01d64e1bde6068c
conference_room_val_lmdb 5316084 927c94df52e10b9b374748c2b83b28b5860e946b3186dfd587985e274834650f
dining_room_train_lmdb 11592966936 e4ee24c7c309360c3bf019123ce5bbf17434b2ba33abec2b0b07cfae715a52cb
dining_room_val_lmdb 5301030 bd604d4b91bb5a9611d4e0b85475efd20758390d1a4eb57b53973fcbb5aa8ab6
kitchen_train_lmdb 35791384987 b1993cf639aece5d207a27eb9ff872bcca9dff6472d8227a052c79d40ee753c4
kitchen_val_lmdb 4867891 329165f35ec61c4cf49f809246de300b8baad3ffcbda1ac30c27bdd32c84369a
living_room_train_lmdb 22792405188 bd2c52b812c80f73ce3062a221396d13a52b5cce2f813b4cdf61937651281d7a
living_room_val_lmdb 5167755 30a23d9a3db5414e9c97865f60ffb2ee973bfa658a23dbca7188ea514c97c9fc
restaurant_train_lmdb 13489345463 11a0a924b960cd0900e9b7477d684fb338bd99cc5f72db1caac592e4f497e09a
restaurant_val_lmdb 6232385 efaa7bcb898ad6cb73b07b89fec3a9c670f4622912eea22fab3986c2cf9a1c20
tower_train_lmdb 12010237081 440caec74c9641cb51fd235a5970c8e4931c3af875aeb044a8bcca956e106309
tower_val_lmdb 5223709 7f5257847bc01f4e40d4a1b3e24dd8fcd37063f12ca8cf31e726c2ee0b1ae104
"""

ARCHIVES = {name: Published(int(size), sha256) for name, size, sha256 in map(str.split, _TABLE.strip().splitlines())}
"""The archives by the names of their LMDBs, as TensorFlow Datasets publishes them (`url_checksums/lsun.txt`).

LSUN itself publishes none, and serves the archives by http, so that these are what makes a download authentic.
"""

MOST_TEST_BYTES = 1 << 30
"""Largest size accepted of the test set's archive, of which nothing is published: 10,000 images."""


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
