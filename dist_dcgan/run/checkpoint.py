"""Checkpoints: safetensors and JSON, written atomically; loading one runs no code from it.

python -m dist_dcgan.run.checkpoint inspect RUN_DIR     lists those of a run, and whether they are sound
python -m dist_dcgan.run.checkpoint verify RUN_DIR      the same, and fails if one is not
python -m dist_dcgan.run.checkpoint prune RUN_DIR       removes all except the newest sound one
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field
from pydantic_settings import CliPositionalArg
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dist_dcgan.run.directory import locked
from dist_dcgan.run.tensor_file import require_size, serialised
from dist_dcgan.run.values import checked_values
from shards.common.command_line import Options, build, nearest, parse_flags, run
from shards.common.errors import UserError
from shards.common.files import (
    atomic_file,
    content_sha256,
    file_sha256,
    name_of,
    open_plain,
    opened_folder,
    publish,
    read_plain,
    sync_directory,
)
from shards.common.messages import say, warn
from shards.common.streams import output_is_optional

FORMAT_VERSION = 3
_TENSORS = "tensors.safetensors"
_VALUES = "values.json"
_MOST_VALUES_BYTES = 1 << 24
_MOST_TENSORS_BYTES = 1 << 36
_UNSOUND = (OSError, AttributeError, KeyError, TypeError, RecursionError, MemoryError, OverflowError, SafetensorError)
"""Exceptions by which files that are no checkpoint of this program's make themselves known, beside ValueError."""
_NAME = re.compile(r"step-([0-9]{8,18})")


class Checkpoint(NamedTuple):
    """Content of a checkpoint."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Retention(NamedTuple):
    """Which checkpoints are kept when another is written."""

    newest: int
    every_steps: int | None = None
    """Those at multiples of this many steps are never removed."""


def save_checkpoint(
    directory: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any], retention: Retention
) -> Path:
    """Write `directory/step-N`, N from `values["step"]`, then remove checkpoints by `retention`.

    It gets its name only after it is complete, on disk and read back. If it cannot be written, raises UserError and
    removes partial files; what cannot be removed afterwards is a warning, and the next call tries again.
    """
    name = f"step-{values['step']:08d}"
    try:
        with suppress(FileExistsError):
            directory.mkdir(parents=True)
        with opened_folder(directory) as folder:
            outdated = _outdated({*list_checkpoints(folder), folder / name}, folder / name, retention)
            for left in folder.glob("step-*.tmp"):  # of a killed process
                _remove(left, directory)
            damaged = _publish(folder / name, tensors, values)
            for old in (damaged, *outdated):
                _remove(old, directory)
    except OSError as error:
        raise UserError(
            f"checkpoint {directory / name} cannot be written: {error.strerror or error}: mend that, and the same "
            "command goes on from the newest one"
        ) from None
    return directory / name


def _publish(final: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Path:
    """Write a checkpoint, and return what a damaged one of its name, if there was one, is called now."""
    temporary = final.with_name(f"{final.name}.{secrets.token_hex(8)}.tmp")  # a new folder, not one that is there
    damaged = final.with_name(final.name + ".damaged.tmp")
    try:
        temporary.mkdir()
        _write(temporary, tensors, values)
        if os.path.lexists(final):  # damaged, else this process would have resumed from it
            final.rename(damaged)
        temporary.rename(final)
        sync_directory(final.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return damaged


def _outdated(found: set[Path], newest: Path, retention: Retention) -> list[Path]:
    """Return the checkpoints to remove once `newest` is written; later ones were found damaged, and stay."""
    published = sorted((path for path in found if _step_of(path) <= _step_of(newest)), key=_step_of)
    return [
        path
        for path in published[: -retention.newest]
        if retention.every_steps is None or _step_of(path) % retention.every_steps
    ]


def _remove(path: Path, directory: Path) -> bool:
    """Remove a folder, if it exists; if that fails, as while another machine reads it over NFS, warn, return False.

    Of a link only the link is removed. `directory` is what the user calls the folder of `path`.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        warn(f"{directory / path.name} cannot be removed now: {reason}")
        return False
    return True


def _write(folder: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    digest = hashlib.sha256()
    with atomic_file(folder / _TENSORS) as file:
        for part in serialised(tensors):
            file.write(part)
            digest.update(part)
    content = {
        "format_version": FORMAT_VERSION,
        "tensors_sha256": digest.hexdigest(),
        "values": dict(values),
    }
    content["sha256"] = _json_sha256(content)
    publish(folder / _VALUES, (json.dumps(content, indent=1) + "\n").encode())
    if file_sha256(folder / _TENSORS) != content["tensors_sha256"]:
        raise OSError("what was written is not what is read")


def load_checkpoint(path: Path, most_bytes: int = _MOST_TENSORS_BYTES) -> Checkpoint:
    """Return the checkpoint at `path`; raises ValueError with the reason if it is not sound, or larger.

    Its values are of the types that training writes (`values.py`), and its step that of its name.
    """
    try:
        content = json.loads(read_plain(path / _VALUES, _MOST_VALUES_BYTES))
        if content.pop("sha256", None) != _json_sha256(content):
            raise ValueError(f"{_VALUES} does not match its checksum")
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {content['format_version']}, this version reads {FORMAT_VERSION}")
        values = checked_values(content["values"], _step_of(path))
        return Checkpoint(_read_tensors(path / _TENSORS, content["tensors_sha256"], most_bytes), values)
    except _UNSOUND as error:
        raise ValueError(f"incomplete or foreign: {error!r}") from None


def _read_tensors(path: Path, sha256: str, most_bytes: int) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; raises ValueError if it does not match its checksum, or is larger."""
    with open_plain(path) as file:
        require_size(file, most_bytes)
        if content_sha256(file) != sha256:
            raise ValueError(f"{_TENSORS} does not match its checksum")
        return load_file(name_of(file))


def load_newest(directory: Path, most_bytes: int = _MOST_TENSORS_BYTES) -> Checkpoint | None:
    """Return the newest sound checkpoint in `directory`, None if there are no checkpoints.

    Warns of each damaged or larger one that it skips; raises UserError if none is sound, so that a run does not begin
    again. Lists them anew if they change meanwhile, as in training.
    """
    found = list_checkpoints(directory)
    while found:
        for path in reversed(found):
            try:
                return load_checkpoint(path, most_bytes)
            except ValueError as error:
                if not os.path.lexists(path):  # training has saved another, and removed it
                    break
                warn(f"checkpoint {path} is passed over: {error}")
        before, found = found, list_checkpoints(directory)
        if found == before:
            raise UserError(
                f"none of the {len(found)} checkpoints in {directory} is sound: mend them, or name another --run-dir"
            )
    return None


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the published checkpoints in `directory`, oldest first."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _json_sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


class _Folder(Options):
    """List the checkpoints of a run."""

    run_dir: CliPositionalArg[Path]
    """Folder of the run."""


class _Prune(_Folder):
    """Remove the older checkpoints of a run that is not in training."""

    keep: int = Field(1, ge=1)
    """Number of newest sound checkpoints to keep."""


def main(argv: Sequence[str]) -> None:
    """Run a subcommand on the checkpoints of a run."""
    commands: dict[str, tuple[type[_Folder], Callable[[Any, list[Path]], object]]] = {
        "inspect": (_Folder, _inspect),
        "verify": (_Folder, _verify),
        "prune": (_Prune, _prune),
    }
    if argv and argv[0] in ("-h", "--help"):
        for line in str(__doc__).strip().splitlines():
            say(line)
        return
    if not argv or argv[0] not in commands:
        word = argv[0] if argv else "no command"
        raise UserError(f"unknown command: {word}{nearest(word, commands)} (usage: {'|'.join(commands)} RUN_DIR)")
    model, command = commands[argv[0]]
    options = build(model, parse_flags(model, argv[1:], f"python -m dist_dcgan.run.checkpoint {argv[0]}"))
    found = list_checkpoints(options.run_dir / "checkpoints")
    if not found:
        raise UserError(f"no checkpoints in {options.run_dir}: is it the folder of a run?")
    command(options, found)


def _inspect(options: _Folder, found: list[Path]) -> list[Path]:
    """Print the content of each; return the sound ones."""
    sound = []
    for path in found:
        try:
            tensors, values = load_checkpoint(path)
        except ValueError as error:
            say(f"{path.name}: DAMAGED, {error}")
        else:
            size = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
            say(f"{path.name}: sound, step {values['step']}, {len(tensors)} tensors, {size:.1f} MiB")
            sound.append(path)
    return sound


def _verify(options: _Folder, found: list[Path]) -> None:
    """Raise UserError if one is damaged."""
    damaged = len(found) - len(_inspect(options, found))
    if damaged:
        raise UserError(f"{damaged} of the {len(found)} checkpoints of {options.run_dir} are damaged: prune them")


def _prune(options: _Prune, found: list[Path]) -> None:
    """Remove all except the newest sound ones."""
    output_is_optional()
    directory = found[0].parent
    with locked(options.run_dir), _opened(directory) as folder:
        kept = _inspect(options, [folder / path.name for path in found])[-options.keep :]
        if not kept:
            raise UserError(f"none of the checkpoints of {options.run_dir} is sound: nothing is removed")
        removed = {
            path.name: _remove(folder / path.name, directory) for path in found if folder / path.name not in kept
        }
        for name in removed:
            say(f"{name}: {'removed' if removed[name] else 'left'}")
        if not all(removed.values()):
            raise UserError(f"checkpoints of {options.run_dir} are left: end what reads them, and prune again")


@contextmanager
def _opened(directory: Path) -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(opened_folder(directory))
        except OSError as error:
            raise UserError(f"{directory} cannot be used: {error.strerror or error}") from None
        yield folder


if __name__ == "__main__":
    run(main)
