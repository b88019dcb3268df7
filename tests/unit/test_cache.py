"""Staged shards are those of the manifest, wherever they come from and whatever happens on the way."""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_dcgan.config import Config, DataOptions, make_plan
from dist_dcgan.data import remote
from dist_dcgan.data.cache import Cache
from dist_dcgan.data.loader import BatchLoader
from dist_dcgan.data.opening import open_place
from dist_dcgan.data.places import Folder, Place
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.remote import OtherFolder
from dist_dcgan.distributed import World
from shards.errors import OneRankError, UserError
from tests.http_server import Answer, serve

WORLD = World(0, 0, 1, torch.device("cpu"))


@pytest.fixture
def source(demo_shards: Path, tmp_path: Path) -> Path:
    """A copy to damage: 96 images in 10 shards."""
    return Path(shutil.copytree(demo_shards, tmp_path / "source"))


@pytest.fixture
def web(source: Path) -> Iterator[str]:
    """The address of a web server of the same."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(source))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def staged(location: Path | str, folder: Path, **options: Any) -> Place:
    return open_place(DataOptions(path=location, cache_dir=folder, **options))


def all_pixels(place: Place) -> np.ndarray:
    samples, size = place.manifest.samples, place.manifest.image_size
    out = np.empty((samples, size, size, 3), dtype=np.uint8)
    ShardReader(place).gather(np.arange(samples), out)
    return out


def loader(place: Place, **data: Any) -> BatchLoader:
    config = Config(global_batch=8, max_steps=36, data={"window_shards": 2, **data})
    return BatchLoader(place, config, make_plan(config, 1, place.manifest.samples), WORLD, 0)


def test_a_data_set_is_the_same_from_everywhere(source: Path, web: str, tmp_path: Path) -> None:
    expected = all_pixels(Folder(source))
    command = f"pipe:cat {source}/{{}}"
    places = [
        staged(source, tmp_path / "a"),
        staged(web, tmp_path / "b"),
        staged(command, tmp_path / "c", allow_commands=True),
    ]
    for place in places:
        assert np.array_equal(all_pixels(place), expected)
        assert place.manifest == Folder(source).manifest


def test_what_was_staged_before_is_used_and_checked(source: Path, tmp_path: Path) -> None:
    expected = all_pixels(staged(source, tmp_path / "cache"))
    files = sorted((tmp_path / "cache").glob("*.tar"))
    assert len(files) == 10
    damaged = files[3].read_bytes()
    files[3].write_bytes(damaged[:700] + bytes([damaged[700] ^ 1]) + damaged[701:])
    for path in source.glob("*.tar"):
        if path.read_bytes() != damaged:
            path.unlink()
    assert np.array_equal(all_pixels(staged(source, tmp_path / "cache")), expected)


def test_no_more_is_kept_than_the_budget_allows_and_the_order_stays(source: Path, tmp_path: Path) -> None:
    shard_bytes = Folder(source).manifest.shards[0].bytes
    budget = 8.5 * shard_bytes
    place = staged(source, tmp_path / "cache", cache_gb=budget / 1e9)
    taken = []
    with loader(Folder(source)) as expected, loader(place) as found:
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one.pixels, other.pixels)
            taken.append(shard_bytes * len(list((tmp_path / "cache").glob("*.tar"))))
    assert max(taken) == 8 * shard_bytes


def test_a_budget_below_what_is_in_use_is_refused(source: Path, tmp_path: Path) -> None:
    place = staged(source, tmp_path / "cache", cache_gb=1e-4)
    with loader(place) as batches, pytest.raises(UserError, match=r"data\.cache_gb 0\.0001 is too small: .* use more"):
        list(batches)


def test_a_shard_that_another_run_evicts_is_brought_again(source: Path, tmp_path: Path) -> None:
    place = staged(source, tmp_path / "cache")
    with loader(Folder(source)) as expected, loader(place) as found:
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one.pixels, other.pixels)
            for path in (tmp_path / "cache").glob("*.tar"):
                path.unlink(missing_ok=True)


def test_a_shard_that_is_damaged_at_its_source_is_named(source: Path, web: str, tmp_path: Path) -> None:
    with (source / "shard-000004.tar").open("r+b") as file:
        file.seek(1000)
        file.write(b"X")
    for place, name in ((staged(source, tmp_path / "a"), source), (staged(web, tmp_path / "b"), web)):
        with loader(place) as batches, pytest.raises(OneRankError) as caught:
            list(batches)
        assert f"shard-000004.tar cannot be had from {name}: " in str(caught.value)
        assert "sha256" in str(caught.value)
        assert not list(tmp_path.glob("*/*.part*"))


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


def test_a_server_that_only_stalls_is_given_up(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_SILENCE_SECONDS", 0.1)
    pauses: list[float] = []
    monkeypatch.setattr("shards.transfer.sleep", pauses.append)
    shard = (source / "shard-000000.tar").read_bytes()
    with serve(Answer((source / "manifest.json").read_bytes()), Answer(shard, hang=100)) as server:
        place = staged(server.address, tmp_path / "cache")
        with pytest.raises(UserError, match=r"cannot get .*shard-000000\.tar: .* after 5 attempts"):
            place.ready(0)
    assert len(pauses) <= 6  # not all over again: ranks on other machines wait


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat {} && exit 3", "the command ends with status"),
        ("sleep 30; cat {}", "the command prints nothing for 0.1 seconds"),
        ("cat {}; exec >&-; sleep 30", "the command does not end"),
        ("cat", "no {} in pipe:cat: it stands for a file's name"),
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
        ({"path": "pipe:cat {}", "cache_dir": "X"}, "runs a shell command: allow that with --data.allow-commands"),
        ({"path": "http://example.org/data"}, "is not on this machine: say with --data.cache-dir where"),
        ({"path": "s3://bucket/data", "cache_dir": "X"}, "give a folder, an address of http or https, or pipe:COMMAND"),
        ({"path": "https://me:secret@example.org/data", "cache_dir": "X"}, "put them into ~/.netrc"),
        ({"path": "nowhere"}, "no data set at nowhere: make one with"),
    ],
)
def test_what_cannot_be_read_gets_one_line(
    options: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        open_place(DataOptions.model_validate(options))
    assert message in str(caught.value) and "secret" not in str(caught.value)


def test_a_folder_that_cannot_hold_the_cache_gets_one_line(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"the cache .*/file/cache cannot be used: Not a directory"):
        staged(source, tmp_path / "file" / "cache")


def test_what_a_killed_run_left_is_removed_and_what_a_running_one_writes_is_not(source: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("cache").mkdir()
    dead, alive = (tmp_path / "cache" / f"{'0' * 64}.tar.{pid}.part" for pid in (2**22 + 1, os.getppid()))
    dead.touch()
    alive.touch()
    Cache(OtherFolder(source), tmp_path / "cache", 10**9)
    assert not dead.exists() and alive.exists()
