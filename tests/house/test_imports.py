"""Who may import whom: arrows run downward only, and `shards` knows no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARDS = {"shards.manifest", "shards.common"}
BASE = {"dist_dcgan.config", "dist_dcgan.drawing", "dist_dcgan.distributed", "dist_dcgan.random_streams"}
LIBRARY = {*BASE, *SHARDS, "dist_dcgan.models", "dist_dcgan.data", "dist_dcgan.run"}
COMMAND = {"dist_dcgan", *SHARDS}
MAY_IMPORT: dict[str, set[str]] = {
    "shards.common": {"shards.common"},
    "shards.manifest": {"shards.common"},
    "shards.reader": {"shards.manifest", "shards.common"},
    "shards.writer": {"shards.manifest", "shards.common"},
    "shards.verify": {"shards.reader", "shards.writer", "shards.manifest", "shards.common"},
    "shards.pipeline": {"shards.manifest", "shards.common"},
    "shards.preview": {"shards.reader", "shards.manifest", "shards.common"},
    "shards.conversion": {"shards.writer", "shards.manifest", "shards.common", "shards.conversion"},
    "shards.lsun": {"shards.conversion", "shards.manifest", "shards.common", "shards.lsun"},
    "shards.demo": {"shards.common", "shards.demo"},
    "shards.__main__": {"shards"},
    "dist_dcgan.random_streams": set(),
    "dist_dcgan.config": SHARDS,
    "dist_dcgan.drawing": {"shards.common"},
    "dist_dcgan.distributed": {*SHARDS, "dist_dcgan.distributed"},
    "dist_dcgan.models": {"dist_dcgan.distributed", "dist_dcgan.models", "shards.common"},
    "dist_dcgan.data.storage": {"dist_dcgan.config", *SHARDS, "dist_dcgan.data.storage"},
    "dist_dcgan.data": {*BASE, *SHARDS, "dist_dcgan.data", "shards.reader"},
    "dist_dcgan.run": {*BASE, *SHARDS, "dist_dcgan.models", "dist_dcgan.run"},
    "dist_dcgan.loggers": {*BASE, *SHARDS, "dist_dcgan.run", "dist_dcgan.loggers"},
    "dist_dcgan.metrics": {*BASE, *SHARDS, "dist_dcgan.data", "dist_dcgan.metrics"},
    "dist_dcgan.training": {*LIBRARY, "dist_dcgan.metrics", "dist_dcgan.loggers", "dist_dcgan.training"},
    "dist_dcgan.preflight": {*LIBRARY, "dist_dcgan.loggers", "dist_dcgan.training", "dist_dcgan.preflight"},
    "dist_dcgan.trained": {*LIBRARY, "dist_dcgan.training"},
    "dist_dcgan.pages": {*BASE, *SHARDS, "dist_dcgan.run", "dist_dcgan.pages"},
    "dist_dcgan.train": COMMAND,
    "dist_dcgan.doctor": COMMAND,
    "dist_dcgan.evaluate": COMMAND,
    "dist_dcgan.sample": COMMAND,
    "dist_dcgan.walk": COMMAND,
    "dist_dcgan.timelapse": COMMAND,
    "dist_dcgan.arithmetic": COMMAND,
    "dist_dcgan.export": COMMAND,
    "dist_dcgan.report": COMMAND,
}
"""What each room may import, from the bottom up: no room stands above one that may import it."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def our_imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(str(node.module))
    return {name for name in found if name.split(".")[0] in ("dist_dcgan", "shards")}


def within(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


MODULES = [path for room in ("dist_dcgan", "shards") for path in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_room_imports_only_what_lies_below(path: Path) -> None:
    name = module_name(path)
    if path.name == "__init__.py":
        assert our_imports(path) == set()
        return
    rooms = [room for room in MAY_IMPORT if within(name, {room})]
    assert rooms, f"{name} stands in no room: add it to the table"
    allowed = MAY_IMPORT[max(rooms, key=len)]
    assert {used for used in our_imports(path) if not within(used, allowed)} == set()


def test_no_room_may_import_one_above_it() -> None:
    rooms = list(MAY_IMPORT)
    for room, allowed in MAY_IMPORT.items():
        above = rooms[rooms.index(room) + 1 :]
        commands = {"dist_dcgan", "shards"} & allowed  # a command may import whatever is not a command
        assert {other for other in above if within(other, allowed - commands)} == set(), room


def test_shards_work_without_torch() -> None:
    tools = "shards.__main__, shards.conversion.convert, shards.lsun.export, shards.verify, shards.demo.dataset"
    code = f"import sys, shards.preview, {tools}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_command_starts_without_what_only_some_need() -> None:
    commands = ", ".join(room for room in MAY_IMPORT if MAY_IMPORT[room] is COMMAND)
    slow = "{'torch._dynamo', 'sympy', 'torchvision', 'matplotlib', 'wandb', 'onnx'}"
    code = f"import sys, {commands}; assert not {slow} & sys.modules.keys(), {slow} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
