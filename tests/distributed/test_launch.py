"""How a process was started, from its environment; mistakes are told in one line."""

from __future__ import annotations

import os

import pytest

from dist_dcgan.distributed.launch import Launch, launched
from shards.common.environment import unset_empty_variables
from shards.common.errors import UserError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29400"}
AGENT = {"LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"}
STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
}
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "RANK", "WORLD_", "LOCAL_", "GROUP_", "MASTER_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launch()),
        (TORCHRUN | AGENT, Launch(5, 8, 1, 4, 1, 2, True)),
        (TORCHRUN | AGENT | STEP, Launch(5, 8, 1, 4, 1, 2, True)),
        (
            STEP | {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "29400"},
            Launch(1, 2, by_torchrun=True),
        ),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch(by_torchrun=True)),
        ({"RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "n1"}, Launch()),
        ({"LOCAL_RANK": "x"}, Launch()),
        ({"WORLD_SIZE": "1"}, Launch()),
        (BATCH_SCRIPT, Launch()),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, Launch()),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, Launch()),
        (STEP | {"SLURM_PTY_PORT": "40001"}, Launch()),
        ({"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"}, Launch()),
        (dict.fromkeys([*TORCHRUN, *AGENT, *STEP, "PMI_SIZE"], ""), Launch()),
    ],
)
def test_how_it_was_started(variables: dict[str, str], expected: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    unset_empty_variables()
    assert launched() == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (STEP, "SLURM_STEP_NUM_TASKS=2: 2 processes were started that do not know each other"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "SLURM_NTASKS=2: 2 processes"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "SLURM_NTASKS=2: 2 processes"),
        (STEP | {"WORLD_SIZE": "1"}, "SLURM_STEP_NUM_TASKS=2: 2 processes"),
        (STEP | TORCHRUN | {"GROUP_WORLD_SIZE": "1"}, "SLURM_STEP_NUM_TASKS=2: 2 processes"),
        (
            {"OMPI_COMM_WORLD_SIZE": "4"},
            "let torchrun start the ranks: `torchrun --nproc_per_node=4 -m dist_dcgan.train",
        ),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, "PMI_SIZE=4: 4 processes"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc, but a number from 1 to"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0, but a number from 1 to"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2, but MASTER_ADDR is not set"),
        (TORCHRUN | {"RANK": "8"}, "RANK=8, but a number from 0 to 7 is needed"),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1, but a number from 0 to 7 is needed"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refused:
        launched()
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_empty_variables_are_unset_unless_empty_has_a_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "CUDA_VISIBLE_DEVICES", "TZ", "https_proxy"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("KEPT", " ")
    unset_empty_variables()
    assert "WANDB_API_KEY" not in os.environ
    assert [os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "TZ", "https_proxy", "KEPT")] == ["", "", "", " "]
