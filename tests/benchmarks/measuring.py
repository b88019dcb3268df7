"""What benchmarks of the training step measure with: pace, host time, memory, operations, the machine's best rate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dist_dcgan.models.networks import Discriminator, Generator
from dist_dcgan.training.train_state import TrainState

Call = Callable[[], object]

WARM_UP = 3
_PRODUCT_SECONDS = 0.05
_SQUARES = {"cuda": (4096, 6144, 8192), "cpu": (1024, 2048, 3072)}
"""Sizes of square products: smaller ones are bound by launches on a GPU."""


class Pace(NamedTuple):
    """How fast something goes."""

    seconds: float
    """Seconds a call, one after the other without waiting for the device in between."""
    host_seconds: float
    """Median seconds until a call returns if the device has nothing else to do."""
    peak_bytes: int | None
    """Most memory that tensors took on the GPU; None on a CPU."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Call, device: torch.device, calls: int = 1) -> float:
    """Return the seconds of some calls, the device's work included."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return time.perf_counter() - started


def timed_together(function: Call, calls: int) -> float:
    """Return the seconds of some calls, begun and ended together by all ranks."""
    dist.barrier()
    started = time.perf_counter()
    for _ in range(calls):
        function()
    dist.barrier()
    return time.perf_counter() - started


def calls_within(function: Call, device: torch.device, seconds: float) -> int:
    """Return how many calls take about so many seconds, at least one."""
    return max(1, round(seconds / max(timed(function, device), 1e-6)))


def pace(function: Call, device: torch.device, seconds: float, warm_up: int = WARM_UP) -> Pace:
    """Measure calls that follow one another for about `seconds`; nothing waits for the device between them."""
    for _ in range(warm_up):
        function()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    host = statistics.median(_until_it_returns(function, device) for _ in range(min(warm_up, WARM_UP)))
    calls = calls_within(function, device, seconds)
    elapsed = timed(function, device, calls)
    return Pace(elapsed / calls, host, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None)


def _until_it_returns(function: Call, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


class Products:
    """The best rate at which the machine multiplies, over products of several shapes and all repeats.

    The shapes are squares, the products that the hidden convolutions of a width and batch amount to, and these
    convolutions themselves: two libraries, of which either may be the faster. Nothing that consists of such products
    can be faster than the best of them.
    """

    def __init__(
        self, width: int, batch: int, device: torch.device, dtype: torch.dtype, square: int | None = None
    ) -> None:
        """Make the operands; `square` replaces the sizes of the square products."""
        self._device, self._dtype = device, dtype
        self._products: dict[str, tuple[Call, float]] = {}
        for size in _SQUARES[device.type] if square is None else (square,):
            self._add_product(size, size, size)
        for layer in range(3):
            self._add_convolution(batch, width << layer, 32 >> layer)
        self.best, self.shape = 0.0, ""
        """Floating-point operations a second, and the shape that reached them."""

    @property
    def shapes(self) -> list[str]:
        """The shapes that are tried."""
        return list(self._products)

    def measure(self) -> float:
        """Try each shape again, and return the best rate so far."""
        for shape, (function, operations) in self._products.items():
            calls = calls_within(function, self._device, _PRODUCT_SECONDS)
            rate = operations * calls / timed(function, self._device, calls)
            if rate > self.best:
                self.best, self.shape = rate, shape
        return self.best

    def _add_product(self, rows: int, inner: int, columns: int) -> None:
        a = torch.randn(rows, inner, device=self._device, dtype=self._dtype)
        b = torch.randn(inner, columns, device=self._device, dtype=self._dtype)
        self._products[f"{rows}x{inner}x{columns}"] = (lambda: a @ b, 2.0 * rows * inner * columns)

    def _add_convolution(self, batch: int, channels: int, size: int) -> None:
        """Add D's layer that takes `channels` of size x size to twice as many of half the size."""
        images = torch.randn(batch, channels, size, size, device=self._device, dtype=self._dtype)
        weight = torch.randn(2 * channels, channels, 4, 4, device=self._device, dtype=self._dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        weight = weight.contiguous(memory_format=torch.channels_last)
        rows, inner, columns = batch * (size // 2) ** 2, 16 * channels, 2 * channels
        self._add_product(rows, inner, columns)
        self._products[f"convolution {channels} to {columns} channels"] = (
            lambda: F.conv2d(images, weight, stride=2, padding=1),
            2.0 * rows * inner * columns,
        )


def step_flops(width: int, batch: int) -> float:
    """Return the floating-point operations of a step with D frozen in G's turn, counted on the meta device."""
    with torch.device("meta"):
        generator, discriminator = Generator(width), Discriminator(width)
        real, z = torch.empty(batch, 3, 64, 64), torch.empty(batch, 100)
    with FlopCounterMode(display=False) as counter:
        fake = generator(z)
        discriminator(real).sum().backward()
        discriminator(fake.detach()).sum().backward()
        discriminator.requires_grad_(False)
        discriminator(fake).sum().backward()
    return float(counter.get_total_flops())


def images(batch: int, device: torch.device) -> Tensor:
    """Return images of noise in [-1, 1]."""
    return torch.rand(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(device)


def constant_images(count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the same on every device as the loader gives them: in the type of training, channels_last."""
    return images(count, device).to(dtype).contiguous(memory_format=torch.channels_last)


def constant_batch(state: TrainState) -> Tensor:
    """Return as many images as a rank takes in a step."""
    return constant_images(state.plan.batch_per_rank, state.world.device, state.dtype)


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the type in which training multiplies by default: bf16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
