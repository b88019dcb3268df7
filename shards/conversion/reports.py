"""Reports of the shards that a conversion has written, used to resume it and to merge its parts.

The reports are in the folder `unfinished-conversion` of the data set until its manifest is written. A later
command reuses a shard without rejected entries if its report has the same identity: the hash of everything that
determines the shard's bytes except the images' content, that is settings, keys, and path, size and mtime of LMDBs
and tars.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import Field, ValidationError

from shards.common.command_line import Options
from shards.common.errors import UserError
from shards.common.files import file_sha256, publish, read_plain
from shards.manifest import Origin, Preparation, ShardEntry

FOLDER_NAME = "unfinished-conversion"

Record = TypeVar("Record", bound=Options)


class Part(NamedTuple):
    """One of the equal parts of a conversion, counted from 1."""

    number: int = 1
    of: int = 1

    @property
    def name(self) -> str:
        """The part's name in file names."""
        return f"part-{self.number}-of-{self.of}"

    def entries_of(self, total: int, samples_per_shard: int) -> int:
        """Return the number of entries of this part, out of `total`."""
        starts = range((self.number - 1) * samples_per_shard, total, self.of * samples_per_shard)
        return len(starts[:-1]) * samples_per_shard + min(samples_per_shard, total - starts[-1]) if starts else 0

    def has(self, shard: int) -> bool:
        """Return whether a shard, counted from 0, belongs to this part."""
        return shard % self.of == self.number - 1


class ShardReport(Options):
    """Result of one run of entries."""

    identity: str
    """Hash of what determines the shard's bytes."""
    entries: int
    """Number of entries in the run."""
    shard: ShardEntry | None
    """None if all entries were rejected."""
    renamed: tuple[dict[str, str], ...]
    """Lines for `keys.jsonl`."""
    rejected: tuple[dict[str, str], ...]
    """Lines for `rejected.jsonl`."""
    coarse_colours: int = 0
    """Samples from images with a side of less than twice the image size that store colours at a part of theirs."""


class PartRecord(Options):
    """Record of a finished part for the merge; equal for all parts of a conversion except for `chain`."""

    image_size: int
    samples_per_shard: int
    sources: tuple[Origin, ...]
    preparation: Preparation
    max_rejected: float
    excluded: int
    exclude_sha256: str | None
    max_images: int | None
    shards: int = Field(ge=1)
    """Number of shards of all parts."""
    entries_sha256: str
    """Of the keys and places of the entries of all parts."""
    chain: str
    """Hash of the identities of this part's shards, in order."""


def write_report(out: Path, name: str, report: Options) -> None:
    """Write the report of a shard (`report_name`) or a part (`Part.name`) of the data set in the folder `out`."""
    publish(out / FOLDER_NAME / f"{name}.json", report.model_dump_json().encode())


def read_report(out: Path, name: str, kind: type[Record]) -> Record | None:
    """Return a report; None if it is missing, damaged or of another version, so that the shard is written again."""
    path = out / FOLDER_NAME / f"{name}.json"
    try:
        return kind.model_validate_json(read_plain(path))
    except (FileNotFoundError, ValidationError):
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def report_name(shard: int) -> str:
    """Return the name of the report of a shard, counted from 0."""
    return f"shard-{shard:06d}"


def finished(out: Path, shard: int, identity: str) -> ShardReport | None:
    """Return the report of a finished, intact shard of that identity; None if the shard must be written.

    A shard with rejected entries is written again: their files may have been mended, which the identity does not tell.
    """
    report = read_report(out, report_name(shard), ShardReport)
    if report is None or report.identity != identity or report.rejected:
        return None
    if report.shard is not None:
        path = out / report.shard.name
        if path.is_symlink() or not path.is_file() or file_sha256(path) != report.shard.sha256:
            return None  # a link is none of ours
    return report


def hash_of(values: Any) -> str:
    """Return the SHA-256, in hex, of JSON values and bytes."""
    return hashlib.sha256(json.dumps(values, default=lambda value: value.hex()).encode()).hexdigest()
