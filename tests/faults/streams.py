"""Standard output and error of ranks that fail at a random moment: nothing changes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tests.faults.harness import STEPS, golden, require_golden, run
from tests.faults.rank import ACTS, Fault
from tests.faults.scenario import Bench, Scenario

TRIALS, SHORT_TRIALS = 50, 3  # in which each act happens
PLACES = ("before step", "D step", "G step")


def streams() -> Iterator[Scenario]:
    """Yield trials in which each rank loses its output in one way or another."""
    acts = [act for act in ACTS if "output" in act]
    for trial in range(TRIALS):
        choice = random.Random(trial)
        faults = [
            Fault(choice.choice(acts), choice.choice(PLACES), choice.randrange(1, STEPS + 1), rank) for rank in range(2)
        ]
        name = f"trial {trial}: {'; '.join(map(str, faults))}"
        yield Scenario("output fails", name, partial(goes_on, faults=faults), always=trial < SHORT_TRIALS)


def goes_on(bench: Bench, folder: Path, faults: Sequence[Fault]) -> str:
    """The ranks that have lost their output train on to the end, and are not started again."""
    outcome = run(folder, bench.data, faults, most_starts=1)
    require_golden(outcome, golden(bench.work, bench.data))
    assert outcome.rows() == golden(bench.work, bench.data).rows()
    assert outcome.faults() == len(faults) and outcome.repeated_steps() == 0
    return "golden, not started again"
