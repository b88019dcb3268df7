"""One training step: D is updated on real and generated images, then G through the updated D.

Cost in forward passes of one network: D on real 3 (forward, and backward twice that), D on fake 3, G 3, D under G 2.
The usual loop needs one more, for unused weight gradients of D in G's update.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_dcgan.config import Config, Plan
from dist_dcgan.data.loader import flip
from dist_dcgan.models.losses import discriminator_loss_fake, discriminator_loss_real, generator_loss
from dist_dcgan.random_streams import normal
from dist_dcgan.training.ema import draw_latents, update_ema
from dist_dcgan.training.train_state import TrainState

Metrics = dict[str, Tensor]
"""Scalars on the device: gradient norms over the whole network, all others means over this rank's images, but for
`diversity`, a deviation over them."""

_OUT_OF_MEMORY = (
    "can't allocate memory",  # the CPU
    "CUDA error: out of memory",  # an AcceleratorError
    "CUDA ran out of memory outside PyTorch's allocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def train_step(state: TrainState, real: Tensor) -> Metrics:
    """Take and count one step on `real`, this rank's images (batch_per_rank, 3, size, size) in [-1, 1]."""
    state.inputs.fill(state.step)
    metrics = step_on_device(state, real)
    state.step += 1
    return metrics


def step_on_device(state: TrainState, real: Tensor) -> Metrics:
    """Compute a step, from the tensors of `state`, its `inputs` and `real` only.

    Uses no Python number that changes between steps and never synchronises, so a CUDA graph can capture it. G runs
    forward once: its images are used, detached, for D's update and then for its own.
    """
    if state.config.data.random_flip:
        real = flip(real, state.inputs.keys["flip"], state.slots)
    z = draw_latents(state.config, state.inputs.keys["z"], state.slots, state.world.device).to(state.dtype)
    with state.autocast():
        fake = state.ddp_generator(z)
    metrics = {"diversity/real": diversity(real), "diversity/fake": diversity(fake)}
    metrics |= discriminator_step(state, real, fake.detach()) | generator_step(state, fake)
    finite = torch.isfinite(metrics["grad_norm/g"])
    update_ema(state.generator_ema, state.generator, state.inputs.ema_weight, finite)
    return metrics


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether a step failed because memory ran out, on a GPU or on the CPU.

    CUDA and its libraries allocate memory outside torch, and raise RuntimeErrors of their own. During the capture of a
    CUDA graph such an error is the context of another one, which reports that the capture failed.
    """
    if isinstance(error.__context__, RuntimeError) and is_out_of_memory(error.__context__):
        return True
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


def memory_remedy(error: RuntimeError, config: Config, plan: Plan) -> str:
    """Return the sizes that took too much memory, the remedy and the reason, for an error message."""
    smaller = "a smaller --batch-per-rank" if config.batch_per_rank else "more ranks, or a smaller --global-batch"
    scores = "" if config.quality.extractor == "none" else ", or --quality.extractor none if a score took it"
    return (
        f"with {plan.batch_per_rank} images per rank at width {config.width}: use {smaller} or --width{scores} "
        f"({str(error).splitlines()[0]})"
    )


def discriminator_step(state: TrainState, real: Tensor, fake: Tensor) -> Metrics:
    """Update D on real and generated images, as two batches with separate batch-norm statistics.

    Gradients of the real half accumulate locally; the fake half's backward reduces the sum once. One autocast context
    contains both forwards, so that it casts each weight once. It opens and closes within the step, so that a CUDA graph
    captures the casts.
    """
    state.optimizer_d.zero_grad(set_to_none=True)
    with state.autocast():
        with state.ddp_discriminator.no_sync():  # forward and backward: DDP decides at the forward
            logits_real = state.ddp_discriminator(_with_noise(state, real, "noise on real"))
            with state.autocast(enabled=False):
                loss_real = discriminator_loss_real(logits_real, state.config.loss)
                state.scaler_d.scale(loss_real).backward()
        logits_fake = state.ddp_discriminator(_with_noise(state, fake, "noise on fake"))
    loss_fake = discriminator_loss_fake(logits_fake, state.config.loss)
    state.scaler_d.scale(loss_fake).backward()
    return {
        "loss/d": (loss_real + loss_fake).detach(),
        "score/real": _score(logits_real),
        "score/fake": _score(logits_fake),
        "logit/real": _mean(logits_real),
        "logit/fake": _mean(logits_fake),
        "grad_norm/d": _update(state, state.optimizer_d, state.scaler_d, state.discriminator),
    }


def generator_step(state: TrainState, fake: Tensor) -> Metrics:
    """Update G by the gradient of its loss through the updated D.

    D is called without DDP and frozen, because its gradients are not used.
    """
    state.optimizer_g.zero_grad(set_to_none=True)
    with _frozen(state.discriminator), state.autocast():
        logits_fake = state.discriminator(_with_noise(state, fake, "noise under G"))
    loss = generator_loss(logits_fake, state.config.loss)
    state.scaler_g.scale(loss).backward()
    return {
        "loss/g": loss.detach(),
        "score/fake_updated": _score(logits_fake),
        "logit/fake_updated": _mean(logits_fake),
        "grad_norm/g": _update(state, state.optimizer_g, state.scaler_g, state.generator),
    }


def _with_noise(state: TrainState, images: Tensor, stream: str) -> Tensor:
    """Return images with instance noise, drawn in the memory format of the images."""
    sigma = state.config.noise.sigma
    if sigma == 0:
        return images
    count, channels, height, width = images.shape
    noise = normal(state.inputs.keys[stream], state.slots, channels * height * width, images.device)
    return images + noise.view(count, height, width, channels).permute(0, 3, 1, 2).to(state.dtype) * sigma


def _update(state: TrainState, optimizer: torch.optim.Adam, scaler: torch.amp.GradScaler, network: nn.Module) -> Tensor:
    """Apply the reduced gradients and return their norm; if they are not finite, the step is skipped.

    Reduced gradients are equal on all ranks, including an infinity from one of them, so all ranks skip the same steps.
    """
    scaler.unscale_(optimizer)
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    scaler.step(optimizer)
    scaler.update(None if state.precision == "fp16" else 1.0)
    return norm


def _score(logits: Tensor) -> Tensor:
    """Return D's mean probability of real."""
    return logits.detach().float().sigmoid().mean()


def _mean(logits: Tensor) -> Tensor:
    return logits.detach().float().mean()


def diversity(images: Tensor) -> Tensor:
    """Return the diversity of a batch: the standard deviation over images of their 8x8 thumbnails.

    Thumbnails, because images of the same layout with different noise differ in every pixel. The fewer images, the
    lower: 0 for one, and 3 % lower for 16 than for very many.
    """
    thumbnails = F.adaptive_avg_pool2d(images.detach().float(), 8)
    return thumbnails.std(0, correction=0).mean()


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
