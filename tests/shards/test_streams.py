"""Standard output and error that fail: a command whose result is something else goes on, another ends."""

from __future__ import annotations

import fcntl
import os
import select
import sys
from pathlib import Path

import pytest

from shards.common import streams
from shards.common.errors import UserError
from shards.common.streams import Stream, guard_streams, output_is_optional
from tests.support.forks import status_of

FULL = Path("/dev/full")


def pipe() -> tuple[int, int]:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    return reader, writer


def read(descriptor: int) -> bytes:
    return os.read(descriptor, 1 << 20)


def test_what_can_be_written_is_written() -> None:
    reader, writer = os.pipe()
    text = b"x" * 10_000
    stream = Stream(writer, is_result=False)
    assert stream.write(text) == select.PIPE_BUF  # as much as a pipe takes without blocking
    assert stream.write(memoryview(text)[:10]) == 10
    assert read(reader) == text[: select.PIPE_BUF + 10]


def test_a_reader_that_has_exited_is_forgotten_by_other_code_too() -> None:
    reader, writer = pipe()
    os.close(reader)
    stream = Stream(writer, is_result=False)
    assert [stream.write(b"one\n"), stream.write(b"two\n")] == [4, 4]
    assert os.write(writer, b"a child process") == 15  # to /dev/null


def test_a_terminal_that_was_closed_is_forgotten() -> None:
    terminal, writer = os.openpty()
    os.close(terminal)
    assert Stream(writer, is_result=False).write(b"one\n") == 4
    assert os.write(writer, b"a child process") == 15


def test_a_disk_that_was_full_for_a_time_gets_what_comes_later_and_the_size_of_the_gap(tmp_path: Path) -> None:
    descriptor = os.open(FULL, os.O_WRONLY)
    stream = Stream(descriptor, is_result=False)
    assert [stream.write(b"12345\n"), stream.write(b"67\n")] == [6, 3]
    os.dup2(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), descriptor)
    stream.write(b"later\n")
    assert (tmp_path / "log").read_text() == "[9 bytes are missing here: No space left on device]\nlater\n"


def test_a_reader_that_has_stopped_reading_delays_one_line_by_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_SLOW_MS", 20)
    reader, writer = pipe()
    stream = Stream(writer, is_result=False)
    assert [stream.write(b"a" * 4096), stream.write(b"lost\n"), stream.write(b"lost\n")] == [4096, 5, 5]
    assert read(reader) == b"a" * 4096
    stream.write(b"later\n")
    assert read(reader) == b"[10 bytes are missing here: its reader is slow]\nlater\n"


def test_a_command_whose_output_is_its_result_ends_quietly_with_its_reader() -> None:
    reader, writer = pipe()
    os.close(reader)
    with pytest.raises(SystemExit) as ended:
        Stream(writer, is_result=True).write(b"one\n")
    assert ended.value.code == 0


def test_a_command_whose_output_is_its_result_ends_with_a_line_if_it_is_lost() -> None:
    stream = Stream(os.open(FULL, os.O_WRONLY), is_result=True)
    message = r"cannot write to standard output \(No space left on device\): redirect it to another place"
    with pytest.raises(UserError, match=message):
        stream.write(b"one\n")
    assert stream.write(b"one\n") == 4  # once is enough: the interpreter tries again as it ends


def print_without_streams(path: Path) -> None:
    """Exit with 0 if what is printed goes neither to the file that is opened next nor up as an error."""
    os.closerange(0, 3)
    sys.stdout = sys.stderr = None  # as the interpreter sets them then
    guard_streams()
    output_is_optional()
    with path.open("w") as file:
        print("output", flush=True)
        print("error", file=sys.stderr, flush=True)
        file.write("content")
    os._exit(0 if path.read_text() == "content" else 3)


def test_streams_that_are_closed_from_the_start_are_not_taken_by_the_next_file(tmp_path: Path) -> None:
    assert status_of(print_without_streams, tmp_path / "file") == 0
