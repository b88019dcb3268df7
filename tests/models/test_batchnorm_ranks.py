"""Both norms of this project over 1, 2 and 4 real ranks: what `nn.BatchNorm2d` computes from the whole batch.

The kernels of the direct one, which exist for CUDA only, are stood in for by `tests.support.primitives`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_dcgan.distributed.world import process_group
from dist_dcgan.models import batchnorm
from dist_dcgan.models.batchnorm import CrossRankBatchNorm, DirectBatchNorm
from tests.benchmarks.collectives import Recorder
from tests.support import primitives
from tests.support.primitives import primitives_stood_in
from tests.support.ranks import run_ranks

LAYERS: dict[str, type[nn.BatchNorm2d]] = {"portable": CrossRankBatchNorm, "direct": DirectBatchNorm}
CHANNELS = 6
Result = dict[str, np.ndarray]


class Case(NamedTuple):
    """What the ranks do."""

    kind: str
    means: tuple[float, ...] = (0.0, 3.0, -1.0)
    """One forward and backward each."""
    poison: float | None = None
    """Is in the first sample of one forward before."""
    mistake: str | None = None


def batch(seed: int, mean: float) -> tuple[Tensor, Tensor]:
    """A whole batch and the gradient of its output; each channel has a mean of its own."""
    stream = torch.Generator().manual_seed(seed)
    values, gradient = torch.randn(2, 8, CHANNELS, 5, 7, dtype=torch.float64, generator=stream)
    return values * 2 + mean + torch.arange(CHANNELS)[:, None, None], gradient


def run_layer(layer: nn.BatchNorm2d, part: slice, case: Case) -> Result:
    """What the layer computes and is left with on its part of the batches."""
    with torch.no_grad():
        layer.weight.copy_(torch.arange(CHANNELS) - 2.5)
        layer.bias.copy_(torch.arange(CHANNELS) * 0.1)
    if case.poison is not None:
        values, _ = batch(0, 0.0)
        values[0, 0, 0, 0] = case.poison
        layer(values[part])
    result: Result = {}
    for seed, mean in enumerate(case.means):
        layer.zero_grad()
        values, gradient = (whole[part].contiguous(memory_format=torch.channels_last) for whole in batch(seed, mean))
        output = layer(values.requires_grad_())
        output.backward(gradient.contiguous())
        assert values.grad is not None
        assert output.stride() == values.grad.stride() == values.stride()
        found = {"output": output, "input": values.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
        found |= layer.named_buffers()
        found["output for samples"] = layer.eval()(values)
        layer.train()
        result |= {f"{name} {seed}": tensor.detach().numpy().copy() for name, tensor in found.items()}
    return result


def run_cases(cases: list[Case]) -> list[tuple[Result, list[str]]]:
    """What this rank finds in each case, and its collectives."""
    with process_group(60, "cpu") as world, primitives_stood_in():
        size = 8 // world.world_size
        part = slice(world.rank * size, (world.rank + 1) * size)
        return [run_case(case, part) for case in cases]


def run_case(case: Case, part: slice) -> tuple[Result, list[str]]:
    recorder = Recorder()
    with MISTAKES[case.mistake]() if case.mistake else contextlib.nullcontext(), recorder:
        result = run_layer(LAYERS[case.kind](CHANNELS, dtype=torch.float64), part, case)
    return result, [collective.kind for collective in recorder.collectives]


def largest_difference(case: Case, ranks: list[Result]) -> float:
    """Between the ranks' results, put together, and those of `nn.BatchNorm2d` from the whole batches.

    Relative to values above 1.
    """
    reference = run_layer(nn.BatchNorm2d(CHANNELS, dtype=torch.float64), slice(8), case)
    differences = []
    for name, expected in reference.items():
        found = np.stack([rank[name] for rank in ranks])
        if name.startswith(("output", "input")):
            found = found.reshape(expected.shape)
        elif name.startswith(("weight", "bias")):
            found = found.sum(0)
        finite = np.isfinite(expected)
        assert (np.isfinite(found) == finite).all(), name
        found, expected = np.where(finite, found, 0), np.where(finite, expected, 0)
        differences.append((np.abs(found - expected) / np.maximum(np.abs(expected), 1)).max())
    return float(max(differences))


def _double_counts() -> Any:
    counts = batchnorm._counts
    return mock.patch.object(batchnorm, "_counts", lambda input, dtype: counts(input, dtype) * 2)


def _biased_running_variance() -> Any:
    gather: Callable[..., tuple[Tensor, Tensor]] = primitives.batch_norm_gather_stats_with_counts

    def biased(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        return gather(input, *arguments[:-1], arguments[-1] * 1_000_000)

    return mock.patch.object(torch, "batch_norm_gather_stats_with_counts", biased)


def _own_moments_only() -> Any:
    def gather(gathered: Tensor, local: Tensor) -> None:
        gathered.copy_(local.repeat(len(gathered) // len(local), 1))

    return mock.patch.object(batchnorm, "_all_gather", gather)


def _own_gradients_only() -> Any:
    return mock.patch.object(batchnorm, "_sum_across_ranks", lambda values: values)


MISTAKES: dict[str, Callable[[], Any]] = {
    "counts twice as large": _double_counts,
    "biased running variance": _biased_running_variance,
    "moments of this rank only": _own_moments_only,
    "gradient sums of this rank only": _own_gradients_only,
}


PLAIN = {kind: Case(kind) for kind in LAYERS}
POISONED = [Case(kind, (3.0, 0.0), poison=poison) for kind in LAYERS for poison in (torch.inf, torch.nan, 1e300)]
LARGE_MEAN = Case("portable", (100.0,))
WRONG = {mistake: Case("direct", (3.0,), mistake=mistake) for mistake in MISTAKES}
CASES = [*PLAIN.values(), *POISONED, LARGE_MEAN, *WRONG.values()]
SEVERAL = [2, pytest.param(4, marks=pytest.mark.slow)]


class Found(NamedTuple):
    """Of one case: the largest difference to `nn.BatchNorm2d`, and the collectives of each rank."""

    difference: float
    collectives: list[list[str]]


@functools.cache
def found_on(world_size: int) -> dict[Case, Found]:
    ranks = run_ranks(world_size, run_cases, CASES)
    return {
        case: Found(largest_difference(case, [result for result, _ in results]), [kinds for _, kinds in results])
        for case, *results in zip(CASES, *ranks, strict=True)
    }


@pytest.mark.parametrize(
    ("case", "most"),
    [
        *((case, 1e-12) for case in PLAIN.values()),
        *((case, 1e-12) for case in POISONED),  # what is not finite is gone after one forward
        (LARGE_MEAN, 1e-10),  # which costs a few digits of float64
    ],
    ids=str,
)
@pytest.mark.parametrize("world_size", [1, *SEVERAL])
def test_ranks_compute_what_torch_computes_from_the_whole_batch(world_size: int, case: Case, most: float) -> None:
    assert found_on(world_size)[case].difference <= most


@pytest.mark.parametrize(("kind", "forward"), [("portable", "allreduce_"), ("direct", "_allgather_base_")])
@pytest.mark.parametrize("world_size", SEVERAL)
def test_a_layer_takes_one_collective_each_way(world_size: int, kind: str, forward: str) -> None:
    for collectives in found_on(world_size)[PLAIN[kind]].collectives:
        assert collectives == [forward, "allreduce_"] * 3


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("world_size", SEVERAL)
def test_a_mistake_in_the_direct_norm_would_be_seen(world_size: int, mistake: str) -> None:
    assert found_on(world_size)[WRONG[mistake]].difference > 1e-4
