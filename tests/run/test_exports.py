"""What is exported is whole: a file that is replaced by one rename, and never by weights that are of no use.

Promise 7 (checkpoints) of dist_dcgan/README.md.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dist_dcgan import train
from dist_dcgan.config import from_command_line
from dist_dcgan.run.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from dist_dcgan.run.export import export_generator, load_generator, read_description
from dist_dcgan.trained import load_trained
from shards.common.files import file_sha256
from tests.run.test_disks import ONE, command, finished, full, run_dir
from tests.support.exports import as_older_version
from tests.support.mistakes import refusal
from tests.support.shards_fixtures import contents

__all__ = ["finished", "run_dir"]


def test_a_finished_run_whose_generator_is_not_finite_fails_and_leaves_the_earlier_export(
    demo_shards: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_dir / "generator_ema.safetensors"
    before = path.read_bytes()
    tensors, values = load_checkpoint(run_dir / "checkpoints" / "step-00000002")
    tensors["generator_ema.layers.0.weight"].fill_(torch.nan)
    save_checkpoint(run_dir / "checkpoints", tensors, values, ONE)
    message = refusal(train.main, *command(demo_shards, run_dir, 4))
    assert message.startswith(f"the averaged generator of step 4 is not exported to {path}, as its weights are not fin")
    assert list_checkpoints(run_dir / "checkpoints")[-1].name == "step-00000004"
    assert path.read_bytes() == before and (run_dir / "curves.png").is_file()
    capsys.readouterr()
    assert load_trained(run_dir, False, torch.device("cpu")).description["step"] == 2
    assert capsys.readouterr().err == (
        f"warning: the weights of the newest checkpoint in {run_dir}/checkpoints are not finite: the earlier export is "
        "taken\n"
    )


@pytest.mark.parametrize("number", [1, 2])
def test_a_kill_between_the_names_of_an_export_leaves_a_sound_generator(
    number: int, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_dir / "generator_ema.safetensors"
    generator, description = load_generator(path)
    for parameter in generator.parameters():
        parameter.mul_(2)
    real, calls = os.replace, mock.Mock()

    def replace(*names: Any, **folders: Any) -> None:
        calls()
        if calls.call_count == number:
            raise KeyboardInterrupt
        real(*names, **folders)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        export_generator(path, generator, from_command_line(["--width", "4"])[0], 64, 9)
    found, described = load_generator(path)
    assert calls.call_count == number and described["step"] in (description["step"], 9)
    factor = 1 if described["step"] == 9 else 2
    assert torch.equal(next(found.parameters()) * factor, next(generator.parameters()))
    assert read_description(path)["step"] == described["step"]


def test_an_export_of_an_older_version_is_read_again_while_it_is_replaced(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_dir / "generator_ema.safetensors"
    as_older_version(path)
    assert load_generator(path)[1]["sha256"] == file_sha256(path)
    description = path.with_suffix(".json")
    whole = description.read_text()
    description.write_text(whole.replace('"sha256": "', '"sha256": "0'))
    monkeypatch.setattr("time.sleep", lambda _: description.write_text(whole))
    assert load_generator(path)[1]["step"] == 2


@pytest.mark.parametrize("number", [1, 2])
def test_an_export_that_fails_leaves_the_pair_that_was_there(
    number: int, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "generator_best.safetensors"
    for suffix in (".safetensors", ".json"):
        shutil.copyfile(finished / f"generator_ema{suffix}", path.with_suffix(suffix))
    generator, _ = load_generator(path)
    for parameter in generator.parameters():
        parameter.mul_(2)
    before = contents(tmp_path)
    real, calls = os.fsync, mock.Mock()

    def fsync(descriptor: int) -> None:
        calls()
        if calls.call_count == number:
            full()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    made = from_command_line(["--width", "4"])[0]
    with pytest.raises(OSError, match="No space left"):
        export_generator(path, generator, made, 64, 9)
    assert contents(tmp_path) == before
