"""Metrics are averaged over the ranks in one reduction; standard output belongs to the command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_dcgan.distributed.collectives import average_across_ranks, from_rank_zero, gather
from dist_dcgan.distributed.world import process_group
from tests.support.operations import OperationRecorder, Parts
from tests.support.ranks import run_ranks

STEPS = 10


def rows_of(rank: int) -> list[dict[str, Tensor]]:
    """Metrics of float64 training: scores are float32, losses float64."""
    generator = torch.Generator().manual_seed(rank)
    return [
        {
            "score": torch.rand((), generator=generator),
            "loss": torch.rand((), generator=generator, dtype=torch.float64),
        }
        for _ in range(STEPS)
    ]


def averaged() -> tuple[list[dict[str, float]], int]:
    """Return the means and how many operations they cost."""
    with process_group(60, "cpu") as world:
        rows, recorder = rows_of(world.rank), OperationRecorder(Parts(""))
        with recorder:
            means = average_across_ranks(rows)
        return means, sum(operation.launches for operation in recorder.operations)


def test_means_over_two_ranks_are_exact_in_both_precisions() -> None:
    first, second = run_ranks(2, averaged)
    expected = [
        {name: (float(mine[name]) + float(other[name])) / 2 for name in mine}
        for mine, other in zip(rows_of(0), rows_of(1), strict=True)
    ]
    assert first == second
    assert first[0] == expected


def test_scalars_are_packed_before_they_are_converted() -> None:
    means, operations = averaged()
    assert means == [{name: float(value) for name, value in row.items()} for row in rows_of(0)]
    assert operations < STEPS  # one by one, there would be a conversion for each of the scores


def told(value: object) -> tuple[list[object], object]:
    """What a rank learns of the others' values, and of rank 0's."""
    with process_group(60, "cpu") as world:
        mine = [value] * (1 + world.rank)  # of different lengths
        return gather(mine), from_rank_zero(lambda: mine)


def test_values_of_ranks_travel_as_json() -> None:
    value = {"text": "ä\n", "number": 0.1, "none": None}
    assert run_ranks(2, told, value) == [([[value], [value, value]], [value])] * 2


def test_what_would_need_pickle_is_refused() -> None:
    with pytest.raises(AssertionError, match="not JSON serializable"):
        run_ranks(2, told, {1, 2})


def what_is_printed(folder: Path) -> bytes:
    """Join while the library prints on standard output, print a result, and return what has arrived there."""
    join = dist.init_process_group

    def joining(*arguments: Any, **options: Any) -> None:
        os.write(1, b"connected to 1 peer\n")
        join(*arguments, **options)

    path = folder / str(os.environ["RANK"])
    with path.open("wb") as output:
        os.dup2(output.fileno(), 1)
    with mock.patch.object(dist, "init_process_group", joining), process_group(60, "cpu"):
        os.write(1, b"result\n")
    return path.read_bytes()


def test_what_the_library_prints_while_ranks_meet_is_no_output_of_the_command(tmp_path: Path) -> None:
    assert run_ranks(2, what_is_printed, tmp_path) == [b"result\n"] * 2
