"""What ranks say to each other: the collectives of a step, on real ranks or on one process that stands for one of many.

torch sends each collective through its dispatcher as an operator of the namespace c10d by any caller (Python, or
DDP's reducer in C++) and whatever carries it out, so that a dispatch mode sees them all.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_dcgan.distributed.world import World
from dist_dcgan.training.steps import train_step
from dist_dcgan.training.train_state import TrainState
from tests.benchmarks.measuring import constant_batch
from tests.support.operations import NORM_BACKWARD, NORM_FORWARD, Parts

GRADIENTS = "gradients"
STEPS_TO_SETTLE = 2
"""DDP groups its gradients anew after its first backward, and tells the other ranks in the second step."""


class Collective(NamedTuple):
    """One collective."""

    kind: str
    """torch's name of it, such as allreduce_."""
    dtype: str
    """Type of its elements, such as float32."""
    bytes: int
    """Of the tensors that the rank hands over."""
    purpose: str = ""
    """Part of the step: batch norm forward or backward, or the gradients."""


class Recorder(TorchDispatchMode):
    """Lists the collectives that this thread issues, and those of its backward passes, while it is entered."""

    def __init__(self, parts: Parts | None = None) -> None:
        """`parts` tells the purpose of each."""
        super().__init__()
        self.collectives: list[Collective] = []
        self._parts = parts or Parts("")

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            kind = func._schema.name.removeprefix("c10d::")
            handed_over = args[1] if "allgather" in kind else args[0]  # what is gathered comes before what is given
            tensors = [leaf for leaf in tree_leaves(handed_over) if isinstance(leaf, Tensor)]
            dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
            size = sum(tensor.nbytes for tensor in tensors)
            self.collectives.append(Collective(kind, dtype, size, self._parts.current))
        return func(*args, **(kwargs or {}))


def recorded(function: Callable[[], object]) -> list[Collective]:
    """Return the collectives of one call, in order."""
    recorder = Recorder()
    with recorder:
        function()
    return recorder.collectives


def recorded_step(state: TrainState) -> list[Collective]:
    """Return the collectives of one training step, after those in which DDP settles."""
    real = constant_batch(state)
    for _ in range(STEPS_TO_SETTLE):
        train_step(state, real)
    parts = Parts(GRADIENTS)
    recorder = Recorder(parts)
    with parts.of_norms(state), recorder:
        train_step(state, real)
    return recorder.collectives


@contextmanager
def one_of(world_size: int) -> Iterator[World]:
    """Stand for rank 0 of `world_size`: every collective is over at once, and brings nothing from the others."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield World(0, 0, world_size, torch.device("cpu"))
    finally:
        gc.collect()  # as in `process_group`
        dist.destroy_process_group()


def reduce_at_once(state: TrainState) -> None:
    """Have DDP reduce where there are no other ranks: the future of a fake reduction fails an assert of its reducer.

    (torch 2.14.1.) The hook issues the reduction that DDP would, and hands over a future that is complete.
    """
    for network in (state.ddp_generator, state.ddp_discriminator):
        assert isinstance(network, DistributedDataParallel)
        # A lambda has no annotations: DDP compares them with classes, and here they are strings.
        network.register_comm_hook(None, lambda _, bucket: _reduce(bucket.buffer()))


def _reduce(gradients: Tensor) -> torch.futures.Future[Tensor]:
    dist.all_reduce(gradients)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(gradients)
    return done


def moments_and_gradients(collectives: Iterable[Collective]) -> tuple[list[int], list[int]]:
    """Return the bytes of each collective of batch norm's moments, and of each of gradients."""
    sizes: dict[str, list[int]] = {NORM_FORWARD: [], NORM_BACKWARD: [], GRADIENTS: []}
    for collective in collectives:
        sizes[collective.purpose].append(collective.bytes)
    return sizes[NORM_FORWARD] + sizes[NORM_BACKWARD], sizes[GRADIENTS]
