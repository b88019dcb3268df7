"""Reads YAML that may come from others: plain values, of a bounded size also after its aliases are expanded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from shards.common.command_line import shortened
from shards.common.errors import UserError
from shards.common.files import read_named
from shards.common.redaction import remember

_MOST_CHARACTERS = 1 << 16
"""Of a file, and of its content with every alias replaced by what it names; a configuration takes about 2,000."""
_LOCATIONS = "data"
"""Key of a configuration under which addresses and commands are, which may have secrets in them."""
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_LONGEST_NUMBER = 40
"""Digits. Without a limit, time and memory for a number can grow with the square of its digits."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in the YAML file at `path`; object tags are refused, so that no code can run.

    Raises UserError if it cannot be read, is no plain YAML, or is larger than any configuration.
    """
    try:
        content = parse_yaml(read_named(path, _MOST_CHARACTERS).decode(), str(path))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"cannot read configuration {path}: {error}") from None
    remember(content.get(_LOCATIONS), from_user=False)
    return content


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """Return the mapping in a YAML text; `where` names it in errors."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None:
            _expanded_size(node, {})
        content = None if node is None else loader.construct_document(node)
    except RecursionError:
        raise UserError(f"{where} is not plain YAML of a configuration: it is nested too deeply") from None
    except Exception as error:  # yaml's constructors raise any, as AttributeError for `!!timestamp x`
        raise UserError(f"{where} is not plain YAML: {shortened(' '.join(str(error).split()))}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{where} must hold a mapping of configuration keys, not {type(content).__name__}")
    return content


def _expanded_size(node: Node, known: dict[int, int]) -> int:
    """Return the characters and nodes below `node` with aliases expanded; raises ValueError if it is too large.

    An alias is the same node once more, so that a few lines may stand for millions.
    """
    size = known.get(id(node))
    if size == 0:
        raise ValueError("it contains itself")
    if size is not None:
        return size
    known[id(node)] = 0  # until it is known
    size = 1
    if isinstance(node, ScalarNode):
        size += len(node.value)
        if node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:
            raise ValueError(f"a number of {len(node.value)} digits")
    elif isinstance(node, SequenceNode):
        size += sum(_expanded_size(each, known) for each in node.value)
    elif isinstance(node, MappingNode):
        size += sum(_expanded_size(each, known) for pair in node.value for each in pair)
    if size > _MOST_CHARACTERS:
        raise ValueError(f"it has more than {_MOST_CHARACTERS:,} characters once its aliases are expanded")
    known[id(node)] = size
    return size
