"""Batch norm over the global batch of all ranks.

| kind | layer | computed by | on |
|---|---|---|---|
| native | `nn.SyncBatchNorm` | torch; every forward on several ranks synchronises host and GPU three times | CUDA |
| direct | `DirectBatchNorm` | torch's CUDA kernels for it, called without that synchronisation | CUDA |
| portable | `CrossRankBatchNorm` | plain torch | any device |

torch's `SyncBatchNorm` raises on CPU tensors, and DDP refuses CPU networks that contain it or a subclass. The other two
need one collective in forward and one in backward. All ranks have equally many samples, so no counts are exchanged.

The portable layer computes moments per sample in float32 and combines them in float64. A sample's moments do not depend
on its rank, so 1 and N ranks normalise by equal values, up to the rounding of float64. With float32 throughout, as in
the other two, they differ by about 1e-6, enough to change the sign of some ReLU's input within five steps (measured at
width 8: parameters 4e-3 apart).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dist_dcgan.models.networks import Norm
from shards.common.errors import UserError

# torch renamed it and warns about the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def make_norm(kind: str, device: torch.device) -> Norm:
    """Return the batch norm layer for `kind`: auto, native, direct or portable.

    auto is direct on CUDA, else portable. Raises UserError for native and direct on a CPU.
    """
    if kind == "auto":
        kind = "direct" if device.type == "cuda" else "portable"
    if kind != "portable" and device.type == "cpu":
        raise UserError(f"--distributed.batchnorm {kind} needs a GPU: use auto or portable")
    return {"native": nn.SyncBatchNorm, "direct": DirectBatchNorm, "portable": CrossRankBatchNorm}[kind]


class CrossRankBatchNorm(nn.BatchNorm2d):
    """Batch norm over the samples of all ranks; input (N, C, H, W), any memory format, on any device.

    Equals `nn.BatchNorm2d` over the concatenated batch, including running statistics and gradients. Outputs in training
    depend on this batch alone: after a non-finite forward the next one is correct (the running statistics stay
    non-finite, as torch's own do).
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        _keep_from_compiler()

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel by the mean and variance of the global batch, in eval mode by the running ones."""
        return self._across_ranks(input) if self.training else super().forward(input)

    def _across_ranks(self, input: Tensor) -> Tensor:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        output: Tensor = _CrossRankNorm.apply(input, self.weight, self.bias, self)
        return output

    def _statistics(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the global batch, float64 (C), and update the running ones."""
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        mean, variance = _moments(input)
        if (world_size := _world_size()) > 1:
            # Not shifted by a mean: the ranks share only the running mean, which stays non-finite after one non-finite
            # value. In float64, the difference has an error of about 1e-15 * (mean / deviation)^2.
            moments = torch.stack([mean, torch.addcmul(variance, mean, mean)])
            mean, square = _sum_across_ranks(moments) / world_size
            variance = torch.addcmul(square, mean, mean, value=-1).clamp_(min=0)
        count = _global_count(input)
        self.running_mean.mul_(1 - self.momentum).add_(mean, alpha=self.momentum)
        self.running_var.mul_(1 - self.momentum).add_(variance, alpha=self.momentum * count / (count - 1))
        return mean, variance

    def _normalise(self, input: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """Return the output in the type and memory format of input, in one pass over memory."""
        mean, variance = mean.to(self.weight.dtype), variance.to(self.weight.dtype)
        return F.batch_norm(input, mean, variance, self.weight, self.bias, eps=self.eps)

    def _gradients(
        self, grad: Tensor, input: Tensor, weight: Tensor, mean: Tensor, variance: Tensor, affine: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the gradients of input and, if `affine`, those of weight and bias over this rank's samples.

        It costs a reduction and two affine passes, less than torch's own CPU kernel (measured on 32x128x32x32
        channels_last: 4 against 17 ms), so one rank uses it too.
        """
        inverse_std = torch.rsqrt(variance + self.eps)
        wide = _wide(grad)
        # Sums within a sample in its own type, sums over samples in float64.
        sums = torch.stack([wide.sum([2, 3]), (wide * input).sum([2, 3])]).sum(1, dtype=torch.float64)
        sums[1].addcmul_(mean, sums[0], value=-1).mul_(inverse_std)
        grad_bias, grad_weight = (row.to(weight.dtype, copy=True) for row in sums) if affine else (None, None)
        mean_bias, mean_weight = _sum_across_ranks(sums) / _global_count(input)
        # d(input) = scale * (grad - mean_bias - normalised * mean_weight), as one affine form of input and grad
        scale = weight * inverse_std
        slope = scale * inverse_std * mean_weight
        offset = torch.addcmul(mean * slope, scale, mean_bias, value=-1)
        scale, slope, offset = torch.stack([scale, slope, offset]).to(_wide_type(input))[:, None, :, None, None]
        grad_input = torch.addcmul(offset, input, slope, value=-1).to(input.dtype)
        grad_input.addcmul_(grad, scale)
        return grad_input, grad_weight, grad_bias


class DirectBatchNorm(CrossRankBatchNorm):
    """The same with torch's CUDA kernels, without synchronising host and GPU; on one rank it is `nn.BatchNorm2d`.

    Parameters are float32 if the input is in half precision, as under autocast.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel by the mean and variance of the global batch, in eval mode by the running ones."""
        if not self.training or _world_size() == 1:
            return super(CrossRankBatchNorm, self).forward(input)
        output: Tensor = self._across_ranks(input.contiguous(memory_format=_memory_format(input)))
        return output

    def _statistics(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and inverse standard deviation of the global batch (C), and update the running statistics."""
        assert self.momentum is not None and self.running_mean is not None
        local = torch.stack(torch.batch_norm_stats(input, self.eps))
        gathered = local.new_empty(_world_size() * 2, input.shape[1])
        _all_gather(gathered, local)
        means, inverse_stds = gathered.view(-1, 2, input.shape[1]).unbind(1)
        mean, inverse_std = torch.batch_norm_gather_stats_with_counts(
            input,
            means,
            inverse_stds,
            self.running_mean,
            self.running_var,
            self.momentum,
            self.eps,
            _counts(input, self.running_mean.dtype),
        )
        return mean, inverse_std

    def _normalise(self, input: Tensor, mean: Tensor, inverse_std: Tensor) -> Tensor:
        return torch.batch_norm_elemt(input, self.weight, self.bias, mean, inverse_std, self.eps)

    def _gradients(
        self, grad: Tensor, input: Tensor, weight: Tensor, mean: Tensor, inverse_std: Tensor, affine: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # The kernels take the memory format from one of the two tensors and read both with it.
        grad = grad.contiguous(memory_format=_memory_format(input))
        sum_grad, sum_product, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, input, mean, inverse_std, weight, True, affine, affine
        )
        sum_grad, sum_product = _sum_across_ranks(torch.stack([sum_grad, sum_product]))
        counts = _counts(input, torch.int32)
        grad_input = torch.batch_norm_backward_elemt(
            grad, input, mean, inverse_std, weight, sum_grad, sum_product, counts
        )
        return grad_input, grad_weight if affine else None, grad_bias if affine else None


@cache
def _keep_from_compiler() -> None:
    """Have the compiler leave the layer alone; not on import, as `torch._dynamo` takes 2 s, half of a command's start.

    It cannot trace it: torch's kernels for statistics have no implementation for fake tensors (torch 2.14.1).
    """
    CrossRankBatchNorm._across_ranks = torch.compiler.disable(CrossRankBatchNorm._across_ranks)  # type: ignore[method-assign]


class _CrossRankNorm(torch.autograd.Function):
    """Normalisation by the moments of the global batch, and its gradient (Ioffe and Szegedy 2015, section 3)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, layer: CrossRankBatchNorm) -> Tensor:
        mean, spread = layer._statistics(input)
        ctx.save_for_backward(input, weight, mean, spread)
        ctx.layer = layer
        return layer._normalise(input, mean, spread)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        affine = ctx.needs_input_grad[1]  # False if D is frozen
        return *ctx.layer._gradients(grad, *ctx.saved_tensors, affine), None


def _moments(input: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel over this rank's samples, float64 (C)."""
    per_sample = _moments_per_sample_on_cpu if input.device.type == "cpu" else _moments_per_sample
    means, variances = per_sample(_wide(input))
    between, mean = torch.var_mean(means.double(), 0, correction=0)
    return mean, variances.mean(0, dtype=torch.float64) + between


def _moments_per_sample(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each sample and channel (N, C)."""
    variances, means = torch.var_mean(values, [2, 3], correction=0)
    return means, variances


def _moments_per_sample_on_cpu(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same; `var_mean` is slow there (measured on 32x128x32x32: 24 ms against 0.9)."""
    moments = [torch.batch_norm_update_stats(sample, None, None, 0.0) for sample in values.split(1)]
    return torch.stack([mean for mean, _ in moments]), torch.stack([variance for _, variance in moments])


def _wide(values: Tensor) -> Tensor:
    """Return half-precision values as float32: moments of activations need more than 8 or 11 bits."""
    return values.to(_wide_type(values))


def _wide_type(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _memory_format(values: Tensor) -> torch.memory_format:
    """Return the memory format in which torch's kernels read and write these values."""
    channels_last = values.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _sum_across_ranks(values: Tensor) -> Tensor:
    """Return the sum over ranks, computed in place."""
    if _world_size() > 1:
        dist.all_reduce(values)
    return values


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _count(input: Tensor) -> int:
    """Return the number of values per channel on this rank, equal on all ranks."""
    return input.numel() // input.shape[1]


def _global_count(input: Tensor) -> int:
    return _count(input) * _world_size()


def _counts(input: Tensor, dtype: torch.dtype) -> Tensor:
    """Return each rank's count, as torch's kernels expect them, filled in on the device."""
    return input.new_full((_world_size(),), _count(input), dtype=dtype)
