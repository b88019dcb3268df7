"""The short part of the fault bench (`python -m tests.faults`), without its limits of time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.__main__ import make_bench
from tests.faults.harness import golden, require_golden, run
from tests.faults.scenario import Bench, Scenario
from tests.faults.scenarios import scenarios

SHORT = [scenario for scenario in scenarios() if scenario.always]
SLOW = [pytest.mark.slow]
BY_DEFAULT = ["kill -9 of torchrun, or of all", "death within a save", "SIGTERM or SIGUSR1, to a rank or to torchrun"]
"""Rows of the table of which the default test run holds one scenario each: the ways in which a run ends early.

What happens to one rank is held by default in distributed/, training/test_precision and run/test_checkpoint.
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A bench whose undisturbed runs are made once, and whose ranks are forked: it is about what happens to them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORKED_RANKS", "1")
        yield make_bench(tmp_path_factory.mktemp("faults"))._replace(limits=False)


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(scenario, id=f"{scenario.row}: {scenario.name}", marks=[] if scenario.by_default else SLOW)
        for scenario in SHORT
    ],
)
def test_nothing_is_lost(scenario: Scenario, bench: Bench, tmp_path: Path) -> None:
    found = scenario.check(bench, tmp_path)
    if found.startswith("not tried"):
        pytest.skip(found)


@pytest.mark.slow
def test_another_run_is_not_taken_for_the_undisturbed_one(bench: Bench, tmp_path: Path) -> None:
    other = run(tmp_path, bench.data, flags=["--seed", 1])
    undisturbed = golden(bench.work, bench.data)
    assert other.samples() != undisturbed.samples() and other.state() != undisturbed.state()
    with pytest.raises(AssertionError):
        require_golden(other, undisturbed)


def test_the_bench_holds_every_promise_of_the_table() -> None:
    assert sorted(scenario.row for scenario in SHORT if scenario.by_default) == sorted(BY_DEFAULT)
    rows = {scenario.row for scenario in SHORT}
    assert rows == {scenario.row for scenario in scenarios()}
    assert len({scenario.name for scenario in scenarios()}) == len(scenarios())
