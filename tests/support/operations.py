"""What a training step asks of its device, operation by operation, without a device.

A dispatch mode sees each operation of torch before it runs, those of backward passes included. On the meta device
tensors have shapes but no values (`meta_device.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dist_dcgan.training import steps
from dist_dcgan.training.train_state import TrainState

NORM_FORWARD, NORM_BACKWARD = "batch norm, forward", "batch norm, backward"
ALLOCATIONS = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided)
FUNCTIONS = (
    (steps, "draw_latents", "z"),
    (steps, "flip", "flips"),
    (steps, "_with_noise", "noise"),
    (steps, "diversity", "metrics"),
    (steps, "_score", "metrics"),
    (steps, "_mean", "metrics"),
    (nn.utils, "get_total_norm", "metrics"),
    (steps, "_update", "Adam and scaler"),
    (steps, "update_ema", "EMA"),
)
"""Functions of the step, each with the part that it is."""


class Operation(NamedTuple):
    """One operation."""

    name: str
    """Such as aten.add.Tensor."""
    arguments: Any
    """As passed, with a description of each tensor in its place."""
    part: str
    """Part of the step that it belongs to."""
    launches: bool
    """Whether the device has work to do, as it has not for views and allocations."""


class Parts:
    """Tells to which part of the step belongs what happens now."""

    def __init__(self, default: str) -> None:
        self._names = [default]

    @property
    def current(self) -> str:
        """Name of the innermost part."""
        return self._names[-1]

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Be in the part `name`."""
        self._names.append(name)
        try:
            yield
        finally:
            self._names.pop()

    def within_backward(self, name: str, output: Tensor) -> None:
        """Be in the part `name` when the backward pass goes through the node that made `output`."""
        assert output.grad_fn is not None
        output.grad_fn.register_prehook(lambda _: self._names.append(name))
        output.grad_fn.register_hook(lambda *_: self._names.pop() and None)

    @contextmanager
    def of_functions(self, functions: Iterable[tuple[Any, str, str]]) -> Iterator[None]:
        """Be in a part while one of `functions` runs, each given by owner, name and part."""
        with ExitStack() as stack:
            for owner, name, part in functions:
                stack.enter_context(mock.patch.object(owner, name, self._function(part, getattr(owner, name))))
            yield

    @contextmanager
    def of_norms(self, state: TrainState) -> Iterator[None]:
        """Be in `NORM_FORWARD` and `NORM_BACKWARD` while the batch norms of `state` run."""
        networks = (state.generator, state.discriminator)
        modules = [module for network in networks for module in network.modules()]
        with ExitStack() as stack:
            for module in modules:
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    stack.enter_context(mock.patch.object(module, "forward", self._norm(module.forward)))
            yield

    def _function(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            with self.within(part):
                return function(*arguments, **options)

        return wrapped

    def _norm(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def wrapped(input: Tensor) -> Tensor:
            with self.within(NORM_FORWARD):
                output = forward(input)
            self.within_backward(NORM_BACKWARD, output)
            return output

        return wrapped


class OperationRecorder(TorchDispatchMode):
    """Lists the operations of this thread, and of its backward passes, while it is entered."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._parts = parts

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace != "profiler":
            described = tree_map(_described, (args, kwargs or {}))
            launches = not (func.is_view or func.overloadpacket in ALLOCATIONS)
            self.operations.append(Operation(str(func), described, self._parts.current, launches))
        return func(*args, **(kwargs or {}))


class Unsynchronised(TorchDispatchMode):
    """Raises an AssertionError if an operation makes the host wait for the device, or mixes devices."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        stray = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)} - {self._device}
        assert not stray, f"{func} on {self._device} takes a tensor on {', '.join(map(str, stray))}"
        assert not _reads_values(func, args), f"{func} waits for the values of its arguments"
        assert func is not torch.ops.aten.lift_fresh.default, f"{func} copies numbers of the host to the device"
        return func(*args, **(kwargs or {}))


def _reads_values(func: Any, args: Sequence[Any]) -> bool:
    """Return whether what `func` returns, or its shape, depends on values, so that the host has to know them."""
    if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def _described(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return f"{value.device} {value.dtype} {tuple(value.shape)} {value.stride()}"


class OutsideTensors(TorchDispatchMode):
    """Collects the memory that operations use and that none of them made.

    For the meta device, where memory costs nothing: none is freed, so that no identity occurs twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}
        self._made: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        used = storages(tree_leaves((args, kwargs or {})))
        self.storages |= {key: storage for key, storage in used.items() if key not in self._made}
        result = func(*args, **(kwargs or {}))
        self._made |= {key: each for key, each in storages(tree_leaves(result)).items() if key not in self.storages}
        return result


def storages(values: Iterable[Any]) -> dict[int, torch.UntypedStorage]:
    """Return the memory of the tensors among `values` by its identity, which holds as long as it is referred to."""
    found = [value.untyped_storage() for value in values if isinstance(value, Tensor)]
    return {storage._cdata: storage for storage in found}


def real_images(state: TrainState) -> Tensor:
    """Return images for a step, all grey."""
    shape = (state.plan.batch_per_rank, 3, 64, 64)
    images = torch.zeros(shape, dtype=state.dtype, device=state.world.device)
    return images.contiguous(memory_format=torch.channels_last)


def operations_of_steps(state: TrainState, count: int = 1) -> list[list[Operation]]:
    """Return the operations of each of `count` calls of `step_on_device`, after a step that creates what is lazy."""
    recorded = []
    steps.train_step(state, real_images(state))
    step_on_device = steps.step_on_device

    def record(state: TrainState, real: Tensor) -> steps.Metrics:
        parts = Parts("networks")
        recorder = OperationRecorder(parts)
        with parts.of_functions(FUNCTIONS), parts.of_norms(state), recorder:
            metrics = step_on_device(state, real)
        recorded.append(recorder.operations)
        return metrics

    with mock.patch.object(steps, "step_on_device", record):
        for _ in range(count):
            steps.train_step(state, real_images(state))
    return recorded


def by_part(operations: Iterable[Operation]) -> Counter[str]:
    """Count the operations of each part that the device has to do; casts of the networks are a part of their own."""
    return Counter(
        "casts" if (each.part, each.name) == ("networks", "aten._to_copy.default") else each.part
        for each in operations
        if each.launches
    )
