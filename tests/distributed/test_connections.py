"""Machines that do not reach each other are named by all, before anything hangs on it."""

from __future__ import annotations

import json
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from dist_dcgan.distributed.connections import Endpoint, own_address, require_connected
from shards.common.errors import UserError

MACHINES = 3


class Store:
    """A store in which one machine's endpoint is what a test makes of it."""

    def __init__(self, store: Any, altered: dict[str, Any], visited: bool) -> None:
        self._store, self._altered, self._visited = store, altered, visited

    def set(self, key: str, value: str) -> None:
        if key.startswith("endpoint") and self._visited:
            endpoint = Endpoint(*json.loads(value))
            with socket.create_connection((endpoint.address, endpoint.port)) as visit:  # and is reset when it is closed
                visit.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if key == "endpoint 1" and self._altered:
            value = json.dumps(Endpoint(*json.loads(value))._replace(**self._altered))
        self._store.set(key, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def what_ranks_hear(visited: bool = False, **altered: Any) -> list[str]:
    """Let two ranks of each machine meet, in threads; return what they hear, leading ranks first."""
    store = Store(dist.HashStore(), altered, visited)  # type: ignore[attr-defined]

    def hear(rank: int) -> str:
        try:
            require_connected(store, rank % MACHINES, MACHINES, leads=rank < MACHINES)
        except UserError as error:
            return str(error)
        return "nothing"

    with ThreadPoolExecutor(2 * MACHINES) as pool:
        return list(pool.map(hear, range(2 * MACHINES)))


def test_machines_that_reach_each_other_hear_nothing() -> None:
    assert what_ranks_hear() == ["nothing"] * 2 * MACHINES


def test_a_visitor_who_resets_its_connection_harms_nobody() -> None:
    assert what_ranks_hear(visited=True) == ["nothing"] * 2 * MACHINES


def test_all_ranks_hear_of_a_machine_that_cannot_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    heard = what_ranks_hear(host="far", address="127.0.0.1", port=closed)
    assert len(set(heard)) == 1 and heard[0].count("cannot connect to far at 127.0.0.1") == 2  # by either of the others


def test_an_address_that_belongs_to_another_machine_is_told() -> None:
    heard = what_ranks_hear(host="far", token="another word, as long")
    assert len(set(heard)) == 1 and heard[0].count(", which far takes for its address") == 2


def test_an_interface_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    assert all("cannot listen (GLOO_SOCKET_IFNAME=nowhere0" in text for text in what_ranks_hear())


def test_the_address_is_the_one_that_gloo_offers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert own_address() == "127.0.0.1"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(socket, "gethostname", lambda: "a-name-that-nobody-knows.invalid")
    assert own_address() == "127.0.0.1"
