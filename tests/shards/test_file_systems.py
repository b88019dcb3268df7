"""What a file system cannot do is told from what went wrong, in every tool alike."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from shards.common.errors import UserError
from shards.common.files import check_room, disk_space, is_unsupported, link_or_rename, publish
from shards.common.locks import Lock, NoLocksError
from shards.common.workers import map_in_order
from shards.manifest import read_manifest
from tests.support.shards_fixtures import contents, convert_here, numbered, output_of, run_shards, write_lmdb

SMALL = ("--image-size", 16, "--samples-per-shard", 2)
CANNOT = [errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP]
FAILED = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EROFS]


def fails(number: int) -> Callable[..., None]:
    """Stand in for a call of the operating system."""
    return mock.Mock(side_effect=OSError(number, os.strerror(number)))


def fsync_of_folders(number: int) -> Callable[[int], None]:
    """Stand in for fsync on a file system that has it for files only."""
    real = os.fsync

    def fsync(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(number, os.strerror(number))
        real(file)

    return fsync


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images, and a data set of them in a folder beside it."""
    found = write_lmdb(tmp_path_factory.mktemp("source") / "lmdb", numbered(3))
    convert_here(found, found.parent / "set", *SMALL)
    return found


def last_line(*words: object) -> str:
    """What a command says at its end, after progress, when it fails."""
    done = run_shards(*words)
    assert done.returncode == 2
    return done.stderr.splitlines()[-1].removeprefix("error: ")


@pytest.mark.parametrize("number", CANNOT)
def test_a_data_set_is_written_to_a_file_system_without_fsync_of_folders(
    number: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", fsync_of_folders(number))
    convert_here(source, tmp_path / "set", *SMALL)
    assert contents(tmp_path / "set") == contents(source.parent / "set")


@pytest.mark.parametrize("number", FAILED)
def test_a_folder_whose_fsync_fails_is_no_place_for_a_data_set(
    number: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", fsync_of_folders(number))
    out = tmp_path / "set"
    message = last_line("convert", source, "--out", out, "--workers", 1, *SMALL)
    assert message.startswith(f"cannot write to {out} ({os.strerror(number)}): mend that and give the same command")
    assert not (out / "manifest.json").exists()


def test_a_file_that_cannot_be_synced_is_written_and_one_whose_sync_fails_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (*CANNOT, *FAILED):
        monkeypatch.setattr(os, "fsync", fails(number))
        if number in CANNOT:
            publish(tmp_path / str(number), b"content")
            assert (tmp_path / str(number)).read_bytes() == b"content"
        else:
            with pytest.raises(OSError, match=os.strerror(number)):
                publish(tmp_path / str(number), b"content")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, CANNOT))


def test_a_disk_that_does_not_tell_its_space_has_room(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage(tmp_path)
    assert disk_space(tmp_path) == (real.total, disk_space(tmp_path).free)  # type: ignore[union-attr]
    for usage in (lambda _: real._replace(total=0, used=0, free=0), fails(errno.ENOSYS)):
        monkeypatch.setattr(shutil, "disk_usage", usage)
        assert disk_space(tmp_path) is None
        check_room(tmp_path, 1 << 60, "the shards take")
    assert convert_here(source, tmp_path / "set", *SMALL).samples == 3
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=0))
    assert "0 are free" in last_line("convert", source, "--out", tmp_path / "another")
    monkeypatch.setattr(shutil, "disk_usage", fails(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        check_room(tmp_path, 1, "the shards take")


@pytest.mark.parametrize("number", [*CANNOT, errno.EPERM, errno.EXDEV])
def test_without_hard_links_a_file_is_renamed(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", fails(number))
    (tmp_path / "part").write_bytes(b"content")
    link_or_rename(tmp_path / "part", tmp_path / "name")
    assert contents(tmp_path) == {"name": b"content"}


def test_a_link_that_fails_is_no_reason_to_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "part").write_bytes(b"content")
    (tmp_path / "name").write_bytes(b"another")
    with pytest.raises(FileExistsError):
        link_or_rename(tmp_path / "part", tmp_path / "name")
    monkeypatch.setattr(os, "link", fails(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        link_or_rename(tmp_path / "part", tmp_path / "name")
    assert contents(tmp_path) == {"name": b"another", "part": b"content"}


def test_a_folder_without_locks_takes_an_export_and_one_whose_lock_fails_does_not(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (*CANNOT, errno.ENOLCK):  # EBADF: NFS, for a folder
        monkeypatch.setattr(fcntl, "flock", fails(number))
        assert "3 files" in output_of("export", source, "--out", tmp_path / "files")
        with Lock(tmp_path) as lock, pytest.raises(NoLocksError):
            lock.take()
    monkeypatch.setattr(fcntl, "flock", fails(errno.EIO))
    assert "Input/output error" in last_line("export", source, "--out", tmp_path / "more")


def test_a_lock_whose_release_fails_is_released_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, Lock(tmp_path / "lock") as lock:
        assert lock.take()
        patch.setattr(fcntl, "flock", fails(errno.EIO))
    with Lock(tmp_path / "lock") as lock:
        assert lock.take()


def test_no_error_of_a_full_or_failing_disk_counts_as_a_missing_operation() -> None:
    assert not any(is_unsupported(OSError(number, "")) for number in FAILED)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EROFS, "they share memory in /dev/shm: make that writable and larger, or use --workers 1"),
        (errno.EACCES, "they share memory in /dev/shm: make that writable and larger, or use --workers 1"),
        (errno.ENOSPC, "they share memory in /dev/shm: make that writable and larger, or use --workers 1"),
        (errno.ENOSYS, "they share memory in /dev/shm: make that writable and larger, or use --workers 1"),
        (errno.EMFILE, "use fewer --workers, or --workers 1"),
    ],
)
def test_without_shared_memory_the_remedy_is_to_do_without_workers(
    number: int, remedy: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", fails(number))
    expected = f"worker processes cannot be started: {os.strerror(number)}: {remedy}"
    convert = ("convert", source, "--out", tmp_path / "set", *SMALL)
    for words in (convert, ("verify", source.parent / "set"), ("demo", "--out", tmp_path, "--images", 60)):
        assert last_line(*words, "--workers", 2) == expected
    output_of(*convert, "--workers", 1)
    assert read_manifest(tmp_path / "set").samples == 3


def test_a_limit_on_processes_is_told_from_a_worker_that_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("concurrent.futures.process.ProcessPoolExecutor.submit", fails(errno.EAGAIN))
    with pytest.raises(UserError, match="Resource temporarily unavailable: use fewer --workers"):
        list(map_in_order(lambda job, tick: job, [1], 2, lambda _: None))
