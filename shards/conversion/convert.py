"""Convert encoded images to a data set of shards; the bytes do not depend on workers, kills or parts."""

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
    """Settings of a conversion."""

    image_size: int = 64
    """Width and height in pixels."""
    samples_per_shard: int = 4096
    """Source entries per shard."""
    fast: bool = False
    """Decode JPEGs at the smallest scale of at least twice `image_size`."""
    selection: Selection = Selection()
    """Entries to convert."""
    max_rejected: float = 0.001
    """Fraction of the entries that may be rejected."""

    @property
    def preparation(self) -> Preparation:
        """The manifest's `preparation`."""
        return Preparation(decoding="reduced" if self.fast else "full", decoder=decoder_version())


DEFAULTS = Settings()


def convert(sources: Sequence[Source], out: Path, settings: Settings = DEFAULTS, workers: int = 0) -> Manifest:
    """Write the images of `sources` as a data set at `out`; return its manifest.

    Shard k contains the selected entries [k * samples_per_shard, (k + 1) * samples_per_shard), counted over the
    sources in order, without the rejected ones; so shards are independent and their bytes do not depend on
    `workers` (0: all available cores). Finished shards of an interrupted run of the same call are reused. Raises
    UserError, and writes no manifest, if a source is unusable, `out` is not free, or too many entries or all
    entries of a shard are rejected.
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
    """Write the shards of one part of a conversion; call `merge` after the last part."""
    with _claimed(sources, out, settings, part) as total:
        _write_part(sources, out, settings, part, total, workers)


def _finished(sources: Sequence[Source], out: Path, settings: Settings) -> Manifest | None:
    """Return the manifest at `out` if the same conversion is complete there, None if there is no manifest."""
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
    """Lock `out` for a part; yields the number of entries of all parts, None if a source does not know its own."""
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
    """Write the shards of a part, their reports and the part's record."""
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
    """Yield the manifest's record of each source; raises UserError if no entry was taken from any."""
    if not any(walk.taken):
        names = ", ".join(source.describe()["name"] for source in sources)
        raise UserError(f"no images in {names}: nothing to convert")
    for source, taken in zip(sources, walk.taken, strict=True):
        yield Origin(**source.describe(), entries=taken)
