"""One CUDA graph of the whole training step, in test code: what it must compute, and how fast it would be."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_dcgan.training.steps import train_step
from dist_dcgan.training.train_state import TrainState
from tests.benchmarks.measuring import Call
from tests.gpu.items import Context, Figures, need_norm
from tests.gpu.training import constant_images, largest_difference, make_state, networks, snapshot

WARM_UP_STEPS = 12
"""DDP synchronises in its first 10 iterations; fewer must not be captured."""
STEPS = 10


def capture(state: TrainState, real: Tensor) -> Call:
    """Return a call that takes a step on whatever `real` holds then, captured once and replayed.

    Warms up on a stream of its own; what training changed meanwhile is put back, as `dry_step` does. A CPU has no
    graphs: there the step itself stands in for the replay.
    """
    before, values = snapshot(state), state.values()
    step = _captured(state, real) if real.is_cuda else lambda: train_step(state, real)
    state.load_tensors(before)
    state.load_values(values)
    return step


def _captured(state: TrainState, real: Tensor) -> Call:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            train_step(state, real)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    # thread_local: what other threads allocate meanwhile, as the loader does, is not captured
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        train_step(state, real)

    def replay() -> None:
        graph.replay()
        state.step += 1

    return replay


def check_equality(context: Context, precision: str, kind: str) -> Figures:
    """Compare steps by replay with the same steps one by one; each step has images of its own."""
    need_norm(kind, context.device)
    width, batch = context.sized((32, 32), (8, 8))
    options = {"width": width, "global_batch": batch, "precision": precision, "distributed": {"batchnorm": kind}}
    plain, captured = (make_state(context.world, options) for _ in range(2))
    images = constant_images(batch * STEPS, context.device, plain.dtype).chunk(STEPS)
    real = images[0].clone(memory_format=torch.preserve_format)
    replay = capture(captured, real)
    for batch_of_step in images:
        train_step(plain, batch_of_step)
        real.copy_(batch_of_step)
        replay()
    difference = largest_difference(networks(captured), networks(plain))
    assert captured.step == plain.step == STEPS
    bound = 1e-9 if precision == "fp64" else 0.05
    assert difference <= bound, f"after {STEPS} steps the networks differ by {difference:.3g}, more than {bound:g}"
    return {"largest_difference": difference, "steps": STEPS}
