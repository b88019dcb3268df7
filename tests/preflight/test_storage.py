"""The checks of the data set and of the disks."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from dist_dcgan.config import Invocation, WandbOptions, make_plan
from dist_dcgan.distributed.world import process_group
from dist_dcgan.preflight import storage
from dist_dcgan.preflight.results import Finding, Subject
from dist_dcgan.run.checkpoint import Retention, load_newest, save_checkpoint
from dist_dcgan.run.export import export_generator
from dist_dcgan.training.train_state import TrainState
from shards.common.errors import UserError
from shards.common.locks import Lock
from shards.manifest import read_manifest
from tests.support.commands import succeed, train_command
from tests.support.mistakes import flip_bit
from tests.support.shards_fixtures import contents
from tests.support.subjects import config, failure, subject, with_data


@pytest.mark.parametrize("options", [{}, {"precision": "fp64", "model": {"kernel_size": 5, "latent_dim": 7}}])
def test_the_bytes_of_a_checkpoint_are_counted_exactly(options: dict[str, Any], tmp_path: Path) -> None:
    made = config(**options)
    with process_group(60, "cpu") as world:
        state = TrainState(made, make_plan(made, 1, 100), world, 64)
        tensors = state.tensors()
        assert storage.checkpoint_bytes(made, 64) == sum(tensor.nbytes for tensor in tensors.values())
        export_generator(tmp_path / "generator.safetensors", state.generator_ema, made, 64, 1)
        path = save_checkpoint(tmp_path, tensors, state.values(), Retention(1))
    written = sum(file.stat().st_size for file in path.iterdir())
    assert 0 < written - storage.checkpoint_bytes(made, 64) < 30_000  # names, shapes and counters
    exported = (tmp_path / "generator.safetensors").stat().st_size
    assert 0 < exported - storage.export_bytes(made, 64) / 2 < 5_000


def takes_exactly(count: int, check: Any, of: Subject) -> str:
    """Require that a check finds enough room in `count` bytes, and not in one less; return what it says then."""
    with mock.patch.object(shutil, "disk_usage", return_value=SimpleNamespace(total=1 << 50, free=count)):
        assert check(of) is not None
    with mock.patch.object(shutil, "disk_usage", return_value=SimpleNamespace(total=1 << 50, free=count - 1)):
        return failure(check, of)


def test_too_small_a_disk_fails_by_one_byte(demo_shards: Path, tmp_path: Path) -> None:
    of = with_data(demo_shards, run_dir=tmp_path / "no" / "run", checkpoint={"keep": 2})
    each, exports = storage.checkpoint_bytes(of.config, 64), storage.export_bytes(of.config, 64)
    text = takes_exactly(3 * each + exports, storage.room, of)
    assert text.startswith(f"no room at {tmp_path}/no/run: 3 checkpoints of {each:,} bytes and the generator take")
    assert text.endswith("use a smaller --checkpoint.keep, or another --run-dir")
    forever = with_data(demo_shards, run_dir=tmp_path, checkpoint={"keep": 2, "keep_every_steps": 5})  # of 20 steps
    takes_exactly(7 * each + exports, storage.room, forever)
    (tmp_path / "no" / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "no" / "run" / "checkpoints" / "there").write_bytes(bytes(1000))
    takes_exactly(3 * each + exports - 1000, storage.room, of)


def test_a_cache_has_room_for_what_it_may_hold(demo_shards: Path, tmp_path: Path) -> None:
    assert storage.cache(with_data(demo_shards)) is None
    total = sum(entry.bytes for entry in read_manifest(demo_shards).shards)
    for gigabytes, required in ((1.0, total), (5e-4, 500_000)):
        of = with_data(demo_shards, data={"cache_dir": tmp_path / "cache", "cache_gb": gigabytes})
        assert "a smaller --data.cache-gb" in takes_exactly(required, storage.cache, of)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_below_what_is_in_use_at_a_time_fails(demo_shards: Path, tmp_path: Path) -> None:
    of = subject(data={"path": demo_shards, "cache_dir": tmp_path / "cache", "cache_gb": 2e-4})
    with ExitStack() as stack:
        assert storage.data_set(of, stack).level == "ok"
        assert storage.plan(of).level == "ok"
        assert "data.cache_gb 0.0002 is too small" in failure(storage.cache, of)
    assert list(tmp_path.iterdir()) == []


def test_locks_that_hold_nobody_off_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.try_writing(tmp_path / "not" / "yet") == tmp_path
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with pytest.raises(UserError, match=f"file locks hold nobody off in {tmp_path}"):
        storage.try_writing(tmp_path / "not" / "yet")
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with pytest.raises(UserError, match="there are no file locks"):
        storage.try_writing(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_whose_folders_cannot_be_renamed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a checkpoint is; training would find out at the first one."""
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.is_dir():
            raise OSError(errno.ENOSYS, "Function not implemented")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    text = failure(storage.writing, subject(run_dir=tmp_path / "run"))
    assert text == f"run directory {tmp_path}/run cannot be used: Function not implemented: name another with --run-dir"
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_or_fails_to_sync_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(28, "No space left on device")))
    text = failure(storage.writing, subject(run_dir=tmp_path / "run"))
    assert text == f"run directory {tmp_path}/run cannot be used: No space left on device: name another with --run-dir"
    assert list(tmp_path.iterdir()) == []


def test_a_first_shard_that_is_damaged_is_named(demo_shards: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(demo_shards, tmp_path / "data"))
    sound = storage.first_shard(with_data(data))
    assert sound is not None
    first = data / sound.text.split(" matches its SHA-256: ")[0]
    flip_bit(first, 600)
    assert failure(storage.first_shard, with_data(data)).startswith(f"shard {first} is damaged: sha256 ")


def test_another_number_of_ranks_than_expected_fails(demo_shards: Path) -> None:
    of = with_data(demo_shards)
    of.invocation = Invocation(world_size=2)
    assert "this is one process without torchrun" in failure(storage.plan, of)


def test_a_run_that_is_there_is_looked_at_and_not_touched(
    demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--width", 4, "--global-batch", 12, "--wandb", "disabled", "--max-steps", 2, "--ema.statistics-images", 32]
    succeed(train_command(1, *flags, "--data", demo_shards, "--run-dir", tmp_path))
    before = contents(tmp_path)
    of, other = (with_data(demo_shards, run_dir=tmp_path, seed=seed, ema={"statistics_images": 32}) for seed in (0, 1))
    assert storage.run_directory(of) == Finding("ok", f"{tmp_path} holds this run, which goes on from step 2")
    assert "holds a run of another configuration (seed: 0 -> 1)" in failure(storage.run_directory, other)
    of.config = of.config.model_copy(update={"batch_per_rank": 6})  # with other ranks, as large a batch in all
    of.plan = make_plan(of.config, 2, 96)
    assert storage.run_directory(of).level == "ok"
    of.plan = make_plan(of.config, 4, 96)
    assert "batch 12, this start makes it 24: give --global-batch 12" in failure(storage.run_directory, of)
    of = with_data(demo_shards, run_dir=tmp_path, ema={"statistics_images": 32})
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("WANDB_RUN_ID", "another")
        found = load_newest(tmp_path / "checkpoints")
        assert found is not None
        found.values["wandb_run_id"] = "this"
        elsewhere.setattr(storage, "load_newest", lambda _: found)
        of.config = of.config.model_copy(update={"wandb": WandbOptions(mode="offline")})
        assert "is W&B's run this, but WANDB_RUN_ID is another" in failure(storage.run_directory, of)
    with Lock(tmp_path / "run.lock") as lock:
        assert lock.take()
        holder = (tmp_path / "run.holder.json").read_text()
        assert f"{tmp_path} is in use by {holder}: wait" in failure(storage.run_directory, of)
    of.invocation = Invocation(resume="never")
    assert "holds a run already" in failure(storage.run_directory, of)
    assert contents(tmp_path) == before


def test_small_windows_are_told(demo_shards: Path) -> None:
    assert storage.shuffling(with_data(demo_shards)) == Finding("ok", "among 96 images at a time (10 shards)")
    found = storage.shuffling(with_data(demo_shards, data={"window_shards": 2}))
    assert found.level == "ok"
    assert found.text.endswith("few batches of 12: a larger --data.window-shards shuffles better")
