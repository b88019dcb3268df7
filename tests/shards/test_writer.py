"""Shard files: their bytes, their names, and what happens when writing fails.

Promise 1 (the shard format) of dist_dcgan/README.md.
"""

from __future__ import annotations

import hashlib
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shards.common.errors import UserError
from shards.conversion.images import to_ppm
from shards.manifest import Layout, member_key
from shards.reader import locate, read_sample
from shards.writer import write_json_lines, write_shard
from tests.support.shards_fixtures import data_set, picture

LAYOUT = Layout(16)


def samples(*keys: str) -> Iterator[tuple[str, bytes]]:
    return iter([(key, to_ppm(picture(i, 16, 16))) for i, key in enumerate(keys)])


def test_the_bytes_of_a_shard_are_pinned(tmp_path: Path) -> None:
    # A change here makes shards of one version differ from those of the next: raise FORMAT_VERSION with it.
    grey = iter([("a", LAYOUT.ppm_header + bytes(768)), ("b", LAYOUT.ppm_header + b"\x80" * 768)])
    entry = write_shard(tmp_path / "shard-000000.tar", LAYOUT, grey)
    assert entry is not None
    assert entry.sha256 == "cadb22c44af4a71738220b86235b3d48a6fc1ede901262edf63f75e52a8d25e3"


@pytest.mark.parametrize(("index", "size"), [(-1, 16), (3, 16), (4, 16), (1000, 16), (0, 17)])
def test_read_sample_outside_the_shard_or_of_another_image_size_is_an_error(
    tmp_path: Path, index: int, size: int
) -> None:
    write_shard(tmp_path / "shard-000000.tar", LAYOUT, samples("a", "b", "c"))
    with pytest.raises(UserError, match=f"no intact sample {index}|cannot read shard"):
        read_sample(tmp_path / "shard-000000.tar", Layout(size), index)


def test_read_sample_of_a_cut_shard_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "shard-000000.tar"
    write_shard(path, LAYOUT, samples("a", "b"))
    path.write_bytes(path.read_bytes()[: 2 * 1536 - 300])
    assert read_sample(path, LAYOUT, 0)[0] == "a"
    with pytest.raises(UserError, match="no intact sample 1"):
        read_sample(path, LAYOUT, 1)
    with pytest.raises(UserError, match=r"cannot read shard .*: No such file"):
        read_sample(tmp_path / "nowhere.tar", LAYOUT, 0)


def test_locate_counts_through_the_shards(tmp_path: Path) -> None:
    _, manifest = data_set(tmp_path, 10, 4)
    places = [locate(manifest, position) for position in range(10)]
    assert places == [(f"shard-{i // 4:06d}.tar", i % 4) for i in range(10)]
    with pytest.raises(IndexError):
        locate(manifest, 10)


def test_two_samples_of_one_name_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="b"):
        write_shard(tmp_path / "shard-000000.tar", LAYOUT, samples("a", "b", "b"))
    assert list(tmp_path.iterdir()) == []


def test_a_failing_source_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[str, bytes]]:
        yield from samples("a", "b")
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_shard(tmp_path / "shard-000000.tar", LAYOUT, failing())
    assert list(tmp_path.iterdir()) == []


def test_no_samples_make_no_shard(tmp_path: Path) -> None:
    assert write_shard(tmp_path / "shard-000000.tar", LAYOUT, iter([])) is None
    assert list(tmp_path.iterdir()) == []


def test_tarfile_and_read_sample_find_every_sample_at_its_stride_whatever_its_key(tmp_path: Path) -> None:
    rng = random.Random(0)
    keys = [rng.randbytes(rng.randint(1, 511)) for _ in range(50)] + [b"a.b", b"a.c", b"k" * 200, b"plain"]
    names = [member_key(key) for key in keys]
    path = tmp_path / "shard-000000.tar"
    write_shard(path, LAYOUT, samples(*names))
    assert path.stat().st_size == LAYOUT.shard_bytes(len(keys))
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        read = [archive.extractfile(member).read() for member in members]  # type: ignore[union-attr]
    assert [(m.name, m.offset) for m in members] == [(f"{name}.ppm", 1536 * i) for i, name in enumerate(names)]
    assert read == [ppm for _, ppm in samples(*names)]
    for index, name in enumerate(names):
        found, pixels = read_sample(path, LAYOUT, index)
        assert found == name and pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
        assert np.array_equal(pixels, np.asarray(picture(index, 16, 16)))


def test_json_lines_appear_when_all_are_written(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"

    def lines() -> Iterator[dict[str, str]]:
        for key in ("schön\n", "b"):
            assert not path.exists()
            yield {"key": key}

    assert write_json_lines(path, lines()) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"key": "schön\n"}, {"key": "b"}]
    assert list(tmp_path.iterdir()) == [path]


def test_json_lines_without_a_line_make_no_file(tmp_path: Path) -> None:
    (tmp_path / "keys.jsonl").write_text("of an earlier conversion")
    assert write_json_lines(tmp_path / "keys.jsonl", iter([])) is None
    assert list(tmp_path.iterdir()) == []


def test_json_lines_that_break_off_leave_nothing(tmp_path: Path) -> None:
    def lines() -> Iterator[dict[str, str]]:
        yield {"key": "a"}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_json_lines(tmp_path / "keys.jsonl", lines())
    assert list(tmp_path.iterdir()) == []
