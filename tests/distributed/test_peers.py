"""Ranks start together, whatever was started before, and name the rank that ends, fails or hangs.

Promise 9 (nothing off the critical path stops training) of dist_dcgan/README.md.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing import get_context
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dist_dcgan.distributed.peers import Peers, _started, rendezvous
from dist_dcgan.distributed.world import process_group
from shards.common.errors import OneRankError, UserError
from tests.support.commands import module, run
from tests.support.ranks import run_ranks

TIMEOUT = 5.0


def what_a_rank_hears(kind: str) -> str:
    """Have something happen to rank 1 between two collectives; return what the others raise."""
    try:
        with process_group(TIMEOUT, "cpu") as world:
            dist.all_reduce(torch.ones(1))
            if world.rank == 1 and kind == "failed":
                raise ValueError("it cannot go on.\nBecause")
            if world.rank == 1 and kind == "late":
                time.sleep(TIMEOUT + 1)
            dist.all_reduce(torch.ones(1))
        return "nothing"
    except OneRankError as error:
        return str(error)
    except ValueError:
        return "mine"


def test_a_rank_that_fails_is_named_with_its_error() -> None:
    heard = run_ranks(3, what_a_rank_hears, "failed")
    assert heard[1] == "mine"
    for rank in (0, 2):
        assert re.match(
            rf"rank {rank} of 3 cannot go on: rank 1 on \S+ \(process \d+\) failed: ValueError: it cannot go on\. \(",
            heard[rank],
        )


def test_a_rank_that_is_late_is_not_killed() -> None:
    """All answer: nobody is to blame."""
    for heard in run_ranks(2, what_a_rank_hears, "late"):
        assert "cannot go on: a collective took too long, or a connection broke" in heard


def test_healthy_ranks_hear_nothing() -> None:
    assert run_ranks(3, what_a_rank_hears, "") == ["nothing"] * 3


def what_a_rank_gets(device_type: str | None, gpus: tuple[int, ...]) -> str:
    """Join ranks whose hosts show them that many GPUs; return the kind of device, or what is raised."""
    shown = mock.patch.object(torch.cuda, "device_count", return_value=gpus[int(os.environ["RANK"])])
    with shown, mock.patch.object(dist, "init_process_group", wraps=dist.init_process_group) as joined:
        try:
            with process_group(60, device_type) as world:
                dist.all_reduce(torch.ones(1))
                return world.device.type
        except UserError as error:
            joined.assert_not_called()
            return str(error)


@pytest.mark.parametrize(
    ("device_type", "gpus", "expected"),
    [
        (None, (0, 0, 0), "cpu"),
        ("any", (8, 0, 8), "cpu"),
        ("cpu", (8, 0, 8), "cpu"),
        (None, (8, 0, 8), r"host \S+ shows no GPU \(rank 1\), the other ranks have one each: mend the driver there"),
    ],
)
def test_all_ranks_take_the_cpu_if_they_may_and_else_name_the_one_without_a_gpu_before_any_joins(
    device_type: str | None, gpus: tuple[int, ...], expected: str
) -> None:
    heard = run_ranks(3, what_a_rank_gets, device_type, gpus)
    assert len(set(heard)) == 1 and re.match(expected, heard[0])


def test_rank_zero_keeps_the_store_until_all_have_read() -> None:
    """Its process may hold the store, and end at once."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    zero, one = (Peers(store, rank, 2) for rank in range(2))
    reading, read = threading.Event(), []
    processes = one._processes

    def slowly() -> Any:
        reading.set()
        time.sleep(0.3)
        read.append(True)
        return processes()

    with mock.patch.object(one, "_processes", slowly):
        slow = threading.Thread(target=one.everyone, args=(60,))
        slow.start()
        assert zero.everyone(60).keys() == {0, 1}
        assert reading.is_set() and read
        slow.join()


class SlowStore:
    """A store that answers late once many ask."""

    def __init__(self) -> None:
        self._store, self.delay = dist.HashStore(), 0.0  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        time.sleep(self.delay)
        return getattr(self._store, name)


class LostStore:
    """A store that does not answer; what is written to it is lost."""

    def append(self, key: str, value: str) -> None:
        pass

    def check(self, keys: list[str]) -> bool:
        time.sleep(60)
        raise RuntimeError("it timed out")


@pytest.fixture(autouse=True)
def _sigterm_is_kept() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_many_ranks_and_a_slow_store_are_no_broken_network(monkeypatch: pytest.MonkeyPatch) -> None:
    store = SlowStore()
    with monkeypatch.context() as far:
        far.setattr(socket, "gethostname", lambda: "far")
        ranks = [Peers(store, rank, 512) for rank in range(512)]
    for peers in ranks[1:500]:
        peers._write("ends", None)
    store.delay = 0.01
    assert ranks[0].cause().count("on far (process") == 12
    ranks[7].report("ValueError: it cannot go on")
    assert ranks[1].cause().endswith("failed: ValueError: it cannot go on")


def test_a_rank_that_comes_and_fails_while_another_asks_is_named() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    late = threading.Timer(0.5, lambda: Peers(store, 1, 2).report("ValueError: it cannot go on"))
    late.start()
    assert Peers(store, 0, 2).cause().endswith("failed: ValueError: it cannot go on")


def test_reports_of_strangers_are_ignored_and_kill_nobody() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    zero = Peers(store, 0, 2, key=b"a secret")
    for key in (b"", b"guessed"):
        Peers(store, 1, 2, key=key).report("a lie")
    store.append("ends", "[1, nonsense")  # type: ignore[attr-defined]
    assert zero.cause() == "rank 1 has not come"


@pytest.mark.parametrize(
    ("key", "later", "fate"),
    [(b"", "", "does not answer and is killed"), (b"", "1", "has ended"), (None, "", "does not answer")],
)
def test_a_process_is_killed_only_if_it_is_certainly_the_rank(key: bytes | None, later: str, fate: str) -> None:
    """It is not if its number belongs to a later process, or if strangers may write to the store."""
    process = get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    process.start()
    assert process.pid
    peers = Peers(dist.HashStore(), 0, 2, key=key)  # type: ignore[attr-defined]
    rank = peers._processes()[0]._replace(pid=process.pid, started=_started(process.pid) + later)
    assert peers._fate(1, rank) == f"rank 1 on {rank.host} (process {process.pid}) {fate}"
    process.join(10 if fate.endswith("killed") else 0.1)
    assert process.is_alive() == (not fate.endswith("killed"))
    process.kill()


def test_a_store_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "n1")
    assert Peers(LostStore(), 0, 2).cause() == "n1, where the ranks meet, cannot be reached"


def rooms(word: str) -> list[str]:
    """Call `rendezvous` three times on one store; return what a rank finds where rank 0 left a word."""
    from torch.distributed.rendezvous import rendezvous as torch_rendezvous

    store, rank, world_size = next(torch_rendezvous("env://"))
    found = []
    for start in range(3):
        room = rendezvous(store, rank, world_size, 30)
        if rank == 0:
            time.sleep(0.3 * (start == 1))  # the others look earlier than it writes
            room.set("word", f"{word} {start}")
        found.append(room.get("word").decode())
    return found


def test_each_start_finds_its_own_words_in_a_store_that_stays() -> None:
    assert run_ranks(3, rooms, "hello") == [["hello 0", "hello 1", "hello 2"]] * 3


def test_ranks_that_do_not_come_are_named() -> None:
    with pytest.raises(OneRankError, match=r"rank 0 has waited for ranks \[1, 2\], which have not started"):
        rendezvous(dist.HashStore(), 0, 3, 0.1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("acts", ["reduce,die", "mistake,mistake", "leave,mistake"])
def test_ranks_that_died_are_started_again_and_a_mistake_is_not(acts: str) -> None:
    torchrun = ["--standalone", "--nproc_per_node=2", "--max-restarts=2", "-m", "tests.distributed.rank", acts, 20]
    done = run(module("torch.distributed.run", *torchrun))
    if acts == "reduce,die":
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("ended well 1") == 2  # at the first attempt: it met no addresses of the ranks before
    elif acts == "leave,mistake":  # of one rank, which no mistake should be: it is not lost
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("error: rank 1, alone: a mistake of the user") == 1
    else:
        assert done.returncode != 0
        assert done.stderr.count("error: a mistake of the user") == 1
        assert "ended well" not in done.stdout
