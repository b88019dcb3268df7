"""Archives that are kept or fetched and are not what was published."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from shards.common.errors import UserError
from shards.common.files import file_sha256
from shards.common.http import FetchOptions
from shards.lsun import download as lsun
from shards.lsun.archive import ArchiveError, unpack
from shards.lsun.catalog import ARCHIVES, Published, lmdb_names
from tests.support.http_server import Answer, serve

OK = b"HTTP/1.1 200 OK\r\n"
LIMITS = FetchOptions(10_000, attempts=2, silence_seconds=0.15, shown=False, copies=1, least_rate=20_000)
CONTENT = bytes(range(256)) * 30


def test_every_archive_but_the_test_sets_has_a_published_size_and_checksum() -> None:
    assert sorted(ARCHIVES) == sorted(set(lmdb_names(["all"])) - {"test_lmdb"})
    assert all(len(bytes.fromhex(sha256)) == 32 and size > 4_000_000 for size, sha256 in ARCHIVES.values())


@pytest.mark.parametrize(
    ("published", "reason"),
    [
        (Published(7000, "0" * 64), "tower_val_lmdb.zip: the server sends more than the 7,000 bytes it may have"),
        (Published(9000, "0" * 64), "it has 7,680 bytes, LSUN's archive 9,000; it was removed"),
        (Published(7680, "0" * 64), f"its SHA-256 is .*, that of LSUN's archive {'0' * 64}; it was removed"),
    ],
)
def test_an_archive_that_is_not_the_published_one_is_refused(
    published: Published, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it is sound in itself: who sits on the line can make one that is."""
    monkeypatch.setitem(ARCHIVES, "tower_val_lmdb", published)
    unpacked = mock.Mock()
    monkeypatch.setattr(lsun, "unpack", unpacked)
    with serve(Answer(CONTENT)) as server, pytest.raises(UserError, match=reason):
        lsun.download("tower_val_lmdb", tmp_path, server.address)
    assert not unpacked.called and not (tmp_path / "tower_val_lmdb.zip.part").exists()


def test_a_fifo_in_place_of_a_kept_archive_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "test_lmdb.zip")
    with pytest.raises(UserError, match=r"test_lmdb\.zip cannot be used: it is no plain file"):
        lsun.download("test_lmdb", tmp_path, "http://127.0.0.1:1/")


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o606])
def test_a_kept_archive_that_others_can_change_is_refused(mode: int, tmp_path: Path) -> None:
    kept = tmp_path / "test_lmdb.zip"
    bomb(kept, 0, b"x")
    kept.chmod(mode)
    with pytest.raises(
        UserError, match=rf"{kept} belongs to another user or can be written by others.*chmod go-w"
    ) as e:
        lsun.download("test_lmdb", tmp_path, "http://127.0.0.1:1/")
    assert "\n" not in str(e.value)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == [kept.name]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_kept_archive_of_another_user_is_refused(tmp_path: Path) -> None:
    bomb(tmp_path / "test_lmdb.zip", 0, b"x")
    os.chown(tmp_path / "test_lmdb.zip", 65534, 65534)
    with pytest.raises(UserError, match="belongs to another user"):
        lsun.download("test_lmdb", tmp_path, "http://127.0.0.1:1/")


def test_the_archive_that_is_unzipped_is_the_one_that_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, other = tmp_path / "x_lmdb.zip", tmp_path / "other.zip"
    bomb(kept, 0, b"checked")
    kept.chmod(0o644)
    bomb(other, 0, b"another")
    published = Published(kept.stat().st_size, file_sha256(kept))
    monkeypatch.setitem(ARCHIVES, "x_lmdb", published)
    check = lsun._authenticate

    def exchanged(archive: Any, name: str) -> None:
        check(archive, name)
        other.replace(kept)

    monkeypatch.setattr(lsun, "_authenticate", exchanged)
    assert lsun.download("x_lmdb", tmp_path, "http://127.0.0.1:1/")
    assert (tmp_path / "x_lmdb" / "data.mdb").read_bytes() == b"checked"


def bomb(path: Path, members: int, content: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x_lmdb/data.mdb", content)
        for n in range(members):
            archive.writestr(f"x_lmdb/{n:060000d}", b"")


@pytest.mark.parametrize(
    ("members", "size", "reason"),
    [(20, 1, "its list of members is too long"), (0, 20_000_000, "it expands to 20,000,000 bytes, which no")],
)
def test_an_archive_that_grows_when_it_is_read_is_refused(
    members: int, size: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.lsun.archive._FREE_EXPANSION_BYTES", 1 << 20)
    bomb(tmp_path / "bomb.zip", members, bytes(size))
    with pytest.raises(ArchiveError, match=reason):
        unpack(tmp_path / "bomb.zip", "x_lmdb", tmp_path / "x_lmdb")
    assert not (tmp_path / "x_lmdb").exists()
