"""All scenarios of the bench."""

from __future__ import annotations

from tests.faults.contents import numbers, shapes
from tests.faults.disks import damages, disks
from tests.faults.processes import hangs, kills, stops
from tests.faults.scenario import Scenario
from tests.faults.streams import streams


def scenarios() -> list[Scenario]:
    """Return them in the order of the table."""
    return [*kills(), *stops(), *hangs(), *numbers(), *shapes(), *disks(), *damages(), *streams()]
