"""A disk that fails for a while costs no row of metrics.jsonl, and a warning.

Promise 9 (nothing off the critical path stops training) of dist_dcgan/README.md.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dist_dcgan.loggers.base import Logger
from dist_dcgan.loggers.composite import CompositeLogger
from dist_dcgan.loggers.jsonl import JsonlLogger
from dist_dcgan.loggers.pictures import draw_curves
from dist_dcgan.loggers.wandb_process import _require_written


def row(step: int) -> dict[str, float]:
    return {"step": step, "images_seen": 8 * step, "loss/d": 1 / step}


def lines_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@contextmanager
def disk(number: int, room: int = 0) -> Iterator[None]:
    """Fail every write after `room` bytes, the last of which is cut short."""
    left, real = [room], os.pwrite

    def pwrite(descriptor: int, content: bytes, position: int) -> int:
        if not left[0]:
            raise OSError(number, os.strerror(number))
        part = content[: left[0]]
        left[0] -= len(part)
        return real(descriptor, part, position)

    with mock.patch.object(os, "pwrite", pwrite):
        yield


def pieces(descriptor: int, content: bytes, position: int, real: Callable[..., int] = os.pwrite) -> int:
    """Write at most 7 bytes at a time."""
    return real(descriptor, content[:7], position)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("room", [0, 10, 70])
def test_rows_of_the_time_in_which_the_disk_fails_are_written_afterwards(
    number: int, room: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = CompositeLogger([JsonlLogger(path, 0)])
    logger.metrics(row(1))
    with disk(number, room):
        for step in (2, 3, 4):
            logger.metrics(row(step))
            assert lines_of(path) == list(range(1, len(lines_of(path)) + 1))  # whole lines only
        logger.alert(4, "collapse")
    logger.metrics(row(5))
    logger.close()
    assert lines_of(path) == [1, 2, 3, 4, 4, 5]
    assert (
        capsys.readouterr().err
        == f"warning: JsonlLogger failed and is tried again: {OSError(number, os.strerror(number))!r}\n"
    )


def test_what_cannot_be_removed_of_a_row_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = CompositeLogger([JsonlLogger(path, 0)])
    with monkeypatch.context() as patch, disk(errno.EIO, 10):
        patch.setattr(os, "ftruncate", mock.Mock(side_effect=OSError(errno.EIO, "Input/output error")))
        logger.metrics(row(1))
    assert path.read_bytes() == b'{"step": 1'
    monkeypatch.setattr(os, "pwrite", pieces)
    logger.metrics(row(2))
    assert lines_of(path) == [1, 2]


def test_a_log_that_was_removed_begins_without_zeros(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = CompositeLogger([JsonlLogger(path, 0)])
    logger.metrics(row(1))
    with disk(errno.ESTALE):
        logger.metrics(row(2))
    path.unlink()
    logger.metrics(row(3))
    assert lines_of(path) == [2, 3]


def test_a_disk_that_stays_full_is_said_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = CompositeLogger([JsonlLogger(path, 0)])
    logger.metrics(row(1))
    with disk(errno.ENOSPC, 5):
        logger.metrics(row(2))
        logger.close()
    assert lines_of(path) == [1]
    assert (
        capsys.readouterr().err.splitlines()[-1] == f"warning: {path} may lack its last rows: No space left on device"
    )


class Broken(Logger):
    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0

    def metrics(self, row: Any) -> None:
        self.calls += 1
        raise self.errors.pop(0)


def test_only_an_error_of_the_disk_leaves_a_logger_on_and_each_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    full, failing = OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "failing")
    broken = Broken(full, full, failing, full, RuntimeError("wrong"), full)
    logger = CompositeLogger([broken])
    for step in range(1, 8):
        logger.metrics(row(step))
    assert broken.calls == 5
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == [
        f"Broken failed and is tried again: {full!r}",
        f"Broken failed and is tried again: {failing!r}",
        "Broken failed and is turned off: RuntimeError('wrong')",
    ]


def test_rows_after_the_step_and_a_torn_line_are_cut_though_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row(step)) + "\n" for step in (1, 2, 3)) + '{"step": 1, "lo')
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    logger = JsonlLogger(path, 2)
    logger.metrics(row(3))
    assert lines_of(path) == [1, 2, 3]


@pytest.mark.parametrize("torn", [b'{"step": 2', b"\xff\0", b""])
def test_what_is_not_a_row_is_left_out_and_a_row_without_its_end_is_kept(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(torn + b"\n" + json.dumps(row(1)).encode())
    JsonlLogger(path, 1).metrics(row(2))
    assert lines_of(path) == [1, 2]


def test_wandb_takes_a_disk_that_does_not_tell_its_space_for_one_with_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.wandb").write_text("longer than a header")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=0, free=0))
    _require_written(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(OSError, match="No space left"):
        _require_written(tmp_path)


def cut_short(figure: object, target: Any, **_: object) -> None:
    """Stand in for savefig on a disk that fills up."""
    with contextlib.nullcontext(target) if hasattr(target, "write") else open(target, "wb") as file:
        file.write(b"half")
    raise OSError(errno.ENOSPC, "full")


def test_a_full_disk_leaves_the_curves_that_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics, curves = tmp_path / "metrics.jsonl", tmp_path / "curves.png"
    metrics.write_text("".join(json.dumps(row(step)) + "\n" for step in (1, 2)))
    draw_curves(metrics, curves)
    before = curves.read_bytes()
    assert before.startswith(b"\x89PNG")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", cut_short)
    draw_curves(metrics, curves)
    assert (curves.read_bytes(), sorted(path.name for path in tmp_path.iterdir())) == (
        before,
        ["curves.png", "metrics.jsonl"],
    )
    assert "warning: curves: OSError(28, 'full')" in capsys.readouterr().err
