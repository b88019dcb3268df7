"""What a command makes of errors.

Promise 11 (errors) of dist_dcgan/README.md.
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from dist_dcgan import train as command
from dist_dcgan.config import Config, Plan
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed import world
from dist_dcgan.distributed.world import run_rank
from shards.common.command_line import run
from shards.common.errors import OneRankError, UserError
from tests.support.commands import environment, module, one_line_error

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("train", ["--dta", "x"], "unknown option --dta; did you mean --data? (--help lists them all)"),
        ("doctor", ["--dta", "x"], "unknown option --dta; did you mean --data? (--help lists them all)"),
        ("evaluate", ["nowhere"], "no folder nowhere: name that of a run, or of an export"),
        ("sample", ["nowhere", "--out", "x.png", "--best"], "no folder nowhere: name that of a run, or of an export"),
    ],
)
def test_every_command_gives_a_mistake_one_line_and_leaves_nothing(
    name: str, words: list[str], message: str, tmp_path: Path
) -> None:
    paths = environment() | {"PYTHONPATH": str(ROOT)}
    line = one_line_error(module(f"dist_dcgan.{name}", *words), cwd=tmp_path, env=paths)
    assert line.startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_out_of_memory_names_the_batch_and_what_to_try(demo_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(command, "train", mock.Mock(side_effect=error))
    plan = Plan(world_size=2, global_batch=64, steps_per_epoch=1, total_steps=1)
    with pytest.raises(UserError, match="out of memory on rank 0 with 32 images per rank at width 128: use"):
        command.train_or_explain(Config(), plan, Folder(demo_shards), "auto", [])


def test_other_errors_keep_their_traceback(demo_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "train", mock.Mock(side_effect=RuntimeError("Connection closed by peer")))
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        command.train_or_explain(Config(), Plan(1, 8, 1, 1), Folder(demo_shards), "auto", [])


class Ended(BaseException):
    """Stands for the SIGTERM by which torchrun ends a rank."""


def test_a_users_mistake_is_one_line_on_the_first_rank_and_silence_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(world, "_wait_for_sigterm", mock.Mock(side_effect=Ended))
    message = "thing: value: remedy"
    line = f"error: {message}\n"
    for error, rank, printed in (
        (UserError(message), "0", line),
        (UserError(message), "1", ""),  # until torchrun ends it: the first rank has said it
        (OneRankError(message), "1", line),
    ):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "x"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_PORT", "1")
        with pytest.raises(Ended if printed == "" else SystemExit):
            run_rank(mock.Mock(side_effect=error), [])
        assert capsys.readouterr().err == printed


def test_an_error_stays_one_line_whatever_characters_a_path_holds(capsys: pytest.CaptureFixture[str]) -> None:
    error = UserError("no file at a\nb \x1b[31m \u2028 \udcff ä")
    with pytest.raises(SystemExit):
        run(mock.Mock(side_effect=error), [])
    assert capsys.readouterr().err == "error: no file at a\\nb \\x1b[31m \\u2028 \\udcff ä\n"
