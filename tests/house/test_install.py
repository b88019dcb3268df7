"""An installed wheel works away from the checkout: commands, presets, and nothing missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import environment, module, succeed

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_wheel_installed_elsewhere_trains_and_samples(demo_shards: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:  # a copy, so that the build leaves nothing in the checkout
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("dist_dcgan-*.whl")
    install = ["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run(module("pip", *install, wheel), check=True)

    def run(*command: str) -> str:
        # The checkout must not be importable: the first assertion below says which package is.
        where = environment() | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
        return succeed([sys.executable, *command], cwd=work, env=where).stdout

    assert str(site) in run("-c", "import dist_dcgan; print(dist_dcgan.__file__)")
    flags = ["--data", str(demo_shards), "--preset", "debug", "--max-steps", "2", "--wandb", "disabled"]
    run("-m", "dist_dcgan.train", *flags, "--run-dir", "run")
    run("-m", "dist_dcgan.sample", "run", "--out", "x.png", "--num", "4")
    assert (work / "x.png").is_file()
    assert "convert" in run("-m", "shards", "--help")
