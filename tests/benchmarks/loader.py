"""Times the loader against what people use and against the machine's memory, and counts what it reads of a cold disk.

    python -m tests.benchmarks.loader LMDB [--samples 100000] [--rounds 3] [--seconds 3] [--json FILE]

Everything on one core, in one run, taking turns; page cache warm and shards checked, where not said otherwise.
"webdataset" is its own loader on tars of JPEGs and on this project's shards; "torchvision" what the common example
does: its LSUN data set, resized, cropped and made a tensor, in a DataLoader; "mosaicml" the StreamingDataset of
mosaicml-streaming on the same pixels in its own format, where that is installed; "memory" copies into a reused
buffer: one batch, which the processor's cache holds, or images from anywhere in a gigabyte.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
import webdataset
from pydantic import Field
from pydantic_settings import CliPositionalArg
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import LSUN

from dist_dcgan.config import Config, make_plan
from dist_dcgan.data.loader import BatchLoader, to_images
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.world import World
from shards.common.command_line import run
from shards.conversion.convert import convert
from shards.conversion.sources.lmdb_source import LmdbSource
from tests.benchmarks.command import Benchmark, medians, options_of

SIZE = 64
JPEGS_PER_TAR = 2000


class Loading(Benchmark):
    """Time the loader."""

    source: CliPositionalArg[Path]
    """LMDB of photographs, which are repeated."""
    samples: int = Field(100_000, ge=1)
    """Least images of the data set."""
    batch: int = Field(128, ge=1)
    """Images of a batch."""
    rounds: int = Field(3, ge=1)
    """Rounds in which all variants take a turn."""
    seconds: float = Field(3.0, gt=0)
    """Length of a turn."""


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    options = options_of(Loading, argv)
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):  # where torchvision leaves a list of keys
        folder = Path(name)
        prepare(options, folder)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
        figures = read_amplification(options, folder / "shards")
        variants = {
            "ours": ours(options, folder / "shards", as_floats=False),
            "ours, as floats": ours(options, folder / "shards", as_floats=True),
            "webdataset, our shards": webdataset_of(options, folder / "shards", "rgb8", "ppm", lambda image: image),
            "webdataset, JPEG": webdataset_of(options, folder / "jpegs", "pil", "jpg", usual_transform()),
            "torchvision": torchvision_lsun(options, folder),
            **({"mosaicml": mosaicml(options, folder)} if find_spec("streaming") else {}),
            "memory, one batch": memory(options, images=options.batch),
            "memory, a gigabyte at random": memory(options, images=80_000),
        }
        for batches in variants.values():
            next(batches)  # what is done once: lists of keys, checks of shards
        turns = {name: partial(rate, batches, options.seconds) for name, batches in variants.items()}
        rates = medians(options.rounds, turns)
    figures |= {f"{name}, images/s": rate for name, rate in rates.items()}
    figures |= {f"ours to {name}": rates["ours"] / rate for name, rate in rates.items() if not name.startswith("ours")}
    options.tell(figures)


def prepare(options: Loading, folder: Path) -> None:
    """Make the data sets: shards of repeated photographs, tars of their JPEGs, and a name that torchvision takes."""
    source = options.source.resolve()
    (folder / "bedroom_train_lmdb").symlink_to(source)
    (folder / "jpegs").mkdir()
    with lmdb.open(str(source), readonly=True, lock=False) as environment, environment.begin() as transaction:
        values = [bytes(value) for _, value in transaction.cursor()]
    for start in range(0, len(values), JPEGS_PER_TAR):
        with tarfile.open(folder / "jpegs" / f"{start:06d}.tar", "w") as tar:
            for number, value in enumerate(values[start : start + JPEGS_PER_TAR], start):
                member = tarfile.TarInfo(f"{number:06d}.jpg")
                member.size = len(value)
                tar.addfile(member, io.BytesIO(value))
    copies = -(-options.samples // len(values))
    with contextlib.redirect_stderr(io.StringIO()):
        convert([LmdbSource(source) for _ in range(copies)], folder / "shards")


def rate(batches: Iterator[int], seconds: float) -> float:
    """Return the images a second of batches of these sizes, over some seconds."""
    started, images = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        images += next(batches)
    return images / elapsed


def loader_of(options: Loading, shards: Path, epochs: float) -> BatchLoader:
    """Return the loader of a data set."""
    place = Folder(shards)
    config = Config(global_batch=options.batch, epochs=epochs)
    plan = make_plan(config, 1, place.manifest.samples)
    return BatchLoader(place, config, plan, World(0, 0, 1, torch.device("cpu")), 0)


def ours(options: Loading, shards: Path, as_floats: bool) -> Iterator[int]:
    """Yield the sizes of batches of this loader, after an epoch in which every shard is checked."""
    with loader_of(options, shards, epochs=1e6) as batches:
        for batch in itertools.islice(batches, batches.plan.steps_per_epoch, None):
            if as_floats:
                to_images(batch, torch.float32)
            yield len(batch.samples)


def webdataset_of(
    options: Loading, tars: Path, decode: str, member: str, transform: Callable[[Any], object]
) -> Iterator[int]:
    """Yield the sizes of batches of webdataset's loader, of members decoded and transformed on the way."""
    urls = [str(path) for path in sorted(tars.glob("*.tar"))]
    data = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(1000).decode(decode)
    return sizes(data.to_tuple(member).map_tuple(transform).batched(options.batch).repeat())


def torchvision_lsun(options: Loading, folder: Path) -> Iterator[int]:
    """Yield the sizes of batches of torchvision's LSUN data set in a DataLoader."""
    data = LSUN(str(folder), classes=["bedroom_train"], transform=usual_transform())
    return sizes(itertools.chain.from_iterable(itertools.repeat(DataLoader(data, options.batch, shuffle=True))))


def mosaicml(options: Loading, folder: Path) -> Iterator[int]:
    """Yield the sizes of batches of MosaicML's StreamingDataset, in a DataLoader."""
    from streaming import MDSWriter, StreamingDataset

    local, reader = str(folder / "mds"), ShardReader(Folder(folder / "shards"))
    pixels = np.empty((1, SIZE, SIZE, 3), np.uint8)
    with MDSWriter(out=local, columns={"pixels": f"ndarray:uint8:{SIZE},{SIZE},3"}, size_limit=1 << 27) as writer:
        for sample in range(reader.manifest.samples):
            reader.gather(np.array([sample]), pixels)
            writer.write({"pixels": pixels[0]})
    data = StreamingDataset(local=local, shuffle=True, batch_size=options.batch)
    while True:
        for batch in DataLoader(data, options.batch):
            yield len(batch["pixels"])


def usual_transform() -> Callable[[Any], torch.Tensor]:
    """Return what the usual examples do with an image."""
    normalise = transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    steps = [transforms.Resize(SIZE), transforms.CenterCrop(SIZE), transforms.ToTensor(), normalise]
    transform: Callable[[Any], torch.Tensor] = transforms.Compose(steps)
    return transform


def memory(options: Loading, images: int) -> Iterator[int]:
    """Yield the sizes of batches that are copied within memory, of `images` in all, into a reused buffer."""
    source = np.ones((images, 3 * SIZE * SIZE), np.uint8)
    target, random = source[: options.batch].copy(), np.random.default_rng(0)
    while True:
        if images == options.batch:
            np.copyto(target, source)
        else:
            np.take(source, random.integers(0, images, options.batch), axis=0, out=target, mode="clip")
        yield options.batch


def sizes(batches: Any) -> Iterator[int]:
    """Yield the sizes of batches whose first part are images."""
    for batch in batches:
        yield len(batch[0])


def read_amplification(options: Loading, shards: Path) -> dict[str, float]:
    """Return bytes read from the disk over bytes of the shards, in the two epochs after the page cache was dropped."""
    figures = {}
    drop(shards)
    total = sum(path.stat().st_size for path in shards.glob("*.tar"))
    with loader_of(options, shards, epochs=2) as batches:
        for epoch in ("first epoch, checked", "second epoch"):
            before = bytes_read()
            for _ in itertools.islice(batches, batches.plan.steps_per_epoch):
                pass
            figures[f"bytes read of a cold disk, {epoch}"] = (bytes_read() - before) / total
            drop(shards)
    return figures


def drop(folder: Path) -> None:
    """Take files out of the page cache."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read() -> int:
    """Return the bytes that this process has had read from disks."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


if __name__ == "__main__":
    run(main)
