"""Parameters, gradients and moments lie alike in memory: fused Adam is silently wrong otherwise.

Promise 6 (the averaged generator) of dist_dcgan/README.md.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from packaging.version import Version
from torch import nn

from dist_dcgan.config import Config
from dist_dcgan.data.loader import flip
from dist_dcgan.distributed.world import process_group
from dist_dcgan.random_streams import stream_seed
from dist_dcgan.run import values
from dist_dcgan.training import steps
from dist_dcgan.training.ema import ema_decay, recompute_statistics, sample_images, update_ema
from dist_dcgan.training.steps import train_step
from dist_dcgan.training.train_state import TrainState
from tests.benchmarks.measuring import constant_images
from tests.gpu.training import make_state, snapshot

SMALL: dict[str, Any] = {"width": 4, "global_batch": 4, "ema": {"statistics_images": 32}}
CONFIG = Config(**SMALL)


@pytest.fixture
def state() -> Iterator[TrainState]:
    assert "WORLD_SIZE" not in os.environ
    with process_group(60, "cpu") as world:
        yield make_state(world, SMALL)


def images() -> torch.Tensor:
    return constant_images(4, torch.device("cpu"), torch.float32)


def test_strides_agree_at_first_after_steps_and_after_a_load(state: TrainState) -> None:
    state.assert_equal_strides()
    train_step(state, images())
    state.assert_equal_strides()
    contiguous = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.tensors().items()}
    state.load_tensors(contiguous)
    train_step(state, images())
    state.assert_equal_strides()
    weight = state.discriminator.get_parameter("layers.2.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_flips_are_part_of_the_step_and_differ_from_step_to_step() -> None:
    seen: list[torch.Tensor] = []
    real_step = steps.discriminator_step

    def note(state: TrainState, real: torch.Tensor, fake: torch.Tensor) -> steps.Metrics:
        seen.append(real)
        return real_step(state, real, fake)

    with process_group(60, "cpu") as world, mock.patch.object(steps, "discriminator_step", note):
        state = make_state(world, SMALL | {"data": {"random_flip": True}})
        for _ in range(2):
            train_step(state, images())
    expected = [flip(images(), stream_seed(CONFIG.seed, "flip", step), range(4)) for step in range(2)]
    assert all(torch.equal(*pair) for pair in zip(seen, expected, strict=True))
    assert not torch.equal(*expected)


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.14"), reason="torch asks so since 2.14: a newer one runs it"
)
@pytest.mark.parametrize("capturable", [True, False])
def test_adam_can_be_captured_by_a_cuda_graph(state: TrainState, capturable: bool) -> None:
    """As torch decides it; without the option it refuses, the negative control."""
    for optimizer in (state.optimizer_g, state.optimizer_d):
        optimizer.param_groups[0]["capturable"] &= capturable
    with (
        mock.patch.object(torch.accelerator, "current_accelerator", return_value=torch.device("cuda")),
        mock.patch.object(torch.accelerator, "current_stream", return_value=mock.Mock(is_capturing=lambda: True)),
        nullcontext() if capturable else pytest.raises(RuntimeError, match="capturable is False"),
    ):
        train_step(state, images())


def test_moments_that_lie_otherwise_are_caught(state: TrainState) -> None:
    train_step(state, images())
    moments = state.optimizer_d.state[state.discriminator.get_parameter("layers.2.weight")]
    moments["exp_avg"] = moments["exp_avg"].contiguous()
    with pytest.raises(AssertionError, match=r"optimizer_d\.layers\.2\.weight: strides differ"):
        state.assert_equal_strides()


def test_fused_adam_is_wrong_where_they_lie_otherwise() -> None:
    """The negative control: what `load_tensors` guards against is real. Should torch mend it, this test will tell."""
    torch.manual_seed(0)
    plain = nn.Parameter(torch.randn(8, 6, 4, 4).contiguous(memory_format=torch.channels_last))
    fused = copy.deepcopy(plain)
    optimizers = [torch.optim.Adam([plain], fused=False), torch.optim.Adam([fused], fused=True)]
    for step in range(3):
        gradient = torch.randn(8, 6, 4, 4).contiguous(memory_format=torch.channels_last)
        for parameter, optimizer in zip((plain, fused), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
        assert torch.allclose(plain, fused) == (step == 0)
        for key in ("exp_avg", "exp_avg_sq"):
            optimizers[1].state[fused][key] = optimizers[1].state[fused][key].contiguous()


def test_a_registry_round_trip_continues_the_same(state: TrainState) -> None:
    train_step(state, images())
    tensors, values = snapshot(state), state.values()
    first = train_step(state, images())
    state.load_tensors(tensors)
    state.load_values(values)
    second = train_step(state, images())
    assert {name: float(value) for name, value in first.items()} == {name: float(v) for name, v in second.items()}


def test_the_registry_holds_every_parameter_buffer_and_moment(state: TrainState) -> None:
    names = state.tensors().keys()
    parameters = [name for name, _ in state.generator.named_parameters()]
    assert {f"optimizer_g.{name}.{key}" for name in parameters for key in ("step", "exp_avg", "exp_avg_sq")} <= names
    assert {f"generator_ema.{name}" for name in state.generator.state_dict()} <= names


def test_what_a_checkpoint_may_hold_beside_tensors_is_what_the_registry_writes(state: TrainState) -> None:
    written = state.values() | {"manifest_digest": "", "config": {}}
    known = values._Values.model_validate(written)
    assert written.keys() == values._Values.model_fields.keys()
    assert known.model_dump(by_alias=True) == written and not known.model_extra
    assert written["watchdog"]["trend"].keys() == values._Trend.model_fields.keys()
    assert written["scaler_g"].keys() == known.scaler_g.model_dump(by_alias=True).keys()


def test_the_average_forgets_the_first_weights_of_a_short_run() -> None:
    left = 1.0
    for step in range(1, 301):
        left *= ema_decay(CONFIG, step * 128, 128)
    assert left < 1e-4
    assert ema_decay(CONFIG, 10**7, 128) == pytest.approx(0.5 ** (128 / 10_000))


def test_a_skipped_step_leaves_the_average(state: TrainState) -> None:
    before = [parameter.clone() for parameter in state.generator_ema.parameters()]
    with torch.no_grad():
        for parameter in state.generator.parameters():
            parameter.add_(1)
    for finite in (False, True):
        update_ema(state.generator_ema, state.generator, torch.tensor(0.5), torch.tensor(finite))
        moved = [not torch.equal(a, b) for a, b in zip(before, state.generator_ema.parameters(), strict=True)]
        assert moved == [finite] * len(before)


def test_statistics_are_those_of_the_averaged_weights(state: TrainState) -> None:
    for _ in range(3):
        train_step(state, images())
    recompute_statistics(state.generator_ema, CONFIG, state.world.device, state.dtype)
    norm = state.generator_ema.get_submodule("layers.1")
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    seen: list[torch.Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    before = {name: buffer.clone() for name, buffer in state.generator_ema.named_buffers()}
    recompute_statistics(state.generator_ema, CONFIG, state.world.device, state.dtype)
    hook.remove()
    assert torch.allclose(norm.running_mean, torch.cat(seen).mean((0, 2, 3)), atol=1e-6)
    assert all(torch.equal(buffer, before[name]) for name, buffer in state.generator_ema.named_buffers())
    assert not state.generator_ema.training
    assert norm.momentum == 0.1
    assert sample_images(state.generator_ema, CONFIG, range(5), state.world.device).shape == (5, 3, 64, 64)
