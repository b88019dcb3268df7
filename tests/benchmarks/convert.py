"""Times the conversion against a plain loop, and watches its memory.

    python -m tests.benchmarks.convert LMDB [--rounds 3] [--json FILE]

The plain loop is what most scripts do in one process: read the value, decode it in full, crop, resize by Lanczos; it
writes nothing. The conversion is the whole command: start, walk, decode, tar, SHA-256, fsync, manifest. All in one run,
taking turns, so that the ratios hold on a noisy machine; ratios per core are of the conversion with one worker.
"""

from __future__ import annotations

import io
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import lmdb
import numpy as np
from PIL import Image
from pydantic import Field
from pydantic_settings import CliPositionalArg

from shards.common.command_line import run
from shards.manifest import read_manifest
from shards.reader import locate, read_sample
from tests.benchmarks.command import Benchmark, medians, options_of, seconds_of

SIZE = 64
COMPARED = 500
SHARDS = ("--samples-per-shard", "1024")


class Conversion(Benchmark):
    """Time the conversion."""

    source: CliPositionalArg[Path]
    """LMDB to convert, with thousands of images."""
    rounds: int = Field(3, ge=1)
    """Rounds in which all variants take a turn."""


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    options = options_of(Conversion, argv)
    memory: list[int] = []
    with tempfile.TemporaryDirectory() as name:
        source, folder = options.source, Path(name)
        variants: dict[str, Callable[[], object]] = {
            "plain loop": lambda: plain_loop(source),
            "two plain loops, half each": lambda: plain_loops(source),
            "exact, 1 worker": lambda: command(source, folder / "exact", "--workers", "1"),
            "exact, 2 workers": lambda: memory.append(command(source, folder / "exact 2", "--workers", "2")),
            "fast, 1 worker": lambda: command(source, folder / "fast", "--workers", "1", "--fast"),
        }
        seconds = medians(options.rounds, {name: partial(seconds_of, call) for name, call in variants.items()})
        figures = report(read_manifest(folder / "exact").samples, seconds)
        figures["peak anonymous memory, 2 workers, MiB"] = max(memory) / 2**20
        figures["mean difference of fast to exact, grey levels"] = difference(folder / "exact", folder / "fast")
    options.tell(figures)


def report(images: int, medians: dict[str, float]) -> dict[str, float]:
    """Return rates and ratios by name."""
    figures = {f"{name}, images/s": images / seconds for name, seconds in medians.items()}
    plain, exact = medians["plain loop"], medians["exact, 1 worker"]
    figures["exact to plain loop, 1 worker"] = plain / exact
    figures["fast to plain loop, 1 worker"] = plain / medians["fast, 1 worker"]
    figures["2 workers to 1, exact"] = exact / medians["exact, 2 workers"]
    figures["two plain loops to one: what two cores give"] = plain / medians["two plain loops, half each"]
    return figures


def plain_loop(path: Path, start: int = 0, step: int = 1) -> None:
    """Decode, crop and resize every image of the LMDB, or every second."""
    with lmdb.open(str(path), readonly=True, lock=False, readahead=False) as source, source.begin() as reading:
        for _, value in islice(reading.cursor(), start, None, step):
            image = Image.open(io.BytesIO(value)).convert("RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.crop((left, top, left + side, top + side))
            np.asarray(square.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def plain_loops(path: Path) -> None:
    """Do the same in two processes that share nothing."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(plain_loop, [path, path], [0, 1], [2, 2]))


def command(source: Path, out: Path, *options: str) -> int:
    """Run the command, and return the most anonymous memory in bytes that its processes had together."""
    shutil.rmtree(out, ignore_errors=True)
    words = [sys.executable, "-m", "shards", "convert", str(source), "--out", str(out), *options, *SHARDS]
    peak = 0
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(0.1)
    assert process.returncode == 0
    return peak


def anonymous_memory(session: int) -> int:
    """Return the bytes of anonymous memory of all processes of a session."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                (line,) = [line for line in (folder / "status").read_text().splitlines() if line.startswith("RssAnon")]
                total += 1024 * int(line.split()[1])
        except (OSError, ValueError):  # it ended meanwhile
            continue
    return total


def difference(a: Path, b: Path) -> float:
    """Return the mean absolute difference of the first samples of two data sets, in grey levels."""
    manifest = read_manifest(a)
    differences = []
    for position in range(min(COMPARED, manifest.samples)):
        name, index = locate(manifest, position)
        pixels = [read_sample(folder / name, manifest.layout, index)[1].astype(int) for folder in (a, b)]
        differences.append(float(np.abs(pixels[0] - pixels[1]).mean()))
    return statistics.mean(differences)


if __name__ == "__main__":
    run(main)
