"""Odd and hostile LMDBs: all of their images, or one line that names the LMDB; the process lives on."""

from __future__ import annotations

import os
import pickle
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import lmdb
import pytest

from shards.common.errors import UserError
from shards.conversion.sources import lmdb_source
from shards.conversion.sources.kinds import open_source
from shards.conversion.sources.lmdb_source import LmdbSource
from tests.support.shards_fixtures import (
    contents,
    convert_here,
    entries_of,
    numbered,
    photographs,
    refusal,
    write_files,
    write_lmdb,
)

VALUES = {b"%05d" % i: bytes([i % 256]) * (i * 37 % 6000) for i in range(300)}


@pytest.fixture
def data(tmp_path: Path) -> bytearray:
    """The file of an LMDB of VALUES, to be damaged."""
    return bytearray((write_lmdb(tmp_path / "sound", VALUES) / "data.mdb").read_bytes())


def refusal_of(tmp_path: Path, data: bytearray) -> str:
    return refusal(write_files(tmp_path / "source", {"data.mdb": bytes(data)}))


def pages_of(data: bytearray, flags: int) -> list[int]:
    """The pages of a kind: 1 branches, 2 leaves, 4 values on pages of their own."""
    numbers = range(2, len(data) // 4096)
    return [n for n in numbers if struct.unpack_from("<Q2xH", data, 4096 * n) == (n, flags)]


@pytest.mark.parametrize("kind", [1, 2, 4])
def test_zeros_for_a_page_are_noticed(kind: int, data: bytearray, tmp_path: Path) -> None:
    """The library asserts, which ends the process, or gives the zeros for an image."""
    number = pages_of(data, kind)[-1]
    data[4096 * number : 4096 * (number + 1)] = bytes(4096)
    assert re.search(r"data.mdb is damaged in page \d+; copy or unzip it again$", refusal_of(tmp_path, data))


@pytest.mark.parametrize("kind", [1, 2])
def test_a_page_in_the_place_of_another_is_noticed(kind: int, data: bytearray, tmp_path: Path) -> None:
    number, other = pages_of(data, kind)[0], pages_of(data, 2)[-1]
    data[4096 * number : 4096 * (number + 1)] = data[4096 * other : 4096 * (other + 1)]
    assert "is damaged in page" in refusal_of(tmp_path, data)


def test_a_tree_that_leads_to_a_page_twice_is_noticed(data: bytearray, tmp_path: Path) -> None:
    page = 4096 * pages_of(data, 1)[0]
    first, second = struct.unpack_from("<HH", data, page + 16)
    data[page + second : page + second + 6] = data[page + first : page + first + 6]
    assert "keys of page" in refusal_of(tmp_path, data)


@pytest.mark.parametrize("place", [8 + 2, 16, 20, 40, 40 + 48 + 6, 40 + 48 + 32, 40 + 48 + 40])
def test_damage_in_the_first_pages_is_noticed(place: int, data: bytearray, tmp_path: Path) -> None:
    """Page flags, magic, version, page size, depth, number of entries and root."""
    for meta in (0, 4096):
        data[meta + place] ^= 0x08
    assert "source/data.mdb" in refusal_of(tmp_path, data)


def test_more_entries_than_the_file_could_hold_are_noticed_before_they_are_counted(
    data: bytearray, tmp_path: Path
) -> None:
    for meta in (0, 4096):
        data[meta + 40 + 48 + 32 + 6] = 1  # 2**48 more
    assert "is damaged in its first pages" in refusal_of(tmp_path, data)


def test_an_lmdb_cut_at_any_page_is_refused(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "source", VALUES)
    whole = (path / "data.mdb").read_bytes()
    assert len(entries_of(open_source(path))) == len(VALUES)
    for kept in {0, 1, 100, 4095, 5000, len(whole) - 1, *range(4096, len(whole), 10 * 4096)}:
        (path / "data.mdb").write_bytes(whole[:kept])
        message = refusal(path)
        expected = f"has {kept} bytes of {len(whole)}: an incomplete copy" if kept >= 8192 else "data.mdb"
        assert expected in message


def test_the_library_reads_the_same_of_the_photographs(tmp_path: Path) -> None:
    path = photographs(tmp_path)
    with lmdb.open(str(path), readonly=True, lock=False) as environment, environment.begin() as transaction:
        expected = [(bytes(key), bytes(value)) for key, value in transaction.cursor()]
    assert len(expected) >= 60 and entries_of(LmdbSource(path)) == expected


@pytest.mark.parametrize("flag", [0x02, 0x04, 0x08])
def test_keys_in_another_order_or_of_several_values_are_refused(flag: int, data: bytearray, tmp_path: Path) -> None:
    for meta in (0, 4096):
        data[meta + 16 + 24 + 48 + 4] = flag
    assert "is an LMDB of several values a key, or of keys in another order" in refusal_of(tmp_path, data)


def test_databases_within_the_database_are_refused(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path), max_dbs=2) as environment:
        environment.open_db(b"images")
    assert "is an LMDB that holds databases within its own" in refusal(tmp_path)


def test_an_lmdb_of_every_picture_in_several_sizes_is_refused(tmp_path: Path) -> None:
    """As the StyleGAN2 in PyTorch prepares it; the manner of the keys alone, or a count alone, is no sign of it."""

    def prepared(name: str, sizes: tuple[int, ...], length: bytes) -> Path:
        images = {b"%d-%05d" % (size, i): b"image" for size in sizes for i in range(5)}
        return write_lmdb(tmp_path / name, images | {b"length": length})

    message = refusal(prepared("two", (128, 256), b"5"))
    assert "/two holds its 5 pictures in several sizes (128-00000 and so on): prepare it again with one size" in message
    assert len(entries_of(open_source(prepared("one", (256,), b"5")))) == 6
    assert len(entries_of(open_source(prepared("odd", (128, 256), b"five")))) == 11
    assert len(entries_of(open_source(write_lmdb(tmp_path / "other", VALUES | {b"length": b"5"})))) == 301


def test_an_lmdb_whose_lock_another_process_holds_is_read(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "source", numbered(5))
    with lmdb.open(str(path)) as environment, environment.begin(write=True):
        before = contents(path)
        assert convert_here(path, tmp_path / "data", "--samples-per-shard", 3, workers=2).samples == 5
        assert contents(path) == before


def test_a_write_after_the_walk_began_is_noticed(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "source", VALUES)
    with LmdbSource(path) as source, LmdbSource(path) as other:
        walk = source.walk()
        key, place = next(walk)
        in_a_worker = pickle.loads(pickle.dumps(source))
        assert source.read(key, place) == VALUES[key]
        with lmdb.open(str(path)) as environment, environment.begin(write=True) as transaction:
            transaction.put(b"new", b"value")
        for read in (lambda: source.read(key, place), lambda: in_a_worker.read(key, place), lambda: list(walk)):
            with pytest.raises(UserError, match=rf"^the LMDB {path} changed while it was read: wait until nobody"):
                read()
        assert other.entries() == len(VALUES) + 1


WRITER = """
import lmdb, os, random, sys
with lmdb.open(sys.argv[1], sync=False) as environment:
    print(flush=True)
    while True:
        with environment.begin(write=True) as transaction:
            for _ in range(20):
                key = b"%05d" % random.randrange(300)
                transaction.put(key, key * random.randrange(1, 1500))
"""


def test_an_lmdb_that_is_written_to_is_refused_or_read_as_it_stood(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "source", {b"%05d" % i: b"%05d" % i * 300 for i in range(300)})
    outcomes = set[str]()
    with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        end = time.monotonic() + 1
        while time.monotonic() < end or (not outcomes and time.monotonic() < end + 20):
            try:
                found = entries_of(LmdbSource(path))
            except UserError as error:
                outcomes.add(str(error))
            else:
                assert all(value == key * (len(value) // 5) for key, value in found) and len(found) == 300
        process.kill()
    assert outcomes == {f"the LMDB {path} changed while it was read: wait until nobody writes to it"}
    assert len(entries_of(LmdbSource(path))) == 300


def test_a_value_too_large_for_an_image_is_rejected_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_source, "MAX_ENTRY_BYTES", 3000)
    path = write_lmdb(tmp_path / "source", {b"a": bytes(3000), b"b": bytes(3001)})
    assert entries_of(LmdbSource(path)) == [(b"a", bytes(3000)), (b"b", "too large: 3,001 bytes")]


def test_a_fifo_for_the_data_of_an_lmdb_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data.mdb")
    assert "no data.mdb in it" in refusal(tmp_path, seconds=5)


def test_keys_are_found_that_are_there_and_no_others(tmp_path: Path) -> None:
    with LmdbSource(write_lmdb(tmp_path / "source", VALUES)) as source:
        assert all(source.holds(key) for key in VALUES)
        others = [b"", b"0", b"00000x", b"000005", b"00299x", b"99999", b"\xff" * 600]
        assert not any(source.holds(key) for key in others)
    lmdb.open(str(tmp_path / "empty")).close()
    with LmdbSource(tmp_path / "empty") as source:
        assert not source.holds(b"key")
