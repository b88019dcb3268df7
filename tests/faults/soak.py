"""One run to which many faults happen, drawn at random from a seed."""

from __future__ import annotations

import random
from pathlib import Path

from tests.faults.harness import Outcome, golden, require_golden, run
from tests.faults.processes import SHORT_TIMEOUT
from tests.faults.rank import ACTS, Fault
from tests.faults.scenario import Bench

FAULTS, SEED = 64, 0
STEPS_BETWEEN = 7
NOT_IN_A_GOLDEN_RUN = {"NaN gradient"}
"""What changes the outcome, as it is to."""
PLACES_OF_RANK_ZERO = {"checkpoint cut short, kill -9": "D step", "disk full": "save"}


def soak(bench: Bench, folder: Path) -> str:
    """Let all of them happen, with no more than the same command; it must end as if nothing had."""
    faults = list(draw())
    steps = FAULTS * STEPS_BETWEEN + 4
    flags = ("--max-steps", steps, "--distributed.timeout-seconds", 2 * SHORT_TIMEOUT, "--checkpoint.every-steps", 4)
    outcome = Outcome(folder, run(folder, bench.data, faults, flags, most_starts=2 * FAULTS).starts)
    require_golden(outcome, golden(bench.work, bench.data, flags=("--max-steps", steps)))
    assert outcome.faults() == FAULTS
    return f"{FAULTS} faults, {len(outcome.starts)} starts of the same command, golden"


def draw() -> list[Fault]:
    """Return the faults of the soak: each kind about as often, at steps in their order."""
    choice = random.Random(SEED)
    acts = sorted(ACTS.keys() - NOT_IN_A_GOLDEN_RUN)
    faults = []
    for index in range(FAULTS):
        act = acts[index % len(acts)] if index < len(acts) else choice.choice(acts)
        step = STEPS_BETWEEN * index + choice.randrange(1, STEPS_BETWEEN - 1) + 4
        place = PLACES_OF_RANK_ZERO.get(act) or choice.choice(("before step", "D step", "G step"))
        if place == "save":
            step += -step % 4
        faults.append(Fault(act, place, step, 0 if act in PLACES_OF_RANK_ZERO else choice.randrange(2)))
    return faults
