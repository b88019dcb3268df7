"""The lock of `shards.common.locks` between real processes."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import pytest

from shards.common.locks import Lock, NoLocksError
from tests.support.shards_fixtures import ROOT

_HOLDER = """
import sys
from pathlib import Path
from shards.common.locks import Lock

print(Lock(Path(sys.argv[1])).take(shared=sys.argv[2] == "shared"), flush=True)
sys.stdin.read()
"""


_FORKS = """
import os, sys, time
from pathlib import Path
from shards.common.locks import Lock

with Lock(Path(sys.argv[1])) as lock:
    lock.take()
    fork = os.fork()
    if fork == 0:
        time.sleep(600)
print(Lock(Path(sys.argv[1])).take())
os.kill(fork, 9)
"""


@contextmanager
def another_process(path: Path, kind: str = "exclusive") -> Iterator[subprocess.Popen[str]]:
    """Have another process hold the lock of `path`."""
    command = [sys.executable, "-c", _HOLDER, str(path), kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        yield process


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_lock_holds_another_process_off_until_that_ends(what: str, tmp_path: Path) -> None:
    path = tmp_path / "lock" if what == "file" else tmp_path
    with Lock(path) as lock, another_process(path) as process:
        assert [lock.take(), lock.take(shared=True)] == [False, False]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert lock.take()
        with Lock(path) as second:
            assert not second.take()
    with another_process(path):  # released with the block
        pass


def test_a_lock_that_is_released_is_free_whatever_forked_processes_hold_open(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _FORKS, str(tmp_path / "lock")]
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60).stdout == "True\n"


def test_a_shared_lock_admits_shared_ones_only(tmp_path: Path) -> None:
    with Lock(tmp_path / "lock") as lock, another_process(tmp_path / "lock", "shared") as process:
        assert [lock.take(shared=True), lock.take()] == [True, False]
        with Lock(tmp_path / "lock") as second:  # a take that fails leaves nothing held
            process.kill()
            process.wait()
            assert second.take()
            assert not lock.take(shared=True)
            second.release()
            assert lock.take()


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    """Sets the umask, which is as before afterwards."""
    before = os.umask(0o022)
    os.umask(before)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o600), (0o077, 0o600), (0o002, 0o660), (0o000, 0o660)])
def test_nobody_can_open_a_lock_file_to_hold_it_who_may_not_write_to_it(
    mask: int, mode: int, tmp_path: Path, umask: Callable[[int], int]
) -> None:
    path = tmp_path / "lock"
    umask(mask)
    for older in (None, 0o644 & ~mask | mode & 0o020):
        if older is not None:
            path.chmod(older)
        with Lock(path):
            assert stat.S_IMODE(path.stat().st_mode) == mode


def _lock_as(user: int, group: int, path: Path, content: str, pipe: Connection) -> None:
    """Lock and write as a user of one group, say what became of it, and hold the lock until told to end."""
    os.setgroups([])
    os.setgid(group)
    os.setuid(user)
    os.umask(0o002)
    try:
        with Lock(path) as lock:
            taken, before = lock.take(), lock.read()
            if taken:
                lock.write(content)
            pipe.send(f"{taken} {before}")
            pipe.recv()
    except OSError as error:
        pipe.send(str(error))


@contextmanager
def member(user: int, group: int, path: Path, content: str) -> Iterator[str]:
    """Have another user hold the lock and write to it; yields what he says."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_lock_as, args=(user, group, path, content, theirs))
    process.start()
    yield ours.recv()
    ours.send("end")
    process.join()


def test_a_lock_file_that_may_only_be_read_is_not_taken_for_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS refuses an exclusive lock on it; a conversion goes on if there are no locks."""
    (tmp_path / "lock").write_text("1")
    opened = os.open

    def refused(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "refused", str(path))
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", refused)
    with Lock(tmp_path / "lock") as lock:
        assert lock.take()
        lock.write("1")
        with pytest.raises(PermissionError, match="lock"):
            lock.write("2")
    with Lock(tmp_path / "lock") as lock:
        monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(errno.EBADF, "refused")))
        with pytest.raises(PermissionError, match="lock"):
            lock.take()
    with Lock(tmp_path) as lock, pytest.raises(NoLocksError):
        lock.take()


def test_another_file_that_is_linked_as_a_lock_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "other").touch(0o644)
    (tmp_path / "lock").hardlink_to(tmp_path / "other")
    mode = (tmp_path / "other").stat().st_mode
    with Lock(tmp_path / "lock"):
        assert (tmp_path / "other").stat().st_mode == mode


@pytest.mark.system
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_the_members_of_a_group_share_a_lock_and_strangers_cannot_hold_it() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name, "of the group")
        folder.mkdir()
        os.chown(folder, -1, 40_000)
        folder.chmod(0o2775)
        Path(name).chmod(0o755)
        path = folder / "lock"
        with member(40_001, 40_000, path, "one") as said:
            assert said == "True "
            with member(40_002, 40_000, path, "two") as second:
                assert second == "False one"
        with member(40_002, 40_000, path, "two") as said:
            assert said == "True one"
        with member(40_003, 40_003, path, "three") as said:
            assert "Permission denied" in said
        path.chmod(0o644)  # of an older version, with another umask: reading it is enough to lock it
        with member(40_002, 40_000, path, "two") as said:
            assert said == "True two"
        with member(40_002, 40_000, path, "other") as said:
            assert "Permission denied" in said


def test_a_lock_file_is_read_and_written_and_no_link_is_followed(tmp_path: Path) -> None:
    with Lock(tmp_path / "lock") as lock:
        lock.write("longer")
        lock.write("12")
        assert lock.read() == (tmp_path / "lock").read_text() == "12"
    for target in ("lock", "not yet", "."):
        (tmp_path / "link").symlink_to(target)
        with pytest.raises(OSError, match="link") as raised:
            Lock(tmp_path / "link")
        assert raised.value.errno in (errno.ELOOP, errno.ENOTDIR)
        (tmp_path / "link").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_told_from_other_errors(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(number, "refused")))
    with Lock(tmp_path / "lock") as lock:
        with pytest.raises(OSError, match="refused" if number == errno.EIO else "has no locks") as raised:
            lock.take()
        assert raised.type is (OSError if number == errno.EIO else NoLocksError)
        assert raised.value.errno == number
