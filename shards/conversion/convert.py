"""Convert encoded images to a data set of shards; the bytes do not depend on workers, kills or parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from shards.common.errors import UserError
from shards.common.messages import warn
from shards.common.progress import Progress
from shards.common.workers import available_cores, map_in_order
from shards.conversion.images import decoder_version
from shards.conversion.merge import Rejects, existing, merge_claimed
from shards.conversion.output_dir import claim
from shards.conversion.reports import Part, PartRecord, hash_of, write_report
from shards.conversion.shard_task import Run, ShardTask
from shards.conversion.sources.entries import Selection, Source, Walk, as_text
from shards.conversion.sources.folder_source import EXTENSIONS
from shards.manifest import MOST_SHARDS, Layout, Manifest, Origin, Preparation, too_many_shards


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

    def recorded(self) -> dict[str, Any]:
        """Return the settings that the manifest records, by its fields."""
        return {
            "image_size": self.image_size,
            "samples_per_shard": self.samples_per_shard,
            "preparation": self.preparation.model_dump(),
            "exclude_sha256": self.selection.exclude_sha256,
            "max_images": self.selection.limit,
        }


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
    names = [source.describe() for source in sources]
    if (manifest := existing(out, settings.recorded(), names)) is not None:
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


@contextmanager
def _claimed(sources: Sequence[Source], out: Path, settings: Settings, part: Part) -> Iterator[int | None]:
    """Lock `out` for a part; yields the number of entries of all parts, None if a source does not know its own."""
    counts = [source.entries() for source in sources]
    total = sum(count or 0 for count in counts)
    if settings.selection.limit is not None:
        total = min(total, settings.selection.limit)
    if total > MOST_SHARDS * settings.samples_per_shard:
        raise too_many_shards(-(-total // settings.samples_per_shard))
    layout, entries = Layout(settings.image_size), part.entries_of(total, settings.samples_per_shard)
    shards = -(-entries // settings.samples_per_shard)
    try:
        with claim(out, part, entries * layout.stride + shards * layout.shard_bytes(0)):
            yield None if None in counts else total
    except OSError as error:
        raise UserError(
            f"cannot write to {out} ({error.strerror or error}): mend that and give the same command again, or "
            "another --out"
        ) from None


def _write_part(
    sources: Sequence[Source], out: Path, settings: Settings, part: Part, total: int | None, workers: int
) -> None:
    """Write the shards of a part, their reports and the part's record."""
    walk = Walk(sources, settings.selection)
    walk.check_keys()
    runs = (Run(shard, run) for shard, run in enumerate(walk.runs(settings.samples_per_shard)) if part.has(shard))
    states = tuple(source.state() for source in sources)
    task = ShardTask(tuple(sources), states, out, Layout(settings.image_size), settings.preparation)
    entries = None if total is None else part.entries_of(total, settings.samples_per_shard)
    workers = workers or available_cores()
    if entries is not None:
        workers = min(workers, max(1, -(-entries // settings.samples_per_shard)))
    rejects, identities = Rejects(total, settings.max_rejected), list[str]()
    with (
        Progress(entries, "convert") as progress,
        closing(map_in_order(task, runs, workers, progress.advance)) as reports,
    ):
        for report in reports:
            rejects.check(report)
            progress.note(f"{rejects.count:,} rejected")
            identities.append(report.identity)
    if (line := walk.check_exclusion()) is not None:
        warn(line)
    write_report(out, part.name, _record(sources, settings, walk, identities))


def _record(sources: Sequence[Source], settings: Settings, walk: Walk, identities: Sequence[str]) -> PartRecord:
    return PartRecord(
        **settings.recorded(),
        sources=tuple(_origins(sources, walk)),
        max_rejected=settings.max_rejected,
        excluded=walk.excluded,
        shards=-(-sum(walk.taken) // settings.samples_per_shard),
        entries_sha256=walk.digest.hexdigest(),
        chain=hash_of(identities),
    )


def _origins(sources: Sequence[Source], walk: Walk) -> Iterator[Origin]:
    """Yield the manifest's record of each source; raises UserError if no entry was taken from any."""
    if not any(walk.taken):
        names = ", ".join(source.describe()["name"] for source in sources)
        raise UserError(f"no images in {names}: nothing to convert{_what_instead(sources, walk)}")
    for source, taken in zip(sources, walk.taken, strict=True):
        yield Origin(**source.describe(), entries=taken)


def _what_instead(sources: Sequence[Source], walk: Walk) -> str:
    """Return what the sources have instead of images, with the remedy; empty if they have nothing."""
    if walk.excluded:
        return f" (--exclude leaves out all {walk.excluded:,} entries)"
    for source in sources:
        if source.left_out.archive:
            return f" ({as_text(source.left_out.archive)} is not looked into: {source.archive_rule})"
    left_out = [as_text(name) for source in sources for name in source.left_out.names]
    extensions = " ".join(sorted(map(as_text, EXTENSIONS)))
    return f" (it holds {', '.join(left_out)}; images are named {extensions})" if left_out else ""
