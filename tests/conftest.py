"""What runs when, what it took, and data sets that tests share."""

from __future__ import annotations

import gc
import signal
from collections import Counter
from pathlib import Path

import pytest
from _pytest.terminal import TerminalReporter

from shards.conversion.convert import Settings, convert
from shards.conversion.sources.lmdb_source import LmdbSource
from shards.demo.dataset import write_demo

LONGEST = (
    "tests/faults/",
    "tests/slurm/",
    "tests/training/test_collapse.py",
    "tests/training/test_quality.py",
    "tests/run/",
    "tests/shards/test_kills.py",
    "tests/data/test_remote.py",
)
"""What begins first, so that no worker is left with one of them while the others are done."""

LEFT_OUT = {"slow": "slow: --all runs it", "system": "needs system packages: --all runs it"}
"""Reason by which a marker leaves a test out of the default run."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run also slow tests and those that need system packages")
    parser.addoption("--long", action="store_true", help="run also what takes many minutes and is covered in short")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(
        key=lambda item: next((n for n, name in enumerate(LONGEST) if item.nodeid.startswith(name)), len(LONGEST))
    )
    if config.getoption("--all"):
        return
    for item in items:
        for mark, reason in LEFT_OUT.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Spare the garbage collector what every test has: it is a tenth of the time."""
    gc.freeze()


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Print the time by folder, and what was left out."""
    reports = [report for found in terminalreporter.stats.values() for report in found if hasattr(report, "duration")]
    seconds: Counter[str] = Counter()
    for report in reports:
        seconds[str(Path(report.nodeid.partition("::")[0]).parent)] += report.duration
    terminalreporter.section("seconds of tests by folder")
    for folder, total in seconds.most_common():
        terminalreporter.write_line(f"{total:7.1f} {folder}")
    left_out = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    terminalreporter.section("left out")
    for reason, count in left_out.most_common():
        terminalreporter.write_line(f"{count:7} {reason.removeprefix('Skipped: ')}")


@pytest.fixture(scope="session", autouse=True)
def hangups_reach_what_tests_start() -> None:
    """Under nohup, ignore SIGHUP by a handler: unlike SIG_IGN, programs that are started do not inherit it."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, frame: None)


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
