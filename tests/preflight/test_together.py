"""The checks that the ranks make together."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_dcgan.config import Invocation
from dist_dcgan.distributed.world import World, process_group
from dist_dcgan.preflight import distributed_checks
from dist_dcgan.preflight.results import Finding
from dist_dcgan.preflight.run_checks import examine
from dist_dcgan.training import steps
from dist_dcgan.training.train_state import TrainState
from shards.conversion.convert import Settings, convert
from shards.conversion.sources.lmdb_source import LmdbSource
from tests.support.ranks import run_ranks
from tests.support.subjects import config, failure, subject, with_data
from tests.support.training import raw_discriminator


def examined(data: Path, run_dir: Path, timeout_seconds: float = 60) -> dict[str, Finding]:
    made = config(data={"path": data}, run_dir=run_dir, distributed={"timeout_seconds": timeout_seconds})
    return examine(made, Invocation(), lambda *_: None)


def with_a_step_of_its_own(
    data: Path, run_dir: Path, rank: int, step: Callable[[TrainState, Tensor], steps.Metrics], timeout_seconds: float
) -> dict[str, Finding]:
    """One rank takes `step` for its step."""

    def train_step(state: TrainState, images: Tensor) -> steps.Metrics:
        return (step if state.world.rank == rank else steps.train_step)(state, images)

    with mock.patch("dist_dcgan.training.graph.train_step", train_step):
        return examined(data, run_dir, timeout_seconds)


def another_gradient(state: TrainState, images: Tensor) -> steps.Metrics:
    """One element of it differs, by less than a comparison with tolerance would see."""
    metrics = steps.train_step(state, images)
    gradient = state.generator.get_parameter("layers.0.weight").grad
    assert gradient is not None
    gradient[0, 0, 0, 0] *= 1 + 2**-22
    return metrics


def no_memory(state: TrainState, images: Tensor) -> steps.Metrics:
    """The other ranks wait for this one in a collective."""
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")


def with_a_raw_discriminator(data: Path, run_dir: Path) -> dict[str, Finding]:
    with raw_discriminator():
        return examined(data, run_dir)


def with_data_of_its_own(data: Path, other: Path, run_dir: Path) -> dict[str, Finding]:
    return examined(other if os.environ["RANK"] == "1" else data, run_dir)


def test_a_rank_with_another_gradient_is_named(demo_shards: Path, tmp_path: Path) -> None:
    results = run_ranks(3, with_a_step_of_its_own, demo_shards, tmp_path / "run", 1, another_gradient, 60)
    for found in results:
        assert found["gradients"].level == "FAILED"
        assert found["gradients"].text.startswith("the gradient of generator.layers.0.weight differs: rank 1 has ")
        assert found["training step"].level == "ok"
    assert list(tmp_path.iterdir()) == []


def test_gradients_that_are_not_reduced_are_found(demo_shards: Path, tmp_path: Path) -> None:
    found = run_ranks(2, with_a_raw_discriminator, demo_shards, tmp_path / "run")[0]
    assert found["gradients"].text.startswith("the gradient of discriminator.layers.0.weight differs: rank 1 has ")
    assert found["parameters"].text.startswith("after a step, discriminator.layers.0.weight differs: rank 1 has ")


def test_a_rank_that_fails_leaves_nobody_waiting(demo_shards: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    results = run_ranks(2, with_a_step_of_its_own, demo_shards, tmp_path / "run", 1, no_memory, 3)
    assert time.monotonic() - started < 60
    for found in results:
        step = found["training step"]
        assert step.level == "FAILED"
        assert "rank 1: out of memory with 6 images per rank at width 4: use more ranks, or a smaller" in step.text
        assert "rank 0: " in step.text
        assert [found[thing].level for thing in ("gradients", "parameters", "scores")] == ["skipped"] * 3
        assert found["writing"].level == "ok"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("none", r"rank 1: no data set at .*none: make one with"),
        ("other", r"the digest of the data set differs: rank 1 has .*: copy one data set to all nodes$"),
    ],
)
def test_a_rank_without_the_data_set_of_the_others_is_named_and_all_skip_alike(
    demo_shards: Path, demo_lmdb: Path, tmp_path: Path, other: str, said: str
) -> None:
    convert([LmdbSource(demo_lmdb)], tmp_path / "other", Settings(samples_per_shard=20), workers=1)
    results = run_ranks(2, with_data_of_its_own, demo_shards, tmp_path / other, tmp_path / "run")
    mine, others = ({thing: finding.level for thing, finding in found.items()} for found in results)
    assert mine == others
    assert results[0]["data set"].level == "FAILED" and re.match(said, results[0]["data set"].text)
    assert results[0]["first shard"] == Finding("skipped", "it needs this first: data set")
    assert results[0]["all-reduce"].level == "ok"


def test_ranks_that_do_not_find_each_other_are_told_and_the_rest_is_checked(
    demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("dist_dcgan.distributed.world.MEETING_SECONDS", 1.0)
    found = examined(demo_shards, tmp_path / "run", timeout_seconds=1)
    assert found["process group"].level == "FAILED"
    assert found["process group"].text.startswith("2 ranks do not find each other at 127.0.0.1:0: ")
    assert found["all-reduce"] == Finding("skipped", "it needs this first: process group")
    assert found["training step"].level == "skipped"
    assert [found[thing].level for thing in ("data set", "plan", "run directory", "room")] == ["ok"] * 4


def test_a_sum_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    of = subject(World(0, 0, 2, torch.device("cpu")))
    monkeypatch.setattr(dist, "all_reduce", lambda content: content.fill_(3))
    assert distributed_checks.all_reduce(of).text.startswith("1 KB in ")
    monkeypatch.setattr(dist, "all_reduce", lambda content: content.fill_(3)[5].add_(1))
    text = failure(distributed_checks.all_reduce, of)
    assert text.startswith("1 of 256 sums over the ranks are wrong, such as 4.0 for 3.0: ")


def test_gradients_that_are_missing_or_not_finite_are_named(demo_shards: Path) -> None:
    with process_group(60, "cpu") as world:
        of = with_data(demo_shards, world)
        assert distributed_checks.training_step(of).level == "ok"
        assert distributed_checks.gradients(of) == Finding("ok", "24 tensors", mock.ANY, mock.ANY)
        assert of.state is not None
        weight = of.state.discriminator.get_parameter("layers.2.weight")
        assert weight.grad is not None
        weight.grad[0, 0, 0, 0] = float("nan")
        text = "the gradient of discriminator.layers.2.weight is not finite: use --precision fp32"
        assert distributed_checks.gradients(of) == Finding("FAILED", text)
        weight.grad = None
        assert distributed_checks.gradients(of).text.startswith("discriminator.layers.2.weight got no gradient")


def test_a_fingerprint_is_of_the_values_whatever_their_strides() -> None:
    values = torch.randn(2, 3, 4, 4)
    assert distributed_checks.fingerprint(values) == distributed_checks.fingerprint(
        values.to(memory_format=torch.channels_last)
    )
    assert distributed_checks.fingerprint(values) != distributed_checks.fingerprint(values + 1e-6)
    assert distributed_checks.fingerprint(torch.tensor(1.0)) != distributed_checks.fingerprint(torch.tensor(2.0))


@pytest.mark.parametrize(
    ("precision", "device", "steps"), [("fp32", "cpu", 1), ("bf16", "cuda", 15), ("fp16", "cuda", 17)]
)
def test_the_step_that_is_timed_comes_after_the_warm_up(precision: str, device: str, steps: int) -> None:
    state = mock.Mock(precision=precision, world=World(0, 0, 1, torch.device(device)))
    assert distributed_checks._steps(state) == steps
