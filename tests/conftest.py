"""Data sets that tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.conversion.convert import Settings, convert
from shards.conversion.sources.lmdb_source import LmdbSource
from shards.demo.dataset import write_demo


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--with-system", action="store_true", help="run tests that need system packages")
    parser.addoption("--long", action="store_true", help="run also what takes minutes each and is covered in short")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:  # a file shares what its tests prepare; the tests of a cluster share one
        file = item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group("slurm" if file.startswith("tests/slurm/") else file))
    if not config.getoption("--with-system"):
        for item in items:
            if "system" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs system packages: run with --with-system"))


@pytest.fixture(scope="session")
def demo_lmdb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 rendered bedrooms in LSUN's format."""
    return write_demo(tmp_path_factory.mktemp("demo"), images=96, seed=0, workers=1)


@pytest.fixture(scope="session")
def demo_shards(demo_lmdb: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as shards of 10 samples, the last of 6."""
    out = tmp_path_factory.mktemp("shards") / "demo"
    convert([LmdbSource(demo_lmdb)], out, Settings(samples_per_shard=10), workers=1)
    return out
