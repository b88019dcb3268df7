"""Progress: a live bar where somebody watches, plain lines where a log is written."""

from __future__ import annotations

import os
import re
import sys

import pytest

from shards.common.progress import Progress


def test_a_log_gets_plain_lines_every_ten_seconds_and_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with Progress(100, "convert") as progress:
        for second in range(1, 26):
            clock[0] = float(second)
            progress.advance(4)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(" +", " ", line) for line in lines] == [
        "convert: 40% 40/100 [00:10<00:15, 4.00img/s]",
        "convert: 80% 80/100 [00:20<00:05, 4.00img/s]",
        "convert: 100% 100/100 [00:25<00:00, 4.00img/s]",
    ]


def test_bytes_are_shown_as_such_and_what_was_there_is_no_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with Progress(43_000_000_000, "archive", unit="B", start=21_500_000_000) as progress:
        clock[0] = 10.0
        progress.advance(100_000_000)
    with Progress(None, "archive", unit="B") as progress:
        clock[0] = 12.0
        progress.advance(3_000)
    assert [re.sub(" +", " ", line) for line in capsys.readouterr().err.splitlines()] == [
        "archive: 50% 21.6G/43.0G [00:10<35:40, 10.0MB/s]",
        "archive: 50% 21.6G/43.0G [00:10<35:40, 10.0MB/s]",
        "archive: 3.00kB [00:02, 1.50kB/s]",
    ]


def test_a_terminal_without_a_size_gets_a_live_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, stderr = os.openpty()  # 0 rows and columns, as in some containers
    with os.fdopen(stderr, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress(10, "convert") as progress:
            progress.advance(10)
        shown = ""
        while "\n" not in shown:
            shown += os.read(terminal, 4096).decode()
    os.close(terminal)
    assert "\rconvert:   0%" in shown and "10/10" in shown
