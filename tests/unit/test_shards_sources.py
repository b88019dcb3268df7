"""Reading an LMDB: every entry once, in order, whatever the step; and one line for every unusable source."""

from __future__ import annotations

import pickle
import random
import zipfile
from pathlib import Path

import lmdb
import pytest

from shards.entries import Selection, Source, Walk
from shards.errors import UserError
from shards.lmdb_source import LmdbSource
from tests.shards_fixtures import contents, write_lmdb

ENTRIES = {b"%03d" % i: bytes([i % 256]) * (i * 37) for i in range(1, 101)}


def entries_of(path: Path) -> int:
    with LmdbSource(path) as source:
        return source.entries()


def all_of(source: Source) -> list[tuple[bytes, bytes]]:
    return [(key, source.read(key, place)) for key, place in source.walk()]


@pytest.mark.parametrize("length", [1, 7, 50, 99, 100, 101, 4096])
def test_runs_together_give_every_entry_once_in_key_order(tmp_path: Path, length: int) -> None:
    with LmdbSource(write_lmdb(tmp_path / "source", ENTRIES)) as source:
        runs = list(Walk([source], Selection()).runs(length))
        read = [(entry.key, source.read(entry.key, entry.place)) for run in runs for entry in run]
    assert read == sorted(ENTRIES.items())
    assert {len(run) for run in runs[:-1]} <= {length} and len(runs) == -(-100 // length)


def test_arbitrary_keys_and_empty_values_come_back(tmp_path: Path) -> None:
    rng = random.Random(0)
    entries = {rng.randbytes(rng.randint(1, 511)): rng.randbytes(rng.choice([0, 1, 5000])) for _ in range(60)}
    with LmdbSource(write_lmdb(tmp_path / "source", entries)) as source:
        assert all_of(source) == sorted(entries.items())


def test_entries_are_read_while_the_walk_goes_on(tmp_path: Path) -> None:
    with LmdbSource(write_lmdb(tmp_path / "source", ENTRIES)) as source:
        walk = source.walk()
        key, place = next(walk)
        assert source.read(key, place) == ENTRIES[key]
        assert len(list(walk)) == 99


def test_a_pickled_source_opens_its_own_environment(tmp_path: Path) -> None:
    with LmdbSource(write_lmdb(tmp_path / "source", ENTRIES)) as source:
        assert source.entries() == 100
        data = pickle.dumps(source)
    with pickle.loads(data) as copy:
        assert copy.entries() == 100


def test_reading_changes_nothing_on_the_disk(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "source", ENTRIES)
    (path / "lock.mdb").unlink()
    before = contents(path)
    assert entries_of(path) == 100
    assert contents(path) == before


def test_describe_names_the_folder_without_its_place(tmp_path: Path) -> None:
    with LmdbSource(write_lmdb(tmp_path / "source", ENTRIES)) as source:
        assert source.describe() == {"kind": "lmdb", "name": "source"}


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no LMDB at {tmp_path}/nowhere: no such directory"):
        entries_of(tmp_path / "nowhere")


def test_a_folder_above_an_lmdb_says_which_one_to_give(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "unzipped" / "bedroom_lmdb", ENTRIES)
    for given in (tmp_path, tmp_path / "unzipped"):
        with pytest.raises(UserError, match=f"but {tmp_path}/unzipped/bedroom_lmdb does: give that folder"):
            entries_of(given)


def test_a_folder_with_an_archive_says_to_unzip_it(tmp_path: Path) -> None:
    (tmp_path / "bedroom_train_lmdb.zip").touch()
    with pytest.raises(UserError, match=r"no data.mdb in it; unzip .*/bedroom_train_lmdb.zip"):
        entries_of(tmp_path)


def test_an_archive_says_to_unzip_it(tmp_path: Path) -> None:
    path = tmp_path / "bedroom_train_lmdb.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bedroom_train_lmdb/data.mdb", b"")
    with pytest.raises(UserError, match="is a file, not the folder of an LMDB: unzip it first"):
        entries_of(path)


def test_the_data_file_itself_asks_for_its_folder(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "source", ENTRIES) / "data.mdb"
    with pytest.raises(UserError, match=r"give the folder that holds data.mdb"):
        entries_of(path)


@pytest.mark.parametrize("content", [b"", b"junk" * 5000, bytes(8192)])
def test_a_data_file_of_another_kind_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.mdb").write_bytes(content)
    with pytest.raises(UserError, match=r"is not an LMDB|cannot read the LMDB"):
        entries_of(tmp_path)


def test_an_empty_lmdb_is_an_error(tmp_path: Path) -> None:
    lmdb.open(str(tmp_path / "source")).close()
    with pytest.raises(UserError, match="is empty: it has no entries"):
        entries_of(tmp_path / "source")


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_an_incomplete_copy_is_an_error_and_no_crash(tmp_path: Path, kept: float) -> None:
    data = write_lmdb(tmp_path / "source", ENTRIES) / "data.mdb"
    whole = data.read_bytes()
    data.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(UserError, match=f"has {int(kept * len(whole))} bytes of {len(whole)}: an incomplete copy"):
        entries_of(tmp_path / "source")
