"""Folders for other software: they draw the same, here and without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from dist_dcgan import export, sample, walk
from dist_dcgan.trained import Trained
from tests.support.commands import environment, module, succeed
from tests.support.mistakes import refusal
from tests.support.pictures import CPU, by_seed, pixels
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generator of that run as a folder for other software.

    Made in a process of its own: onnxruntime leaves threads behind, and a later test could not fork this one.
    """
    out = tmp_path_factory.mktemp("exported") / "model"
    succeed(module("dist_dcgan.export", finished, "--out", out, "--licence", "cc0-1.0"))
    return out


def test_an_exported_folder_draws_the_same_here(finished: Path, folder: Path, tmp_path: Path) -> None:
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.onnx", "model.safetensors", "sample.py"]
    for path, out in ((finished, tmp_path / "run.png"), (folder, tmp_path / "folder.png")):
        sample.main([str(path), "--out", str(out), "--seeds", "0-3"])
    assert (tmp_path / "run.png").read_bytes() == (tmp_path / "folder.png").read_bytes()
    walk.main([str(folder), "--out", str(tmp_path / "walk.png"), "--rows", "1", "--frames", "3"])
    assert "leave out --best" in refusal(sample.main, folder, "--out", tmp_path / "best.png", "--best")
    card = (folder / "README.md").read_text()
    digest = json.loads((folder / "config.json").read_text())["sha256"]
    for words in ("license: cc0-1.0", "pipeline_tag: unconditional-image-generation", digest, "| Step | 6 |", "| 96 |"):
        assert words in card, card


def test_its_script_draws_the_same_without_torch(folder: Path, trained: Trained, tmp_path: Path) -> None:
    blocked = "import runpy, sys; sys.modules.update(torch=None, dist_dcgan=None); sys.argv = sys.argv[1:]; "
    blocked += "runpy.run_path(sys.argv[0], run_name='__main__')"
    words = [sys.executable, "-c", blocked, folder / "sample.py", tmp_path / "grid.png", "9"]
    subprocess.run([str(word) for word in words], check=True, cwd=tmp_path, env=environment())
    grid = pixels(tmp_path / "grid.png").reshape(3, 64, 3, 64, 3).swapaxes(1, 2).reshape(9, 64, 64, 3)
    expected = by_seed(trained, range(9)).permute(0, 2, 3, 1).numpy()
    assert np.abs(grid.astype(int) - expected.astype(int)).max() <= 1
    subprocess.run([*map(str, words[:-1]), "8"], check=True, cwd=tmp_path, env=environment())
    assert np.array_equal(pixels(tmp_path / "grid.png")[-64:, :128], np.concatenate(grid[6:8], axis=1))
    for wrong in ("0", "-1", "many", ""):
        done = subprocess.run([str(word) for word in [*words[:-1], wrong]], capture_output=True, env=environment())
        assert done.returncode == 1 and done.stderr.startswith(b"Draw a grid: python sample.py"), done.stderr


def test_normal_latents_are_the_same_in_the_script(trained: Trained) -> None:
    normal = Trained(trained.network, trained.description | {"latent": "normal"}, CPU)
    for of in (trained, normal):
        text = export.script(of.description)
        names: dict[str, Any] = {}
        exec(text[text.index("import hashlib") : text.index("out, count =")], names)
        found = np.stack([names["latent"](seed) for seed in range(5)])
        assert np.abs(found - of.latents(range(5)).numpy()).max() < 1e-5


def refusal_of_any_difference(run_dir: Path, out: Path) -> str:
    with mock.patch.object(export, "MOST_DIFFERENCE", -1.0):
        return refusal(export.main, run_dir, "--out", out)


@pytest.mark.slow
def test_onnx_that_draws_otherwise_is_refused_and_leaves_nothing(finished: Path, tmp_path: Path) -> None:
    (message,) = run_ranks(1, refusal_of_any_difference, finished, tmp_path / "model")
    assert "draws other images than torch" in message
    assert os.listdir(tmp_path) == []
