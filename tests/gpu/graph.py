"""Replays of the captured step must compute what the step computes.

A CPU has no CUDA graphs: in a rehearsal a replay calls the step itself.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from dist_dcgan.training import graph
from dist_dcgan.training.graph import TakeStep, training_stream
from dist_dcgan.training.steps import train_step
from dist_dcgan.training.train_state import TrainState
from tests.benchmarks.measuring import constant_images
from tests.gpu.items import Context, Figures, need_norm
from tests.gpu.training import largest_difference, make_state, networks

STEPS = 10


def prepare(state: TrainState, *, recorded: bool) -> TakeStep:
    """Return a function that takes a step of 64x64 images, with or without a graph; call in `training_stream`."""
    record = graph.record if state.world.device.type == "cuda" else _stand_in
    with mock.patch.object(graph, "record", record), mock.patch.object(graph, "takes_graph", return_value=recorded):
        return graph.prepare_step(state, 64)


def check_equality(context: Context, precision: str, kind: str) -> Figures:
    """Compare replays with the same steps taken without a graph, networks and metrics; each step has its own images."""
    need_norm(kind, context.device)
    width, batch = context.sized((32, 32), (8, 8))
    options = {"width": width, "global_batch": batch, "precision": precision, "distributed": {"batchnorm": kind}}
    with training_stream(context.device):
        plain, recorded = (make_state(context.world, options) for _ in range(2))
        replay = prepare(recorded, recorded=True)
        batches = constant_images(batch * STEPS, context.device, plain.dtype).chunk(STEPS)
        metrics = [(train_step(plain, images), replay(images)) for images in batches]
    assert recorded.step == plain.step == STEPS
    difference = largest_difference(networks(recorded), networks(plain))
    bound = 1e-9 if precision == "fp64" else 0.05
    assert difference <= bound, f"after {STEPS} steps the networks differ by {difference:.3g}, more than {bound:g}"
    tolerance = 1e-6 if precision == "fp64" else 0.05
    for step, (expected, found) in enumerate(metrics):
        assert list(expected) == list(found)
        for name, value in expected.items():
            close = torch.allclose(found[name].double(), value.double(), tolerance, tolerance, equal_nan=True)
            assert close, f"{name} of step {step} is {float(found[name])}, not {float(value)}"
    return {"largest_difference": difference, "steps": STEPS}


def _stand_in(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """Replace `graph.record` on a CPU: call `work`, which `prepare_step` undoes, and again in each replay."""
    result = work().clone()

    def replay() -> None:
        result.copy_(work())

    return result, replay
