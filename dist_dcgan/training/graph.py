"""The training step, warmed up, and on a GPU captured as one CUDA graph that the host launches at once.

A step launches about 500 kernels. With 128 images at the paper's width the host takes longer to launch them than the
GPU to execute them: on an H100 17 against 5.4 ms (tests/gpu/results).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from dist_dcgan.training.steps import Metrics, step_on_device, train_step
from dist_dcgan.training.train_state import TrainState
from shards.common.errors import UserError

TakeStep = Callable[[Tensor], Metrics]
"""Takes and counts one step on this rank's images, (batch_per_rank, 3, size, size) in [-1, 1], channels_last."""

WARM_UP_STEPS = 12
"""Steps before capture: DDP synchronises with the GPU in its first 10 iterations, which cannot be captured."""


@contextmanager
def training_stream(device: torch.device) -> Iterator[None]:
    """Work on a stream other than the default one, on which no graph can be captured; does nothing on a CPU.

    The state must be built inside as well: DDP and autograd accumulate gradients on the stream that is current then.
    """
    if device.type == "cpu":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def prepare_step(state: TrainState, image_size: int) -> TakeStep:
    """Return a function that takes a step; call both within `training_stream`.

    First takes steps on grey images and undoes them. DDP rebuilds its gradient buckets after its first backward, which
    changes the order of summation: without this, a resumed run of 4 ranks would differ in the last bits from an
    uninterrupted one. It also warms up the allocator and shows at once whether memory suffices. Raises UserError if the
    configuration asks for a graph on a CPU.
    """
    with_graph = takes_graph(state)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    values = state.values()
    shape = (state.plan.batch_per_rank, 3, image_size, image_size)
    grey = torch.zeros(shape, dtype=state.dtype, device=state.world.device)
    grey = grey.contiguous(memory_format=torch.channels_last)
    for _ in range(WARM_UP_STEPS if with_graph else 1):
        train_step(state, grey)
    state.assert_equal_strides()
    take_step = Replay(state, grey) if with_graph else partial(train_step, state)
    state.load_tensors(before)
    state.load_values(values)
    return take_step


def takes_graph(state: TrainState) -> bool:
    """Return whether steps are replays of a graph; raises UserError if that is configured on a CPU."""
    wanted, device = state.config.cuda_graph, state.world.device
    if wanted and device.type == "cpu":
        raise UserError("--cuda-graph needs a GPU: leave it out")
    if wanted is None:  # not tested on several GPUs
        return device.type == "cuda" and state.world.world_size == 1
    return wanted


class Replay:
    """Takes steps by replaying a captured one: the same kernels on the same memory, with new contents."""

    def __init__(self, state: TrainState, like: Tensor) -> None:
        """Capture a step of `state` on images like `like`; nothing is computed."""
        self._state = state
        self._real = torch.empty_like(like)
        self._names: list[str] = []
        self._metrics, self._replay = record(self._step)

    def __call__(self, real: Tensor) -> Metrics:
        """Take and count one step on `real`."""
        self._state.inputs.fill(self._state.step)
        self._real.copy_(real)
        self._replay()
        self._state.step += 1
        return dict(zip(self._names, self._metrics.clone().unbind(), strict=True))  # the next replay overwrites them

    def _step(self) -> Tensor:
        metrics = step_on_device(self._state, self._real)
        self._names = list(metrics)
        return torch.stack([value.detach() for value in metrics.values()])


def record(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """Capture `work` on the current stream; return its result tensor, which each replay fills, and the replay."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads may allocate during the capture
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        result = work()
    return result, graph.replay
