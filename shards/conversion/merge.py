"""Merge the shards and reports of a conversion's parts: write the key lists and the manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.common.command_line import shortened
from shards.common.errors import UserError
from shards.common.messages import warn
from shards.conversion.output_dir import claim_whole, clean_up, finish
from shards.conversion.reports import Part, PartRecord, ShardReport, hash_of, read_report, report_name
from shards.manifest import MANIFEST_NAME, Manifest, ShardEntry, check_files, read_manifest, write_manifest
from shards.writer import KEYS_NAME, REJECTED_NAME, write_json_lines

_REASONS_SHOWN = 3


class Rejects:
    """Counter of rejected entries; at most the fraction `allowed` of `entries`, None if unknown, may be rejected."""

    def __init__(self, entries: int | None, allowed: float) -> None:
        self.entries, self.allowed = entries, allowed
        self.count = 0
        self._first: list[str] = []

    def check(self, report: ShardReport) -> None:
        """Add a shard's rejects; raises UserError with the first reasons if there are too many."""
        self.count += len(report.rejected)
        for line in report.rejected[: _REASONS_SHOWN - len(self._first)]:
            self._first.append(f"{line.get('key', line.get('key_hex'))}: {line['reason']}")
        if self.allowed == 0 and self.count:
            raise UserError(
                f"a source entry is unusable, and none may be with --damaged fail or --max-rejected 0 ({self.first})"
            )
        if self.entries is not None and self.count > self.allowed * self.entries:
            raise UserError(
                f"{self.count} of {self.entries} source entries are unusable, more than --max-rejected "
                f"{self.allowed} allows ({self.first})"
            )

    @property
    def first(self) -> str:
        """The first three rejects with their reasons."""
        return "; ".join(self._first)


def existing(out: Path, settings: Mapping[str, Any], sources: Sequence[Mapping[str, Any]]) -> Manifest | None:
    """Return the manifest of the complete data set at `out`, None if there is none.

    Raises UserError if the data set was made with other settings, given as fields of the manifest, or from other
    sources, given as they describe themselves, or if a shard is missing or not of its size.
    """
    if (manifest := _complete(out)) is None:
        return None
    found = _compared(manifest.model_dump(include=set(settings)))
    found["sources"] = [origin.model_dump(include={"kind", "name"}) for origin in manifest.sources]
    wanted = _compared(settings) | {"sources": list(sources)}
    shown = [{name: shortened(str(value)) for name, value in values.items()} for values in (found, wanted)]
    different = [f"{name}: {shown[0][name]} -> {shown[1][name]}" for name in wanted if found[name] != wanted[name]]
    if different:
        raise UserError(
            f"{out} already holds another data set ({'; '.join(different)}): give another --out, or remove it first"
        )
    return manifest


def _complete(out: Path) -> Manifest | None:
    """Return the manifest of a complete data set, None if there is none; raises UserError if files do not match it.

    Removes the reports if a conversion was killed after writing its manifest.
    """
    if not (out / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest(out)
    check_files(out, manifest)
    finish(out)
    return manifest


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without the versions of the decoder: a newer one is no reason to convert again."""
    preparation = {name: value for name, value in settings["preparation"].items() if name != "decoder"}
    return {**settings, "preparation": preparation}


def merge(out: Path) -> Manifest:
    """Complete the data set at `out` after all parts have been converted; return its manifest.

    Raises UserError if a part is missing, still being written or of another conversion, if more entries were
    rejected than allowed, or if the data set is complete but a shard is missing or not of its size.
    """
    if (manifest := _complete(out)) is not None:
        return manifest
    try:
        with claim_whole(out) as parts:
            return merge_claimed(out, parts)
    except OSError as error:
        raise UserError(
            f"cannot write to {out} ({error.strerror or error}): mend that and give the same command again"
        ) from None


def merge_claimed(out: Path, parts: int) -> Manifest:
    """Do the same in a folder that the caller has locked."""
    records = list(_records(out, parts))
    record = records[0]
    rejects = Rejects(sum(origin.entries for origin in record.sources), record.max_rejected)
    shards: list[ShardEntry] = []
    chains: list[list[str]] = [[] for _ in range(parts)]
    coarse_colours = 0
    for index, report in enumerate(_reports(out, record.shards, parts)):
        chains[index % parts].append(report.identity)
        rejects.check(report)
        coarse_colours += report.coarse_colours
        if report.shard is not None:
            shards.append(report.shard)
        elif index < record.shards - 1 or not shards:
            raise UserError(
                f"a run of {report.entries} source entries has no usable image ({rejects.first}): no shard may "
                "be empty, give more --samples-per-shard"
            )
    for index, (chain, own) in enumerate(zip(chains, records, strict=True), 1):
        if hash_of(chain) != own.chain:
            raise _missing(out, Part(index, parts))
    # The reports are read again for each list: both lists together may not fit into memory.
    renamed = (line for report in _reports(out, record.shards, parts) for line in report.renamed)
    rejected = (line for report in _reports(out, record.shards, parts) for line in report.rejected)
    lists = {KEYS_NAME: write_json_lines(out / KEYS_NAME, renamed)}
    lists[REJECTED_NAME] = write_json_lines(out / REJECTED_NAME, rejected)
    clean_up(out, len(shards))
    manifest = Manifest(
        **record.model_dump(exclude={"max_rejected", "shards", "entries_sha256", "chain"}),
        rejected=rejects.count,
        lists={name: sha256 for name, sha256 in lists.items() if sha256 is not None},
        shards=tuple(shards),
    )
    write_manifest(out, manifest)
    finish(out)
    if coarse_colours > manifest.samples / 2:
        warn(
            f"{coarse_colours:,} of {manifest.samples:,} images have a side of less than twice {record.image_size} "
            "pixels and store colours at half of their resolution: the discriminator may tell real images by that. If "
            "pictures fade in a long training, train anew with --noise.sigma 0.05 (tests/stability/README.md)"
        )
    return manifest


def _records(out: Path, parts: int) -> Iterator[PartRecord]:
    """Yield the records of all parts; raises UserError if one is missing or of another conversion."""
    first: PartRecord | None = None
    for index in range(1, parts + 1):
        part = Part(index, parts)
        record = read_report(out, part.name, PartRecord)
        if record is None:
            raise _missing(out, part)
        first = first or record
        if record.model_copy(update={"chain": first.chain}) != first:
            raise UserError(
                f"part {index}/{parts} at {out} was converted from other sources or otherwise: convert it again"
            )
        yield record


def _reports(out: Path, shards: int, parts: int) -> Iterator[ShardReport]:
    """Yield the reports of all shards in order; raises UserError if one is missing."""
    for index in range(shards):
        report = read_report(out, report_name(index), ShardReport)
        if report is None:
            raise _missing(out, Part(index % parts + 1, parts))
        yield report


def _missing(out: Path, part: Part) -> UserError:
    return UserError(
        f"part {part.number}/{part.of} at {out} is not complete: run convert --part {part.number}/{part.of} again"
    )
