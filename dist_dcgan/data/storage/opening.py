"""Opens the data set that the options name."""

from __future__ import annotations

from pathlib import Path

from dist_dcgan.config import LocationOptions
from dist_dcgan.data.storage.cache import Cache
from dist_dcgan.data.storage.location import DatasetLocation, Folder
from dist_dcgan.data.storage.remote import Command, OtherFolder, Remote, WebServer
from shards.common.errors import UserError
from shards.common.redaction import HIDDEN_COMMAND


def open_location(options: LocationOptions, allow_commands: bool = False) -> DatasetLocation:
    """Return the data set's location; raises UserError, with the remedy, if there is none.

    `allow_commands` is the user's consent to run the command of a `pipe:`.
    """
    location = options.path
    if isinstance(location, Path) and not _exists(location):
        raise UserError(
            f"no data set at {options.name}: make one with `python -m shards convert LMDB --out {options.name}`, "
            "or name another with --data"
        )
    if options.cache_dir is not None:
        return Cache(_remote(options, allow_commands), options.cache_dir, round(options.cache_gb * 1e9))
    if isinstance(location, Path):
        return Folder(location)
    raise UserError(f"{options.name} is not on this machine: say with --data.cache-dir where its shards may be staged")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as error:  # no permission, too long, a NUL in it
        raise UserError(f"cannot look at {path}: {getattr(error, 'strerror', None) or error}") from None


def _remote(options: LocationOptions, allow_commands: bool) -> Remote:
    location = options.path
    if isinstance(location, Path):
        return OtherFolder(location)
    if location.lower().startswith(("http://", "https://")):
        return WebServer(location)
    if not location.startswith("pipe:"):
        raise UserError(f"cannot read {options.name}: give a folder, an address of http or https, or pipe:COMMAND")
    if not allow_commands:
        raise UserError(
            f"{options.name} runs a shell command: only --data.allow-commands on the command line allows it"
        )
    if location == HIDDEN_COMMAND:
        raise UserError(f"{location} stands for a command, which is not stored: give it with --data pipe:COMMAND")
    return Command(location.removeprefix("pipe:"))
