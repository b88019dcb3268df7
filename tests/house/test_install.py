"""An installed wheel works away from the checkout: commands, presets, and nothing missing."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

import pytest

from tests.support.commands import environment, module, succeed

ROOT = Path(__file__).parents[2]


def setup(key: str) -> list[str]:
    """The lines of a value in setup.cfg, with their comments."""
    found = re.search(rf"^{key} =\n((?: +\S.*\n|#.*\n)+)", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert found is not None
    return [line.strip() for line in found[1].splitlines()]


def test_every_floor_has_its_reason() -> None:
    lines = setup("install_requires")
    for before, line in zip(["", *lines], lines, strict=False):
        assert line.startswith("#") or before.startswith("#") or line in ("numpy>=1.26", "pydantic-settings>=2.9"), line


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 does not know whose a module is: 3.11 runs it")
def test_every_package_that_is_imported_has_a_floor() -> None:
    """What another package brings may be of any version."""
    named = [line for key in ("install_requires", "eval", "video", "onnx") for line in setup(key)]
    known = {re.sub(r"[-_.]+", "-", line.split(">=")[0]).lower() for line in named if ">=" in line}
    imported = set()
    for path in (path for folder in ("dist_dcgan", "shards") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.split(".")[0] for name in names}
    others = imported - sys.stdlib_module_names - {"dist_dcgan", "shards"}
    packages = metadata.packages_distributions()
    assert len(others) > 10 and {"urllib3", "torch"} <= others
    assert {name for name in others if not {re.sub(r"[-_.]+", "-", p).lower() for p in packages[name]} & known} == set()


def test_every_installed_command_is_one() -> None:
    for line in setup("console_scripts"):
        module, _, function = line.partition(" = ")[2].partition(":")
        assert callable(getattr(import_module(module), function)), line


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
    run("-m", "dist_dcgan.sample", "run", "--out", "x.png", "--seeds", "0-3")
    run("-m", "dist_dcgan.report", "run")
    assert (work / "x.png").is_file()
    assert "convert" in run("-m", "shards", "--help")
    for name in ("torch", "shards", "dist_dcgan", "runpy"):  # as of somebody whose folder it is
        (work / f"{name}.py").write_text("raise RuntimeError('imported')")
    where = {name: value for name, value in environment().items() if name != "PYTHONSAFEPATH"} | {
        "PYTHONPATH": str(site)
    }
    words = [str(site / "bin" / "dist-dcgan-train"), *flags, "--run-dir", "run", "--dry-run"]
    assert "steps in all:      2 " in succeed([sys.executable, *words], cwd=work, env=where).stdout
    torchrun = [Path(sys.executable).parent / "torchrun", "--standalone", "--local-addr=localhost", "--no-python"]
    where |= {"PATH": f"{site}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run([*map(str, torchrun), *words], cwd=work, env=where, capture_output=True, text=True)
    assert "steps in all:      2 " in done.stdout, done.stderr
