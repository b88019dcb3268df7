"""The command that somebody with a GPU runs, rehearsed without one: on the day it is needed, it has to work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gpu.__main__ import ITEMS
from tests.support.commands import environment, one_line_error, run

COMMAND = ["bash", str(Path(__file__).parent / "run.sh")]


@pytest.mark.slow
def test_every_item_is_rehearsed(tmp_path: Path) -> None:
    done = run([*COMMAND, "--rehearse", "--out", str(tmp_path / "out")], env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(files) <= 8 and all(name.startswith("cpu-rehearsal-") for name in files)
    items = json.loads((tmp_path / "out" / "cpu-rehearsal-results.json").read_text())["items"]
    assert list(items) == ["data", *(item.name for item in ITEMS)]
    assert {entry["reason"] for entry in items.values() if entry["status"] == "SKIP"} == {"needs CUDA"}
    assert "| 128x128: portable+graph |" in (tmp_path / "out" / "cpu-rehearsal-results.md").read_text()


def test_without_a_gpu_the_rehearsal_is_offered(tmp_path: Path) -> None:
    assert "no GPU is seen here: use --rehearse" in one_line_error([*COMMAND, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
