"""The training step on the meta device, where tensors have shapes but no values, and no operation takes time.

Whatever would read a value there is an error. DDP and torch.autocast, which do not know the device, have stand-ins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode

from dist_dcgan.distributed.world import World
from dist_dcgan.training.train_state import TrainState
from tests.gpu.training import make_state

META = torch.device("meta")
CONVOLUTIONS = (torch.conv2d, F.conv2d, torch.conv_transpose2d, F.conv_transpose2d)


class AutocastOnMeta(TorchFunctionMode):
    """Does to convolutions on the meta device what torch.autocast, which knows no meta device, does on others.

    While it is entered, its contexts stand in for those of torch.autocast: convolutions compute in half precision, and
    trained weights are cast once until the outermost context is left.
    """

    def __init__(self) -> None:
        super().__init__()
        self._dtype: torch.dtype | None = None
        self._depth = 0
        self._cast: dict[int, Tensor] = {}

    @contextmanager
    def context(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True) -> Iterator[None]:
        """Take the arguments of torch.autocast."""
        before, self._dtype = self._dtype, dtype if enabled else None
        self._depth += 1
        try:
            yield
        finally:
            self._dtype = before
            self._depth -= 1
            if self._depth == 0:
                self._cast.clear()

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self._dtype is not None and func in CONVOLUTIONS:
            args = (self._half(args[0]), self._half(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))

    def _half(self, values: Tensor) -> Tensor:
        assert self._dtype is not None
        if not (values.is_leaf and values.requires_grad):
            return values.to(self._dtype)
        if id(values) not in self._cast:
            self._cast[id(values)] = values.to(self._dtype)
        return self._cast[id(values)]


@contextmanager
def state_on_meta(**options: Any) -> Iterator[TrainState]:
    """Yield the state of one rank on the meta device, of width 8 and batch 4."""
    autocast = AutocastOnMeta()
    with (
        mock.patch.object(torch, "autocast", autocast.context),
        mock.patch.object(clip_grad, "_has_foreach_support", return_value=True),  # as on CPUs and GPUs
        autocast,
    ):
        yield make_state(World(0, 0, 1, META), {"width": 8, "global_batch": 4, **options})
