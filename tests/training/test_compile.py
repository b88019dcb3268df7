"""Compiled networks train as plain ones do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.gpu.training import largest_difference
from tests.support.ranks import run_ranks
from tests.support.training import train_steps
from tests.training.test_equivalence import options


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_compiled_networks_compute_the_same_on_two_ranks(demo_shards: Path) -> None:
    plain, compiled = (
        run_ranks(2, train_steps, demo_shards, options("fp64") | {"compile": flag}, 2)[0] for flag in (False, True)
    )
    assert largest_difference(plain.tensors, compiled.tensors) <= 1e-9
