"""`export`: every value of an LMDB as a file with its bytes, below one folder, whatever the keys are."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from shards.common.errors import UserError
from shards.common.locks import Lock
from shards.conversion.sources import lmdb_source
from shards.conversion.sources.lmdb_pages import ValueLocation
from shards.conversion.sources.lmdb_source import LmdbSource
from shards.lsun.export import ExportReport, export
from tests.support.forks import status_of
from tests.support.shards_fixtures import (
    ODD_KEYS,
    PLAIN_KEYS,
    contents,
    encoded,
    killed_at,
    largest_file,
    output_of,
    picture,
    run_shards,
    write_files,
    write_lmdb,
)

JPEG, WEBP, PNG = (encoded(picture(0), format) for format in ("JPEG", "WEBP", "PNG"))
JUNK = b"no picture"
SMALL = {b"image0001": JPEG, b"image0002": WEBP, b"image0003": PNG, b"image0004": JUNK, b"image0005": JPEG}


def exported(tmp_path: Path, entries: dict[bytes, bytes], flat: bool = False, limit: int | None = None) -> ExportReport:
    """Write `entries` as an LMDB, where that is not done yet, and export it to `tmp_path`/out."""
    if not (tmp_path / "source").exists():
        write_lmdb(tmp_path / "source", entries)
    with LmdbSource(tmp_path / "source") as source:
        return export(source, tmp_path / "out", flat=flat, limit=limit)


def test_every_value_becomes_a_file_in_the_layout_of_lsun(tmp_path: Path) -> None:
    others = {b"k": PNG, b"ab": b"", b"-": JPEG[:2], b"a_-Z09q": b"RIFF\0\0\0\0WAVE"}
    report = exported(tmp_path, SMALL | others)
    assert report == ExportReport(Counter({".jpg": 2, ".webp": 1, ".png": 2, ".bin": 4}))
    assert contents(tmp_path / "out") == {
        "i/m/a/g/e/0/image0001.jpg": JPEG,
        "i/m/a/g/e/0/image0002.webp": WEBP,
        "i/m/a/g/e/0/image0003.png": PNG,
        "i/m/a/g/e/0/image0004.bin": JUNK,
        "i/m/a/g/e/0/image0005.jpg": JPEG,
        "k/k.png": PNG,
        "a/b/ab.bin": b"",
        "-/-.bin": JPEG[:2],
        "a/_/-/Z/0/9/a_-Z09q.bin": b"RIFF\0\0\0\0WAVE",
    }


@pytest.mark.parametrize("limit", [1, 2, 5, 6, 100])
def test_a_limit_takes_the_first_in_key_order_and_more_may_follow(tmp_path: Path, limit: int) -> None:
    assert exported(tmp_path, SMALL, flat=True, limit=limit).extensions.total() == min(limit, 5)
    names = [f"image000{i}" for i in range(1, min(limit, 5) + 1)]
    assert sorted(Path(name).stem for name in contents(tmp_path / "out")) == names
    assert exported(tmp_path, SMALL, flat=True).present == min(limit, 5)
    assert sorted(contents(tmp_path / "out").values()) == sorted(SMALL.values())


@pytest.mark.parametrize("flat", [False, True])
def test_hostile_keys_become_their_sha1_and_stay_below_the_folder(tmp_path: Path, flat: bool) -> None:
    entries = {key: JPEG + key for key in [*PLAIN_KEYS, *ODD_KEYS]}
    report = exported(tmp_path, entries, flat=flat)
    assert report == ExportReport(Counter({".jpg": len(entries)}), renamed=len(ODD_KEYS))
    names = {key: hashlib.sha1(key).hexdigest() if key in ODD_KEYS else key.decode() for key in entries}
    folders = {name: "" if flat else "/".join(name[:6]) + "/" for name in names.values()}
    assert contents(tmp_path / "out") == {f"{folders[name]}{name}.jpg": entries[key] for key, name in names.items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("key", [b"../x", b"\xff"])  # one before its SHA-1 in key order, one behind
def test_two_keys_that_would_share_a_name_are_an_error(tmp_path: Path, key: bytes) -> None:
    twin = hashlib.sha1(key).hexdigest().encode()
    with pytest.raises(UserError) as caught:
        exported(tmp_path, {key: JPEG, twin: PNG})
    source = tmp_path / "source"
    assert str(caught.value) == f"keys {key!r} and {twin!r} of {source} would share a name: rename one of them"


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    """Inode and time of every file and folder: whether anything was written, and not only what."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def test_an_export_over_a_complete_one_changes_nothing(tmp_path: Path) -> None:
    exported(tmp_path, SMALL)
    before = snapshot(tmp_path / "out")
    assert exported(tmp_path, SMALL).present == 5
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("content", [b"somebody's", WEBP + b"longer", WEBP[:-1] + b"?", WEBP[:50] + b"\0?"])
def test_a_file_of_other_bytes_is_never_overwritten(tmp_path: Path, content: bytes) -> None:
    path = write_files(tmp_path / "out", {"image0002.webp": content}) / "image0002.webp"
    with pytest.raises(UserError) as caught:
        exported(tmp_path, SMALL, flat=True)
    assert str(caught.value) == (
        f"{path} exists and is not what key b'image0002' holds: move it away, or give another --out"
    )
    assert path.read_bytes() == content


@pytest.mark.parametrize("make", [os.mkdir, lambda path: os.symlink("nowhere", path)])
def test_a_folder_or_a_link_in_the_place_of_a_file_stays(make: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / "image0001.jpg")
    with pytest.raises(UserError, match=r"image0001.jpg exists and is not what key"):
        exported(tmp_path, SMALL, flat=True)
    assert os.path.lexists(tmp_path / "out" / "image0001.jpg")


@pytest.mark.parametrize("left", [b"", JPEG[:1], JPEG[:100], JPEG[:100] + bytes(10), bytes(len(JPEG)), JPEG[:-1]])
def test_what_a_power_failure_left_is_completed(tmp_path: Path, left: bytes) -> None:
    write_files(tmp_path / "out", {"image0001.jpg": left})
    assert exported(tmp_path, SMALL, flat=True).present == 0
    assert contents(tmp_path / "out")["image0001.jpg"] == JPEG


@pytest.mark.parametrize("left", ["image0002.webp.tmp", "image0002.webp.0123456789abcdef.tmp"])
def test_a_half_written_temporary_file_is_replaced_and_other_files_stay(left: str, tmp_path: Path) -> None:
    first, *_ = SMALL.values()
    write_files(tmp_path / "out", {"image0001.jpg": first, left: WEBP[:70], "notes.txt": b"somebody's"})
    exported(tmp_path, SMALL, flat=True)
    found = contents(tmp_path / "out")
    assert found.pop("notes.txt") == b"somebody's"
    assert sorted(found) == ["image0001.jpg", "image0002.webp", "image0003.png", "image0004.bin", "image0005.jpg"]


@pytest.mark.slow
def test_a_kill_at_any_file_operation_leaves_whole_files_and_the_same_command_goes_on(tmp_path: Path) -> None:
    source, out = write_lmdb(tmp_path / "source", SMALL), tmp_path / "out"
    words, unnamed = ["export", str(source), "--out", str(out)], set[str]()
    for at in count(1):
        status = status_of(killed_at, at, out, words)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        left = {name: value for name, value in contents(out).items() if not name.endswith(".tmp")}
        unnamed |= contents(out).keys() - left.keys()
        assert all(value == SMALL[Path(name).stem.encode()] for name, value in left.items())
        present = f"; {len(left)} were there already" if left else ""
        assert output_of(*words).endswith(f"1 .bin (unknown content){present}\n")
        assert sorted(contents(out).values()) == sorted(SMALL.values())
        shutil.rmtree(out)
    assert at > 15 and len(unnamed) == len(SMALL)  # every operation was met, and each file before it was renamed


def test_keys_are_read_as_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one pass over the keys and then another: memory and the time to the first file stay small."""
    ahead = []

    class Watched(LmdbSource):
        def walk(self) -> Iterator[tuple[bytes, ValueLocation]]:
            for taken, entry in enumerate(super().walk()):
                ahead.append(taken - len(list((tmp_path / "out").glob("*.*"))))
                yield entry

    write_lmdb(tmp_path / "source", SMALL)
    with Watched(tmp_path / "source") as source:
        export(source, tmp_path / "out", flat=True)
    assert ahead == [0] * 5


def test_a_value_too_large_to_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_source, "MAX_ENTRY_BYTES", 10)
    with pytest.raises(UserError, match=rf"^cannot export key b'key' of {tmp_path}/source: too large: 11 bytes$"):
        exported(tmp_path, {b"key": bytes(11)})


def test_one_export_at_a_time_writes_to_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with Lock(tmp_path / "out") as lock:
        assert lock.take()
        with pytest.raises(UserError, match=f"another export is writing to {tmp_path}/out: wait, or give another"):
            exported(tmp_path, SMALL)
    assert exported(tmp_path, SMALL).present == 0


def test_the_command_says_how_many_of_which_kind(tmp_path: Path) -> None:
    source, out = write_lmdb(tmp_path / "source", SMALL | {b"a b": JPEG}), tmp_path / "out"
    process = run_shards("export", source, "--out", out, "--flat")
    kinds = "3 .jpg, 1 .webp, 1 .png, 1 .bin (unknown content)"
    assert process.stdout == f"6 files at {out}: {kinds}; 1 named by the SHA-1 of their key\n"
    assert process.stderr.startswith("export: 100% 6/6 [")


def test_a_disk_that_fills_up_is_one_line_and_the_same_command_goes_on(tmp_path: Path) -> None:
    large = b"\xff\xd8\xff" + bytes(range(256)) * 600
    write_lmdb(tmp_path / "source", SMALL | {b"image0003b": large})
    out = tmp_path / "out"
    message = rf"^cannot write {out} \(File too large\): mend that and give the same command again, or another --out$"
    with largest_file(100 << 10), pytest.raises(UserError, match=message):
        exported(tmp_path, {}, flat=True)
    assert sorted(contents(out)) == ["image0001.jpg", "image0002.webp", "image0003.png"]
    assert exported(tmp_path, {}, flat=True).present == 3
