"""Batch norm across ranks, on one rank: the same as torch's. On several ranks: tests/distributed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dist_dcgan.models.batchnorm import CrossRankBatchNorm, make_norm
from shards.errors import UserError


def both(dtype: torch.dtype) -> tuple[CrossRankBatchNorm, nn.BatchNorm2d]:
    torch.manual_seed(0)
    reference = nn.BatchNorm2d(6, dtype=dtype)
    nn.init.normal_(reference.weight)
    nn.init.normal_(reference.bias)
    ours = CrossRankBatchNorm(6, dtype=dtype)
    ours.load_state_dict(reference.state_dict())
    return ours, reference


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


def test_outputs_gradients_and_statistics_equal_torchs() -> None:
    ours, reference = both(torch.float64)
    for step in range(3):
        values = images(torch.float64, mean=step)
        for a, b in zip(gradients(ours, values), gradients(reference, values), strict=True):
            assert (a - b).abs().max() <= 1e-11
    for name, buffer in reference.state_dict().items():
        assert (ours.state_dict()[name] - buffer).abs().max() <= 1e-11, name
    values = images(torch.float64)
    assert (ours.eval()(values) - reference.eval()(values)).abs().max() <= 1e-11


def test_a_large_mean_does_not_cancel() -> None:
    """Channels around 10,000 with deviation 2: E[x^2] - E[x]^2 in float32 would be off by whole units."""
    ours, _ = both(torch.float32)
    values = images(torch.float32, mean=10_000)
    ours.running_mean.fill_(10_000.0)
    exact = nn.functional.batch_norm(values.double(), None, None, ours.weight.double(), ours.bias.double(), True)
    assert (ours(values) - exact).abs().max() <= 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_keeps_float32_moments(dtype: torch.dtype) -> None:
    ours, _ = both(torch.float32)
    values = images(dtype)
    output, grad, *_ = gradients(ours, values)
    assert output.dtype == grad.dtype == dtype
    exact_mean = values.double().mean((0, 2, 3))
    assert ((ours.running_mean / 0.1) - exact_mean).abs().max() <= 1e-5


def test_the_memory_format_is_kept() -> None:
    ours, _ = both(torch.float32)
    output, grad, *_ = gradients(ours, images(torch.float32))
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert grad.is_contiguous(memory_format=torch.channels_last)


def test_native_batch_norm_is_taken_on_cuda_only() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert make_norm("auto", cpu) is CrossRankBatchNorm
    assert make_norm("auto", cuda) is nn.SyncBatchNorm
    assert make_norm("portable", cuda) is CrossRankBatchNorm
    with pytest.raises(UserError, match="native needs a GPU"):
        make_norm("native", cpu)
