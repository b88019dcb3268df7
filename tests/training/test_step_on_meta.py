"""The training step is fit for a CUDA graph: shown without a GPU, on tensors that have no values.

A graph repeats the operations that it captured, with their arguments, on the memory that they used. So the step must
neither read values nor mix devices, must do the same at each call, and must use no memory but what stays in place.

Promise 5 (the step) of dist_dcgan/README.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from dist_dcgan.config import Config, make_plan
from dist_dcgan.distributed.world import process_group
from dist_dcgan.random_streams import stream_seed
from dist_dcgan.training import steps, train_state
from dist_dcgan.training.train_state import StepInputs, TrainState
from tests.support.meta_device import META, Undistributed, state_on_meta
from tests.support.operations import (
    Operation,
    OutsideTensors,
    Unsynchronised,
    by_part,
    operations_of_steps,
    real_images,
    storages,
)

PRECISIONS = ["fp64", "fp32", "bf16", "fp16"]
NORMS = ["native", "portable"]
EVERYTHING: dict[str, Any] = {"noise": {"sigma": 0.3}, "data": {"random_flip": True}}

BUDGET = {
    "z": 23,
    "networks": 117,
    "casts": 38,
    "metrics": 28,
    "Adam and scaler": 24,
    "EMA": 14,
    "batch norm, forward": 26,
    "batch norm, backward": 13,
}
"""Operations of a step of one rank in bf16 with torch's own batch norm, by part; each costs the host a launch."""
PORTABLE_BUDGET = 900
"""The same with the portable batch norm, all parts together."""


def options(precision: str, norm: str) -> dict[str, Any]:
    return EVERYTHING | {"precision": precision, "distributed": {"batchnorm": norm}}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_neither_waits_for_its_device_nor_leaves_it(precision: str, norm: str) -> None:
    with state_on_meta(**options(precision, norm)) as state:
        for _ in range(2):
            with Unsynchronised(META):
                metrics = steps.train_step(state, real_images(state))
    assert {value.device for value in metrics.values()} == {META}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_neither_does_it_under_ddp_and_autocast(precision: str) -> None:
    """On a CPU, the one device here that has both."""
    with process_group(60, "cpu") as world:
        config = Config(width=8, global_batch=4, precision=precision, **EVERYTHING)
        state = TrainState(config, make_plan(config, 1, 100), world, 64)
        for _ in range(2):
            with Unsynchronised(world.device):
                steps.train_step(state, real_images(state))


def _item(images: Tensor) -> Tensor:
    return images * images.mean().item()


def _mask(images: Tensor) -> Tensor:
    return images[images > 0].mean()


def _nonzero(images: Tensor) -> Tensor:
    return images.nonzero().float().mean()


def _truth(images: Tensor) -> Tensor:
    return images.mean() if images.isfinite().all() else images.sum()


def _cpu_tensor(images: Tensor) -> Tensor:
    return images.mean() * torch.ones(())


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (_item, r"aten\._local_scalar_dense.* waits"),
        (_mask, r"aten\.index.* waits"),
        (_nonzero, r"aten\.nonzero.* waits"),
        (_truth, r"aten\._local_scalar_dense.* waits"),
        (_cpu_tensor, "a tensor on cpu"),
    ],
)
def test_mistakes_in_the_step_are_caught(mistake: Callable[[Tensor], Tensor], message: str) -> None:
    with (
        state_on_meta() as state,
        mock.patch.object(steps, "diversity", mistake),
        Unsynchronised(META),
        pytest.raises(AssertionError, match=message),
    ):
        steps.train_step(state, real_images(state))


def test_a_number_copied_to_the_device_is_caught() -> None:
    """On a CPU: torch.tensor on the meta device copies nothing."""
    with Unsynchronised(torch.device("cpu")), pytest.raises(AssertionError, match="copies numbers of the host"):
        torch.tensor(0.5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_consecutive_steps_do_the_same(precision: str, norm: str) -> None:
    with state_on_meta(**options(precision, norm)) as state:
        first, second = operations_of_steps(state, 2)
    assert first == second


@pytest.mark.parametrize("inputs", ["keys", "ema_weight"])
def test_steps_with_numbers_for_inputs_differ(inputs: str) -> None:
    def fill(self: StepInputs, step: int) -> None:
        numbers = {"keys": {stream: stream_seed(0, stream, step) for stream in self.keys}, "ema_weight": 1 / (step + 1)}
        setattr(self, inputs, numbers[inputs])

    with state_on_meta() as state, mock.patch.object(StepInputs, "fill", fill):
        first, second = operations_of_steps(state, 2)
    assert [operation.name for operation in first] == [operation.name for operation in second]
    assert first != second


def outside_tensors(state: TrainState) -> set[int]:
    outside = OutsideTensors()
    real = real_images(state)
    with outside:
        steps.step_on_device(state, real)
    return set(outside.storages) - set(storages([real]))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_uses_only_memory_that_stays_in_place(precision: str) -> None:
    with state_on_meta(**options(precision, "portable")) as state:
        steps.train_step(state, real_images(state))
        scalers = [scaler._scale for scaler in (state.scaler_g, state.scaler_d)]
        scalers += [scaler._growth_tracker for scaler in (state.scaler_g, state.scaler_d)]
        inputs = [*state.inputs.keys.values(), state.inputs.ema_weight]
        allowed = storages([*state.tensors().values(), *inputs, *scalers])
        assert storages(inputs).keys() <= outside_tensors(state) <= allowed.keys()
        state.inputs.ema_weight = torch.zeros((), device=META)
        assert not outside_tensors(state) <= allowed.keys()


def over_budget(operations: list[Operation]) -> dict[str, int]:
    """Return the operations of the parts that have too many; a part without a budget may have none."""
    return {part: count for part, count in by_part(operations).items() if count > BUDGET.get(part, 0)}


def test_a_step_keeps_to_its_budget_of_operations() -> None:
    with state_on_meta(**bf16("native")) as state:
        (operations,) = operations_of_steps(state)
    assert over_budget(operations) == {}


def test_a_step_with_portable_batch_norm_keeps_to_its_budget() -> None:
    with state_on_meta(**bf16("portable")) as state:
        (operations,) = operations_of_steps(state)
    assert sum(by_part(operations).values()) <= PORTABLE_BUDGET


def bf16(norm: str) -> dict[str, Any]:
    return {"precision": "bf16", "distributed": {"batchnorm": norm}}


def test_an_ema_weight_per_parameter_exceeds_the_budget() -> None:
    def update(averaged: nn.Module, current: nn.Module, weight: Tensor, finite: Tensor) -> None:
        with torch.no_grad():
            for average, parameter in zip(averaged.parameters(), current.parameters(), strict=True):
                average.lerp_(parameter, (finite * weight).to(average.dtype))

    with state_on_meta(**bf16("native")) as state, mock.patch.object(steps, "update_ema", update):
        (operations,) = operations_of_steps(state)
    assert over_budget(operations) == {"EMA": 26}


def casts_of_weights(state: TrainState) -> Counter[str]:
    """Return how often one step casts weights to half precision, by shape."""
    weights = [parameter for network in (state.generator, state.discriminator) for parameter in network.parameters()]
    shapes = {shape_of(weight) for weight in weights if weight.dim() == 4}
    (operations,) = operations_of_steps(state)
    casts = [each for each in operations if each.name == "aten._to_copy.default" and "float32" in each.arguments[0][0]]
    return Counter(shape for each in casts for shape in shapes if shape in each.arguments[0][0])


def shape_of(weight: Tensor) -> str:
    return f"{tuple(weight.shape)} {weight.stride()}"


@contextmanager
def autocast_cache(enabled: bool) -> Iterator[None]:
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(enabled)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "without autocast's cache"])
def test_weights_are_cast_once_for_each_state_that_they_are_used_in(precision: str, cached: bool) -> None:
    """G's once, D's before and after its update; by torch's own autocast."""
    with process_group(60, "cpu") as world, autocast_cache(cached):
        config = Config(width=8, global_batch=4, precision=precision)
        state = TrainState(config, make_plan(config, 1, 100), world, 64)
        casts = casts_of_weights(state)
    times = {state.generator: 1, state.discriminator: 2 if cached else 3}
    weights = [(network, weight) for network in times for weight in network.parameters() if weight.dim() == 4]
    assert casts == Counter(shape_of(weight) for network, weight in weights for _ in range(times[network]))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_runs_on_meta_is_what_runs_on_a_cpu(precision: str) -> None:
    """Autocast included, of which the meta device has but a stand-in."""
    with state_on_meta(**options(precision, "native")) as state:
        (on_meta,) = operations_of_steps(state)
    with (
        process_group(60, "cpu") as world,
        mock.patch.object(train_state, "make_norm", return_value=nn.BatchNorm2d),
        mock.patch.object(train_state, "DistributedDataParallel", Undistributed),
    ):
        config = Config(width=8, global_batch=4, precision=precision, **EVERYTHING)
        (on_cpu,) = operations_of_steps(TrainState(config, make_plan(config, 1, 100), world, 64))
    assert [operation.name for operation in on_meta] == [operation.name for operation in on_cpu]
