"""Two hosts and a cable: training over it, without it, and where they do not reach each other at all."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.faults.harness import (
    ROOT,
    Outcome,
    Start,
    command,
    golden,
    launcher_environment,
    processes_of,
    require_golden,
)
from tests.faults.rank import Fault
from tests.faults.scenario import Bench
from tests.slurm.hosts import PROBE, PROGRAMS, Hosts
from tests.slurm.needs import require

pytestmark = pytest.mark.system
TIMEOUT = 10
PORT = 29400
SECONDS = 180


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    require(PROGRAMS, PROBE)
    with Hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


class Pair:
    """The command that a user types on both hosts."""

    def __init__(self, hosts: Hosts, folder: Path, data: Path, faults: Sequence[Fault] = ()) -> None:
        self.hosts, self.folder = hosts, folder
        self._words = ["bash", "launch/torchrun.sh"]
        self._words += command(data, folder / "run", "--distributed.timeout-seconds", TIMEOUT)
        self._env = launcher_environment(folder, faults, 2)
        self._env |= {"NODES": "2", "HEAD": f"{hosts.names[0]}:{PORT}", "RESTARTS": "0"}
        self.ended: dict[str, float] = {}

    def start(self, **of_second: str) -> None:
        """Type it; the second host may have more in its environment."""
        self._processes = {
            name: self.hosts.start(
                name,
                self._words,
                env=self._env | (of_second if name == self.hosts.names[1] else {}),
                cwd=ROOT,
                stdout=(self.folder / f"{name}.txt").open("w"),
                stderr=subprocess.STDOUT,
            )
            for name in self.hosts.names
        }

    def wait_for_fault(self) -> None:
        """Wait until the fault has begun."""
        deadline = time.monotonic() + SECONDS
        while not (self.folder / "fault-000").exists():
            assert time.monotonic() < deadline, self.outputs()
            time.sleep(0.05)

    def wait(self) -> list[int]:
        """Wait for both to end; return their statuses. Nobody lives on."""
        deadline, left = time.monotonic() + SECONDS, dict(self._processes)
        while left and time.monotonic() < deadline:
            for name in [name for name, process in left.items() if process.poll() is not None]:
                self.ended[name] = time.monotonic()
                del left[name]
            time.sleep(0.05)
        for process in left.values():
            process.kill()
        assert not left, self.outputs()
        while processes_of(self.folder):  # the launcher's watch, for seconds
            assert time.monotonic() < deadline, processes_of(self.folder)
            time.sleep(0.1)
        return [process.wait() for process in self._processes.values()]

    def outputs(self) -> list[str]:
        """What was printed on each host."""
        return [(self.folder / f"{name}.txt").read_text() for name in self.hosts.names]

    def outcome(self) -> Outcome:
        """What the run left."""
        return Outcome(self.folder, [Start(0, "".join(self.outputs()), 0, [])])


def test_where_the_cable_is_cut_both_end_and_afterwards_the_same_command_goes_on(
    hosts: Hosts, bench: Bench, tmp_path: Path
) -> None:
    pair = Pair(hosts, tmp_path, bench.data, [Fault("wait", "D step", 6, 0)])
    pair.start()
    pair.wait_for_fault()
    hosts.cut("hostb")
    cut = time.monotonic()
    assert all(status != 0 for status in pair.wait())
    seconds = [ended - cut for ended in pair.ended.values()]
    print(f"ended {min(seconds):.1f} and {max(seconds):.1f} s after the cut")
    assert max(seconds) < 100  # by themselves, and not by what ends a launcher that waits
    first, second = pair.outputs()
    assert "on hostb (process" in first and "does not answer" in first
    assert "hosta, where the ranks meet, cannot be reached" in second

    hosts.mend("hostb")
    pair.start()
    assert pair.wait() == [0, 0], pair.outputs()
    assert "going on after step 4" in pair.outputs()[0]
    require_golden(pair.outcome(), golden(bench.work, bench.data, ranks=4))


def test_a_cut_shorter_than_the_timeout_changes_nothing(hosts: Hosts, bench: Bench, tmp_path: Path) -> None:
    pair = Pair(hosts, tmp_path, bench.data, [Fault("wait", "D step", 6, 0)])
    pair.start()
    pair.wait_for_fault()
    hosts.cut("hostb")
    time.sleep(0.3 * TIMEOUT)  # TCP sends again after 6 s at the latest then
    hosts.mend("hostb")
    assert pair.wait() == [0, 0], pair.outputs()
    outcome = pair.outcome()
    assert outcome.repeated_steps() == 0
    require_golden(outcome, golden(bench.work, bench.data, ranks=4))


def test_hosts_that_do_not_reach_each_other_are_named(hosts: Hosts, bench: Bench, tmp_path: Path) -> None:
    """The second host gives the others an address that only itself can reach."""
    pair = Pair(hosts, tmp_path, bench.data)
    pair.start(GLOO_SOCKET_IFNAME="lo")
    assert all(status != 0 for status in pair.wait())
    line = "error: machines do not reach each other: hosta cannot connect to hostb at 127.0.0.1 "
    for output in pair.outputs():
        assert sum(text.startswith(line) for text in output.splitlines()) == 1, output
    assert not (tmp_path / "run" / "config.yaml").exists()
