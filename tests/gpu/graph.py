"""One CUDA graph of the whole training step, in test code: what it must compute, and how fast it would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from dist_dcgan.training.steps import step_on_device, train_step
from dist_dcgan.training.train_state import TrainState
from tests.benchmarks.measuring import Call
from tests.gpu.items import Context, Figures, need_norm
from tests.gpu.training import constant_images, largest_difference, make_state, networks, snapshot
from tests.meta_device import Undistributed

WARM_UP_STEPS = 12
"""DDP synchronises in its first 10 iterations; fewer must not be captured."""
STEPS = 10


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Work on a stream other than the default one, which cannot be captured; on a CPU this changes nothing.

    The state must be built on it, too: DDP and autograd accumulate gradients on the stream that was current then.
    """
    if device.type == "cpu":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def capture(state: TrainState, real: Tensor) -> Call:
    """Return a call that takes a step on whatever `real` holds then, captured once and replayed.

    Call it on the stream on which `state` was built (`own_stream`). What training changed in the warm-up is put back,
    as `dry_step` does. A CPU has no graphs: there the step itself stands in for the replay.
    """
    before, values = snapshot(state), state.values()
    step = _captured(state, real) if real.is_cuda else partial(step_on_device, state, real)
    state.load_tensors(before)
    state.load_values(values)

    def replay() -> None:
        state.inputs.fill(state.step)
        step()
        state.step += 1

    return replay


def _captured(state: TrainState, real: Tensor) -> Callable[[], object]:
    for _ in range(WARM_UP_STEPS):
        train_step(state, real)
    graph = torch.cuda.CUDAGraph()
    # thread_local: what other threads allocate meanwhile, as the loader does, is not captured
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        step_on_device(state, real)
    return graph.replay


def without_ddp(state: TrainState) -> TrainState:
    """Return the state with its networks called directly, as one rank could; DDP's hooks then do nothing."""
    for name in ("generator", "discriminator"):
        setattr(state, f"ddp_{name}", Undistributed(getattr(state, name)))
    return state


def check_equality(context: Context, precision: str, kind: str, *, ddp: bool = True) -> Figures:
    """Compare steps by replay with the same steps one by one; each step has images of its own."""
    need_norm(kind, context.device)
    width, batch = context.sized((32, 32), (8, 8))
    options = {"width": width, "global_batch": batch, "precision": precision, "distributed": {"batchnorm": kind}}
    with own_stream(context.device):
        plain, captured = (make_state(context.world, options) for _ in range(2))
        captured = captured if ddp else without_ddp(captured)
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
