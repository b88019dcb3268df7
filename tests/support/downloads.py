"""An archive as LSUN publishes it, and downloads of it that must bring the folder, or one line and nothing."""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from shards.common.errors import UserError
from shards.lsun.download import download
from tests.support.http_server import Answer, Server, serve
from tests.support.shards_fixtures import (
    contents,
)

NAME = "test_lmdb"  # the only one whose checksum is not published
FILES = {"data.mdb": random.Random(0).randbytes(200_000), "lock.mdb": b"lock"}


def zip_bytes(members: Mapping[Any, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def lsun_zip(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive as LSUN publishes them."""
    return zip_bytes({f"{NAME}/": b""} | {f"{NAME}/{name}": content for name, content in files.items()}, compression)


ZIP = lsun_zip(FILES)
NO_ZIP = "it is damaged, or no zip file (File is not a zip file)"
FOLDER = {f"{NAME}/{name}": content for name, content in FILES.items()}


def fetched(out: Path, *answers: Answer) -> Server:
    """Download from a server that answers so; require exactly the right folder, and nothing beside it."""
    with serve(*answers) as server:
        assert download(NAME, out, server.address)
    assert contents(out) == FOLDER
    assert [path.name for path in out.iterdir()] == [NAME]
    return server


def refused(out: Path, *answers: Answer) -> tuple[Server, str]:
    """Require a refusal and no final name; return the server and the line, with ADDRESS for the archive's."""
    with serve(*answers) as server, pytest.raises(UserError) as caught:
        download(NAME, out, server.address)
    assert not (out / NAME).exists() and not (out / f"{NAME}.zip").exists() and not (out / f"{NAME}.tmp").exists()
    line = str(caught.value)
    assert "\n" not in line
    return server, line.replace(f"{server.address}{NAME}.zip", "ADDRESS")
