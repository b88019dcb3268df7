"""Staged shards are those of the manifest, wherever they come from and whatever happens on the way."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from dist_dcgan.config import Config, DataOptions, make_plan
from dist_dcgan.data.loader import BatchLoader
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage import remote
from dist_dcgan.data.storage.cache import Cache
from dist_dcgan.data.storage.location import DatasetLocation, Folder
from dist_dcgan.data.storage.opening import open_location
from dist_dcgan.data.storage.remote import OtherFolder
from dist_dcgan.distributed.world import World
from shards.common.errors import OneRankError, UserError
from tests.support.forks import status_of
from tests.support.http_server import Answer, serve, web_server
from tests.support.mistakes import flip_bit
from tests.support.waiting import wait_until

WORLD = World(0, 0, 1, torch.device("cpu"))


@pytest.fixture
def source(demo_shards: Path, tmp_path: Path) -> Path:
    """A copy to damage: 96 images in 10 shards."""
    return Path(shutil.copytree(demo_shards, tmp_path / "source"))


@pytest.fixture
def web(source: Path) -> Iterator[str]:
    """The address of a web server of the same."""
    with web_server(source) as (_, address):
        yield address


def staged(location: Path | str, folder: Path, allow_commands: bool = False, **options: Any) -> DatasetLocation:
    return open_location(DataOptions(path=location, cache_dir=folder, **options), allow_commands)


def staged_from_everywhere(source: Path, web: str, tmp_path: Path) -> list[DatasetLocation]:
    """The data set as another folder, a web server and a command give it."""
    return [
        staged(source, tmp_path / "a"),
        staged(web, tmp_path / "b"),
        staged(f"pipe:cat {source}/{{}}", tmp_path / "c", allow_commands=True),
    ]


def all_pixels(place: DatasetLocation) -> np.ndarray:
    samples, size = place.manifest.samples, place.manifest.image_size
    out = np.empty((samples, size, size, 3), dtype=np.uint8)
    ShardReader(place).gather(np.arange(samples), out)
    return out


def loader(place: DatasetLocation, **data: Any) -> BatchLoader:
    config = Config(global_batch=8, max_steps=36, data={"window_shards": 2, **data})
    return BatchLoader(place, config, make_plan(config, 1, place.manifest.samples), WORLD, 0)


def test_a_data_set_is_the_same_from_everywhere(source: Path, web: str, tmp_path: Path) -> None:
    expected = all_pixels(Folder(source))
    for place in staged_from_everywhere(source, web, tmp_path):
        assert np.array_equal(all_pixels(place), expected)
        assert place.manifest == Folder(source).manifest


def test_what_was_staged_before_is_used_and_checked(source: Path, tmp_path: Path) -> None:
    expected = all_pixels(staged(source, tmp_path / "cache"))
    files = sorted((tmp_path / "cache").glob("*.tar"))
    assert len(files) == 10
    damaged = files[3].read_bytes()
    flip_bit(files[3], 700)
    for path in source.glob("*.tar"):
        if path.read_bytes() != damaged:
            path.unlink()
    assert np.array_equal(all_pixels(staged(source, tmp_path / "cache")), expected)


def open_but_removed() -> set[str]:
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed by the loader's threads meanwhile
            found.add(os.readlink(path))
    return {name for name in found if name.endswith(".tar (deleted)")}


def test_no_more_is_kept_than_the_budget_allows_and_the_order_stays(source: Path, tmp_path: Path) -> None:
    shard_bytes = Folder(source).manifest.shards[0].bytes
    budget = 8.5 * shard_bytes
    place = staged(source, tmp_path / "cache", cache_gb=budget / 1e9)
    taken, removed = [], []
    with loader(Folder(source)) as expected, loader(place) as found:
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one.pixels, other.pixels)
            taken.append(shard_bytes * len(list((tmp_path / "cache").glob("*.tar"))))
            removed.append(len(open_but_removed()))
    assert max(taken) == 8 * shard_bytes
    assert max(removed) <= 4  # what is open of them still takes room


def test_a_budget_below_what_is_in_use_is_refused(source: Path, tmp_path: Path) -> None:
    place = staged(source, tmp_path / "cache", cache_gb=7.5 * Folder(source).manifest.shards[0].bytes / 1e9)
    with pytest.raises(UserError, match=r"data\.cache_gb 0\.001\d* is too small: .* use more"):
        loader(place)


def test_a_shard_that_another_run_evicts_is_brought_again(source: Path, tmp_path: Path) -> None:
    place = staged(source, tmp_path / "cache")
    with loader(Folder(source)) as expected, loader(place) as found:
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one.pixels, other.pixels)
            for path in (tmp_path / "cache").glob("*.tar"):
                path.unlink(missing_ok=True)


def test_a_shard_that_is_damaged_at_its_source_is_named(source: Path, web: str, tmp_path: Path) -> None:
    flip_bit(source / "shard-000004.tar", 1000)
    for place, name in ((staged(source, tmp_path / "a"), source), (staged(web, tmp_path / "b"), web)):
        with loader(place) as batches, pytest.raises(OneRankError) as caught:
            list(batches)
        assert f"shard-000004.tar cannot be had from {name}: " in str(caught.value)
        assert "sha256" in str(caught.value)
        assert not list(tmp_path.glob("*/*.part*"))


def test_a_cache_that_is_emptied_is_not_taken_for_a_source_without_the_shard(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}/parts has gone"):
        remote.copy(source / "shard-000000.tar", tmp_path / "parts" / "a", 1 << 20)


def test_a_shard_that_is_missing_at_its_source_is_named(source: Path, web: str, tmp_path: Path) -> None:
    places = staged(source, tmp_path / "a"), staged(web, tmp_path / "b")
    (source / "shard-000004.tar").unlink()
    for place, message in zip(
        places, ("no shard-000004.tar in", "shard-000004.tar: the server answers 404"), strict=True
    ):
        with pytest.raises(UserError, match=message):
            place.ready(4)


def test_a_server_that_cuts_corrupts_and_stalls_is_asked_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_SILENCE_SECONDS", 0.3)
    manifest, shard = (source / "manifest.json").read_bytes(), (source / "shard-000000.tar").read_bytes()
    answers = (
        Answer(manifest),
        Answer(shard, cut=5000),
        Answer(b"X" * len(shard)),
        Answer(shard, hang=9000),
        Answer(shard),
    )
    with serve(*answers) as server:
        place = staged(server.address, tmp_path / "cache")
        assert place.ready(0).path.read_bytes() == shard


@pytest.mark.parametrize(
    ("options", "message", "pauses_at_most"),
    [
        ({"hang": 100}, r"cannot get .*shard-000000\.tar: .* after 5 attempts", 6),  # others wait: not all over again
        ({"status": 503, "headers": {"Retry-After": "120"}}, "the server answers 503 .* attempts without progress;", 4),
    ],
)
def test_a_server_that_gives_nothing_for_long_is_given_up(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
    pauses_at_most: int,
) -> None:
    """However much patience it asks for: ranks on other machines have less."""
    monkeypatch.setattr(remote, "_SILENCE_SECONDS", 0.1)
    pauses: list[float] = []
    monkeypatch.setattr("shards.common.http.sleep", pauses.append)
    manifest, shard = (source / "manifest.json").read_bytes(), (source / "shard-000000.tar").read_bytes()
    with serve(Answer(manifest), Answer(shard, **options)) as server:
        place = staged(server.address, tmp_path / "cache")
        with pytest.raises(UserError, match=message):
            place.ready(0)
    assert len(pauses) <= pauses_at_most and max(pauses) <= 8.0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat {} && exit 3", "the command ends with status"),
        ("sleep 30; cat {}", "the command prints nothing for 0.3 seconds"),
        ("cat {}; exec >&-; sleep 30", "the command does not end"),
        ("cat", "no {} in pipe:***: it stands for a file's name"),
    ],
)
def test_a_command_that_fails_is_named(
    command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_SILENCE_SECONDS", 0.1)
    with pytest.raises(UserError) as caught:
        staged(f"pipe:{command}", tmp_path / "cache", allow_commands=True)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"path": "pipe:cat {}", "cache_dir": "X"},
            "runs a shell command: only --data.allow-commands on the command line",
        ),
        ({"path": "http://example.org/data"}, "is not on this machine: say with --data.cache-dir where"),
        ({"path": "s3://bucket/data", "cache_dir": "X"}, "give a folder, an address of http or https, or pipe:COMMAND"),
        ({"path": "https://me:secret@example.org/data", "cache_dir": "X"}, "put them into ~/.netrc"),
        ({"path": "nowhere"}, "no data set at nowhere: make one with"),
        (
            {"path": "source", "cache_dir": "source/manifest.json/X"},
            "cache source/manifest.json/X cannot be used: Not a",
        ),
        ({"path": "http://[::1/data", "cache_dir": "X"}, "http://[::1/data is no address: Invalid IPv6"),
        ({"path": "x" * 5000}, "File name too long"),
        ({"path": "pipe:cat {}\0", "cache_dir": "X"}, "a NUL in it"),
    ],
)
def test_what_cannot_be_read_gets_one_line(
    options: dict[str, str], message: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    with pytest.raises(UserError) as caught:
        open_location(DataOptions.model_validate(options), allow_commands="\0" in options["path"])
    assert message in str(caught.value) and "secret" not in str(caught.value)


def open_cache_and_die(source: Path, folder: Path) -> None:
    alive = Cache(OtherFolder(source), folder, 10**9)
    assert alive.manifest.samples == 96
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_run_left_is_removed_and_what_a_running_one_writes_is_not(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    for _ in range(2):
        assert status_of(open_cache_and_die, source, folder) == -signal.SIGKILL
    alive = Cache(OtherFolder(source), folder, 10**9)
    dead, young, own = sorted(folder.glob("parts-*"), key=lambda path: path.stat().st_mtime_ns)
    for path in (dead, own):
        os.utime(path, (0, 0))
    Cache(OtherFolder(source), folder, 10**9)
    assert not dead.exists() and young.exists() and own.exists()
    del alive
    assert not own.exists()


def test_files_of_others_are_neither_counted_nor_removed(source: Path, tmp_path: Path) -> None:
    backup = tmp_path / "cache" / "backup.tar"
    backup.parent.mkdir()
    backup.write_bytes(bytes(10**7))
    place = staged(source, backup.parent, cache_gb=0.002)
    all_pixels(place)
    assert backup.stat().st_size == 10**7 and len(list(backup.parent.glob("*.tar"))) == 11
    with pytest.raises(UserError, match=r"holds a data set: give --data\.cache-dir a folder of its own"):
        staged(source, source)
    assert len(list(source.glob("*.tar"))) == 10


@pytest.mark.parametrize("number", [errno.EPERM, errno.EBUSY])
def test_a_file_that_is_another_users_or_busy_is_used_and_stays(
    number: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbidden = mock.Mock(side_effect=OSError(number, os.strerror(number)))
    expected = all_pixels(staged(source, tmp_path / "cache"))
    place = staged(source, tmp_path / "cache", cache_gb=2e-4)
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", forbidden)
        assert np.array_equal(all_pixels(place), expected)
    (tmp_path / "cache" / f"{place.manifest.shards[0].sha256}.tar").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, missing_ok: forbidden() if path.parent.name == "cache" else None)
        place.ready(0)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 10


def test_more_than_a_file_may_have_is_refused_before_it_fills_the_disk(source: Path, web: str, tmp_path: Path) -> None:
    places = staged_from_everywhere(source, web, tmp_path)
    with (source / "shard-000004.tar").open("ab") as file:
        file.truncate(10**8)
    for place, message in zip(places, ("has more than", "sends more than the", "prints more than"), strict=True):
        with pytest.raises(UserError, match=message):
            place.ready(4)


def test_a_command_that_is_given_up_leaves_no_process(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_SILENCE_SECONDS", 0.1)
    with pytest.raises(UserError, match="prints nothing"):
        staged("pipe:sleep 31.4159 | cat {}", tmp_path / "cache", allow_commands=True)
    listing = ["ps", "-eo", "args"]  # a killed one stands there until it is waited for
    wait_until(lambda: b"31.4159" not in subprocess.check_output(listing), seconds=5)


def test_a_manifest_that_does_not_come_at_once_is_asked_for_again(source: Path, tmp_path: Path) -> None:
    (tmp_path / "tried").touch()
    command = f"test -e {tmp_path}/tried && rm {tmp_path}/tried || cat {source}/{{}}"
    assert staged(f"pipe:{command}", tmp_path / "cache", allow_commands=True).manifest == Folder(source).manifest
    with pytest.raises(OneRankError, match=r"manifest\.json cannot be had from pipe:\*\*\*: the command ends with"):
        staged("pipe:false {}", tmp_path / "cache", allow_commands=True)
