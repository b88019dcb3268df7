"""Batch norm across ranks: what one rank shows. That it equals torch's: `test_batchnorm_ranks.py`."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from dist_dcgan.models import batchnorm
from dist_dcgan.models.batchnorm import CrossRankBatchNorm, DirectBatchNorm, make_norm
from shards.common.errors import UserError
from tests.support.operations import OperationRecorder, Parts

FORWARD_OPERATIONS = 15
"""Of one forward on a GPU with half-precision input, one rank; one of them is an unused buffer of torch's own."""
BACKWARD_OPERATIONS = 23


def images(dtype: torch.dtype, mean: float = 3.0) -> Tensor:
    torch.manual_seed(1)
    values = torch.randn(8, 6, 5, 7, dtype=torch.float64) * 2 + mean
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def gradients(layer: nn.Module, values: Tensor) -> list[Tensor]:
    values = values.clone().requires_grad_()
    output = layer(values)
    torch.manual_seed(2)
    output.backward(torch.randn(output.shape).to(output))
    assert values.grad is not None
    return [output.detach(), values.grad, layer.weight.grad, layer.bias.grad]


def test_a_constant_channel_of_large_mean_stays_finite() -> None:
    """Its variance between ranks is a difference of two equal large numbers, which may round below zero."""
    values = torch.logspace(3, 9, 60, dtype=torch.float64)[:, None, None].expand(2, 60, 5, 7)
    with mock.patch.multiple(batchnorm, _world_size=lambda: 3, _sum_across_ranks=lambda sums: sums + sums + sums):
        assert CrossRankBatchNorm(60, dtype=torch.float64)(values).isfinite().all()


def test_a_large_mean_does_not_cancel() -> None:
    """Channels around 10,000 with deviation 2: E[x^2] - E[x]^2 in float32 would be off by whole units."""
    ours = CrossRankBatchNorm(6)
    values = images(torch.float32, mean=10_000)
    exact = nn.functional.batch_norm(values.double(), None, None, ours.weight.double(), ours.bias.double(), True)
    assert (ours(values) - exact).abs().max() <= 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_type_and_memory_format_are_those_of_the_input_and_moments_are_float32(dtype: torch.dtype) -> None:
    ours = CrossRankBatchNorm(6)
    values = images(dtype)
    output, grad, *_ = gradients(ours, values)
    assert output.dtype == grad.dtype == dtype
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    assert ours.running_mean is not None
    assert (ours.running_mean / 0.1 - values.double().mean((0, 2, 3))).abs().max() <= 1e-5


def test_moments_of_gpus_are_those_of_cpus() -> None:
    values = images(torch.float64)
    pairs = zip(batchnorm._moments_per_sample(values), batchnorm._moments_per_sample_on_cpu(values), strict=True)
    for gpu, cpu in pairs:
        assert gpu.shape == cpu.shape == (8, 6) and (gpu - cpu).abs().max() <= 1e-13


def test_frozen_parameters_get_no_gradients_and_their_input_gets_the_same() -> None:
    ours = CrossRankBatchNorm(6, dtype=torch.float64)
    values = images(torch.float64).requires_grad_()
    (trained,) = torch.autograd.grad(ours(values).square().sum(), values)
    ours.requires_grad_(False)
    (frozen,) = torch.autograd.grad(ours(values).square().sum(), values)
    assert torch.equal(trained, frozen)


def test_a_layer_launches_few_kernels() -> None:
    """Of a layer as a GPU would run it under autocast."""
    layer = CrossRankBatchNorm(6, device="meta")
    values = images(torch.bfloat16).to("meta").requires_grad_()
    forward, backward = OperationRecorder(Parts("")), OperationRecorder(Parts(""))
    with forward:
        output = layer(values)
    gradient = torch.empty_like(output)
    with backward:
        torch.autograd.grad(output, [values, layer.weight, layer.bias], gradient)
    launches = [sum(operation.launches for operation in each.operations) for each in (forward, backward)]
    assert launches[0] <= FORWARD_OPERATIONS and launches[1] <= BACKWARD_OPERATIONS, launches


def test_each_kind_is_taken_where_it_runs() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert make_norm("auto", cpu) is make_norm("portable", cuda) is CrossRankBatchNorm
    assert make_norm("auto", cuda) is make_norm("direct", cuda) is DirectBatchNorm
    assert make_norm("native", cuda) is nn.SyncBatchNorm
    for kind in ("native", "direct"):
        with pytest.raises(UserError, match=f"--distributed.batchnorm {kind} needs a GPU: use auto or portable"):
            make_norm(kind, cpu)


@pytest.mark.parametrize(("norm", "traced"), [(CrossRankBatchNorm, False), (nn.BatchNorm2d, True)])
def test_the_compiler_leaves_batch_norm_across_ranks_alone(norm: type[nn.BatchNorm2d], traced: bool) -> None:
    network, operations = nn.Sequential(norm(3), nn.ReLU()), CompileCounter()
    network.compile(backend=operations)
    network(torch.randn(2, 3, 4, 4)).sum().backward()
    assert (operations.op_count > 0) == traced
