"""What the scaling benchmarks count is what real ranks do, and their model keeps to what it says.

Promise 5 (the step) of dist_dcgan/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import nn
from torch.profiler import profile

from dist_dcgan.config import Config, make_plan
from dist_dcgan.data.order import rank_slots
from dist_dcgan.distributed.world import World, process_group
from dist_dcgan.models.networks import Discriminator, Generator, count_parameters
from dist_dcgan.training.steps import train_step
from dist_dcgan.training.train_state import TrainState
from tests.benchmarks import ddp, scale
from tests.benchmarks.collectives import (
    GRADIENTS,
    Collective,
    one_of,
    recorded_step,
    reduce_at_once,
)
from tests.benchmarks.measuring import images, step_flops
from tests.benchmarks.scaling_model import (
    FLOP_PER_IMAGE,
    Model,
    collectives_of_a_step,
    estimate,
    reduction_seconds,
    table,
)
from tests.gpu.training import make_state
from tests.support.operations import NORM_BACKWARD, NORM_FORWARD
from tests.support.primitives import direct_batch_norm
from tests.support.ranks import run_ranks

WIDTH = 8
ELEMENT_BYTES = {"float32": 4, "float64": 8}
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class NormTraffic(NamedTuple):
    """What a batch norm says to the other ranks in one direction."""

    kind: str
    dtype: str
    bytes_per_channel: int


TRAFFIC = {
    "portable": (NormTraffic("allreduce_", "float64", 16), NormTraffic("allreduce_", "float64", 16)),
    "direct": (NormTraffic("_allgather_base_", "float32", 8), NormTraffic("allreduce_", "float32", 8)),
}
"""Forward and backward, by the name of the batch norm in the configuration."""


def expected_step(norm: str) -> list[Collective]:
    """Return the collectives of a step in their order."""

    def of_layers(traffic: NormTraffic, channels: Iterable[int], purpose: str) -> list[Collective]:
        return [Collective(traffic.kind, traffic.dtype, traffic.bytes_per_channel * n, purpose) for n in channels]

    def forward(channels: list[int]) -> list[Collective]:
        return of_layers(TRAFFIC[norm][0], channels, NORM_FORWARD)

    def backward(channels: list[int]) -> list[Collective]:
        return of_layers(TRAFFIC[norm][1], reversed(channels), NORM_BACKWARD)

    def gradients(network: nn.Module) -> list[Collective]:
        return [Collective("allreduce_", "float32", 4 * count_parameters(network), GRADIENTS)]

    g, d = [8 * WIDTH, 4 * WIDTH, 2 * WIDTH, WIDTH], [2 * WIDTH, 4 * WIDTH, 8 * WIDTH]
    return [
        *forward(g),  # the images of the step
        *forward(d), *backward(d),  # real
        *forward(d), *backward(d), *gradients(Discriminator(WIDTH)),  # fake
        *forward(d), *backward(d), *backward(g), *gradients(Generator(WIDTH)),  # G's turn
    ]  # fmt: skip


def state_in(world: World, norm: str = "portable") -> TrainState:
    return make_state(world, {"width": WIDTH, "batch_per_rank": 2, "distributed": {"batchnorm": norm}})


def norm_on_cpu(norm: str) -> AbstractContextManager[None]:
    """Return a context in which this batch norm runs here."""
    return direct_batch_norm() if norm == "direct" else nullcontext()


def counted(world_size: int, norm: str = "portable") -> list[Collective]:
    with one_of(world_size) as world, norm_on_cpu(norm):
        state = state_in(world, norm)
        reduce_at_once(state)
        return recorded_step(state)


def real_step(norm: str) -> tuple[list[Collective], list[int]]:
    """Return the collectives of a step as recorded, and the elements of reductions as torch's profiler saw them."""
    with process_group(60, "cpu") as world, norm_on_cpu(norm):
        state = state_in(world, norm)
        collectives = recorded_step(state)
        real = images(2, world.device).contiguous(memory_format=torch.channels_last)
        with profile(record_shapes=True) as profiler:
            train_step(state, real)
        shapes = [event.input_shapes[0] for event in profiler.events() if event.name == "gloo:all_reduce"]
        return collectives, [math.prod(shape) for shape in shapes]


@pytest.mark.parametrize("norm", ["direct", pytest.param("portable", marks=pytest.mark.slow)])
def test_two_real_ranks_issue_the_collectives_of_a_step_in_order(norm: str) -> None:
    """As one process that stands for one of two does."""
    found = run_ranks(2, real_step, norm)
    assert found[0] == found[1]
    collectives, elements = found[0]
    assert collectives == expected_step(norm) == counted(2, norm)
    reductions = [each for each in collectives if each.kind == "allreduce_"]
    assert [each.bytes // ELEMENT_BYTES[each.dtype] for each in reductions] == elements


def test_the_count_is_the_same_for_every_number_of_ranks() -> None:
    assert counted(2) == counted(64) == counted(512) == collectives_of_a_step(WIDTH)


def test_the_slices_of_64_ranks_make_up_the_batch_and_wrong_ones_do_not() -> None:
    place, config = scale.Nowhere(scale.manifest_of(100_000)), Config(batch_per_rank=8)
    plan = make_plan(config, 64, place.manifest.samples)
    steps = (0, plan.steps_per_epoch - 1, plan.steps_per_epoch)
    assert scale.slices_make_up_the_batch(place, config, plan, steps)

    def shifted(global_batch: int, rank: int, world_size: int) -> range:
        slots = rank_slots(global_batch, rank, world_size)
        return slots if rank != 17 else range(slots.start - 1, slots.stop - 1)

    with mock.patch("dist_dcgan.data.loader.rank_slots", shifted):
        assert not scale.slices_make_up_the_batch(place, config, plan, steps)


def test_the_command_prints_its_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def here(function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(scale, "alone", here)
    scale.main(["--ranks", "3,4", "--width", str(WIDTH), "--batch-per-rank", "16", "--samples", "20000"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| ranks | 3 | 4 |"
    assert "| steps per epoch | 416 | 312 |" in lines
    assert "| slices make up the batch | True | True |" in lines
    assert "| reductions of moments | 26 | 26 |" in lines
    assert any(line.startswith("- 3 ranks: error: global_batch 128 is not divisible by 3 ranks") for line in lines)
    assert "- 4 ranks: 32 images per rank, 156 steps per epoch" in lines
    assert "| shards | 5 |" in lines


def test_start_up_reads_the_manifest_that_was_written(tmp_path: Path) -> None:
    scale.write_manifest_of(tmp_path, 9000)
    assert scale.start_up(tmp_path)["shards"] == 3


@pytest.fixture(scope="module")
def collectives() -> list[Collective]:
    moments = Collective("allreduce_", "float64", 16 * 512, NORM_FORWARD)
    return [moments] * 26 + [Collective("allreduce_", "float32", 19_000_000, GRADIENTS)] * 5


def increases(values: Iterable[float]) -> bool:
    return all(before < after for before, after in pairwise(values))


@pytest.mark.parametrize("size", [16, 16_384, 1_000_000, 100_000_000])
def test_more_ranks_take_longer_to_reduce_and_one_takes_nothing(size: int) -> None:
    assert reduction_seconds(Model(), size, 1) == 0
    assert increases(reduction_seconds(Model(), size, world_size) for world_size in SIZES)


def test_more_bytes_take_longer_and_many_take_what_the_wire_takes() -> None:
    model = Model()
    for world_size in SIZES[1:]:
        assert increases(reduction_seconds(model, 10**power, world_size) for power in range(1, 11))
    on_nvlink = 2 * 7 / 8 * 1e12 / (model.nvlink_gb_per_s * 1e9)
    assert reduction_seconds(model, 10**12, 8) == pytest.approx(on_nvlink, rel=1e-4)
    between_nodes = 2 * 63 / 64 * 1e12 / 8 / (model.network_gb_per_s * 1e9)
    assert reduction_seconds(model, 10**12, 512) == pytest.approx(on_nvlink + between_nodes, rel=1e-4)


def test_a_step_of_one_gpu_is_its_compute(collectives: list[Collective]) -> None:
    step = estimate(Model(achieved=0.5, launch_floor_ms=0), collectives, 1, 100)
    assert step.total == step.at_best == step.compute == pytest.approx(FLOP_PER_IMAGE * 100 / 494.5e12)
    assert estimate(Model(launch_floor_ms=7), collectives, 1, 1).total == pytest.approx(7e-3)


def test_efficiency_falls_with_the_ranks_and_hiding_gradients_helps(collectives: list[Collective]) -> None:
    for images_of in (dict.fromkeys(SIZES, 128), {size: 512 // size for size in SIZES}):
        rows: list[dict[str, Any]] = [dict(row) for row in table(Model(stop_hop_us=0), collectives, images_of)]
        assert rows[0]["efficiency"] == rows[0]["at best"] == 1
        assert increases(-row["efficiency"] for row in rows)
        assert all(row["efficiency"] < row["at best"] <= 1 for row in rows[1:])


def test_a_step_is_no_shorter_than_the_round_of_the_stop_flag(collectives: list[Collective]) -> None:
    assert estimate(Model(stop_hop_us=100), collectives, 512, 1).total == pytest.approx(2 * 511 * 100e-6 / 9)


def test_the_model_counts_the_operations_that_the_step_has() -> None:
    assert step_flops(128, 2) / 2 == pytest.approx(FLOP_PER_IMAGE, rel=0.01)


def test_ratios_of_the_ddp_benchmark_are_taken_within_rounds() -> None:
    seconds = {ddp.RANKS: (2.0, 4.0), ddp.THREADS: (1.6, 3.6), ddp.ONE: (3.0, 6.0), ddp.APART: (1.0, 3.0)}
    turns = {variant: [ddp.Turn(s, s / 4) for s in both] for variant, both in seconds.items()}
    row = ddp.summarise(16, 32, 10, turns)
    assert row["2 ranks over 2 threads"] == pytest.approx(0.85)
    assert row["share of collectives"] == pytest.approx(0.375)
    assert row["share in moments"] == pytest.approx(0.25)
    assert row["2 ranks x 1 thread, images/s"] == pytest.approx(320 / 3)
