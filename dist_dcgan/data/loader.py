"""Batches of this rank, read ahead by a thread, starting at any step."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_dcgan.config import Config, Plan
from dist_dcgan.data.order import Indices, SampleOrder, rank_slots
from dist_dcgan.data.prefetch import ClosedError, ShardPrefetcher
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.location import DatasetLocation
from dist_dcgan.distributed.node import NodeStore
from dist_dcgan.distributed.world import World
from dist_dcgan.random_streams import Key, uniform
from shards.common.errors import OneRankError, UserError

_WAIT_SHARE = 0.8
"""Share of the collectives' timeout: a rank that lacks data reports it before its peers time out."""
_SECONDS_BETWEEN_LOOKS = 0.005
_SECONDS_TO_CLOSE = 5.0
"""Limited, because a read from a file system that is gone may never return."""


@dataclass(frozen=True)
class Batch:
    """This rank's slice of one global batch."""

    step: int
    samples: Indices
    pixels: Tensor
    """uint8, (batch_per_rank, size, size, 3), on the device."""
    copied: torch.cuda.Event | None = None
    """CUDA event recorded after the copy of the pixels; None on a CPU."""


class BatchLoader:
    """Iterator over the batches of steps [first_step, total_steps); a context manager that ends its threads.

    `waited` counts the seconds that the consumer waited for data. The iteration raises errors of the threads.
    """

    def __init__(
        self,
        location: DatasetLocation,
        config: Config,
        plan: Plan,
        world: World,
        first_step: int,
        node: NodeStore | None = None,
    ) -> None:
        """Read from `location`; the ranks of `node` (by default only this one) divide the checking of shards."""
        self.plan, self._world = plan, world
        self._wait_seconds = _WAIT_SHARE * config.distributed.timeout_seconds
        self._order = SampleOrder(location.manifest, config.seed, config.data.window_shards)
        self._prefetcher = ShardPrefetcher(location, self._order, node or NodeStore(), *self._positions(first_step))
        self._reader = ShardReader(location, self._prefetcher.file)
        self._image_size = location.manifest.image_size
        self._slots = rank_slots(plan.global_batch, world.rank, world.world_size)
        self._copies = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None
        self._first_step = first_step
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=config.data.prefetch)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="batch loader", daemon=True)
        self.waited = 0.0

    def samples(self, step: int) -> Indices:
        """Return the samples of this rank at `step`."""
        epoch, positions = self._positions(step)
        mine = positions[self._slots.start : self._slots.stop]
        return self._order.samples(epoch, mine.start, mine.stop)

    @property
    def supplying(self) -> float:
        """Seconds that the prefetcher's thread was busy."""
        return self._prefetcher.seconds

    def __enter__(self) -> BatchLoader:
        self._prefetcher.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._prefetcher.__exit__()
        self._thread.join(_SECONDS_TO_CLOSE)

    def wait_for_first(self, meanwhile: Callable[[], None]) -> None:
        """Wait without a limit until the first batch is ready: its shards may have to be fetched.

        `meanwhile` is called again and again.
        """
        while self._ready.empty():
            meanwhile()
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def __iter__(self) -> Iterator[Batch]:
        while (item := self._next()) is not None:
            if isinstance(item, UserError):
                raise OneRankError(f"{self._world}: {item}") from item
            if isinstance(item, BaseException):
                raise item
            yield item

    def _next(self) -> Batch | BaseException | None:
        """Wait for the next batch, for less time than the other ranks wait for this one."""
        started = time.perf_counter()
        try:
            return self._ready.get(timeout=self._wait_seconds)
        except queue.Empty:
            raise OneRankError(
                f"{self._world}: no data for {self._wait_seconds:g} seconds, {self._prefetcher.awaited}: where its "
                "source is well but slow, use a larger --distributed.timeout-seconds"
            ) from None
        finally:
            self.waited += time.perf_counter() - started

    def _produce(self) -> None:
        try:
            # A new thread uses GPU 0, where a CUDA context of every rank of the node would take memory.
            if self._copies is not None:
                torch.cuda.set_device(self._world.device)
            for step in range(self._first_step, self.plan.total_steps):
                if not self._hand_over(self._read(step)):
                    return
            self._hand_over(None)
        except ClosedError:
            pass
        except BaseException as error:  # raised by the consumer
            self._hand_over(error)

    def _read(self, step: int) -> Batch:
        samples, size = self.samples(step), self._image_size
        self._prefetcher.reach(*self._positions(step))
        # Copies on a separate stream overlap with the training step. Each batch takes new memory: torch's pinned
        # allocator reuses a block only after the copies out of it are done, a ring of buffers would have to track them.
        with torch.cuda.stream(self._copies):
            pixels = torch.empty((len(samples), size, size, 3), dtype=torch.uint8, pin_memory=self._copies is not None)
            out: np.ndarray = pixels.numpy()
            self._reader.gather(samples, out)
            if self._copies is None:
                return Batch(step, samples, pixels)
            on_device = pixels.to(self._world.device, non_blocking=True)
            return Batch(step, samples, on_device, self._copies.record_event())

    def _positions(self, step: int) -> tuple[int, range]:
        """Return the epoch of a step, and the positions in it of its global batch."""
        epoch, step_in_epoch = divmod(step, self.plan.steps_per_epoch)
        start = step_in_epoch * self.plan.global_batch
        return epoch, range(start, start + self.plan.global_batch)

    def _hand_over(self, item: Batch | BaseException | None) -> bool:
        """Queue `item`; return False if the loader is closed."""
        while not self._closing.is_set():
            with suppress(queue.Full):
                self._ready.put(item, timeout=0.1)
                return True
        return False


def to_images(batch: Batch, dtype: torch.dtype) -> Tensor:
    """Return the batch as (N, 3, size, size) in [-1, 1], channels_last like the pixels."""
    if batch.copied is not None:
        stream = torch.cuda.current_stream(batch.pixels.device)
        stream.wait_event(batch.copied)  # the GPU waits, not this thread
        batch.pixels.record_stream(stream)  # else the next copy may reuse the memory while this stream reads it
    return batch.pixels.permute(0, 3, 1, 2).to(dtype).mul_(2 / 255).sub_(1)


def flip(images: Tensor, key: Key, slots: range) -> Tensor:
    """Mirror each image with probability 1/2, by a random number of its slot."""
    coins = uniform(key, slots, 1, images.device) < 0.5
    return torch.where(coins[:, :, None, None], images.flip(3), images)
