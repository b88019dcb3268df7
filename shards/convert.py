"""From an LMDB of images to a data set of shards, whose bytes do not depend on the number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from shards.destination import claim
from shards.errors import UserError
from shards.images import ImageError, decode_image, decoder_version, prepare, to_ppm
from shards.manifest import Layout, Manifest, Preparation, ShardEntry, member_key, shard_name, write_manifest
from shards.progress import Progress
from shards.sources import LmdbSource
from shards.workers import Tick, available_cores, map_in_order
from shards.writer import KEYS_NAME, REJECTED_NAME, JsonLines, describe_key, write_shard

_REASONS_SHOWN = 3


def convert(
    source: LmdbSource,
    out: Path,
    *,
    image_size: int = 64,
    samples_per_shard: int = 4096,
    workers: int = 0,
    max_rejected: float = 0.001,
) -> Manifest:
    """Write the images of `source` as a data set of `image_size` pixels a side at `out`; return its manifest.

    Shard k holds the source entries [k * samples_per_shard, (k + 1) * samples_per_shard) less the rejected
    ones, so that shards are independent and their bytes do not depend on `workers` (0: all available cores).
    Raises UserError where the source is unusable, `out` is not free, more than the fraction `max_rejected` of
    the entries or all entries of one shard are rejected, or two entries of a shard share a name; then there
    is no manifest.
    """
    origin, layout = source.describe(), Layout(image_size)
    entries = source.entries()
    shard_count = -(-entries // samples_per_shard)
    try:
        with claim(out, entries * layout.stride + shard_count * layout.shard_bytes(0)):
            conversion = Conversion(source, out, layout, samples_per_shard)
            rejects = Rejects(entries, max_rejected)
            shards = _write_shards(conversion, rejects, min(workers or available_cores(), shard_count))
            manifest = Manifest(
                image_size=image_size,
                samples_per_shard=samples_per_shard,
                source=origin,
                preparation=Preparation(decoder=decoder_version()),
                rejected=rejects.count,
                shards=tuple(shards),
            )
            write_manifest(out, manifest)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from None
    return manifest


@dataclass(frozen=True)
class Run:
    """The source entries that make shard `index`: `count` of them from the key `start` on."""

    index: int
    start: bytes
    count: int


@dataclass
class ShardReport:
    """What came of a run: its shard, None where all was rejected; renamed keys; rejected keys, and why."""

    shard: ShardEntry | None = None
    renamed: list[tuple[bytes, str]] = field(default_factory=list)
    rejected: list[tuple[bytes, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Conversion:
    """From where to where, and the task that turns one run into one shard."""

    source: LmdbSource
    out: Path
    layout: Layout
    samples_per_shard: int

    def runs(self) -> Iterator[Run]:
        """Yield the runs in order, as the walk over the source's keys meets them."""
        entries = self.source.entries()
        for index, start in enumerate(self.source.starts(self.samples_per_shard)):
            yield Run(index, start, min(self.samples_per_shard, entries - index * self.samples_per_shard))

    def __call__(self, run: Run, tick: Tick) -> ShardReport:
        """Write the shard of `run`. Raises UserError where the source lacks entries or a name comes twice."""
        report = ShardReport()
        report.shard = write_shard(self.out / shard_name(run.index), self.layout, self._samples(run, report, tick))
        return report

    def _samples(self, run: Run, report: ShardReport, tick: Tick) -> Iterator[tuple[str, bytes]]:
        count = 0
        for key, data in self.source.read(run.start, run.count):
            try:
                ppm = to_ppm(prepare(decode_image(data), self.layout.image_size))
            except ImageError as error:
                report.rejected.append((key, str(error)))
            else:
                member = member_key(key)
                if member.encode() != key:
                    report.renamed.append((key, member))
                yield member, ppm
            count += 1
            tick(1)
        if count != run.count:
            raise UserError(f"the LMDB {self.source.path} is damaged: it lacks entries that its header counts")


class Rejects:
    """Counts rejected entries against what is allowed: the fraction `allowed` of the source's `entries`."""

    def __init__(self, entries: int, allowed: float) -> None:
        self.count = 0
        self._entries, self._allowed = entries, allowed
        self._first: list[str] = []

    def check(self, report: ShardReport) -> None:
        """Count a run's rejects; raises UserError, naming the first, for too many or where no shard came."""
        self.count += len(report.rejected)
        missing = _REASONS_SHOWN - len(self._first)
        self._first += [f"{key!r}: {why}" for key, why in report.rejected[:missing]]
        first = "; ".join(self._first)
        if self.count > self._allowed * self._entries:
            raise UserError(
                f"{self.count} of {self._entries} source entries are unusable, more than --max-rejected "
                f"{self._allowed} allows ({first})"
            )
        if report.shard is None:
            raise UserError(
                f"a run of {len(report.rejected)} source entries has no usable image ({first}): no shard may "
                "be empty, give more --samples-per-shard"
            )


def _write_shards(conversion: Conversion, rejects: Rejects, workers: int) -> list[ShardEntry]:
    """Write all shards, `keys.jsonl` and `rejected.jsonl`."""
    shards = []
    with (
        JsonLines(conversion.out / KEYS_NAME) as keys,
        JsonLines(conversion.out / REJECTED_NAME) as rejected,
        Progress(conversion.source.entries(), "convert") as progress,
        closing(map_in_order(conversion, conversion.runs(), workers, progress)) as reports,
    ):
        for report in reports:
            rejects.check(report)
            assert report.shard is not None
            shards.append(report.shard)
            for key, member in report.renamed:
                keys.append({"member": member} | describe_key(key))
            for key, reason in report.rejected:
                rejected.append(describe_key(key) | {"reason": reason})
        keys.publish()
        rejected.publish()
    return shards
