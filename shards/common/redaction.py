r"""Text of any origin as it may be printed and stored: `without_secrets`, and `one_line`, which also escapes it.

Secrets are known in two ways. By their form: user, password, query and fragment of an address, a command after `pipe:`,
an authorization header, `password=...`, the tokens of well-known services. And by their value: those in environment
variables, and those in a command line or a configuration (`remember`), which are masked wherever they turn up, such as
in an error message of a library. A configuration may come from others, who must not choose which words of our messages
are masked: of it only what looks random counts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from urllib.parse import quote, unquote

MASK = "***"
HIDDEN_COMMAND = f"pipe:{MASK}"
"""Stands for a command in what is printed and stored."""

_LONGEST_LINE = 20_000
_SHORTEST = 6
"""Shorter values are not masked by value: they would be found in ordinary words."""
_SHORTEST_UNNAMED = 20
"""The same for a part of a query or a command whose name does not say that it is a secret."""

_SECRET_NAME = r"(?:password|passwd|secret|token|signature|credential|api[_-]?key|access[_-]?key|auth[_-]?key)"
_FORMS = (
    # A command, to the end of its line; COMMAND is our own help's. "Broken pipe: reason" is none.
    (re.compile(r"\b(?i:pipe):(?!\*\*\*|COMMAND\b)\S.*"), HIDDEN_COMMAND),
    # An address. One slash: as a Path of an address is printed. A password may have a slash, unless it may be a port.
    (
        re.compile(
            r"\b([a-z][a-z0-9+.-]{0,30}://?)(?:[^\s/?#]*@|[^\s/?#@:]*:(?!\d*(?:[/?#\s]|$))[^\s@]{0,2000}@)?"
            r"([^\s?#'\"]*)(?:[?#][^\s'\"]*)?",
            re.IGNORECASE,
        ),
        r"\1\2",
    ),
    # user:password@host, if the scheme is missing or misspelt; the same for a query.
    (re.compile(r"(?:(?<![^\s'\"(=])|(?<=//))[^\s/'\"@:*]{1,200}:[^\s/'\"@]{1,200}@(?=[\w.\[-])"), f"{MASK}@"),
    (re.compile(r"([?&][\w.%-]{1,100}=)[^\s&'\"]+"), rf"\1{MASK}"),
    # Headers, and values named as secrets.
    (re.compile(r"\b((?:proxy-)?authorization['\"]?\s*[:=]\s*['\"]?)[^'\"\n]*", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"\b(bearer )\s*[\w.~+/=-]{6,}", re.IGNORECASE), rf"\1{MASK}"),
    (
        re.compile(rf"(?<![\w.-])([\w.-]{{0,64}}?{_SECRET_NAME}[\w-]{{0,64}}['\"]?\s*[:=]\s*['\"]?)[^\s'\"&,;]+", re.I),
        rf"\1{MASK}",
    ),
    # Tokens of Hugging Face, GitHub, GitLab, Slack, W&B and others; JSON web tokens.
    (re.compile(r"\b(?:hf_|gh[opsur]_|github_pat_|glpat-|xox[abprs]-|wandb_v1_|sk-)[\w-]{16,}"), MASK),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*"), MASK),
)
_NAMED_WORD = re.compile(
    rf"(?:{_SECRET_NAME}|authorization|bearer|--user|-u)[\w-]*['\"]?[\s:=]+['\"]?(?:(?:bearer|basic|token)\s+)?([^\s'\"]+)",
    re.IGNORECASE,
)
"""A word of a command after a name."""
_LOCATION = re.compile(r"[a-z][a-z0-9+.-]*://?", re.IGNORECASE)
_PARTS = re.compile(r"://?(?:(?P<user>.*)@)?[^?#]*(?:[?#](?P<query>.*))?", re.DOTALL)
_VARIABLE = re.compile(r"(?:^|_)(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASS|PAT|AUTH|CREDENTIALS?|CONNECTION_STRING)$")
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
"""Characters without a width that Python takes for printable (Unicode: Default_Ignorable_Code_Point)."""

_remembered = set[str]()


def without_secrets(text: str) -> str:
    """Return a text in which secrets are masked or left out."""
    for secret in sorted(_remembered | set(_of_environment()), key=len, reverse=True):
        text = text.replace(secret, MASK)
    for form, shown in _FORMS:
        text = form.sub(shown, text)
    return text


def printable(text: str, kept: str = "") -> str:
    """Return a text with all characters escaped that move, colour, hide or reorder others, but for those in `kept`."""
    if text.isprintable() and not _INVISIBLE.search(text):
        return text
    return "".join(char if char in kept or _is_visible(char) else _escaped(char) for char in text)


def one_line(text: object) -> str:
    """Return a message of any origin as one line of bounded length that may be printed and stored."""
    line = str(text)
    if len(line) > _LONGEST_LINE:  # at a space, so that no secret is cut and not recognised
        line = f"{line[:_LONGEST_LINE].rpartition(' ')[0] or line[:100]} ..."
    return printable(without_secrets(line))


def public_address(location: str) -> str:
    """Return the location of a data set as it may be printed and stored; a folder is returned as it is."""
    if location.startswith("pipe:"):
        return HIDDEN_COMMAND
    if not _LOCATION.match(location):
        return location
    return without_secrets(re.split(r"[?#]", location, maxsplit=1)[0])


def remember(value: object, from_user: bool = True) -> None:
    """Have the secrets in all strings of a value masked from now on; if it is not `from_user`, those that look random.

    The user's are the words of the command line, not the content of a file.
    """
    if isinstance(value, str):
        _remembered.update(secret for secret in _secrets_in(value) if from_user or _looks_random(secret))
    elif isinstance(value, Mapping):
        for item in value.values():
            remember(item, from_user)
    elif isinstance(value, list | tuple):
        for item in value:
            remember(item, from_user)


def _secrets_in(text: str) -> Iterator[str]:
    """Yield the secrets of an address or a command, in the forms in which a library or a server may repeat them."""
    _, is_command, command = text.partition("pipe:")
    if not is_command and "{}" in text and " " in text:  # its scheme is misspelt
        command = text
    found = list(_of_command(command)) if command != MASK else []
    if (parts := _PARTS.search(text)) is not None:
        found += _of_address(parts["user"] or "", parts["query"] or "")
    for secret in found:
        plain = unquote(secret)
        yield from {secret, plain, quote(plain, safe=""), printable(secret)}


def _of_address(user: str, query: str) -> Iterator[str]:
    password = user.partition(":")[2]
    if len(password) >= _SHORTEST:
        yield password
    elif len(user) >= _SHORTEST_UNNAMED:  # a token in place of a user
        yield user
    if "=" not in query and len(query) >= _SHORTEST_UNNAMED:
        yield query
    for pair in re.split(r"[&#?]", query):
        name, _, value = pair.partition("=")
        is_named = re.search(rf"{_SECRET_NAME}|sig|auth|key|pass", name, re.IGNORECASE)
        if len(value) >= (_SHORTEST if is_named else _SHORTEST_UNNAMED):
            yield value


def _of_command(command: str) -> Iterator[str]:
    """Yield a command, and the words of it that look like passwords and tokens, or follow a name that says so."""
    yield from (part.strip() for part in (command, *command.split("{}")) if len(part.strip()) >= _SHORTEST_UNNAMED)
    for match in _NAMED_WORD.finditer(command):
        yield from (word for word in (match[1], match[1].partition(":")[2]) if len(word) >= _SHORTEST)
    for word in re.split(r"[\s'\"=:,;|&<>()@]+", command):
        is_path = re.fullmatch(r"[-/.~].*|.*\{\}.*", word)
        if not is_path and _looks_random(word):
            yield word


def _looks_random(word: str) -> bool:
    """Return whether a word is none of a language: letters of both cases and digits, or long and with a digit."""
    is_mixed = len(word) >= 8 and all(re.search(kind, word) for kind in (r"\d", "[a-z]", "[A-Z]"))
    is_long = len(word) >= _SHORTEST_UNNAMED and re.search(r"\d", word) is not None
    return (is_mixed or is_long) and re.search(r"\s", word) is None


def _of_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if _VARIABLE.search(name.upper()) and len(value) >= 8 and not value.startswith(("/", "~", ".")):
            yield value
        elif "@" in value and _LOCATION.match(value):
            yield from _secrets_in(value)


def _is_visible(char: str) -> bool:
    return char.isprintable() and not _INVISIBLE.match(char)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()
