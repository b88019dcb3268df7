"""The step as training takes it: warmed up, and on a GPU recorded as one CUDA graph that the host launches at once.

A step launches some 500 kernels. At 128 images and the paper's width this takes the host longer than the GPU needs for
the work: on an H100 17 against 5.4 ms (tests/gpu/results).
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
"""Takes one step on this rank's images, (batch_per_rank, 3, size, size) in [-1, 1], channels_last, and counts it."""

WARM_UP_STEPS = 12
"""Before a graph is recorded: DDP waits for the GPU in its first 10 iterations, which must not be recorded."""


@contextmanager
def training_stream(device: torch.device) -> Iterator[None]:
    """Work on a stream other than the default one, of which no graph can be recorded; on a CPU this changes nothing.

    The state must be built within, too: DDP and autograd add gradients up on the stream that was current then.
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
    """Return what takes a step; call it within `training_stream`, as all that it returns.

    First it takes steps on grey images and undoes them. DDP rebuilds its gradient buckets after its first backward,
    which changes the order of summation: without this, a resumed run of 4 ranks would differ in the last bits from one
    that was never interrupted. It warms up the allocator and shows at once whether memory suffices. Raises UserError
    if the configuration wants a graph on a CPU.
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
    """Return whether steps are replays of a graph; raises UserError if they were to be on a CPU."""
    wanted, device = state.config.cuda_graph, state.world.device
    if wanted and device.type == "cpu":
        raise UserError("--cuda-graph needs a GPU: leave it out")
    if wanted is None:  # over several GPUs nobody has seen it run
        return device.type == "cuda" and state.world.world_size == 1
    return wanted


class Replay:
    """Takes steps by replaying one that was recorded: the same kernels on the same memory, with new contents."""

    def __init__(self, state: TrainState, like: Tensor) -> None:
        """Record a step of `state` on images such as `like`; nothing is computed."""
        self._state = state
        self._real = torch.empty_like(like)
        self._names: list[str] = []
        self._metrics, self._replay = record(self._step)

    def __call__(self, real: Tensor) -> Metrics:
        """Take one step on `real`, and count it."""
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
    """Record `work` on the current stream; return the tensor that each replay fills with its result, and the replay."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: what other threads allocate meanwhile is not recorded
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        result = work()
    return result, graph.replay
