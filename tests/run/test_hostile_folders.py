"""A run directory that came from somebody else, or in which others write: nothing elsewhere changes, nothing hangs."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_dcgan import sample, train
from dist_dcgan.loggers.jsonl import JsonlLogger
from dist_dcgan.loggers.pictures import draw_curves
from dist_dcgan.loggers.wandb_process import picture_times
from dist_dcgan.run import checkpoint
from dist_dcgan.run.checkpoint import Retention, load_newest, save_checkpoint
from dist_dcgan.run.directory import RunDirectory, locked, record_stopped, require_fitting
from dist_dcgan.run.export import load_generator
from dist_dcgan.training.compile_cache import use_own_cache
from shards.common.errors import UserError
from tests.run.test_disks import command, finished, names, run_dir
from tests.run.test_disks import save as save_one
from tests.support.exports import as_older_version
from tests.support.hostile import foreign_link, secret
from tests.support.mistakes import refusal
from tests.support.shards_fixtures import contents, within

__all__ = ["finished", "run_dir"]

REPLACED = [
    "config.yaml",
    "curves.png",
    "generator_ema.json",
    "generator_ema.safetensors",
    "run.holder.json",
    "run.saved.json",
    "samples/step-00000004.png",
]


def test_links_that_came_with_a_run_directory_change_nothing_elsewhere(
    demo_shards: Path, run_dir: Path, tmp_path: Path
) -> None:
    file, folder = secret(tmp_path), tmp_path / "folder"
    folder.mkdir()
    (folder / "values.json").write_bytes(b"this user's own, too")
    for name in [*REPLACED, "metrics.jsonl"]:
        (run_dir / f"{name}.tmp").symlink_to(file)  # as older versions named what they wrote
    for name in REPLACED[1:]:  # the configuration is read
        (run_dir / name).unlink(missing_ok=True)
        (run_dir / name).symlink_to(file)
    (run_dir / "STOPPED").symlink_to(file)
    for name in ("step-00000004", "step-00000004.tmp", "step-00000004.damaged.tmp"):
        (run_dir / "checkpoints" / name).symlink_to(folder)
    train.main(command(demo_shards, run_dir, 4))
    assert file.read_bytes() == b"this user's own"
    assert contents(folder) == {"values.json": b"this user's own, too"}
    found = load_newest(run_dir / "checkpoints")
    assert found is not None and found.values["step"] == 4
    assert [path for path in run_dir.rglob("*") if path.is_symlink()] == []
    assert list(run_dir.rglob("*.tmp")) == []
    assert load_generator(run_dir / "generator_ema.safetensors")[1]["step"] == 4


def test_the_marker_of_a_stopped_run_is_not_written_through_a_link(tmp_path: Path) -> None:
    run, file = RunDirectory(tmp_path), secret(tmp_path)
    run.stopped.symlink_to(file)
    record_stopped(run, 3)
    assert (file.read_bytes(), run.stopped.read_text()) == (b"this user's own", "stopped by a signal at step 3\n")


@pytest.mark.parametrize("make", [lambda path, file: path.symlink_to(file), lambda path, file: os.mkfifo(path)])
def test_rows_are_not_appended_to_a_link_or_a_fifo(
    make: Callable[[Path, Path], None], demo_shards: Path, run_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rows"
    (run_dir / "metrics.jsonl").rename(file)
    before = file.read_bytes()
    make(run_dir / "metrics.jsonl", file)
    message = f"{run_dir}/metrics.jsonl, to which rows are appended, is a link or no plain file: remove it"
    assert refusal(train.main, *command(demo_shards, run_dir, 4)) == message
    with pytest.raises(OSError, match="not"):  # also if it was laid later
        JsonlLogger(run_dir / "metrics.jsonl", 1)
    assert file.read_bytes() == before


def test_a_link_that_is_laid_while_rows_are_written_is_not_followed(tmp_path: Path) -> None:
    path, file = tmp_path / "metrics.jsonl", secret(tmp_path)
    logger = JsonlLogger(path, 0)
    path.symlink_to(file)
    with pytest.raises(OSError, match="link"):
        logger.metrics({"step": 1})
    path.unlink()
    logger.metrics({"step": 2})
    logger.close()
    assert file.read_bytes() == b"this user's own"
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_log_of_others_takes_no_more_memory_than_a_line_and_no_more_time_than_its_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, rows = tmp_path / "metrics.jsonl", b'{"step": 1}\n{"step": 2}\n'
    for content, expected in (
        (rows + b'{"step": 3}\n' + b"\0" * (32 << 20), rows),
        (b"\0" * (32 << 20) + b"\n" + rows, rows),
        ((row := b'{"step": 1}' + b" " * 100_000 + b"\n") * 300, row * 300),
    ):
        path.write_bytes(content)
        tracemalloc.start()
        try:
            JsonlLogger(path, 2).close()
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()
        assert path.read_bytes() == expected
    os.truncate(path, 1 << 40)
    with within(20), pytest.raises(OSError, match="larger than 4,294,967,296 bytes"):
        JsonlLogger(path, 2)
    draw_curves(path, tmp_path / "curves.png")
    assert "larger than 4,294,967,296 bytes" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["checkpoints", "samples", "logs", "wandb"])
def test_a_folder_of_a_run_may_be_this_users_link_and_not_anothers(
    name: str, finished: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(run_dir)
    config = (run_dir / "config.yaml").read_bytes()
    disk, link = tmp_path / "disk", run_dir / name
    link.rename(disk) if link.exists() else disk.mkdir()
    link.symlink_to(disk)
    stored = _stored(run)
    require_fitting(run, stored, "auto")
    link.unlink()
    foreign_link(link, disk, monkeypatch)
    with pytest.raises(UserError) as caught:
        require_fitting(run, stored, "auto")
    assert str(caught.value) == f"{link} is a link of another user: name what it leads to, or remove it"
    assert (run_dir / "config.yaml").read_bytes() == config


def _stored(run: RunDirectory) -> Any:
    from dist_dcgan.config import Config
    from shards.common.command_line import build
    from shards.common.plain_yaml import read_yaml

    return build(Config, read_yaml(run.config))


def test_a_run_goes_on_though_it_is_a_link_and_its_checkpoints_are_on_another_disk(
    demo_shards: Path, run_dir: Path, tmp_path: Path
) -> None:
    (run_dir / "checkpoints").rename(tmp_path / "scratch")
    (run_dir / "checkpoints").symlink_to(tmp_path / "scratch")
    (tmp_path / "named").symlink_to(run_dir)
    train.main(command(demo_shards, tmp_path / "named", 4))
    assert names(tmp_path / "scratch")[-1] == "step-00000004"
    assert (run_dir / "checkpoints").is_symlink() and (tmp_path / "named").is_symlink()


def test_a_link_into_another_run_is_refused(demo_shards: Path, finished: Path, run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").symlink_to(finished / "checkpoints")  # of this user, as tar unpacks links
    before = contents(finished)
    message = f"{run_dir}/checkpoints leads into another run, {os.path.realpath(finished)}: remove the link"
    assert refusal(train.main, *command(demo_shards, run_dir, 4)) == message
    assert contents(finished) == before


def test_checkpoints_are_not_written_or_removed_through_another_users_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_one(tmp_path / "mine", 1)
    before = contents(tmp_path / "mine")
    link = foreign_link(tmp_path / "checkpoints", tmp_path / "mine", monkeypatch)
    with pytest.raises(UserError, match="cannot be written: a link of another user"):
        save_one(link, 2)
    assert contents(tmp_path / "mine") == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.yaml", "run directory {0} holds files but no run"),
        ("run.lock", "not a plain file"),
        ("checkpoints/step-00000002/values.json", "none of the 1 checkpoints in {0}/checkpoints is sound"),
        ("checkpoints/step-00000002/tensors.safetensors", "none of the 1 checkpoints in {0}/checkpoints is sound"),
    ],
)
def test_a_fifo_in_place_of_what_is_read_is_refused(name: str, message: str, demo_shards: Path, run_dir: Path) -> None:
    (run_dir / name).unlink()
    os.mkfifo(run_dir / name)
    with within(60):
        assert message.format(run_dir) in refusal(train.main, *command(demo_shards, run_dir, 4))


def test_fifos_in_place_of_what_is_written_are_replaced(demo_shards: Path, run_dir: Path) -> None:
    for name in (*REPLACED[1:], "STOPPED", "checkpoints/step-00000004"):
        (run_dir / name).unlink(missing_ok=True)
        os.mkfifo(run_dir / name)
    with within(60):
        train.main(command(demo_shards, run_dir, 4))
    assert load_generator(run_dir / "generator_ema.safetensors")[1]["step"] == 4
    assert [path for path in run_dir.rglob("*") if path.is_fifo()] == []


def test_a_fifo_in_place_of_a_generator_its_description_or_a_configuration_hangs_nothing(
    demo_shards: Path, run_dir: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    words = (run_dir, "--out", tmp_path / "grid.png")
    with within(60):
        message = refusal(train.main, "--config", tmp_path / "fifo", "--data", demo_shards)
        assert message == f"cannot read configuration {tmp_path}/fifo: [Errno 22] not a plain file: '{tmp_path}/fifo'"
        shutil.rmtree(run_dir / "checkpoints")
        as_older_version(run_dir / "generator_ema.safetensors")
        for name in ("generator_ema.json", "generator_ema.safetensors"):
            (run_dir / name).unlink()
            os.mkfifo(run_dir / name)
            assert "generator" in refusal(sample.main, *words)


def test_a_holder_that_is_no_plain_file_is_unknown(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.holder.json")
    with within(60), locked(tmp_path), pytest.raises(UserError, match="is in use by an unknown process"):
        locked(tmp_path).__enter__()


def test_what_killed_processes_left_is_removed_by_the_next_holder_and_nothing_else(
    demo_shards: Path, tmp_path: Path
) -> None:
    run, digits = tmp_path / "run", "0123456789abcdef"
    (run / "samples").mkdir(parents=True)
    (run / f"config.yaml.{digits}.tmp").touch()  # killed before it was a run
    (run / "samples").rmdir()
    train.main(command(demo_shards, run))
    left = [f"metrics.jsonl.{digits}.tmp", f"generator_best.json.{digits}.tmp", "curves.png.tmp"]
    left += [f"samples/step-00000001.png.{digits}.tmp", f"checkpoints/step-00000009.{digits}.tmp"]
    for name in left:
        (run / name).touch()
    kept = [f"mine.png.{digits}.tmp", "notes.tmp"]
    for name in kept:
        (run / name).touch()
    train.main(command(demo_shards, run, 4))
    assert sorted(path.name for path in run.rglob("*.tmp")) == sorted(kept)


def test_a_link_is_no_picture_of_this_run(tmp_path: Path) -> None:
    (tmp_path / "step-00000001.png").touch()
    (tmp_path / "step-00000002.png").symlink_to(secret(tmp_path))
    os.mkfifo(tmp_path / "step-00000003.png")
    for name in ("step-evil.png", "step-.png", "step--1.png", "step-\u0661.png", f"step-{'1' * 100}.png"):
        (tmp_path / name).touch()
    assert [path.name for path in picture_times(tmp_path)] == ["step-00000001.png"]


def test_the_compilers_cache_is_a_folder_of_this_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    folder = tmp_path / f"dist_dcgan-compile-{os.geteuid()}"
    for _ in range(2):  # another rank, another start
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
        use_own_cache()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/of/the/user")
    use_own_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/of/the/user"


@pytest.mark.parametrize("taken", ["others write", "link", "file"])
def test_a_cache_of_the_compiler_that_others_may_have_made_is_refused(
    taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    folder = tmp_path / f"dist_dcgan-compile-{os.geteuid()}"
    if taken == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif taken == "file":
        folder.touch(mode=0o600)
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(UserError, match=r"name a folder of your own with TORCHINDUCTOR_CACHE_DIR$"):
        use_own_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == ""


def exchange(path: Path, other: Path) -> None:
    """What the owner of a folder can do at any time to what is in it."""
    path.rename(path.with_name("moved"))
    path.symlink_to(other)


def test_checkpoints_of_another_run_stay_though_the_folder_becomes_a_link_to_them_during_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, mine = tmp_path / "theirs" / "checkpoints", tmp_path / "mine"
    for folder in (theirs, mine):
        save_one(folder, 1)
        (folder / "step-00000002").mkdir()  # damaged
    before = contents(mine)

    def late(*arguments: Any) -> None:
        write(*arguments)
        exchange(theirs, mine)

    write = checkpoint._write
    monkeypatch.setattr(checkpoint, "_write", late)
    save_one(theirs, 2)
    assert (contents(mine), names(mine)) == (before, ["step-00000001", "step-00000002"])
    assert names(theirs.with_name("moved")) == ["step-00000002"]
    assert load_newest(theirs.with_name("moved")).values["step"] == 2  # type: ignore[union-attr]


def test_a_failed_save_removes_its_parts_though_the_folder_becomes_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"

    def fail(folder: Path, *_: object) -> None:
        (mine / folder.name).mkdir(parents=True)
        exchange(theirs, mine)
        raise OSError("full")

    monkeypatch.setattr(checkpoint, "_write", fail)
    with pytest.raises(UserError, match="cannot be written: full"):
        save_one(theirs, 2)
    assert len(names(mine)) == 1 and names(tmp_path / "moved") == []


def test_prune_removes_nothing_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, mine = tmp_path / "theirs" / "checkpoints", tmp_path / "mine"
    for step in (1, 2):
        save_checkpoint(mine, {"a": torch.tensor(step)}, {"step": step}, Retention(2))
    shutil.copytree(mine, theirs)
    before = contents(mine)

    def late(*arguments: Any) -> list[Path]:
        try:
            return inspect(*arguments)
        finally:
            exchange(theirs, mine)

    inspect = checkpoint._inspect
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_inspect", late)
        checkpoint.main(["prune", str(theirs.parent)])
    assert capsys.readouterr().out.endswith("step-00000001: removed\n")
    assert (contents(mine), names(theirs.with_name("moved"))) == (before, ["step-00000002"])
    theirs.unlink()
    foreign_link(theirs, mine, monkeypatch)
    assert refusal(checkpoint.main, "prune", theirs.parent).startswith(f"{theirs} cannot be used: a link of another")
    assert contents(mine) == before
