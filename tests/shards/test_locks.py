"""The lock of `shards.common.locks` between real processes."""

from __future__ import annotations

import errno
import fcntl
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


def test_a_lock_file_is_its_users_only_and_no_link_is_followed(tmp_path: Path) -> None:
    with Lock(tmp_path / "lock") as lock:
        assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o600
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
