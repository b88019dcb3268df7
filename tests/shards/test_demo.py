"""The demo data set: LSUN's format, the same bytes for any number of workers, and pictures that differ."""

from __future__ import annotations

import hashlib
import io
import os
import signal
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from shards.common.errors import UserError
from shards.common.locks import Lock
from shards.common.workers import Tick
from shards.demo import dataset as demo
from shards.demo.bedroom import render_bedroom
from shards.demo.dataset import write_demo
from tests.support.forks import status_of
from tests.support.shards_fixtures import encoded, killed_at, output_of

IMAGES = demo.CHUNK + 6  # a full chunk and a part of one


def entries(path: Path) -> list[tuple[bytes, bytes]]:
    with lmdb.open(str(path), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return list(transaction.cursor())


def jpeg(data: bytes) -> JpegImageFile:
    image = Image.open(io.BytesIO(data))
    assert isinstance(image, JpegImageFile)
    return image


def small(seed: int, index: int) -> np.ndarray:
    """A picture as training sees it, (64, 64, 3)."""
    return np.asarray(render_bedroom(seed, index).resize((64, 64)), np.float32)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo(tmp_path_factory.mktemp("one"), IMAGES, seed=3, workers=1)


def test_lsun_format(written: Path) -> None:
    assert written.name == "demo_train_lmdb"
    assert sorted(path.name for path in written.iterdir()) == ["data.mdb", "lock.mdb"]
    reference = jpeg(encoded(Image.new("RGB", (8, 8)), quality=75))
    found = entries(written)
    assert len(found) == IMAGES
    for key, value in found:
        assert key == hashlib.sha1(value).hexdigest().encode()
        assert (jpeg(value).mode, jpeg(value).size) == ("RGB", (256, 256))
        assert jpeg(value).quantization == reference.quantization


def test_workers_do_not_change_the_bytes(written: Path, tmp_path: Path) -> None:
    assert entries(write_demo(tmp_path, IMAGES, seed=3, workers=2)) == entries(written)


def test_picture_is_a_function_of_seed_and_index() -> None:
    picture = render_bedroom(0, 7).tobytes()
    assert render_bedroom(0, 7).tobytes() == picture
    assert render_bedroom(0, 8).tobytes() != picture
    assert render_bedroom(1, 7).tobytes() != picture


def test_pictures_vary_and_are_well_exposed() -> None:
    pictures = np.stack([small(0, index) for index in range(24)])
    pairs = [np.abs(a - b).mean() for i, a in enumerate(pictures) for b in pictures[:i]]
    assert np.mean(pairs) > 30
    assert min(pairs) > 8
    assert 90 < pictures.mean() < 170
    assert pictures.std(axis=(1, 2, 3)).min() > 20


def test_progress_reaches_the_number_of_images(tmp_path: Path) -> None:
    told: list[int] = []
    write_demo(tmp_path, 3, workers=1, advance=told.append)
    assert told == [1, 1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["demo_train_lmdb"]


def test_existing_folder_is_refused_and_kept(tmp_path: Path) -> None:
    kept = tmp_path / "demo_train_lmdb" / "data.mdb"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(UserError, match="demo_train_lmdb exists already: "):
        write_demo(tmp_path, 1, workers=1)
    assert kept.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["demo_train_lmdb"]


def test_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        write_demo(tmp_path / "file", 1, workers=1)


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(seed: int, indices: range, tick: Tick) -> list[demo.Record]:
        raise RuntimeError("no paint left")

    monkeypatch.setattr(demo, "_render_chunk", fail)
    with pytest.raises(RuntimeError, match="no paint left"):
        write_demo(tmp_path, 1, workers=1)
    assert os.listdir(tmp_path) == [".demo_train_lmdb.lock"]


@pytest.mark.parametrize("operation", range(1, 7))
def test_what_a_kill_left_is_removed_at_the_next_start(operation: int, tmp_path: Path) -> None:
    words = ["demo", "--out", str(tmp_path), "--images", "1", "--workers", "1"]
    status = status_of(killed_at, operation, tmp_path, words)
    assert status in (0, -signal.SIGKILL)
    if not (tmp_path / "demo_train_lmdb").exists():
        output_of(*words)
        assert os.listdir(tmp_path) == ["demo_train_lmdb"]


def test_two_processes_do_not_write_one_demo(tmp_path: Path) -> None:
    with Lock(tmp_path / ".demo_train_lmdb.lock") as lock:
        assert lock.take()
        with pytest.raises(UserError, match=r"^another process is writing .*/demo_train_lmdb: wait for it, or choose"):
            write_demo(tmp_path, 1, workers=1)
    write_demo(tmp_path, 1, workers=1)
    assert os.listdir(tmp_path) == ["demo_train_lmdb"]
