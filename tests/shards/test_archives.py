"""Archives that are damaged, lie or lead elsewhere: refused whole, with nothing left of them."""

from __future__ import annotations

import io
import shutil
import stat
import warnings
import zipfile
from pathlib import Path

import pytest

from shards.common.errors import UserError
from shards.lsun.archive import ArchiveError, unpack
from tests.support.downloads import FILES, NAME, NO_ZIP, ZIP, fetched, lsun_zip, refused, zip_bytes
from tests.support.http_server import Answer
from tests.support.shards_fixtures import (
    contents,
)

pytestmark = pytest.mark.usefixtures("waits")


def member(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


def with_extra(extra: zipfile.ZipInfo, content: bytes = b"evil") -> bytes:
    """LSUN's archive with one member more."""
    buffer = io.BytesIO(ZIP)
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "a") as archive:
        warnings.simplefilter("ignore")  # of two members of one name
        archive.writestr(extra, content)
    return buffer.getvalue()


def patched(archive: bytes, local: int, central: int, value: bytes) -> bytes:
    """`archive` with other bytes in the headers of its first file, at these offsets into them."""
    changed = bytearray(archive)
    for signature, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        header = archive.index(signature)
        changed[header + offset : header + offset + len(value)] = value
    return bytes(changed)


ONE_FILE = zip_bytes({f"{NAME}/data.mdb": FILES["data.mdb"]})
DEFLATED = zip_bytes({f"{NAME}/data.mdb": bytes(200_000)}, zipfile.ZIP_DEFLATED)
FOREIGN = f"which is no file of {NAME}"
BAD_CRC = f"it is damaged, or no zip file (Bad CRC-32 for file '{NAME}/data.mdb')"
LINK = f"'{NAME}/data.mdb', which is a link or a device"


@pytest.mark.parametrize(
    ("archive", "reason"),
    [
        (with_extra(member("../evil")), f"it holds '../evil', {FOREIGN}"),
        (with_extra(member(f"{NAME}/../../evil")), f"it holds '{NAME}/../../evil', {FOREIGN}"),
        (with_extra(member("/tmp/evil")), f"it holds '/tmp/evil', {FOREIGN}"),
        (with_extra(member("..\\evil")), f"it holds '..\\\\evil', {FOREIGN}"),
        (with_extra(member(f"{NAME}/data.mdb/x")), f"it holds '{NAME}/data.mdb/x', {FOREIGN}"),
        (with_extra(member(f"{NAME}/notes\n\x1b[2J")), f"it holds '{NAME}/notes\\n\\x1b[2J', {FOREIGN}"),
        (with_extra(member("bedroom_val_lmdb/data.mdb")), f"it holds 'bedroom_val_lmdb/data.mdb', {FOREIGN}"),
        *[
            (zip_bytes({member(f"{NAME}/data.mdb", kind | 0o777): b"/etc/passwd"}), f"it holds {LINK}")
            for kind in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFDIR, stat.S_IFCHR)
        ],
        (with_extra(member(f"{NAME}/data.mdb")), f"it holds '{NAME}/data.mdb', which it held before"),
        (zip_bytes({f"{NAME}/lock.mdb": b""}), f"it holds no {NAME}/data.mdb"),
        (zip_bytes({}), f"it holds no {NAME}/data.mdb"),
        (patched(ONE_FILE, 6, 8, b"\x01\x00"), f"it holds '{NAME}/data.mdb', which is encrypted"),
        (
            zip_bytes({f"{NAME}/data.mdb0evil": b""}).replace(b"mdb0", b"mdb\x00"),
            f"it holds '{NAME}/data.mdb\\x00evil', {FOREIGN}",
        ),
        (patched(ONE_FILE, 8, 10, b"\x0c\x00"), f"it holds '{NAME}/data.mdb', which is neither stored nor deflated"),
        (patched(ONE_FILE, 14, 16, b"\x00\x00\x00\x00"), BAD_CRC),
        (ONE_FILE[:1000] + bytes([ONE_FILE[1000] ^ 1]) + ONE_FILE[1001:], BAD_CRC),
        (patched(DEFLATED, 22, 24, (100).to_bytes(4, "little")), BAD_CRC),  # declares less than it unpacks to
        (
            patched(DEFLATED, 22, 24, (300_000).to_bytes(4, "little")),  # declares more
            f"{NAME}/data.mdb has 200,000 bytes, not the 300,000 that it declares",
        ),
        (ZIP[:-30], NO_ZIP),
        (b"<html>not here</html>", NO_ZIP),
        (b"", NO_ZIP),
    ],
)  # fmt: skip
def test_an_unsound_archive_is_refused_whole(tmp_path: Path, archive: bytes, reason: str) -> None:
    out = tmp_path / "deep" / "er" / "out"
    _, line = refused(out, Answer(archive))
    assert line == f"ADDRESS cannot be used: {reason}; it was removed, and the same command downloads it again"
    assert list(contents(tmp_path)) == [f"deep/er/out/{NAME}.lock"]
    fetched(out, Answer(ZIP))


def test_a_lying_size_writes_no_more_than_it_declares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bomb: 200,000 bytes that declare to be 100."""
    (tmp_path / "bomb.zip").write_bytes(patched(DEFLATED, 22, 24, (100).to_bytes(4, "little")))
    largest = 0

    def kept(folder: Path, **_: object) -> None:
        nonlocal largest
        largest = (folder / "data.mdb").stat().st_size

    monkeypatch.setattr("shutil.rmtree", kept)
    with pytest.raises(ArchiveError):
        unpack(tmp_path / "bomb.zip", NAME, tmp_path / "folder")
    assert largest <= 100


def test_no_flipped_bit_goes_unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)  # hundreds of times
    data = b"some data " * 20
    archive = lsun_zip({"data.mdb": data, "lock.mdb": b""}, zipfile.ZIP_DEFLATED)
    sound = sum(
        unpacks_soundly(tmp_path, archive[:i] + bytes([archive[i] ^ (1 << i % 8)]) + archive[i + 1 :], data)
        for i in range(len(archive))
    )
    assert 0.1 < sound / len(archive) < 0.6  # a date, an attribute


def unpacks_soundly(tmp_path: Path, archive: bytes, data: bytes) -> bool:
    """Unpack what is damaged; require the right data or a refusal, and say which it was."""
    folder = tmp_path / "folder"
    (tmp_path / "damaged.zip").write_bytes(archive)
    try:
        unpack(tmp_path / "damaged.zip", NAME, folder)
    except (ArchiveError, UserError):
        assert not folder.exists()
        return False
    assert contents(folder) in ({"data.mdb": data, "lock.mdb": b""}, {"data.mdb": data})
    shutil.rmtree(folder)
    return True
