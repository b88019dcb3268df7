"""A rank whose main thread waits in C, as it does inside CUDA, ends with the reason when it cannot go on."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from dist_dcgan.distributed.peers import Peers
from dist_dcgan.distributed.watch import Watch, grace_seconds
from tests.support import commands
from tests.support.commands import environment, module

TIMEOUT = 4
SLACK = 60  # seconds in which ranks of a loaded machine start, and end


class Ranks:
    """Ranks that do as they are told after a collective, around a store of this process, as torchrun's agent has."""

    def __init__(self, folder: Path, acts: tuple[str, ...]) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        common = environment() | {
            "WORLD_SIZE": str(len(acts)),
            "LOCAL_WORLD_SIZE": str(len(acts)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        self.errors = [folder / "attempt_0" / str(rank) / "error.json" for rank in range(len(acts))]
        command = module("tests.distributed.rank", ",".join(acts), TIMEOUT)
        self.processes = []
        for rank, error in enumerate(self.errors):
            error.parent.mkdir(parents=True)
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_ERROR_FILE": str(error)}
            self.processes.append(commands.start(command, env=common | own))

    def outcome(self, rank: int) -> tuple[int, str]:
        """Status and output of a rank."""
        text, _ = self.processes[rank].communicate(timeout=SLACK)
        return self.processes[rank].wait(), text

    def place(self, rank: int) -> str:
        return rf"rank {rank} on \S+ \(process {self.processes[rank].pid}\)"

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    started: list[Ranks] = []

    def start(*acts: str) -> Ranks:
        started.append(Ranks(tmp_path, acts))
        return started[-1]

    yield start
    for ranks in started:
        ranks.kill()


@pytest.mark.parametrize(
    ("act", "reason"), [("raise", "failed: ValueError: it cannot go on"), ("die", "has ended")], ids=["raise", "die"]
)
def test_a_blocked_rank_ends_with_the_reason(act: str, reason: str, start: Callable[..., Ranks]) -> None:
    ranks = start(act, "block")
    ranks.processes[0].wait(SLACK)
    status, text = ranks.outcome(1)
    assert status == 2, text
    expected = rf"error: rank 1 of 2 cannot go on: {ranks.place(0)} {reason}"
    assert re.search(rf"^{expected}$", text, re.MULTILINE), text
    assert "OneRankError: rank 1 of 2 cannot go on" in json.loads(ranks.errors[1].read_text())["message"]["message"]


def test_a_healthy_rank_that_is_blocked_is_neither_blamed_nor_killed(start: Callable[..., Ranks]) -> None:
    ranks = start("reduce", "die", "block")
    status, text = ranks.outcome(0)
    assert status == 2, text
    assert re.search(rf"rank 0 of 3 cannot go on: {ranks.place(1)} has ended \(", text), text
    status, text = ranks.outcome(2)
    assert status == 2, text  # by itself
    assert re.search(rf"rank 2 of 3 cannot go on: {ranks.place(1)} has ended$", text, re.MULTILINE), text


def test_a_rank_that_is_stopped_is_killed(start: Callable[..., Ranks]) -> None:
    ranks = start("reduce", "stop", "block")
    assert re.search(rf"cannot go on: {ranks.place(1)} does not answer and is killed \(", ranks.outcome(0)[1])
    assert ranks.outcome(1)[0] == -9
    assert ranks.outcome(2)[0] == 2


def test_a_rank_that_hangs_in_a_loop_is_told_with_its_line_and_ends(start: Callable[..., Ranks]) -> None:
    ranks = start("reduce", "hang")
    text = ranks.outcome(0)[1]
    assert re.search(rf"cannot go on: {ranks.place(1)} is busy or waits at rank\.py:\d+ \(hang\) \(", text), text
    assert ranks.outcome(1)[0] == 2


def test_a_rank_that_ends_first_is_no_failure(start: Callable[..., Ranks]) -> None:
    ranks = start("leave", "work")
    assert [ranks.outcome(rank)[0] for rank in (0, 1)] == [0, 0]


class LostStore:
    """A store whose host is gone."""

    def append(self, key: str, value: str) -> None:
        """Take it: torch waits for no answer, either."""

    def check(self, keys: list[str]) -> bool:
        raise dist.DistNetworkError("recvValue failed")


def test_the_watch_ends_quietly_with_its_store() -> None:
    end = mock.Mock()
    with Watch(Peers(LostStore(), 0, 2), 2, TIMEOUT, end) as watch:
        watch._thread.join(10)
        assert not watch._thread.is_alive()
    end.assert_not_called()


def test_the_watch_ends_with_the_group() -> None:
    peers = Peers(dist.HashStore(), 0, 2)  # type: ignore[attr-defined]
    with Watch(peers, 2, TIMEOUT, mock.Mock()) as watch:
        time.sleep(1)
    assert not watch._thread.is_alive()


def test_the_grace_is_shorter_than_what_would_end_a_rank_otherwise() -> None:
    """Torchrun kills after 30 s; the collectives of the default configuration wait for 60."""
    assert grace_seconds(60) == 20 and grace_seconds(1800) == 20
    assert grace_seconds(1) > 4 + 1  # what asking takes at the most, and a look
    assert timedelta(seconds=grace_seconds(30)) < timedelta(seconds=30)
