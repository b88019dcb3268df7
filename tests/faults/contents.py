"""Numbers that are none; ranks, shards and images in numbers that change or do not fit: what must be true then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dist_dcgan.run.checkpoint import load_newest
from tests.faults.harness import Flags, Outcome, golden, require_golden, run
from tests.faults.rank import Fault
from tests.faults.scenario import Bench, Scenario
from tests.support.commands import metrics
from tests.support.rows import read_rows


def numbers() -> Iterator[Scenario]:
    """Yield a gradient that is not finite on one rank."""
    yield Scenario("NaN gradient on one rank", "NaN gradient, rank 1, D step 6", skips)


def skips(bench: Bench, folder: Path) -> str:
    """All ranks skip together: they hold the same afterwards, all of it finite."""
    outcome = run(folder, bench.data, [Fault("NaN gradient", "D step", 6)], most_starts=1)
    undisturbed = golden(bench.work, bench.data)
    assert outcome.starts[-1].code == 0, outcome.output
    assert outcome.samples() == undisturbed.samples()
    assert outcome.state() != undisturbed.state()
    held = [read_rows(path) for path in sorted(folder.glob("holds-*.jsonl"))]
    assert len(held) == 2 and len(held[0]) == 3 and held[0] == held[1]
    found = load_newest(outcome.run_dir / "checkpoints")
    assert found is not None and all(tensor.isfinite().all() for tensor in found.tensors.values())
    assert [row["step"] for row in metrics(outcome.run_dir) if row["grad_norm/d"] is None] == [6]
    return "skipped by both ranks, equal and finite afterwards"


def shapes() -> Iterator[Scenario]:
    """Yield runs whose ranks change, or do not fit."""
    yield Scenario("another number of ranks", "1, 2, 4, 1 ranks in float64", elastic)
    yield Scenario("another number of ranks", "3 ranks for a batch of 8", does_not_divide)
    yield Scenario("fewer shards than ranks, N mod B not 0", "2 ranks, 1 shard, over an epoch's end", few_shards)


def elastic(bench: Bench, folder: Path) -> str:
    """The same samples in the same order, and the same values up to rounding."""
    fp64: Flags = ("--precision", "fp64")
    undisturbed = golden(bench.work, bench.data, 1, fp64)
    flags = [str(flag) for flag in fp64]
    outcome = Outcome(folder)
    for ranks, steps in ((1, 3), (2, 6), (4, 9), (1, 12)):
        outcome.starts += run(folder, bench.data, (), [*flags, "--max-steps", steps], ranks, most_starts=1).starts
        assert outcome.starts[-1].code == 0, outcome.output
    assert len(outcome.samples()) == 12
    assert outcome.samples() == undisturbed.samples()
    ours, theirs = (load_newest(each.run_dir / "checkpoints") for each in (outcome, undisturbed))
    assert ours is not None and theirs is not None
    furthest = max(float((ours.tensors[name] - theirs.tensors[name]).abs().max()) for name in ours.tensors)
    assert furthest <= 1e-9
    return f"same samples; values differ by {furthest:.0e} at most"


def does_not_divide(bench: Bench, folder: Path) -> str:
    """One line, and nothing is begun or tried again."""
    outcome = run(folder, bench.data, ranks=3, most_starts=1)
    assert outcome.starts[0].code != 0
    expected = "error: global_batch 8 is not divisible by 3 ranks: use --global-batch 6 or 9"
    assert outcome.output.count(expected) == 1, outcome.output
    assert not outcome.run_dir.exists()
    return "one line"


def few_shards(bench: Bench, folder: Path) -> str:
    """Both ranks take equal steps, each epoch uses every image at most once, and a kill changes nothing."""
    flags = ("--global-batch", 20, "--max-steps", 9)
    outcome = run(folder, bench.other, [Fault("kill -9 of a rank", "D step", 6)], flags, most_starts=1)
    require_golden(outcome, golden(bench.work, bench.other, flags=flags))
    steps = list(outcome.samples().values())
    for epoch in (steps[:4], steps[4:8]):
        assert len(set(np.concatenate(epoch))) == 80
    assert len(list(bench.other.glob("*.tar"))) == 1
    return "equal steps, no hang"
