"""The data sets and the undisturbed runs that all of these share."""

from __future__ import annotations

import pytest

from tests.faults.__main__ import make_bench
from tests.faults.scenario import Bench


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A bench as that of the faults."""
    return make_bench(tmp_path_factory.mktemp("bench"))
