"""What W&B's own variables and the user's settings file ask for, read without importing wandb.

The configuration wins over a variable (WANDB_PROJECT), a variable over W&B's settings file, and this over our defaults.
What cannot be obeyed is refused. Of a settings file in the working directory, which may be somebody's, only a mode that
sends nothing is obeyed (`wandb offline` writes one): it could name another server for the user's key.
"""

from __future__ import annotations

import configparser
import contextlib
import netrc
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from dist_dcgan.config import Config, WandbOptions
from shards.common.errors import UserError
from shards.common.files import open_plain

Mode = Literal["auto", "online", "offline", "disabled"]

DEFAULT_PROJECT = "dist_dcgan"
_MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
_TRUE = ("1", "on", "true", "yes")
_NOT_IN_IDS = ":;,#?/'"  # wandb's own rules, of which it would tell only after training has begun
_NOT_IN_PROJECTS = "/\\#?%:"
_LONGEST_PROJECT = 128
_LONGEST_TAG = 64
_MOST_BYTES = 1 << 16  # of a settings file


@dataclass(frozen=True)
class WandbRun:
    """Where and under which names W&B keeps a run."""

    mode: Mode
    """auto: online if there is a key, else disabled."""
    project: str
    name: str
    run_id: str | None
    """None if disabled and never recorded."""
    resume: str
    """What to do if W&B knows the id already."""


def resolve_wandb(config: Config, stored_id: str | None) -> WandbRun:
    """Return how W&B records a run whose checkpoint stores `stored_id`, None if it is new.

    Raises UserError if W&B's variables contradict the run or ask for something that cannot be had here.
    """
    mode = resolve_mode(config.wandb)
    name = config.wandb.name or client_setting("name") or client_setting("run_name")
    resume = client_setting("resume")
    if mode != "disabled":
        _require_supported()
    return WandbRun(
        mode=mode,
        project=_project(config.wandb, mode),
        name=name or config.run_dir.resolve().name,
        run_id=stored_id if mode == "disabled" else _run_id(config.run_dir, stored_id),
        resume=resume if resume in ("must", "never") and stored_id is None else "allow",
    )


def resolve_mode(options: WandbOptions) -> Mode:
    """Return the mode: with `auto`, the one that W&B's variables or settings ask for, if any."""
    if options.mode != "auto":
        return options.mode
    if os.environ.get("WANDB_DISABLED", "").lower() in _TRUE:
        return "disabled"
    asked = os.environ.get("WANDB_MODE") or _offline_here() or client_setting("mode")
    if asked is None:
        return "auto"
    if asked.lower() not in _MODES:
        raise UserError(
            f"WANDB_MODE {asked!r}, of the environment or W&B's settings, is not supported, as only rank 0 records a "
            "run: unset it, or give --wandb online, offline or disabled"
        )
    return _MODES[asked.lower()]


def client_setting(name: str) -> str | None:
    """Return one of W&B's settings from its variable or the user's settings, None if it is not set or empty."""
    return os.environ.get(f"WANDB_{name.upper()}") or _user_settings().get("default", name, fallback="") or None


def has_home() -> bool:
    """Return whether this user has a home: without HOME and an entry in the list of users, `~` would be any folder."""
    return os.path.expanduser("~") != "~"


def source_of_key() -> str | None:
    """Return where W&B finds a key, None if nowhere; in W&B's order: environment, settings, .netrc."""
    for variable in ("WANDB_IDENTITY_TOKEN_FILE", "WANDB_API_KEY"):
        if os.environ.get(variable):
            return variable
    if _user_settings().get("default", "api_key", fallback=""):
        return "its settings"
    server = client_setting("base_url") or "https://api.wandb.ai"
    named = os.environ.get("NETRC")
    for name in [named] if named else ["~/.netrc", "~/_netrc"]:
        path = Path(os.path.expanduser(name))  # unlike Path.expanduser, it does not fail without a home
        try:
            if _is_known(path) and path.is_file() and netrc.netrc(path).authenticators(str(urlsplit(server).hostname)):
                return str(path)
        except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
            continue
    return None


def _project(options: WandbOptions, mode: Mode) -> str:
    asked = client_setting("project")
    project = options.project or asked or DEFAULT_PROJECT
    if mode == "disabled":
        return project
    if len(project) > _LONGEST_PROJECT or set(project) & set(_NOT_IN_PROJECTS):
        raise UserError(
            f"W&B's project {project!r} must have at most {_LONGEST_PROJECT} characters and none of "
            f"{_NOT_IN_PROJECTS}: give another --wandb.project (WANDB_ENTITY names a team)"
        )
    if os.environ.get("WANDB_SWEEP_ID") and asked and asked != project:
        raise UserError(
            f"--wandb.project {project}, but the sweep WANDB_SWEEP_ID is in WANDB_PROJECT {asked}: drop --wandb.project"
        )
    return project


def _run_id(run_dir: Path, stored: str | None) -> str:
    asked = client_setting("run_id")
    if asked and (asked != asked.strip() or set(asked) & set(_NOT_IN_IDS)):
        raise UserError(f"WANDB_RUN_ID {asked!r} must not begin or end with a space, nor contain any of {_NOT_IN_IDS}")
    if stored is not None and (not isinstance(stored, str) or not stored.strip() or set(stored) & set(_NOT_IN_IDS)):
        raise UserError(f"run directory {run_dir} holds {stored!r}, which is no id of W&B: give --wandb disabled")
    if asked and stored and asked != stored:
        raise UserError(
            f"run directory {run_dir} is W&B's run {stored}, but WANDB_RUN_ID is {asked}: unset it, "
            "or name another with --run-dir"
        )
    return stored or asked or secrets.token_hex(4)


def _require_supported() -> None:
    """Raise UserError for variables that wandb would refuse when training has already begun."""
    for name in ("fork_from", "resume_from"):
        if client_setting(name):
            raise UserError(
                f"WANDB_{name.upper()} is not supported: a run goes on from its own checkpoint; "
                "unset it, or give --wandb disabled"
            )
    for tag in (client_setting("tags") or "").split(","):
        if len(tag) > _LONGEST_TAG:
            raise UserError(f"WANDB_TAGS: {tag!r} has {len(tag)} characters, W&B takes at most {_LONGEST_TAG}")


def _user_settings() -> configparser.ConfigParser:
    folder = os.path.expanduser(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb")
    return _settings(Path(folder, "settings")) if _is_known(Path(folder)) else configparser.ConfigParser()


def _is_known(path: Path) -> bool:
    """Return whether a path is not one in the home of a user without one, which the working directory could hold."""
    return has_home() or not str(path).startswith("~")


def _offline_here() -> str | None:
    """Return the mode in W&B's settings of the working directory if it is one that sends nothing."""
    here = ".wandb" if os.path.exists(".wandb") else "wandb"
    mode = _settings(Path(here, "settings")).get("default", "mode", fallback="").lower()
    return mode if _MODES.get(mode) in ("offline", "disabled") else None


def _settings(path: Path) -> configparser.ConfigParser:
    settings = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(OSError, UnicodeDecodeError, configparser.Error):  # W&B skips such a file, too
        with open_plain(path) as file:
            content = file.read(_MOST_BYTES).decode()
        settings.read_string(content)
    return settings
