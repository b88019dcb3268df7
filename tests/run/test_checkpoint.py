"""A checkpoint is whole or passed over, and nothing in it runs.

Promise 7 (checkpoints) of dist_dcgan/README.md.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch

from dist_dcgan.config import CheckpointOptions
from dist_dcgan.run import checkpoint
from dist_dcgan.run.checkpoint import Retention, list_checkpoints, load_checkpoint, load_newest, save_checkpoint
from dist_dcgan.run.saver import Saver, Schedule, make_schedule
from dist_dcgan.run.tensor_file import serialised
from shards.common.errors import UserError
from shards.common.files import atomic_file
from shards.common.locks import Lock
from tests.support.commands import module, one_line_error
from tests.support.mistakes import flip_bit, refusal
from tests.support.waiting import wait_until

CPU = torch.device("cpu")
THREE = Retention(3)
MIB = 1 << 20


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    return {
        "a": torch.full((2, 3, 4, 4), float(step)).contiguous(memory_format=torch.channels_last),
        "b": torch.tensor(step),
    }


def values_of(step: int) -> dict[str, object]:
    return {"step": step, "best_kid": 1.5}


def save(directory: Path, step: int, retention: Retention = THREE) -> Path:
    return save_checkpoint(directory, tensors_of(step), values_of(step), retention)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    tensors, values = load_checkpoint(save(tmp_path, 7))
    assert torch.equal(tensors["a"], torch.full((2, 3, 4, 4), 7.0))
    assert (tensors["b"].item(), tensors["b"].dtype) == (7, torch.int64)
    assert values == {"step": 7, "best_kid": 1.5}


@pytest.mark.parametrize(
    ("steps", "retention", "kept"),
    [
        ((1, 99_999_998, 99_999_999, 100_000_000), Retention(3), [99_999_998, 99_999_999, 100_000_000]),  # a digit more
        ((7, 8, 9, 1, 2), Retention(2), [1, 2, 8, 9]),  # one just written stays though later ones are there
        (range(1, 9), Retention(1, 3), [3, 6, 8]),  # those at multiples stay for good
    ],
)
def test_the_newest_are_kept(tmp_path: Path, steps: Iterable[int], retention: Retention, kept: list[int]) -> None:
    for step in steps:
        save(tmp_path, step, retention)
    assert [int(path.name.removeprefix("step-")) for path in list_checkpoints(tmp_path)] == kept


class Disk(io.BufferedWriter):
    """A file to which something happens on the way to the disk."""

    def __init__(self, path: Path, room: int, lies: bool) -> None:
        super().__init__(io.FileIO(path, "w"))
        self._room, self._lies = room, lies

    def write(self, content: Any) -> int:
        self._room -= len(content)
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(bytes(content).replace(b"\0\0", b"\0\1", 1) if self._lies else content)


def on_disk(room: int = MIB, lies: bool = False) -> Callable[[Path], AbstractContextManager[Disk]]:
    """Return a stand-in for `atomic_file`."""

    @contextmanager
    def opened(path: Path) -> Iterator[Disk]:
        with atomic_file(path) as real, Disk(Path(real.name), room, lies) as file:
            yield file

    return opened


def full(path: Path, content: bytes) -> None:
    """Stand in for `publish` on a full disk."""
    path.write_bytes(content[:10])
    raise OSError(errno.ENOSPC, "No space left on device")


FULL = r"step-00000002 cannot be written: No space left on device: mend that"


@pytest.mark.parametrize(
    ("replaced", "disk", "message"),
    [
        ("atomic_file", on_disk(room=10), FULL),  # the header is longer
        ("atomic_file", on_disk(room=300), FULL),  # the header is shorter
        ("publish", full, FULL),
        ("atomic_file", on_disk(lies=True), "what was written is not what is read"),
    ],
)
def test_one_that_cannot_be_written_leaves_the_others_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: str, disk: Callable[..., Any], message: str
) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(f"dist_dcgan.run.checkpoint.{replaced}", disk)
    with pytest.raises(UserError, match=message):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_streamed_file_is_that_of_the_library_to_the_byte(tmp_path: Path) -> None:
    dtypes = [torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.int32]
    dtypes += [torch.float32, torch.float64, torch.int64]
    tensors = {f"{name}.{dtype}": torch.arange(7).to(dtype) for dtype in dtypes for name in ("z", "a", 'é"')}
    tensors |= {"scalar": torch.tensor(3), "empty": torch.empty(0, 4), "large": torch.randn(3, MIB // 8 + 5)}
    images = torch.randn(2, 3, 4, 4)
    expected = safetensors.torch.save(tensors | {"images": images})
    tensors["images"] = images.contiguous(memory_format=torch.channels_last)
    content = b"".join(serialised(tensors))
    assert content == expected
    (tmp_path / "file").write_bytes(content)
    loaded = safetensors.torch.load_file(tmp_path / "file")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_no_large_copy_is_made_of_what_is_written(tmp_path: Path) -> None:
    """One object of the whole file holds the interpreter lock while it is filled, and training stands still."""
    tensors = {f"{index}": torch.ones(16 * MIB // 4) for index in range(3)}
    tracemalloc.start()
    try:
        save_checkpoint(tmp_path, tensors, {"step": 1}, Retention(1))
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()


def test_what_is_written_beside_training_is_what_would_have_been_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*arguments: Any) -> Path:
        assert stepped.wait(20)
        return save_checkpoint(*arguments)

    expected, live, stepped = save(tmp_path / "at once", 7), tensors_of(7), threading.Event()
    monkeypatch.setattr("dist_dcgan.run.saver.save_checkpoint", late)
    with Saver(tmp_path / "beside", THREE, CPU) as saver:
        saver.save(live, values_of(7))
        for tensor in live.values():  # the next step
            tensor.zero_()
        stepped.set()
        saver.wait()
    for name in ("tensors.safetensors", "values.json"):
        assert (tmp_path / "beside" / expected.name / name).read_bytes() == (expected / name).read_bytes()


def test_never_two_are_written_at_once_and_an_error_is_raised_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most = [0], [0]

    def slow(directory: Path, tensors: object, values: dict[str, int], retention: Retention) -> Path:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.1)
        running[0] -= 1
        if values["step"] == 3:
            raise UserError("no room")
        return directory

    monkeypatch.setattr("dist_dcgan.run.saver.save_checkpoint", slow)
    with Saver(tmp_path, THREE, CPU) as saver:
        for step in (1, 2, 3):
            saver.save({}, {"step": step})
        wait_until(lambda: saver.failed)
        with pytest.raises(UserError, match="no room"):
            saver.save({}, {"step": 4})
        assert not saver.failed
    assert most == [1]


def test_the_copies_of_all_checkpoints_lie_in_the_same_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[list[int]] = []

    def note(directory: Path, tensors: dict[str, torch.Tensor], *_: object) -> Path:
        places.append([tensor.data_ptr() for tensor in tensors.values()])
        return directory

    monkeypatch.setattr("dist_dcgan.run.saver.save_checkpoint", note)
    with Saver(tmp_path, THREE, CPU) as saver:
        for step in (1, 2):
            live = tensors_of(step)
            saver.save(live, values_of(step))
            saver.wait()
    assert places[0] == places[1]
    assert not set(places[0]) & {tensor.data_ptr() for tensor in live.values()}


def test_on_a_gpu_the_writing_thread_waits_for_the_copies_and_training_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls of CUDA are noted, with the thread that makes them; the tensors are on the CPU."""
    calls: list[tuple[str, bool]] = []

    def note(name: str) -> None:
        calls.append((name, threading.current_thread() is threading.main_thread()))

    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking

        def record(self) -> None:
            note("record")

        def synchronize(self) -> None:
            note("synchronize")

    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: note(f"use {device}"))
    with Saver(tmp_path, THREE, torch.device("cuda", 3)) as saver:
        for step in (1, 2):
            saver.save(tensors_of(step), values_of(step))
            saver.wait()
    for calls_of_thread, expected in (
        ([name for name, main in calls if main], ["record", "record"]),
        ([name for name, main in calls if not main], ["use cuda:3", "synchronize", "synchronize"]),
    ):
        assert calls_of_thread == expected
    assert load_newest(tmp_path) is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_checkpoint_from_a_gpu_holds_what_was_there_although_the_next_step_goes_on(tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    live = {"a": torch.ones(4, 3, 512, 512, device=device).contiguous(memory_format=torch.channels_last)}
    live |= {"b": torch.tensor(1, device=device)}
    with torch.cuda.device(device), Saver(tmp_path, THREE, device) as saver:
        for step in (1, 2, 3):
            saver.save(live, {"step": step})
            for tensor in live.values():  # the next step, queued on the same stream
                tensor.add_(1)
        assert all(buffer.is_pinned() for buffer in saver._buffers.values())
    for path in list_checkpoints(tmp_path):
        tensors, values = load_checkpoint(path)
        assert all(bool((tensor == values["step"]).all()) for tensor in tensors.values())


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [
        ("cpu", {}, Schedule(None, (1000,))),
        ("cuda", {}, Schedule(600.0, ())),
        ("cuda", {"every_steps": 5}, Schedule(None, (5,))),
        ("cpu", {"every_minutes": 0.5}, Schedule(30.0, ())),
        ("cpu", {"every_minutes": 2, "every_steps": 7}, Schedule(120.0, (7,))),
        ("cuda", {"keep_every_steps": 50}, Schedule(600.0, (50,))),
    ],
)
def test_checkpoints_are_due_as_asked_and_else_as_suits_the_device(
    device: str, options: dict[str, Any], expected: Schedule
) -> None:
    assert make_schedule(CheckpointOptions(**options), torch.device(device)) == expected


def test_one_is_due_at_each_multiple_and_those_to_be_kept_are_written_too() -> None:
    schedule = make_schedule(CheckpointOptions(every_steps=4, keep_every_steps=6), CPU)
    assert [step for step in range(1, 13) if schedule.due_at(step)] == [4, 6, 8, 12]


@pytest.mark.parametrize("name", ["tensors.safetensors", "values.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    middle = path.stat().st_size // 2
    if damage == "flip":
        flip_bit(path, middle)
    elif damage == "cut":
        os.truncate(path, middle)
    else:
        path.unlink()
    found = load_newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 1
    assert "step-00000002 is passed over" in capsys.readouterr().err


def test_an_unfinished_checkpoint_is_none_and_is_swept_by_the_next(tmp_path: Path) -> None:
    left = tmp_path / "step-00000002.tmp"
    left.mkdir()
    (left / "tensors.safetensors").write_bytes(b"half")
    assert load_newest(tmp_path) is None
    (tmp_path / "step-00000009.tmp").mkdir()
    save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_one_that_training_replaces_between_listing_and_reading_is_looked_for_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    real = load_checkpoint

    def late(path: Path, most_bytes: int) -> checkpoint.Checkpoint:
        if path.name == "step-00000001":
            save(tmp_path, 2, Retention(1))
        return real(path, most_bytes)

    monkeypatch.setattr(checkpoint, "load_checkpoint", late)
    found = load_newest(tmp_path)
    assert found is not None and found.values["step"] == 2
    assert capsys.readouterr().err == ""


def test_a_pickle_in_its_place_does_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "pwned",)  # type: ignore[return-value]

    path = save(tmp_path, 1)
    for name in ("tensors.safetensors", "values.json"):
        (path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(UserError, match=r"none of the 1 checkpoints in .* is sound"):
            load_newest(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_inspect_lists_what_is_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no checkpoints in" in refusal(checkpoint.main, "inspect", tmp_path)
    save(tmp_path / "checkpoints", 1)
    values = save(tmp_path / "checkpoints", 2) / "values.json"
    values.write_text(json.dumps(json.loads(values.read_text()) | {"values": {"step": 3}}))
    checkpoint.main(["inspect", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step-00000001: sound, step 1, 2 tensors")
    assert lines[1].startswith("step-00000002: DAMAGED, values.json does not match its checksum")


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "-h"):
        checkpoint.main([flag])
        lines = capsys.readouterr().out.splitlines()
        for word in ("inspect", "verify", "prune"):
            assert sum(line.startswith(f"python -m dist_dcgan.run.checkpoint {word} RUN_DIR  ") for line in lines) == 1
    assert "unknown command: --hlp" in refusal(checkpoint.main, "--hlp")


def test_verify_fails_if_one_is_damaged_and_prune_keeps_the_newest_sound_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path / "checkpoints", step)
    checkpoint.main(["verify", str(tmp_path)])
    (tmp_path / "checkpoints" / "step-00000003" / "tensors.safetensors").write_bytes(b"")
    verify = module("dist_dcgan.run.checkpoint", "verify", tmp_path)
    assert "1 of the 3 checkpoints" in one_line_error(verify)
    with Lock(tmp_path / "run.lock") as lock:
        assert lock.take()
        assert "is in use by an unknown process: wait" in refusal(checkpoint.main, "prune", tmp_path)
    checkpoint.main(["prune", str(tmp_path)])
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000002"]


def test_on_a_file_system_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path / "checkpoints", step)
    monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    assert "cannot be used: [Errno 37] the file system has no locks" in refusal(checkpoint.main, "prune", tmp_path)
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 2
