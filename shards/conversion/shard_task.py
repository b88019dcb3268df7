"""Worker task that converts one run of entries to one shard and its report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from shards.common.workers import Tick
from shards.conversion.images import ImageError, decode_image, has_coarse_colours, prepare, to_ppm
from shards.conversion.reports import ShardReport, finished, hash_of, report_name, write_report
from shards.conversion.sources.entries import Entry, Source, as_text
from shards.manifest import Layout, Preparation, member_key, shard_name
from shards.writer import describe_key, write_shard


class Run(NamedTuple):
    """The entries of one shard, counted from 0."""

    shard: int
    entries: list[Entry]


@dataclass(frozen=True)
class ShardTask:
    """Converts the entries of one shard."""

    sources: tuple[Source, ...]
    states: tuple[Any, ...]
    """`Source.state()` of each source."""
    out: Path
    layout: Layout
    preparation: Preparation

    def __call__(self, run: Run, tick: Tick) -> ShardReport:
        """Write the shard of `run` and its report, unless both exist and nothing was rejected."""
        # Everything that determines the shard's bytes, except the images themselves.
        identity = hash_of([self.layout.image_size, self.preparation.model_dump(), self.states, run])
        if (report := finished(self.out, run.shard, identity)) is not None:
            tick(report.entries)
            return report
        renamed, rejected, coarse = list[dict[str, str]](), list[dict[str, str]](), list[bytes]()
        samples = self._samples(run.entries, renamed, rejected, coarse, tick)
        shard = write_shard(self.out / shard_name(run.shard), self.layout, samples)
        report = ShardReport(
            identity=identity,
            entries=len(run.entries),
            shard=shard,
            renamed=tuple(renamed),
            rejected=tuple(rejected),
            coarse_colours=len(coarse),
        )
        write_report(self.out, report_name(run.shard), report)
        return report

    def _samples(
        self,
        entries: list[Entry],
        renamed: list[dict[str, str]],
        rejected: list[dict[str, str]],
        coarse: list[bytes],
        tick: Tick,
    ) -> Iterator[tuple[str, bytes]]:
        """Yield names and PPMs; fills the lists of keys that are not names, of rejects, and of coarse colours."""
        taken = dict[str, bytes]()
        for entry in entries:
            key = self.key_of(entry)
            member, source = member_key(key), self.sources[entry.source]
            name = source.name(entry.key, entry.place)
            try:
                if member in taken:
                    raise ImageError(_second_of_a_name(name, taken[member], source.key_rule))
                data = source.read(entry.key, entry.place)
                image = self._decoded(data)
            except ImageError as error:
                rejected.append(describe_key(key) | {"reason": str(error)})
            else:
                taken[member] = name
                if member.encode() != key:
                    renamed.append({"member": member} | describe_key(key))
                if min(image.size) < 2 * self.layout.image_size and has_coarse_colours(data):
                    coarse.append(key)
                yield member, to_ppm(prepare(image, self.layout.image_size))
            tick(1)

    def key_of(self, entry: Entry) -> bytes:
        """Return the key of an entry, prefixed with the source's number if there are several, so that it is unique."""
        return b"%d_%s" % (entry.source, entry.key) if len(self.sources) > 1 else entry.key

    def _decoded(self, data: bytes) -> Image.Image:
        return decode_image(data, 2 * self.layout.image_size if self.preparation.decoding == "reduced" else None)


def _second_of_a_name(name: bytes, first: bytes, rule: str) -> str:
    if name == first:
        return f"{as_text(name)} comes a second time; the first is used"
    return f"the key of {as_text(name)} is taken by {as_text(first)} before it; {rule}"
