"""1 = N: the ranks compute together what one process computes alone (promise 4 of the design).

Promise 4 (equivalence) of dist_dcgan/README.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.primitives import direct_batch_norm
from tests.support.ranks import run_ranks
from tests.support.training import MISTAKES, Outcome, train_steps

STEPS = 5


def options(precision: str) -> dict[str, Any]:
    return {
        "width": 8,
        "global_batch": 8,
        "precision": precision,
        "noise": {"sigma": 0.3},
        "ema": {"statistics_images": 64},
    }


@pytest.fixture(scope="module")
def alone(demo_shards: Path) -> dict[str, Outcome]:
    return {
        precision: run_ranks(1, train_steps, demo_shards, options(precision), STEPS)[0]
        for precision in ("fp64", "fp32")
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_process_in_float64(alone: dict[str, Outcome], demo_shards: Path, world_size: int) -> None:
    ranks = run_ranks(world_size, train_steps, demo_shards, options("fp64"), STEPS)
    assert joined_keys(ranks) == alone["fp64"].keys
    for outcome in ranks:
        assert largest_difference(outcome, alone["fp64"]) <= 1e-9


def test_ranks_with_direct_batch_norm_equal_one_process(alone: dict[str, Outcome], demo_shards: Path) -> None:
    for outcome in run_ranks(2, train_with_direct_batch_norm, demo_shards, options("fp64"), STEPS):
        assert largest_difference(outcome, alone["fp64"]) <= 1e-9


def train_with_direct_batch_norm(data: Path, options: dict[str, Any], count: int) -> Outcome:
    with direct_batch_norm():
        return train_steps(data, options, count)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_process_in_float32(alone: dict[str, Outcome], demo_shards: Path, world_size: int) -> None:
    ranks = run_ranks(world_size, train_steps, demo_shards, options("fp32"), STEPS)
    assert joined_keys(ranks) == alone["fp32"].keys
    assert largest_relative_difference(ranks[0], alone["fp32"]) <= 1e-4


@pytest.mark.parametrize("mistake", MISTAKES)
def test_equivalence_fails_where_it_should(alone: dict[str, Outcome], demo_shards: Path, mistake: str) -> None:
    ranks = run_ranks(2, train_steps, demo_shards, options("fp64"), STEPS, mistake)
    assert largest_difference(ranks[0], alone["fp64"]) > 1e-6


def test_each_sample_is_seen_once_in_an_epoch_part(alone: dict[str, Outcome]) -> None:
    keys = [key for step in alone["fp64"].keys for key in step]
    assert len(set(keys)) == len(keys) == STEPS * 8


def joined_keys(ranks: list[Outcome]) -> list[list[str]]:
    """The keys of each global batch, in the order of slots."""
    return [[key for outcome in ranks for key in outcome.keys[step]] for step in range(STEPS)]


def largest_difference(a: Outcome, b: Outcome) -> float:
    return max(float(np.abs(a.tensors[name] - b.tensors[name]).max()) for name in networks(b))


def largest_relative_difference(a: Outcome, b: Outcome) -> float:
    return max(
        float(np.linalg.norm(a.tensors[name] - b.tensors[name]) / (np.linalg.norm(b.tensors[name]) or 1.0))
        for name in networks(b)
    )


def networks(outcome: Outcome) -> list[str]:
    """Parameters and buffers of G, D and the averaged G."""
    names = [name for name in outcome.tensors if name.startswith(("generator", "discriminator"))]
    assert {name.split(".")[0] for name in names} == {"generator", "discriminator", "generator_ema"}
    return names
