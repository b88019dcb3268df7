"""Batch norms that exchange statistics on a single rank, to time what several ranks do: the collectives are real."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as SyncFunction

from dist_dcgan.models import batchnorm
from dist_dcgan.training import train_state


class NativeAcross(nn.SyncBatchNorm):
    """torch's layer, exchanging statistics although there is one rank."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise as `nn.SyncBatchNorm` does on several ranks."""
        if not self.training:
            return super().forward(input)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weights = (self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum)
        output: Tensor = SyncFunction.apply(input, *weights, dist.group.WORLD, 1)
        return output


class DirectAcross(batchnorm.DirectBatchNorm):
    """The project's layer for GPUs, exchanging statistics although there is one rank."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise as `DirectBatchNorm` does on several ranks."""
        return self._across_ranks(input) if self.training else nn.BatchNorm2d.forward(self, input)


LAYERS: dict[str, type[nn.BatchNorm2d] | type[nn.SyncBatchNorm]] = {"native": NativeAcross, "direct": DirectAcross}


@contextmanager
def across_ranks(kind: str) -> Iterator[None]:
    """Inside, networks are built with these layers, and their collectives are not left out for a single rank."""

    def make_norm(*_: Any) -> Any:
        return LAYERS[kind]

    def reduced(values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    with (
        mock.patch.object(train_state, "make_norm", make_norm),
        mock.patch.object(batchnorm, "_sum_across_ranks", reduced),
    ):
        yield
