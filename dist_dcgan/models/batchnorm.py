"""Batch norm whose statistics are those of the global batch, on any device.

torch's `SyncBatchNorm` runs on CUDA only; it raises on CPU tensors, and DDP refuses CPU networks that hold even a
subclass of it. `CrossRankBatchNorm` runs anywhere, with one packed all-reduce each way. The ranks hold equally many
samples by construction, so their moments are averaged without counts.

Moments are taken per sample in float32 and combined in float64. A sample's moments do not depend on which rank holds
it, so 1 and N ranks normalise by the same bits but for the rounding of float64. With float32 throughout they differ by
about 1e-6, enough to turn some ReLU over at its kink within five steps (measured at width 8: parameters 4e-3 apart).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dist_dcgan.models.networks import Norm
from shards.errors import UserError


def make_norm(kind: str, device: torch.device) -> Norm:
    """Return the batch norm layer for `kind` (auto, native, portable); raises UserError for native on a CPU."""
    if kind == "native" and device.type == "cpu":
        raise UserError("--distributed.batchnorm native needs a GPU: use auto or portable")
    native = kind == "native" or (kind == "auto" and device.type == "cuda")
    return nn.SyncBatchNorm if native else CrossRankBatchNorm


class CrossRankBatchNorm(nn.BatchNorm2d):
    """Batch norm over the samples of all ranks; input (N, C, H, W), any memory format, on any device.

    Equals `nn.BatchNorm2d` over the concatenated batch, running statistics and gradients included.
    """

    # Traced by the compiler, its float64 gradients came out wrong (torch 2.14.1).
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel by the mean and variance of the global batch, in eval mode by the running ones."""
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        if not self.training:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        output, mean, variance = _CrossRankNorm.apply(input, self.weight, self.bias, self.running_mean, self.eps)
        with torch.no_grad():
            count = _global_count(input)
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((variance * (count / (count - 1))).to(self.running_var.dtype), self.momentum)
        normalised: Tensor = output
        return normalised


class _CrossRankNorm(torch.autograd.Function):
    """Normalisation by the moments of the global batch, and its gradient (Ioffe and Szegedy 2015, section 3).

    Both directions cost one reduction and one or two affine passes: less than torch's own CPU kernels take (measured on
    32x128x32x32 channels_last: backward 4 against 17 ms), so one rank takes this way too.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        means, variances = _moments_per_sample(input)
        # Second moments are taken around a shift that all ranks share and that lies near the mean, the running mean:
        # around zero, E[x^2] - E[x]^2 would cancel where the mean is large.
        offsets = means - shift.double()
        sums = torch.stack([offsets.sum(0), (variances + offsets * offsets).sum(0)])
        offset, square = _sum_across_ranks(sums) / (len(input) * _world_size())
        mean, variance = shift.double() + offset, square - offset * offset
        inverse_std = torch.rsqrt(variance + eps)
        ctx.save_for_backward(input, weight, mean, inverse_std)
        ctx.mark_non_differentiable(mean, variance)
        scale = weight * inverse_std
        return _affine(input, scale, bias - mean * scale), mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, inverse_std = ctx.saved_tensors
        grad_bias = _sum_per_channel(_wide(grad))
        grad_weight = (_sum_per_channel(_wide(grad) * _wide(input)) - mean * grad_bias) * inverse_std
        mean_bias, mean_weight = _sum_across_ranks(torch.stack([grad_bias, grad_weight])) / _global_count(input)
        # d(input) = scale * (grad - mean_bias - normalised * mean_weight), as one affine form of input and grad
        scale = weight * inverse_std
        slope = -scale * inverse_std * mean_weight
        grad_input = _affine(input, slope, -scale * mean_bias - mean * slope)
        grad_input.addcmul_(grad, _per_channel(scale, grad))
        return grad_input, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None


def _moments_per_sample(input: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each sample and channel, float64 (N, C)."""
    if input.device.type != "cpu":
        variances, means = torch.var_mean(_wide(input), dim=[2, 3], correction=0)
    else:  # var_mean is slow there (measured on 32x128x32x32: 24 ms against 0.9)
        moments = [torch.batch_norm_update_stats(sample, None, None, 0.0) for sample in _wide(input).split(1)]
        means, variances = torch.stack([m for m, _ in moments]), torch.stack([v for _, v in moments])
    return means.double(), variances.double()


def _sum_per_channel(values: Tensor) -> Tensor:
    """Return the sum over samples and pixels, float64 (C): samples in their own type, their sums in float64."""
    return values.sum([2, 3]).double().sum(0)


def _wide(values: Tensor) -> Tensor:
    """Return half-precision values as float32: moments of activations do not fit 8 or 11 bits."""
    return values if values.dtype == torch.float64 else values.float()


def _affine(input: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Return input * scale + offset per channel, in the type and memory format of input, in one pass over memory."""
    return torch.addcmul(_per_channel(offset, input), input, _per_channel(scale, input)).to(input.dtype)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Return float32 (C) as (1, C, 1, 1) against an input of half or single precision, float64 against float64."""
    return values.to(torch.promote_types(like.dtype, torch.float32)).view(1, -1, 1, 1)


def _sum_across_ranks(values: Tensor) -> Tensor:
    if _world_size() > 1:
        dist.all_reduce(values)
    return values


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _global_count(input: Tensor) -> int:
    """Return over how many values a channel's moments are taken; the ranks hold equally many."""
    return input.numel() // input.shape[1] * _world_size()
