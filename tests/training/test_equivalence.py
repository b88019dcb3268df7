"""1 = N: the ranks compute together what one process computes alone (promise 4 of the design).

Promise 4 (equivalence) of dist_dcgan/README.md. Float64 trains the networks as they are. Float32 trains them with
smooth activations: in 3 of 12 trials rounding moved an input of a ReLU across 0 within five steps, and gradients
differed by 1e-2 from then on. Which trials these are depends on the seed and on Pillow's JPEG decoder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.gpu.training import Arrays, largest_difference
from tests.support.primitives import direct_batch_norm
from tests.support.ranks import run_ranks
from tests.support.training import MISTAKES, Outcome, smooth_activations, train_steps

STEPS = 5


def options(precision: str) -> dict[str, Any]:
    return {
        "width": 8,
        "global_batch": 8,
        "precision": precision,
        "noise": {"sigma": 0.3},
        "ema": {"statistics_images": 64},
    }


def largest_relative_difference(a: Arrays, b: Arrays) -> float:
    return max(float(np.linalg.norm(a[name] - b[name]) / (np.linalg.norm(b[name]) or 1.0)) for name in b)


LIMITS: dict[str, tuple[Callable[[Arrays, Arrays], float], float]] = {
    "fp64": (largest_difference, 1e-9),
    "fp32": (largest_relative_difference, 1e-4),
}
"""How far ranks may be from one process, by precision."""


@pytest.fixture(scope="module")
def alone(demo_shards: Path) -> dict[str, Outcome]:
    return {precision: run_ranks(1, train, demo_shards, options(precision), STEPS)[0] for precision in LIMITS}


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", LIMITS)
def test_ranks_equal_one_process(alone: dict[str, Outcome], demo_shards: Path, world_size: int, precision: str) -> None:
    difference, most = LIMITS[precision]
    ranks = run_ranks(world_size, train, demo_shards, options(precision), STEPS)
    assert joined_keys(ranks) == alone[precision].keys
    for outcome in ranks:
        assert difference(outcome.tensors, alone[precision].tensors) <= most


def test_ranks_with_direct_batch_norm_equal_one_process(alone: dict[str, Outcome], demo_shards: Path) -> None:
    for outcome in run_ranks(2, train_with_direct_batch_norm, demo_shards, options("fp64"), STEPS):
        assert largest_difference(outcome.tensors, alone["fp64"].tensors) <= 1e-9


def train_with_direct_batch_norm(data: Path, options: dict[str, Any], count: int) -> Outcome:
    with direct_batch_norm():
        return train_steps(data, options, count)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("precision", LIMITS)
def test_equivalence_fails_where_it_should(
    alone: dict[str, Outcome], demo_shards: Path, precision: str, mistake: str
) -> None:
    difference, most = LIMITS[precision]
    ranks = run_ranks(2, train, demo_shards, options(precision), STEPS, mistake)
    assert difference(ranks[0].tensors, alone[precision].tensors) > 1000 * most


def train(data: Path, options: dict[str, Any], count: int, mistake: str | None = None) -> Outcome:
    with smooth_activations() if options["precision"] == "fp32" else contextlib.nullcontext():
        return train_steps(data, options, count, mistake)


def joined_keys(ranks: list[Outcome]) -> list[list[str]]:
    """The keys of each global batch, in the order of slots."""
    return [[key for outcome in ranks for key in outcome.keys[step]] for step in range(STEPS)]
