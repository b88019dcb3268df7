"""Nothing is printed except by `shards.common.messages`, which redacts and escapes it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAY = {
    "shards/common/messages.py",
    "shards/common/streams.py",  # what it prints is its own text
}


def prints(path: Path) -> Iterator[str]:
    """Yield the lines of a file that print, or write to a standard stream's text layer."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write"):
            yield f"{path}:{node.lineno}"


def test_every_line_that_a_command_prints_is_redacted_and_escaped() -> None:
    files = [path for package in ("dist_dcgan", "shards") for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 80
    found = {path.relative_to(ROOT).as_posix(): [*prints(path)] for path in files}
    assert {name for name, lines in found.items() if lines} <= MAY
    assert found["shards/common/messages.py"] != []  # it would see one
