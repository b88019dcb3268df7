"""A few steps of real training on CPU ranks, with the mistakes that the tests must be able to see."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from dist_dcgan.config import Config, make_plan
from dist_dcgan.data.loader import BatchLoader, to_images
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.node import node_store
from dist_dcgan.distributed.world import process_group
from dist_dcgan.training import steps, train_state
from dist_dcgan.training.ema import draw_latents, recompute_statistics
from dist_dcgan.training.train_state import TrainState


@dataclass
class Outcome:
    """What a rank saw and what it ended with."""

    keys: list[list[str]] = field(default_factory=list)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)


def train_steps(data: Path, options: dict[str, Any], count: int, mistake: str | None = None) -> Outcome:
    """Take `count` steps and return the sample keys of each and the final tensors of networks and EMA."""
    config = Config(data={"path": data}, **options)
    outcome = Outcome()
    with process_group(60, "cpu") as world, MISTAKES[mistake]() if mistake else contextlib.nullcontext():
        place = Folder(data)
        manifest = place.manifest
        plan = make_plan(config, world.world_size, manifest.samples)
        reader = ShardReader(place)
        state = TrainState(config, plan, world, manifest.image_size)
        if mistake == "raw discriminator":
            state.ddp_discriminator = _Raw(state.discriminator)
        with BatchLoader(place, config, plan, world, 0, node_store(world, 60)) as batches:
            for _, batch in zip(range(count), batches, strict=False):
                outcome.keys.append(reader.keys(batch.samples))
                steps.train_step(state, to_images(batch, state.dtype))
        recompute_statistics(state.generator_ema, config, world.device, state.dtype)
        outcome.tensors = {name: tensor.detach().numpy().copy() for name, tensor in state.tensors().items()}
    return outcome


class _Raw(nn.Module):
    """Stands in for DDP and reduces nothing."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def no_sync(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()


def _plain_batchnorm() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(train_state, "make_norm", return_value=nn.BatchNorm2d)


def _z_per_rank() -> contextlib.AbstractContextManager[Any]:
    def draw(config: Config, key: Tensor, slots: range, device: torch.device) -> Tensor:
        return draw_latents(config, key + slots.start, range(len(slots)), device)

    return mock.patch.object(steps, "draw_latents", draw)


MISTAKES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "plain batch norm": _plain_batchnorm,
    "raw discriminator": contextlib.nullcontext,
    "z per rank": _z_per_rank,
}
