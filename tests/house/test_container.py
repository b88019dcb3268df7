"""The container that launch/apptainer.def describes: its steps run, in a folder that stands for its root."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.commands import environment

ROOT = Path(__file__).parents[2]


def section(name: str) -> str:
    text = (ROOT / "launch" / "apptainer.def").read_text()
    found = re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_the_container_gets_all_files_that_an_installation_needs() -> None:
    copied = {line.split()[0] for line in section("files").splitlines() if line.strip()}
    needed = {"LICENSE", "README.md", "pyproject.toml", "setup.cfg", "dist_dcgan", "shards"}
    assert copied == needed and all((ROOT / name).exists() for name in copied)


def test_the_steps_of_the_container_make_an_environment_that_works(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--long"):
        pytest.skip("installs torch: --long runs it")
    for line in filter(str.strip, section("files").splitlines()):
        name, folder = line.split()
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tmp_path / folder.strip("/")).mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, tmp_path / folder.strip("/") / name)
    env = environment() | {"ROOT": str(tmp_path)}
    env.pop("PYTHONPATH", None)  # the checkout must not be what is imported
    for step in ("post", "test"):
        subprocess.run(["sh", "-e", "-c", section(step)], cwd=tmp_path, env=env, check=True)
    assert not (tmp_path / "opt" / "source").exists()
