"""The training step that most ports of DCGAN have, to compare with."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from dist_dcgan.models.networks import Discriminator, Generator, init_weights
from tests.benchmarks.measuring import compute_dtype


class PlainLoop:
    """Sigmoid and BCELoss, weight gradients of D in G's turn, torch's own batch norm, no noise, no EMA.

    As most ports have it, in float32, contiguous layout, with an unfused Adam. `tuned` gives the same loop what people
    give it who look after speed: the precision that training has here (bf16 autocast on a GPU), channels_last and fused
    Adam.
    """

    def __init__(self, width: int, device: torch.device, seed: int = 0, *, tuned: bool = False) -> None:
        self._device, self._half = device, tuned and compute_dtype(device) == torch.bfloat16
        self._format = torch.channels_last if tuned else torch.contiguous_format
        self.generator = Generator(width)
        self.discriminator = nn.Sequential(Discriminator(width), nn.Sigmoid())
        for network in (self.generator, self.discriminator):
            init_weights(network, torch.Generator().manual_seed(seed))
            network.to(device, memory_format=self._format)  # type: ignore[call-overload]
        adam: dict[str, Any] = {"lr": 2e-4, "betas": (0.5, 0.999)} | ({"fused": True} if tuned else {"foreach": False})
        self._optimizer_g = torch.optim.Adam(self.generator.parameters(), **adam)
        self._optimizer_d = torch.optim.Adam(self.discriminator.parameters(), **adam)
        self._criterion = nn.BCELoss()

    def step(self, real: Tensor) -> None:
        """Update both networks on `real`."""
        real = real.contiguous(memory_format=self._format)
        ones, zeros = torch.ones(len(real), device=real.device), torch.zeros(len(real), device=real.device)
        self.discriminator.zero_grad()
        self._loss(real, ones).backward()
        with self._autocast():
            fake = self.generator(torch.randn(len(real), 100, device=real.device))
        self._loss(fake.detach(), zeros).backward()
        self._optimizer_d.step()
        self.generator.zero_grad()
        self._loss(fake, ones).backward()
        self._optimizer_g.step()

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        with self._autocast():
            probabilities = self.discriminator(images)
        loss: Tensor = self._criterion(probabilities.float(), targets)  # autocast refuses BCELoss
        return loss

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._half)
