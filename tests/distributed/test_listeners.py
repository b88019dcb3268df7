"""What a run lets in on a machine that others use: no port of ours, and nobody in the place of a rank."""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file

from dist_dcgan.distributed import strangers, world
from dist_dcgan.distributed.collectives import gather
from dist_dcgan.distributed.launch import Launch
from dist_dcgan.distributed.peers import machine
from dist_dcgan.distributed.private import private_folder
from dist_dcgan.distributed.strangers import other_users, own_sockets, require_no_strangers, warn_of_open_agent
from shards.common.errors import OneRankError, UserError
from tests.support.commands import environment, metrics, train_command
from tests.support.ranks import run_ranks

ROOT = Path(__file__).parents[2]
STRANGER = 4321
RANK_OF_TWO = Launch(rank=1, world_size=2, local_rank=1, ranks_of_node=2, by_torchrun=True)


def family(pid: int) -> Iterator[int]:
    """A process and all that it started."""
    yield pid
    with suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from family(int(child))


def listeners(pid: int) -> set[tuple[str, int]]:
    """Addresses and ports on which a process and all that it started listen."""
    inodes = set()
    for member in family(pid):
        with suppress(OSError):
            inodes |= {os.readlink(f"/proc/{member}/fd/{name}") for name in os.listdir(f"/proc/{member}/fd")}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
                address, port = words[1].split(":")
                ours = socket.inet_ntoa(bytes.fromhex(address)[::-1]) if table == "tcp" else "any"
                found.add((ours, int(port, 16)))
    return found


def flags(data: Path, run_dir: Path, steps: int) -> list[str]:
    tiny = ("--preset", "debug", "--width", "4", "--global-batch", "8", "--quality.extractor", "none")
    return ["--data", str(data), "--run-dir", str(run_dir), "--wandb", "disabled", "--max-steps", str(steps), *tiny]


def launcher(data: Path, run_dir: Path, steps: int) -> list[str]:
    return ["bash", str(ROOT / "launch" / "torchrun.sh"), *flags(data, run_dir, steps)]


@contextmanager
def training(command: list[str], run_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run of two ranks that has taken its first step."""
    env = environment() | {"RANKS": "2", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            end = time.monotonic() + 120
            while not (run_dir / "metrics.jsonl").exists() and time.monotonic() < end:
                time.sleep(0.05)
            assert metrics(run_dir)
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def test_a_run_of_the_launcher_listens_on_the_loopback_interface_alone(demo_shards: Path, tmp_path: Path) -> None:
    with training(launcher(demo_shards, tmp_path / "run", 100_000), tmp_path / "run") as process:
        found = listeners(process.pid)
        assert found and {address for address, _ in found} == {"127.0.0.1"}


@pytest.mark.slow
def test_of_a_run_of_plain_torchrun_only_torchrun_itself_listens_elsewhere(demo_shards: Path, tmp_path: Path) -> None:
    """The check above would see a port that is open to others."""
    command = train_command(2, *flags(demo_shards, tmp_path / "run", 100_000))
    with training(command, tmp_path / "run") as process:
        torchrun, *ranks = family(process.pid)
        of_ranks = set[tuple[str, int]]().union(*map(listeners, ranks))
        assert {address for address, _ in of_ranks} == {"127.0.0.1"}
        assert {address for address, _ in listeners(torchrun) - of_ranks} == {"any"}


def as_stranger(function: Callable[..., object], *arguments: object) -> Any:
    """A process of another user that calls a function."""

    def call() -> None:
        os.setgid(STRANGER)
        os.setuid(STRANGER)
        function(*arguments)

    process = get_context("fork").Process(target=call, daemon=True)
    process.start()
    return process


def fuzz(ports: list[int], seconds: float) -> None:
    """Send random, torn and repeated messages."""
    end, words = time.monotonic() + seconds, random.Random(0)
    while time.monotonic() < end:
        with socket.create_connection(("127.0.0.1", words.choice(ports)), timeout=5) as connection:
            number = words.randrange(64).to_bytes(words.choice((4, 8)), "little")
            message = words.choice((b"", words.randbytes(words.randrange(5000)), number, number * 64, number[:3]))
            connection.sendall(message)
            time.sleep(words.choice((0, 0, 0.01)))


@pytest.mark.system
def test_words_of_a_stranger_change_nothing(demo_shards: Path, tmp_path: Path) -> None:
    """On all ports that are left, by another user, from the first step to the last."""
    weights = {}
    for name in ("alone", "fuzzed"):
        with training(launcher(demo_shards, tmp_path / name, 60), tmp_path / name) as process:
            if name == "fuzzed":
                ports = [port for _, port in listeners(process.pid)]
                stranger = as_stranger(fuzz, ports, float(os.environ.get("FUZZ_SECONDS", "5")))
                assert stranger.is_alive()
            assert process.wait(300) == 0
        weights[name] = load_file(tmp_path / name / "generator_ema.safetensors")
    assert all(bool((weights["fuzzed"][name] == tensor).all()) for name, tensor in weights["alone"].items())


def connect(host: str, port: int) -> None:
    socket.create_connection((host, port)).recv(1)


@pytest.mark.system
@pytest.mark.parametrize("host", ["127.0.0.1", "::ffff:127.0.0.1"])
def test_a_connection_of_another_user_in_the_place_of_a_rank_is_found(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), server.accept()[0]:
            require_no_strangers(frozenset())
        stranger = as_stranger(connect, host, port)
        with server.accept()[0]:
            with pytest.raises(OneRankError, match=f"a process of user {STRANGER} on this machine has connected"):
                require_no_strangers(frozenset())
            require_no_strangers(own_sockets())  # a connection of before is not one of a rank
        stranger.join()


def test_a_connection_of_which_the_other_end_is_hidden_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    with server, socket.create_connection(server.getsockname()), server.accept()[0]:
        seen = [row for row in strangers._rows() if row.local.endswith(f":{server.getsockname()[1]:04X}")]
        require_no_strangers(frozenset())
        monkeypatch.setattr(strangers, "_rows", lambda: iter(seen))
        with pytest.raises(OneRankError, match="a process of an unknown user on this machine has connected"):
            require_no_strangers(frozenset())


def gathered() -> list[str]:
    with world.process_group(60, "cpu"):
        return gather(os.environ["NCCL_SOCKET_IFNAME"])


def test_ranks_of_one_machine_use_the_loopback_interface_whatever_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's name, or a variable meant for several machines, leads elsewhere."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    assert run_ranks(2, gathered) == [["lo", "lo"]] * 2


def refused_among_strangers() -> str:
    """What a rank is told if somebody has connected in the place of another."""
    with mock.patch.object(world, "require_no_strangers", side_effect=OneRankError("a stranger")):
        try:
            with world.process_group(60, "cpu"):
                return "trains"
        except OneRankError as error:
            return str(error)


def test_ranks_look_for_strangers_before_they_train() -> None:
    assert run_ranks(2, refused_among_strangers) == ["a stranger"] * 2


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which ranks meet in folders."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "logs/run/attempt_0/1/error.json")
    return tmp_path


def test_ranks_meet_in_a_folder_of_their_own_which_the_last_one_removes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with private_folder(RANK_OF_TWO) as one:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "logs/run/attempt_0/0/error.json")
        with private_folder(RANK_OF_TWO._replace(rank=0, local_rank=0)) as zero:
            assert one and zero and one.path == zero.path and one.path.parent == place
            assert one.path.stat().st_mode & 0o777 == 0o700
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "logs/run/attempt_1/0/error.json")
            with private_folder(RANK_OF_TWO) as later:
                assert later and later.path != one.path
        assert one.path.exists()
    assert not list(place.iterdir())


def test_a_store_is_not_destroyed_as_torch_would_wait_for_a_folder_that_another_rank_removes(place: Path) -> None:
    with private_folder(RANK_OF_TWO) as folder:
        assert folder
        store: Any = folder.store("ranks", ranks=2)
        store.set("name", "value")
        before = (folder.path / "ranks").read_bytes()
        del store
        gc.collect()
        assert (folder.path / "ranks").read_bytes() == before  # where a destructor counts itself


def test_folders_of_killed_ranks_are_removed_and_those_in_use_stay(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, other = (place / f"dist_dcgan-{os.geteuid()}-{machine()}-{name}" for name in ("left", "open to others"))
    with private_folder(RANK_OF_TWO) as used:
        assert used
        left.mkdir(mode=0o700)
        other.mkdir(mode=0o755)
        for path in (left, other, used.path):
            os.utime(path, (0, 0))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "logs/run/attempt_1/0/error.json")
        with private_folder(RANK_OF_TWO._replace(local_rank=0)) as later:
            assert later and set(place.iterdir()) == {used.path, later.path, other}


def make_link(path: Path) -> None:
    (path.parent / "elsewhere").mkdir(mode=0o700)
    path.symlink_to("elsewhere")


def make_open_folder(path: Path) -> None:
    path.mkdir()
    path.chmod(0o755)


@pytest.mark.parametrize("make", [make_link, make_open_folder, Path.touch])
def test_a_meeting_place_that_others_may_have_made_is_refused(place: Path, make: Callable[[Path], None]) -> None:
    with private_folder(RANK_OF_TWO) as folder:
        assert folder
    make(folder.path)
    with pytest.raises(UserError, match="is not a folder of this user alone: set TMPDIR to a folder of your own"):
        private_folder(RANK_OF_TWO).__enter__()


def test_other_users_are_warned_of_where_torchrun_is_open(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dist_dcgan.distributed.strangers.other_users", lambda: [STRANGER])
    for store in ("False", "True"):
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", store)
        warn_of_open_agent(RANK_OF_TWO)
    assert capsys.readouterr().err.splitlines() == [
        f"warning: processes of user {STRANGER} run on this machine, and torchrun's port is open to them: they could "
        "end this run, or run code as you: start with `bash launch/torchrun.sh FLAGS`, which opens none"
    ]


@pytest.mark.system
def test_processes_of_another_person_are_seen() -> None:
    assert STRANGER not in other_users()
    stranger = as_stranger(time.sleep, 60)
    while stranger.is_alive() and STRANGER not in other_users():
        time.sleep(0.01)
    assert stranger.is_alive()
    stranger.kill()
