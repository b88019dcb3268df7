"""Moving average of the generator's weights (as in Karras et al. 2018, arXiv 1710.10196), and images from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from dist_dcgan.config import Config
from dist_dcgan.random_streams import Key, normal, stream_seed, uniform

_BATCH = 64  # images at a time outside training


def draw_latents(config: Config, key: Key, slots: range, device: torch.device) -> Tensor:
    """Return z for `slots` of the global batch, float32 (len(slots), latent_dim); uniform ones lie in [-1, 1]."""
    if config.model.latent == "normal":
        return normal(key, slots, config.model.latent_dim, device)
    return uniform(key, slots, config.model.latent_dim, device).mul_(2).sub_(1)


def ema_decay(config: Config, images_seen: int, global_batch: int) -> float:
    """Return the decay of one step.

    The half-life grows with the images seen up to its full length; otherwise a run of a few hundred steps would
    export its first weights.
    """
    half_life = min(config.ema.half_life_images, config.ema.ramp_up * images_seen)
    return float(0.5 ** (global_batch / max(half_life, 1e-8)))


@torch.no_grad()
def update_ema(averaged: nn.Module, current: nn.Module, weight: Tensor, finite: Tensor) -> None:
    """Move the averaged parameters towards the current ones by `weight`, 1 - decay, a float32 scalar.

    `finite`, a bool scalar, is False if the optimizer skipped the step due to non-finite gradients; the average then
    stays. Both are read on the device, without synchronising the host.
    Buffers are not averaged: batch-norm statistics belong to other weights (`recompute_statistics`).
    """
    weight = (finite * weight).to(next(averaged.parameters()).dtype)  # a network has one dtype
    for average, parameter in zip(averaged.parameters(), current.parameters(), strict=True):
        average.lerp_(parameter, weight)


@torch.no_grad()
def recompute_statistics(generator: nn.Module, config: Config, device: torch.device, dtype: torch.dtype) -> None:
    """Set the batch-norm statistics of `generator` to those of its own images from fixed z.

    A pure function of the weights without communication, so that rank 0 can call it alone: `generator` has local batch
    norms. Before the call, the statistics are those of earlier weights.
    """
    key, slots = stream_seed(config.seed, "ema statistics", 0), range(config.ema.statistics_images)
    batches = (slots[first : first + _BATCH] for first in range(0, len(slots), _BATCH))
    update_bn((draw_latents(config, key, batch, device).to(dtype) for batch in batches), generator)
    generator.eval()


@torch.no_grad()
def sample_images(
    generator: nn.Module, config: Config, slots: range, device: torch.device, stream: str = "samples"
) -> Tensor:
    """Return an image per slot, (len(slots), 3, size, size) in [-1, 1], from fixed z; `generator` is in eval mode."""
    dtype = next(generator.parameters()).dtype
    z = draw_latents(config, stream_seed(config.seed, stream, 0), slots, device).to(dtype)
    return torch.cat([generator(part) for part in z.split(_BATCH)])
