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
from packaging.version import Version
from torch import Tensor, nn

from dist_dcgan.distributed.world import process_group
from dist_dcgan.random_streams import stream_seed
from dist_dcgan.training import steps, train_state
from dist_dcgan.training.train_state import StepInputs, TrainState
from tests.gpu.training import make_state
from tests.support.meta_device import META, state_on_meta
from tests.support.operations import (
    OutsideTensors,
    Unsynchronised,
    by_part,
    operations_of_steps,
    real_images,
    storages,
)

COUNTED = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.14"), reason="operations are those of torch 2.14: a newer torch runs it"
)
PRECISIONS = ["fp64", "fp32", "bf16", "fp16"]
NORMS = ["native", "portable"]
SMALL: dict[str, Any] = {"width": 8, "global_batch": 4}
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
        state = make_state(world, SMALL | EVERYTHING | {"precision": precision})
        for _ in range(2):
            with Unsynchronised(world.device):
                steps.train_step(state, real_images(state))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda images: images * images.mean().item(), r"aten\._local_scalar_dense.* waits"),
        (lambda images: images[images > 0].mean(), r"aten\.index.* waits"),
        (lambda images: images.nonzero().float().mean(), r"aten\.nonzero.* waits"),
        (lambda images: images.mean() if images.isfinite().all() else None, r"aten\._local_scalar_dense.* waits"),
        (lambda images: images.mean() * torch.ones(()), "a tensor on cpu"),
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


def operations_in_bf16(norm: str) -> Counter[str]:
    with state_on_meta(precision="bf16", distributed={"batchnorm": norm}) as state:
        return by_part(operations_of_steps(state)[0])


@COUNTED
def test_a_step_keeps_to_its_budget_of_operations() -> None:
    """A part without a budget may have none."""
    found = operations_in_bf16("native")
    assert {part: count for part, count in found.items() if count > BUDGET.get(part, 0)} == {}
    assert sum(operations_in_bf16("portable").values()) <= PORTABLE_BUDGET


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
        state = make_state(world, SMALL | {"precision": precision})
        casts = casts_of_weights(state)
    times = {state.generator: 1, state.discriminator: 2 if cached else 3}
    weights = [(network, weight) for network in times for weight in network.parameters() if weight.dim() == 4]
    assert casts == Counter(shape_of(weight) for network, weight in weights for _ in range(times[network]))


@COUNTED
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_runs_on_meta_is_what_runs_on_a_cpu(precision: str) -> None:
    """Autocast included, of which the meta device has but a stand-in."""
    with state_on_meta(**options(precision, "native")) as state:
        (on_meta,) = operations_of_steps(state)
    with (
        process_group(60, "cpu") as world,
        mock.patch.object(train_state, "make_norm", return_value=nn.BatchNorm2d),
    ):
        (on_cpu,) = operations_of_steps(make_state(world, SMALL | EVERYTHING | {"precision": precision}))
    assert [operation.name for operation in on_meta] == [operation.name for operation in on_cpu]
