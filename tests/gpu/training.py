"""A few steps of training for the checks, and how far two of them are apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_dcgan.config import Config, make_plan
from dist_dcgan.distributed.world import World
from dist_dcgan.training.steps import Metrics, train_step
from dist_dcgan.training.train_state import TrainState
from tests.benchmarks.measuring import constant_images

Arrays = dict[str, np.ndarray]
"""Tensors by name, on the host."""


def make_state(world: World, options: Mapping[str, Any], samples: int = 100_000) -> TrainState:
    """Return the state of a training of 64x64 images; the same options give the same weights everywhere."""
    config = Config(**options)
    return TrainState(config, make_plan(config, world.world_size, samples), world, 64)


def own_images(state: TrainState) -> Tensor:
    """Return this rank's slice of the constant images of a global batch."""
    images = constant_images(state.plan.global_batch, state.world.device, state.dtype)
    return images[state.slots.start : state.slots.stop]


def train(state: TrainState, real: Tensor, steps: int) -> Metrics:
    """Take some steps on the same images, and return the metrics of the last."""
    for _ in range(steps - 1):
        train_step(state, real)
    return train_step(state, real)


def networks_after(world: World, options: Mapping[str, Any], steps: int) -> Arrays:
    """Return the networks after some steps on the constant images."""
    state = make_state(world, options)
    metrics = train(state, own_images(state), steps)
    state.assert_equal_strides()
    scaling = "grad_norm" if state.precision == "fp16" else None  # the first scale may be too large
    checked = {name: value for name, value in metrics.items() if not (scaling and name.startswith(scaling))}
    not_finite = [name for name, value in checked.items() if not torch.isfinite(value)]
    assert not not_finite, f"not finite after {steps} steps: {', '.join(not_finite)}"
    return networks(state)


def networks(state: TrainState) -> Arrays:
    """Return parameters and buffers of G, D and the averaged G, copied to the host."""
    tensors = state.tensors()
    names = [name for name in tensors if name.startswith(("generator", "discriminator"))]
    assert {name.split(".")[0] for name in names} == {"generator", "discriminator", "generator_ema"}
    return arrays({name: tensors[name] for name in names})


def snapshot(state: TrainState) -> dict[str, Tensor]:
    """Return a copy of all tensors of a state, on its device and in their memory formats."""
    return {name: tensor.detach().clone() for name, tensor in state.tensors().items()}


def arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    """Return a copy of tensors on the host, which other processes can be sent."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}


def largest_difference(a: Arrays, b: Arrays) -> float:
    """Return the largest difference of an element; infinite if one is not finite."""
    assert a.keys() == b.keys()
    differences = np.array([np.abs(a[name].astype(np.float64) - b[name]).max() for name in a])
    return float(np.nan_to_num(differences, nan=np.inf).max())
