"""From encoded images to a data set of shards, whose bytes depend on neither workers, kills nor parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from shards.destination import claim
from shards.entries import Entry, Selection, Source, Walk
from shards.errors import UserError
from shards.images import ImageError, decode_image, decoder_version, prepare, to_ppm
from shards.manifest import Layout, Manifest, Origin, Preparation, member_key, shard_name
from shards.merge import Rejects, existing, merge_claimed
from shards.progress import Progress
from shards.reports import Part, PartRecord, Reports, ShardReport, chain_of, hash_of
from shards.workers import Tick, available_cores, map_in_order
from shards.writer import describe_key, write_shard

_WHOLE = Part()
_EVERYTHING = Selection()


def convert(
    sources: Sequence[Source],
    out: Path,
    *,
    image_size: int = 64,
    samples_per_shard: int = 4096,
    fast: bool = False,
    selection: Selection = _EVERYTHING,
    max_rejected: float = 0.001,
    workers: int = 0,
    part: Part = _WHOLE,
) -> Manifest | None:
    """Write the images of `sources` as a data set of `image_size` pixels a side at `out`; return its manifest.

    Shard k holds the entries [k * samples_per_shard, (k + 1) * samples_per_shard) that `selection` takes from
    the sources, one after the other, less the rejected ones, so that shards are independent and their bytes
    do not depend on `workers` (0: all available cores). Shards that the same command has written before it was
    killed are taken over. A `part` of several writes its shards only, for `merge` to complete, and returns None.
    Raises UserError where a source is unusable, `out` is not free, more than the fraction `max_rejected` of
    the entries or all entries of one shard are rejected; then there is no manifest.
    """
    preparation = Preparation(decoding="reduced" if fast else "full", decoder=decoder_version())
    conversion = Conversion(tuple(sources), out, Layout(image_size), samples_per_shard, preparation)
    expected = {
        "image_size": image_size,
        "samples_per_shard": samples_per_shard,
        "preparation": preparation,
        "names": [source.describe() for source in sources],
    }
    if (manifest := existing(out, expected)) is not None:
        return manifest
    total = total_of(sources, selection)
    try:
        with claim(out, part, conversion.bytes_of(part, total or 0)):
            write_part(conversion, selection, part, Rejects(total, max_rejected), workers)
            if part.of > 1:
                return None
            return merge_claimed(out, 1)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from None


def total_of(sources: Sequence[Source], selection: Selection) -> int | None:
    """Return how many entries will be walked, or None where a source does not know."""
    counts = [source.entries() for source in sources]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return None
    return sum(known) if selection.limit is None else min(sum(known), selection.limit)


class Run(NamedTuple):
    """The entries that make a shard, counted from 0."""

    shard: int
    entries: list[Entry]


@dataclass(frozen=True)
class Conversion:
    """From where to where and how: the task that turns one run into one shard and its report."""

    sources: tuple[Source, ...]
    out: Path
    layout: Layout
    samples_per_shard: int
    preparation: Preparation

    def entries_of(self, part: Part, total: int) -> int:
        """Return how many of `total` entries belong to a part."""
        starts = range((part.number - 1) * self.samples_per_shard, total, part.of * self.samples_per_shard)
        return sum(min(self.samples_per_shard, total - start) for start in starts)

    def bytes_of(self, part: Part, total: int) -> int:
        """Return the room that the shards of a part take at most."""
        entries = self.entries_of(part, total)
        return entries * self.layout.stride + -(-entries // self.samples_per_shard) * self.layout.shard_bytes(0)

    def identity(self, run: Run) -> str:
        """Return the hash of what decides the shard's bytes, but for the images themselves."""
        names = [source.describe() for source in self.sources]
        return hash_of([self.layout.image_size, self.preparation.model_dump(), names, run])

    def __call__(self, run: Run, tick: Tick) -> ShardReport:
        """Write the shard of `run` and its report, unless both are there."""
        identity, reports = self.identity(run), Reports(self.out)
        if (report := reports.finished(run.shard, identity)) is not None:
            tick(report.entries)
            return report
        renamed, rejected = list[dict[str, str]](), list[dict[str, str]]()
        samples = self._samples(run.entries, renamed, rejected, tick)
        shard = write_shard(self.out / shard_name(run.shard), self.layout, samples)
        report = ShardReport(
            identity=identity,
            entries=len(run.entries),
            shard=shard,
            renamed=tuple(renamed),
            rejected=tuple(rejected),
        )
        reports.write_shard(run.shard, report)
        return report

    def _samples(
        self, entries: list[Entry], renamed: list[dict[str, str]], rejected: list[dict[str, str]], tick: Tick
    ) -> Iterator[tuple[str, bytes]]:
        taken = set[str]()
        for entry in entries:
            key = self.key_of(entry)
            member = member_key(key)
            try:
                if member in taken:
                    raise ImageError(f"its name {member} is taken by an entry before it")
                ppm = self._ppm(self.sources[entry.source].read(entry.key, entry.place))
            except ImageError as error:
                rejected.append(describe_key(key) | {"reason": str(error)})
            else:
                taken.add(member)
                if member.encode() != key:
                    renamed.append({"member": member} | describe_key(key))
                yield member, ppm
            tick(1)

    def key_of(self, entry: Entry) -> bytes:
        """Return the key of an entry: with several sources it begins with the number of its own, so that none meet."""
        return b"%d_%s" % (entry.source, entry.key) if len(self.sources) > 1 else entry.key

    def _ppm(self, data: bytes) -> bytes:
        size = self.layout.image_size
        enough = 2 * size if self.preparation.decoding == "reduced" else None
        return to_ppm(prepare(decode_image(data, enough), size))


def write_part(conversion: Conversion, selection: Selection, part: Part, rejects: Rejects, workers: int) -> None:
    """Write the shards of a part, their reports, and the part's record."""
    walk = Walk(conversion.sources, selection)
    shards = 0

    def runs() -> Iterator[Run]:
        nonlocal shards
        for shards, entries in enumerate(walk.runs(conversion.samples_per_shard), 1):
            if part.has(shards - 1):
                yield Run(shards - 1, entries)

    total = None if rejects.entries is None else conversion.entries_of(part, rejects.entries)
    workers = workers or available_cores()
    if total is not None:
        workers = min(workers, max(1, -(-total // conversion.samples_per_shard)))
    identities = []
    with (
        Progress(total, "convert") as progress,
        closing(map_in_order(conversion, runs(), workers, progress)) as reports,
    ):
        for report in reports:
            rejects.check(report)
            progress.note(f"{rejects.count:,} rejected")
            identities.append(report.identity)
    origins = [
        Origin(**source.describe(), entries=taken) for source, taken in zip(conversion.sources, walk.taken, strict=True)
    ]
    for origin in origins:
        if not origin.entries and selection.limit is None:
            raise UserError(f"the {origin.kind} {origin.name} has no images to convert")
    record = PartRecord(
        image_size=conversion.layout.image_size,
        samples_per_shard=conversion.samples_per_shard,
        sources=tuple(origins),
        preparation=conversion.preparation,
        max_rejected=rejects.allowed,
        excluded=walk.excluded,
        shards=shards,
        chain=chain_of(identities),
    )
    Reports(conversion.out).write_part(part, record)
