"""A W&B client that misbehaves, servers that do, and a reader of what the real client leaves."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # chosen at run time

from tests.support.http_server import Answer, serve

ROOT = Path(__file__).parents[2]

_CLIENT = """
import os, time
from pathlib import Path
from unittest.mock import MagicMock

def here(place):
    if os.environ["FAKE_WANDB"] == place:
        raise RuntimeError(f"broken at {place} with {os.environ['WANDB_API_KEY']}")
    if os.environ["FAKE_WANDB"] == f"hang at {place}":
        time.sleep(600)

def init(*, mode, dir, **_):
    here("init")
    files = Path(dir, "wandb", f"{mode}-run-fake", "files")
    files.mkdir(parents=True)
    (files.parent / "run.wandb").write_text("longer than a header")
    return MagicMock(dir=files)

here("import")
Settings = login = define_metric = Image = alert = teardown = MagicMock()
log, finish = lambda row: here("log"), lambda **_: here("finish")
"""


def fake_client(folder: Path, behaviour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `import wandb` find a client that fails at, say, "init", or hangs, as in "hang at init"."""
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb" / "__init__.py").write_text(_CLIENT)
    monkeypatch.syspath_prepend(folder)  # W&B's process imports from where this one does
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")
    monkeypatch.setenv("FAKE_WANDB", behaviour)


@contextmanager
def server(kind: str) -> Iterator[str]:
    """Return the address of a server that never answers ("silent"), refuses connections, or answers 401."""
    unauthorized = Answer(status=401, headers={"Content-Length": "0"})
    with socket.create_server(("127.0.0.1", 0)) as silent, serve(unauthorized) as running:  # nobody accepts at silent
        addresses = {"silent": f"http://127.0.0.1:{silent.getsockname()[1]}", "refused": "http://127.0.0.1:9"}
        yield (addresses | {"401": running.address.removesuffix("/scenes/")})[kind]


def read_records(path: Path) -> Iterator[Record]:
    """Read a .wandb file: LevelDB's log format, blocks of 32 KiB with records in parts, after a header of 7 bytes."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    position, whole = 7, b""
    while position < len(content):
        if 0 < -position % 32768 < 7:  # too little for another header
            position += -position % 32768
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
        with suppress(OSError):  # it ended, or is another user's
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
    return found
