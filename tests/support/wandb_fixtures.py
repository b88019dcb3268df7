"""A W&B client that misbehaves, servers that do, and a reader of what the real client leaves."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

ROOT = Path(__file__).parents[2]

_CLIENT = """
import os, time

def here(place):
    if os.environ["FAKE_WANDB"] == place:
        raise RuntimeError(f"broken at {place} with {os.environ['WANDB_API_KEY']}")
    if os.environ["FAKE_WANDB"] == f"hang at {place}":
        time.sleep(600)

here("import")

class Settings:
    def __init__(self, **_): pass

class Run:
    def __init__(self, dir): self.dir = dir

def login(**_): return True
def init(*, mode, dir, **_):
    here("init")
    files = os.path.join(dir, "wandb", f"{mode}-run-fake", "files")
    os.makedirs(files)
    with open(os.path.join(files, "..", "run.wandb"), "w") as file:
        file.write("longer than a header")
    return Run(files)
def define_metric(*_, **__): pass
def log(row): here("log")
def Image(path): return path
def alert(**_): pass
def finish(**_): here("finish")
def teardown(): pass
"""


def fake_client(folder: Path, behaviour: str) -> dict[str, str]:
    """Return the environment in which `import wandb` finds a client that is, say, "broken at init"."""
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb" / "__init__.py").write_text(_CLIENT)
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "FAKE_WANDB": behaviour}


@contextmanager
def black_hole() -> Iterator[str]:
    """Return the address of a server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(100)  # the kernel takes them; nobody accepts
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def read_records(path: Path) -> Iterator[Record]:
    """Read a .wandb file: LevelDB's log format, blocks of 32 KiB with records in parts, after a header of 7 bytes."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    position, whole = 7, b""
    while position < len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole, or its last part
            yield Record.FromString(whole)
            whole = b""


def processes_with(variable: str) -> dict[int, str]:
    """Return ids and command lines of processes that have `variable`, NAME=VALUE, in their environment."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it ended, or is another user's
            continue
    return found
