"""What fails once a checkpoint is safe costs a warning; a run that has lost its checkpoints is not begun again.

Promises 7 (checkpoints) and 9 (nothing off the critical path stops training) of dist_dcgan/README.md.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_dcgan import sample, train
from dist_dcgan.config import from_command_line
from dist_dcgan.distributed.world import World
from dist_dcgan.preflight import storage
from dist_dcgan.preflight.results import Check, Finding, Subject, attempt
from dist_dcgan.run import checkpoint
from dist_dcgan.run.checkpoint import Retention, list_checkpoints, load_newest, save_checkpoint
from dist_dcgan.run.directory import RunDirectory, record_saved
from dist_dcgan.run.export import load_generator
from dist_dcgan.training import reporting
from dist_dcgan.training.stopping import StepAgreement
from tests.support.commands import metrics
from tests.support.mistakes import refusal
from tests.support.shards_fixtures import contents

FLAGS = ["--preset", "debug", "--wandb", "disabled", "--width", 4, "--global-batch", 8, "--quality.extractor", "none"]
ONE = Retention(1)


def command(data: Path, run_dir: Path, steps: int = 2, *more: object) -> list[str]:
    return [
        *map(str, FLAGS),
        "--data",
        str(data),
        "--run-dir",
        str(run_dir),
        "--max-steps",
        str(steps),
        *map(str, more),
    ]


@pytest.fixture(scope="module")
def finished(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 steps, to be copied."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train.main(command(demo_shards, run_dir))
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def save(directory: Path, step: int) -> Path:
    return save_checkpoint(directory, {"a": torch.tensor(step)}, {"step": step}, ONE)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def busy(name: str) -> Callable[..., None]:
    """Stand in for rmtree while something reads in the folder of this name: its files go, it stays."""
    real = shutil.rmtree

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if path.name != name:
            real(path, ignore_errors)
            return
        for file in path.iterdir():
            file.unlink()
        (path / ".nfs0001").touch()
        if not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy")

    return rmtree


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning_and_the_next_save_removes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy("step-00000001"))
        for step in (2, 3):
            save(tmp_path, step)
            warning = f"warning: {tmp_path}/step-00000001 cannot be removed now: Device or resource busy\n"
            assert capsys.readouterr().err == warning
            assert names(tmp_path) == ["step-00000001", f"step-{step:08d}"]
        found = load_newest(tmp_path)
        assert found is not None and found.values["step"] == 3
    save(tmp_path, 4)
    assert names(tmp_path) == ["step-00000004"]


@pytest.mark.parametrize("left", ["step-00000002.tmp", "step-00000001.tmp"])
def test_what_a_killed_save_left_and_cannot_be_removed_is_no_obstacle(
    left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / left).mkdir()
    monkeypatch.setattr(shutil, "rmtree", busy(left))
    save(tmp_path, 2)
    assert f"{left} cannot be removed now: Device or resource busy" in capsys.readouterr().err
    found = load_newest(tmp_path)
    assert found is not None and found.values["step"] == 2


def test_a_damaged_checkpoint_that_cannot_be_removed_makes_way_for_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (save(tmp_path, 2) / "values.json").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy("step-00000002.damaged.tmp"))
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000002", "step-00000002.damaged.tmp"]
    found = load_newest(tmp_path)
    assert found is not None and found.values["step"] == 2
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000003"]


def test_prune_removes_what_it_can_and_tells_of_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "checkpoints", {"a": torch.tensor(step)}, {"step": step}, Retention(3))
    monkeypatch.setattr(shutil, "rmtree", busy("step-00000001"))
    message = f"checkpoints of {tmp_path} are left: end what reads them, and prune again"
    assert refusal(checkpoint.main, "prune", tmp_path) == message
    assert names(tmp_path / "checkpoints") == ["step-00000001", "step-00000003"]
    assert capsys.readouterr().out.splitlines()[-2:] == ["step-00000001: left", "step-00000002: removed"]


def test_a_run_trains_where_folders_cannot_be_synced_and_not_where_that_fails(
    demo_shards: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, number = os.fsync, errno.EINVAL

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    train.main(command(demo_shards, tmp_path / "run"))
    found, expected = load_newest(tmp_path / "run" / "checkpoints"), load_newest(finished / "checkpoints")
    assert found is not None and expected is not None
    assert all(torch.equal(found.tensors[name], expected.tensors[name]) for name in expected.tensors)
    number = errno.EIO
    assert "Input/output error" in refusal(train.main, *command(demo_shards, tmp_path / "another"))


def versions_before(run_dir: Path) -> None:
    """Remove what older versions did not write."""
    (run_dir / "run.saved.json").unlink()


def stopped_before(run_dir: Path) -> None:
    """Leave what an older version did when it was stopped, and could not export."""
    versions_before(run_dir)
    for path in run_dir.glob("generator_ema*"):
        path.unlink()
    (run_dir / "STOPPED").touch()


def killed(run_dir: Path) -> None:
    """Leave what a run leaves that was killed after its first checkpoint."""
    for path in run_dir.glob("generator_ema*"):
        path.unlink()


def purged(run_dir: Path) -> None:
    """Leave what is as young as the run's last save."""
    for name in set(names(run_dir)) - {"run.saved.json", "run.lock", "checkpoints"}:
        shutil.rmtree(run_dir / name) if (run_dir / name).is_dir() else (run_dir / name).unlink()


LOST = (
    "run directory {0} has lost its checkpoints: {0}/checkpoints holds none, and the run had saved some: put them "
    "back, or begin again with another --run-dir"
)


def examined(data: Path, run_dir: Path) -> Finding:
    """What the doctor says of the folder."""
    config, invocation = from_command_line(command(data, run_dir))
    world = World(0, 0, 1, torch.device("cpu"))
    found = attempt(Check("run directory", storage.run_directory), Subject(config, invocation, world))
    assert found is not None
    return found


@pytest.mark.parametrize("left", [lambda run_dir: None, versions_before, stopped_before, killed, purged])
def test_the_doctor_knows_a_run_that_has_lost_its_checkpoints(
    left: Callable[[Path], None], demo_shards: Path, run_dir: Path
) -> None:
    left(run_dir)
    assert examined(demo_shards, run_dir).level == ("FAILED" if left is purged else "ok")
    for path in (run_dir / "checkpoints").iterdir():
        shutil.rmtree(path)
    if left is not purged:  # which holds files, but no run
        assert examined(demo_shards, run_dir) == Finding("FAILED", LOST.format(run_dir))
    (run_dir / "checkpoints").rmdir()
    assert examined(demo_shards, run_dir) == Finding("FAILED", LOST.format(run_dir))


def test_a_run_that_has_lost_its_checkpoints_is_not_begun_again_and_goes_on_when_they_are_back(
    demo_shards: Path, run_dir: Path, tmp_path: Path
) -> None:
    (run_dir / "run.saved.json").unlink()  # a run of an older version
    (run_dir / "checkpoints").rename(tmp_path / "away")
    before = contents(run_dir)
    assert refusal(train.main, *command(demo_shards, run_dir, 4)) == LOST.format(run_dir)
    holder = "run.holder.json"  # says who tried last
    assert contents(run_dir) | {holder: before[holder]} == before
    (tmp_path / "away").rename(run_dir / "checkpoints")
    train.main(command(demo_shards, run_dir, 4))
    assert [row["step"] for row in metrics(run_dir)] == [1, 2, 3, 4]
    assert (run_dir / "run.saved.json").read_text() == '{"step": 4}'


def test_a_run_that_died_before_its_first_checkpoint_is_begun_again(
    demo_shards: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed(run_dir)
    versions_before(run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints" / "step-00000002.tmp").mkdir(parents=True)
    train.main(command(demo_shards, run_dir))
    assert names(run_dir / "checkpoints") == ["step-00000002"]
    assert [row["step"] for row in metrics(run_dir)] == [1, 2]


def test_that_a_checkpoint_was_saved_is_noted_by_the_next_save_if_it_cannot_be_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("dist_dcgan.run.directory.publish", full)
        record_saved(run, 1)
    assert capsys.readouterr().err == f"warning: {run.saved} cannot be written: No space left on device\n"
    assert not run.saved.exists()
    record_saved(run, 2)
    assert run.saved.read_text() == '{"step": 2}'


def test_a_generator_that_cannot_be_exported_fails_a_finished_run_and_the_same_command_exports_it(
    demo_shards: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command(demo_shards, run_dir, 4)
    before = (run_dir / "generator_ema.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("dist_dcgan.run.export.sync", full)
        message = refusal(train.main, *words)
    assert message == (
        f"the generator cannot be exported to {run_dir}/generator_ema.safetensors: No space left on device: mend that, "
        "and the same command exports it"
    )
    assert list_checkpoints(run_dir / "checkpoints")[-1].name == "step-00000004"
    assert load_generator(run_dir / "generator_ema.safetensors")[1]["step"] == 2  # the one that was there, whole
    assert (run_dir / "generator_ema.safetensors").read_bytes() == before
    train.main(words)
    assert load_generator(run_dir / "generator_ema.safetensors")[1]["step"] == 4


def test_of_a_stopped_run_the_marker_must_be_written_and_the_export_need_not(
    demo_shards: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(demo_shards, run_dir, 1000)
    entered = StepAgreement.__enter__

    def stopped(agreement: StepAgreement) -> StepAgreement:
        agreement.request_stop()
        return entered(agreement)

    monkeypatch.setattr(StepAgreement, "__enter__", stopped)
    with monkeypatch.context() as patch:
        patch.setattr("dist_dcgan.run.export.sync", full)
        train.main(words)
    step = load_newest(run_dir / "checkpoints").values["step"]  # type: ignore[union-attr]
    assert step < 1000 and (run_dir / "STOPPED").read_text() == f"stopped by a signal at step {step}\n"
    assert f"warning: the generator cannot be exported to {run_dir}" in capsys.readouterr().err
    assert load_generator(run_dir / "generator_ema.safetensors")[1]["step"] == 2
    monkeypatch.setattr("dist_dcgan.training.loop.record", lambda *_: None)
    monkeypatch.setattr("dist_dcgan.run.directory.publish", lambda path, _: full() if path.name == "STOPPED" else None)
    message = refusal(train.main, *words)
    assert message.startswith(f"{run_dir}/STOPPED cannot be written: No space left on device: the same command goes on")


def test_fewer_steps_than_a_run_has_train_nothing_and_leave_its_configuration(
    demo_shards: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run_dir / "config.yaml").read_bytes()
    (run_dir / "generator_ema.safetensors").unlink()
    train.main(command(demo_shards, run_dir, 1))
    said = capsys.readouterr().err.splitlines()
    assert f"{run_dir} has 2 steps already, and 1 are asked for: nothing is trained" in said
    assert (run_dir / "config.yaml").read_bytes() == before
    assert load_generator(run_dir / "generator_ema.safetensors")[1]["step"] == 2
    assert [row["step"] for row in metrics(run_dir)] == [1, 2]
    train.main(command(demo_shards, run_dir, 2))
    said = capsys.readouterr().err.splitlines()
    assert f"going on after step 2 of {run_dir}, which is the last: nothing is left to train" in said


def test_a_picture_that_cannot_be_written_is_one_line(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.Image.Image.save", full)
    out = tmp_path / "samples.png"
    assert refusal(sample.main, run_dir, "--out", out) == f"cannot write --out {out}: No space left on device"
    assert not out.exists()


def test_a_dump_that_cannot_be_written_does_not_hide_why_training_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "write_dump", full)
    state: Any = None
    assert reporting._details(RunDirectory(Path("run")), state, []) == (
        "the details cannot be written: No space left on device"
    )
