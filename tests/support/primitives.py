"""Stand-ins for the five CUDA kernels of `DirectBatchNorm`, in plain torch: they run on any device, meta included.

Written after what the kernels compute (ATen/native/cuda/Normalization.cuh), with their demands on types and memory
formats as assertions. Sums are of one rank; counts have one entry per rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dist_dcgan.models.batchnorm import DirectBatchNorm
from dist_dcgan.training import train_state


@contextmanager
def direct_batch_norm() -> Iterator[None]:
    """Train with `DirectBatchNorm` on any device."""
    with primitives_stood_in(), mock.patch.object(train_state, "make_norm", return_value=DirectBatchNorm):
        yield


@contextmanager
def primitives_stood_in() -> Iterator[None]:
    """Let these functions stand in for torch's, which exist for CUDA only."""
    functions: tuple[Any, ...] = (  # their signatures differ
        batch_norm_stats,
        batch_norm_gather_stats_with_counts,
        batch_norm_elemt,
        batch_norm_backward_reduce,
        batch_norm_backward_elemt,
    )
    with mock.patch.multiple(torch, **{function.__name__: function for function in functions}):
        yield


def batch_norm_stats(input: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and inverse standard deviation per channel, biased, at least in float32."""
    assert is_dense(input)
    variance, mean = torch.var_mean(input.to(wide(input)), [0, 2, 3], correction=0)
    return mean, torch.rsqrt(variance + eps)


def batch_norm_gather_stats_with_counts(
    input: Tensor,
    means: Tensor,
    inverse_stds: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return those of the ranks (ranks, channels) together; move the running ones, with the unbiased variance."""
    assert means.shape == inverse_stds.shape == (len(counts), input.shape[1])
    assert means.dtype == inverse_stds.dtype == wide(input) and counts.dtype == running_mean.dtype
    weights = (counts / counts.sum())[:, None]
    mean = (weights * means).sum(0)
    variance = (weights * (inverse_stds**-2 - eps + (means - mean) ** 2)).sum(0)
    running_mean.mul_(1 - momentum).add_(momentum * mean)
    running_var.mul_(1 - momentum).add_(momentum * variance * (counts.sum() / (counts.sum() - 1)))
    return mean, torch.rsqrt(variance + eps)


def batch_norm_elemt(
    input: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, eps: float
) -> Tensor:
    """Return the output in the type and memory format of input."""
    assert is_dense(input) and weight.dtype == bias.dtype == mean.dtype == inverse_std.dtype == wide(input)
    normalised = (input - per_channel(mean)) * per_channel(inverse_std)
    return (normalised * per_channel(weight) + per_channel(bias)).to(input.dtype)


def batch_norm_backward_reduce(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor,
    input_g: bool,
    weight_g: bool,
    bias_g: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the sums of grad and of grad * (input - mean), and the gradients of weight and bias where asked for."""
    assert input_g and grad.dtype == input.dtype and grad.stride() == input.stride() and is_dense(grad)
    sum_grad = grad.sum([0, 2, 3], dtype=mean.dtype)
    sum_product = (grad * (input - per_channel(mean))).sum([0, 2, 3])
    grad_weight = (sum_product * inverse_std).to(weight.dtype) if weight_g else None
    return sum_grad, sum_product, grad_weight, sum_grad.to(weight.dtype, copy=True) if bias_g else None


def batch_norm_backward_elemt(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor,
    sum_grad: Tensor,
    sum_product: Tensor,
    counts: Tensor,
) -> Tensor:
    """Return the gradient of input from the sums over all ranks."""
    assert grad.stride() == input.stride() and is_dense(grad) and counts.dtype == torch.int32
    assert weight.dtype == mean.dtype == sum_grad.dtype == sum_product.dtype == wide(input)
    share, slope = sum_grad / counts.sum(), inverse_std**2 * sum_product / counts.sum()
    centred = grad - per_channel(share) - (input - per_channel(mean)) * per_channel(slope)
    return (centred * per_channel(weight * inverse_std)).to(input.dtype)


def per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


def wide(input: Tensor) -> torch.dtype:
    """The type in which the kernels accumulate."""
    return torch.promote_types(input.dtype, torch.float32)


def is_dense(values: Tensor) -> bool:
    return values.is_contiguous() or values.is_contiguous(memory_format=torch.channels_last)
