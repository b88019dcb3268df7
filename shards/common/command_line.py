"""Command lines from typed models: flags, help and one-line errors, for all commands of the project.

pydantic-settings derives flags and help from a model; this module adds the nearest name for a misspelt flag
or key, one-line errors and exit status 2.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_settings import CliSettingsSource, SettingsError

from shards.common.environment import unset_empty_variables
from shards.common.errors import UserError, joined
from shards.common.messages import tell, tell_traceback
from shards.common.redaction import remember, without_secrets
from shards.common.streams import guard_streams

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class Options(BaseModel):
    """Base of all option models: frozen, without extra fields, with a docstring under each field as its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _take_none(cls, values: Any) -> Any:
        """Take the word none for None where a field may be None."""
        if not isinstance(values, Mapping):
            return values
        may_be = {name for name, field in cls.model_fields.items() if NoneType in get_args(field.annotation)}
        is_none = {name for name in may_be if str(values.get(name)).lower() == "none"}
        return {name: None if name in is_none else value for name, value in values.items()}


def expand_home(path: Path) -> Path:
    """Return `path` with a leading `~` or `~user` as a folder; as in a shell, `~name` of no user stays.

    Raises ValueError if this user has no home.
    """
    expanded = Path(os.path.expanduser(path))
    if expanded.parts[:1] == ("~",):
        raise ValueError("this user has no home: set HOME, or give a path without ~")
    return expanded


def not_empty(path: Any) -> Any:
    """Return a path that a user gives; raises ValueError if it is empty, which would be the working directory."""
    if path == "":
        raise ValueError("a path is needed (is a variable unset?); . is the working directory")
    return path


def _no_address(path: Any) -> Any:
    if isinstance(path, str) and _ADDRESS.match(path):
        raise ValueError("a path on this machine is needed, not an address")
    return not_empty(path)


UserPath = Annotated[Path, BeforeValidator(_no_address), AfterValidator(expand_home)]
"""A path that a user gives, in which `~` is home: no shell expands it in `--run-dir=~/runs` or in a file."""


_LONGEST = 200
"""Characters of a value in a message: files of others may hold values of any size."""
_MOST_MISTAKES = 5
_BRIEFLY = reprlib.Repr()
_BRIEFLY.maxlevel, _BRIEFLY.maxlist, _BRIEFLY.maxdict, _BRIEFLY.maxset, _BRIEFLY.maxtuple = 2, 4, 4, 4, 4
_BRIEFLY.maxstring = _BRIEFLY.maxother = _BRIEFLY.maxlong = 10 * _LONGEST  # `shortened` cuts, after secrets are removed

Model = TypeVar("Model", bound=BaseModel)


def parse_flags(
    model: type[BaseModel],
    argv: Sequence[str],
    prog: str,
    short: Mapping[str, str] | None = None,
    about: str | None = None,
) -> dict[str, Any]:
    """Return the values that `argv` sets for `model`, nested by field and not yet validated.

    `short` maps a short flag to the full one. `--help` prints `about`, by default the model's docstring, and all
    flags, and exits. Raises UserError for an unknown flag or a missing value.
    """
    remember([*argv])
    source: CliSettingsSource[Any] = CliSettingsSource(
        model,  # type: ignore[arg-type]  # annotated as BaseSettings, but any pydantic model works
        cli_prog_name=prog,
        cli_exit_on_error=False,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_enforce_required=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
    )
    _arrange_help(source.root_parser, short or {}, about)
    try:
        found = source.root_parser.parse_args(_expand(argv, short or {}))
        lists = _take_lists(source.root_parser, found)
        return dict(source(parsed_args=found)()) | lists
    except SettingsError as error:
        flags = [flag for flag in source.root_parser._option_string_actions if flag.startswith("--")]
        raise UserError(_explain_flags(str(error), [*flags, *(short or {})])) from None


def build(model: type[Model], values: Mapping[str, Any], where: str = "") -> Model:
    """Validate `values` into `model`; raises UserError with each key, its value and the expected value.

    `where` names the origin of the values (a file, a preset) in the message. At most 5 keys are listed.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        details = error.errors(include_url=False)
        lines = [_explain_field(model, dict(detail)) for detail in details[:_MOST_MISTAKES]]
        more = f"; and {len(details) - _MOST_MISTAKES} more" if len(details) > _MOST_MISTAKES else ""
        raise UserError(f"{where + ': ' if where else ''}{joined(lines)}{more}") from None


def shortened(text: str) -> str:
    """Return a text for a message, with its middle left out if it is long."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST * 2 // 3]}...{text[-_LONGEST // 3 :]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` with the known name nearest to `name`, or an empty string if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Run a command: a UserError becomes one line on stderr and exit status 2, an interrupt exit status 130.

    Empty environment variables are unset first. No error of standard error stops a command; one of standard
    output does, until the command calls `output_is_optional`.
    """
    guard_streams()
    sys.excepthook = tell_traceback
    unset_empty_variables()
    try:
        try:
            main(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()  # here, so that its failure is one of the command
    except UserError as error:
        tell(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _take_lists(parser: argparse.ArgumentParser, found: argparse.Namespace) -> dict[str, list[str]]:
    """Return the words of positional lists as they were typed, and leave harmless ones in their places.

    pydantic-settings would split a folder `a,b` in two, take `2024` for a number, and `[x]` for a list.
    """
    lists = {}
    for action in parser._actions:
        words = getattr(found, action.dest, None)
        if not action.option_strings and isinstance(words, list) and words:
            lists[action.dest] = words
            setattr(found, action.dest, ["x"] * len(words))
    return lists


def _expand(argv: Sequence[str], short: Mapping[str, str]) -> list[str]:
    expanded = []
    for word in argv:
        flag, equals, value = word.partition("=")
        expanded.append(short.get(flag, flag) + equals + value)
    return expanded


def _arrange_help(parser: argparse.ArgumentParser, short: Mapping[str, str], about: str | None) -> None:
    """Arrange the help: usage and description first, short flags next to full ones, groups named by their docstring."""
    words = [str(action.metavar) for action in parser._actions if not action.option_strings]
    parser.usage = " ".join([parser.prog, *words, "[OPTIONS]"])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    if about is not None:
        parser.description = about.strip()
    for action in parser._actions:
        names = [flag for flag, longer in short.items() if longer in action.option_strings]
        action.option_strings = [*names, *action.option_strings]
    for group in parser._action_groups:
        if group.description:
            group.title, group.description = group.description.rstrip("."), None


def _explain_flags(message: str, flags: Iterable[str]) -> str:
    message = re.sub(r"\s+", " ", message.removeprefix("error parsing CLI: "))
    unknown = re.search(r"unrecognized arguments: (--?[^ =]+)", message)
    if unknown:
        return f"unknown option {unknown[1]}{nearest(unknown[1], flags)} (--help lists them all)"
    return f"{message} (--help explains)"


def _explain_field(model: type[BaseModel], detail: dict[str, Any]) -> str:
    path = [str(part) for part in detail["loc"]]
    name = shortened(".".join(path))
    if detail["type"] == "extra_forbidden":
        return f"unknown key {name}{nearest(path[-1], _keys(model, path[:-1]))}"
    if detail["type"] == "missing":
        return f"{name} is missing"
    reason: str = detail["msg"].removeprefix("Value error, ")
    if not name:
        return reason
    reason = reason if reason[:2].isupper() else reason[0].lower() + reason[1:]
    return f"{name}: {shortened(reason)}, got {shortened(without_secrets(_BRIEFLY.repr(detail['input'])))}"


def _keys(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        # get_origin: in Python 3.10 isinstance(tuple[...], type) is true, and issubclass raises
        if get_origin(annotation) or not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
