"""From encoded images to a data set of shards, whose bytes depend on neither workers, kills nor parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from shards.common.errors import UserError
from shards.common.progress import Progress
from shards.common.workers import available_cores, map_in_order
from shards.conversion.images import decoder_version
from shards.conversion.merge import Rejects, existing, merge_claimed
from shards.conversion.output_dir import claim
from shards.conversion.reports import Part, PartRecord, Reports, chain_of
from shards.conversion.shard_task import Run, ShardTask
from shards.conversion.sources.entries import Selection, Source, Walk
from shards.manifest import Layout, Manifest, Origin, Preparation


class Settings(NamedTuple):
    """How to convert."""

    image_size: int = 64
    """Pixels a side."""
    samples_per_shard: int = 4096
    """Entries that go into one shard."""
    fast: bool = False
    """Decode JPEGs at the reduced scale that leaves the filter twice the size."""
    selection: Selection = Selection()
    """Which entries are taken."""
    max_rejected: float = 0.001
    """Fraction of the entries that may be rejected."""

    @property
    def preparation(self) -> Preparation:
        """How the pixels are made."""
        return Preparation(decoding="reduced" if self.fast else "full", decoder=decoder_version())


DEFAULTS = Settings()


def convert(sources: Sequence[Source], out: Path, settings: Settings = DEFAULTS, workers: int = 0) -> Manifest:
    """Write the images of `sources` as a data set at `out`; return its manifest.

    Shard k holds the entries [k * samples_per_shard, (k + 1) * samples_per_shard) that are taken from the
    sources, one after the other, less the rejected ones, so that shards are independent and their bytes do not
    depend on `workers` (0: all available cores). Shards that the same call wrote before it was killed are taken
    over. Raises UserError where a source is unusable, `out` is not free, too many entries or all of one shard
    are rejected; then there is no manifest.
    """
    whole = Part()
    if (manifest := _finished(sources, out, settings)) is not None:
        return manifest
    with _claimed(sources, out, settings, whole) as total:
        _write_part(sources, out, settings, whole, total, workers)
        return merge_claimed(out, 1)


def convert_part(
    sources: Sequence[Source], out: Path, part: Part, settings: Settings = DEFAULTS, workers: int = 0
) -> None:
    """Write the shards of one part of the same; `merge` completes the data set after the last."""
    with _claimed(sources, out, settings, part) as total:
        _write_part(sources, out, settings, part, total, workers)


def _finished(sources: Sequence[Source], out: Path, settings: Settings) -> Manifest | None:
    """Return the manifest of the same conversion that is complete at `out`, None where there is none."""
    expected = {
        "image_size": settings.image_size,
        "samples_per_shard": settings.samples_per_shard,
        "preparation": settings.preparation,
        "exclude_sha256": settings.selection.exclude_sha256,
        "max_images": settings.selection.limit,
        "names": [source.describe() for source in sources],
    }
    return existing(out, expected)


@contextmanager
def _claimed(sources: Sequence[Source], out: Path, settings: Settings, part: Part) -> Iterator[int | None]:
    """Hold `out` for a part; yields how many entries all parts have, None where a source does not know."""
    counts = [source.entries() for source in sources]
    known = [count for count in counts if count is not None]
    total = sum(known)
    if settings.selection.limit is not None:
        total = min(total, settings.selection.limit)
    layout, entries = Layout(settings.image_size), part.entries_of(total, settings.samples_per_shard)
    shards = -(-entries // settings.samples_per_shard)
    try:
        with claim(out, part, entries * layout.stride + shards * layout.shard_bytes(0)):
            yield total if len(known) == len(counts) else None
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from None


def _write_part(
    sources: Sequence[Source], out: Path, settings: Settings, part: Part, total: int | None, workers: int
) -> None:
    """Write the shards of a part, their reports, and the part's record."""
    walk, shards = Walk(sources, settings.selection), 0

    def runs() -> Iterator[Run]:
        nonlocal shards
        for shard, entries in enumerate(walk.runs(settings.samples_per_shard)):
            shards = shard + 1
            if part.has(shard):
                yield Run(shard, entries)

    states = tuple(source.state() for source in sources)
    task = ShardTask(tuple(sources), states, out, Layout(settings.image_size), settings.preparation)
    entries = None if total is None else part.entries_of(total, settings.samples_per_shard)
    workers = workers or available_cores()
    if entries is not None:
        workers = min(workers, max(1, -(-entries // settings.samples_per_shard)))
    rejects, identities = Rejects(total, settings.max_rejected), list[str]()
    with (
        Progress(entries, "convert") as progress,
        closing(map_in_order(task, runs(), workers, progress)) as reports,
    ):
        for report in reports:
            rejects.check(report)
            progress.note(f"{rejects.count:,} rejected")
            identities.append(report.identity)
    record = PartRecord(
        image_size=settings.image_size,
        samples_per_shard=settings.samples_per_shard,
        sources=tuple(_origins(sources, walk)),
        preparation=settings.preparation,
        max_rejected=settings.max_rejected,
        excluded=walk.excluded,
        exclude_sha256=settings.selection.exclude_sha256,
        max_images=settings.selection.limit,
        shards=shards,
        chain=chain_of(identities),
    )
    Reports(out).write_part(part, record)


def _origins(sources: Sequence[Source], walk: Walk) -> Iterator[Origin]:
    """Yield what was taken from each source; raises UserError where that is nothing at all."""
    if not any(walk.taken):
        names = ", ".join(source.describe()["name"] for source in sources)
        raise UserError(f"no images in {names}: nothing to convert")
    for source, taken in zip(sources, walk.taken, strict=True):
        yield Origin(**source.describe(), entries=taken)
