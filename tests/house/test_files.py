"""Files are opened in `shards.common.files` only, which follows no link that others may have laid and opens no FIFO."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.test_imports import MODULES, ROOT, module_name

BY_NAME = {
    "write_text",
    "write_bytes",
    "read_text",
    "read_bytes",
    "touch",
    "NamedTemporaryFile",
    "mktemp",
    "symlink_to",
}
"""Methods of paths, and others, that open what has a name."""
MODES = {"r", "w", "a", "r+", "w+", "rb", "wb", "ab", "r+b", "w+b"}
ALLOWED = {
    "shards.common.files": "the one writer and the one reader",
    "shards.common.locks: os.open": "a lock's file is opened without following links, and only if it is plain",
    "shards.common.streams: os.open": "/dev/null",
    "dist_dcgan.loggers.wandb_process: os.open": "/dev/null",
    "dist_dcgan.config: read_text": "a preset in the package",
    "dist_dcgan.pages.page: read_text": "style and script in the package",
    "dist_dcgan.preflight.machine: read_bytes": "the package's own code",
    "dist_dcgan.distributed.peers: read_text": "/proc",
    "dist_dcgan.distributed.strangers: read_text": "/proc",
    "dist_dcgan.metrics.extractors: torch.save": "in a temporary folder that only this user can enter",
}


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func)


def mode_of(call: ast.Call, position: int) -> str:
    keywords = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    found = [*call.args[position : position + 1], *keywords]
    return str(found[0].value) if found and isinstance(found[0], ast.Constant) else ""


def opened(tree: ast.AST) -> Iterator[str]:
    """Yield the calls by which a module opens files by name; "x" makes a new file or fails, and follows no link."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = name_of(call)
        last = name.rpartition(".")[2]
        if name in ("os.open", "io.open", "torch.save", "np.save", "np.load", "torch.load"):
            if not (name == "torch.load" and ast.unparse(call.args[0]) == "name"):  # of a file that is open
                yield name
        elif (name == "open" and "x" not in mode_of(call, 1)) or last in BY_NAME:
            yield last
        elif last == "open" and name != "open" and (not (call.args or call.keywords) or mode_of(call, 0) in MODES):
            yield "open"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_no_module_opens_a_file_by_another_way(path: Path) -> None:
    name = module_name(path)
    if name in ALLOWED:
        return
    assert [call for call in opened(ast.parse(path.read_text())) if f"{name}: {call}" not in ALLOWED] == []


def test_what_is_allowed_is_there() -> None:
    found = {f"{module_name(path)}: {call}" for path in MODULES for call in opened(ast.parse(path.read_text()))}
    assert {name for name in ALLOWED if ":" in name} <= found
    assert (ROOT / "shards/common/files.py").exists()


@pytest.mark.parametrize(
    ("code", "calls"),
    [
        ('open(path, "wb")', ["open"]),
        ("open(path)", ["open"]),
        ("path.open()", ["open"]),
        ('path.open("ab")', ["open"]),
        ('path.open(mode="w")', ["open"]),
        ('path.write_text("x")', ["write_text"]),
        ("os.open(path, flags)", ["os.open"]),
        ('path.open("xb"); Image.open(buffer, formats=FORMATS); self._open(place); lmdb.open(folder)', []),
    ],
)
def test_ways_to_open_files_are_seen(code: str, calls: list[str]) -> None:
    assert list(opened(ast.parse(code))) == calls
