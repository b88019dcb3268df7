"""A few steps of real training on CPU ranks, with the mistakes that the tests must be able to see."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_dcgan.config import Config
from dist_dcgan.data.loader import BatchLoader, to_images
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.node import node_store
from dist_dcgan.distributed.world import process_group
from dist_dcgan.training import steps, train_state
from dist_dcgan.training.ema import draw_latents, recompute_statistics
from dist_dcgan.training.train_state import TrainState, Undistributed
from tests.gpu.training import Arrays, make_state, networks


@dataclass
class Outcome:
    """What a rank saw and what it ended with."""

    keys: list[list[str]] = field(default_factory=list)
    tensors: Arrays = field(default_factory=dict)


def train_steps(data: Path, options: dict[str, Any], count: int, mistake: str | None = None) -> Outcome:
    """Take `count` steps and return the sample keys of each and the networks at the end."""
    outcome = Outcome()
    with process_group(60, "cpu") as world, MISTAKES[mistake]() if mistake else contextlib.nullcontext():
        place = Folder(data)
        reader = ShardReader(place)
        state = make_state(world, options, place.manifest.samples)
        with BatchLoader(place, state.config, state.plan, world, 0, node_store(world)) as batches:
            for _, batch in zip(range(count), batches, strict=False):
                outcome.keys.append(reader.keys(batch.samples))
                steps.train_step(state, to_images(batch, state.dtype))
        recompute_statistics(state.generator_ema, state.config, world.device, state.dtype)
        outcome.tensors = networks(state)
    return outcome


@contextlib.contextmanager
def smooth_activations() -> Iterator[None]:
    """Train with softplus for ReLU, and with the same slopes for leaky ReLU.

    Their gradients do not jump, so that rounding stays rounding.
    """

    def leaky(self: nn.LeakyReLU, input: Tensor) -> Tensor:
        return torch.lerp(F.softplus(input), input, self.negative_slope)

    smooth = mock.patch.object(nn.ReLU, "forward", lambda self, input: F.softplus(input))
    with smooth, mock.patch.object(nn.LeakyReLU, "forward", leaky):
        yield


def raw_discriminator() -> contextlib.AbstractContextManager[Any]:
    """Reduce no gradients of D, as after a `.module` in the wrong place."""
    real = TrainState._wrap

    def wrap(self: TrainState, network: nn.Module) -> nn.Module:
        return Undistributed(network) if network is self.discriminator else real(self, network)

    return mock.patch.object(TrainState, "_wrap", wrap)


def _plain_batchnorm() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(train_state, "make_norm", return_value=nn.BatchNorm2d)


def _z_per_rank() -> contextlib.AbstractContextManager[Any]:
    def draw(config: Config, key: Tensor, slots: range, device: torch.device) -> Tensor:
        return draw_latents(config, key + slots.start, range(len(slots)), device)

    return mock.patch.object(steps, "draw_latents", draw)


MISTAKES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "plain batch norm": _plain_batchnorm,
    "raw discriminator": raw_discriminator,
    "z per rank": _z_per_rank,
}
