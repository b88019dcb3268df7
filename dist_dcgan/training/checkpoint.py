"""Checkpoints: safetensors and JSON, written whole or not at all; nothing that is loaded can run code.

`python -m dist_dcgan.training.checkpoint inspect RUN_DIR` lists those of a run and whether their checksums hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_settings import CliPositionalArg
from safetensors.torch import load_file, save_file
from torch import Tensor

from shards.command_line import Options, build, nearest, parse_flags, run
from shards.errors import UserError
from shards.files import file_sha256, publish, sync_directory

FORMAT_VERSION = 2
_TENSORS = "tensors.safetensors"
_VALUES = "values.json"
_NAME = re.compile(r"step-(\d{8,})")


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def save_checkpoint(directory: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any], keep: int) -> Path:
    """Write `directory/step-N`, N from `values["step"]`, then remove all but the newest `keep`.

    It appears under its name only when it is complete and on disk.
    """
    final = directory / f"step-{values['step']:08d}"
    temporary = final.with_name(final.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed process left
    temporary.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary / _TENSORS)
    _sync_file(temporary / _TENSORS)
    content = {
        "format_version": FORMAT_VERSION,
        "tensors_sha256": file_sha256(temporary / _TENSORS),
        "values": dict(values),
    }
    content["sha256"] = _json_sha256(content)
    publish(temporary / _VALUES, (json.dumps(content, indent=1) + "\n").encode())
    if final.exists():  # an earlier attempt at this step, found damaged, or this process would have resumed from it
        shutil.rmtree(final)
    temporary.rename(final)
    sync_directory(directory)
    published = list_checkpoints(directory)
    for old in published[: published.index(final) + 1][:-keep]:  # later ones were passed over, not replaced
        shutil.rmtree(old)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint at `path`; raises ValueError saying what is wrong with it."""
    try:
        content = json.loads((path / _VALUES).read_bytes())
        if content.pop("sha256", None) != _json_sha256(content):
            raise ValueError(f"{_VALUES} does not match its checksum")
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {content['format_version']}, this version reads {FORMAT_VERSION}")
        if file_sha256(path / _TENSORS) != content["tensors_sha256"]:
            raise ValueError(f"{_TENSORS} does not match its checksum")
    except (OSError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"incomplete or foreign: {error!r}") from None
    return Checkpoint(load_file(path / _TENSORS), content["values"])


def load_newest(directory: Path) -> Checkpoint | None:
    """Return the newest checkpoint in `directory` that is sound, None where there are none at all.

    Says which it had to pass over; raises UserError where none is sound, rather than begin again from nothing.
    """
    found = list_checkpoints(directory)
    for path in reversed(found):
        try:
            return load_checkpoint(path)
        except ValueError as error:
            print(f"warning: checkpoint {path} is passed over: {error}", file=sys.stderr, flush=True)
    if found:
        raise UserError(f"none of the {len(found)} checkpoints in {directory} is sound: mend or move them away")
    return None


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the published checkpoints in `directory`, oldest first."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _json_sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


class _Inspect(Options):
    """List the checkpoints of a run."""

    run_dir: CliPositionalArg[Path]
    """Folder of the run."""


def main(argv: Sequence[str]) -> None:
    """Run `inspect`."""
    if not argv or argv[0] != "inspect":
        word = argv[0] if argv else "no command"
        raise UserError(f"unknown command: {word}{nearest(word, ['inspect'])} (usage: inspect RUN_DIR)")
    prog = "python -m dist_dcgan.training.checkpoint inspect"
    options = build(_Inspect, parse_flags(_Inspect, argv[1:], prog))
    found = list_checkpoints(options.run_dir / "checkpoints")
    if not found:
        raise UserError(f"no checkpoints in {options.run_dir}: is it the folder of a run?")
    for path in found:
        try:
            tensors, values = load_checkpoint(path)
            size = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
            print(f"{path.name}: sound, step {values['step']}, {len(tensors)} tensors, {size:.1f} MiB")
        except ValueError as error:
            print(f"{path.name}: DAMAGED, {error}")


if __name__ == "__main__":
    run(main)
