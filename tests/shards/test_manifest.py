"""The manifest: what it says comes back, and no damaged one is taken.

Promise 1 (the shard format) of dist_dcgan/README.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shards.common.errors import UserError
from shards.common.files import publish
from shards.manifest import (
    MANIFEST_NAME,
    Layout,
    Manifest,
    ShardEntry,
    read_manifest,
    shard_name,
    write_manifest,
)


def manifest_of(*samples: int, **changes: Any) -> Manifest:
    layout = Layout(64)
    shards = tuple(
        ShardEntry(name=shard_name(i), samples=n, bytes=layout.shard_bytes(n), sha256=f"{i:064x}")
        for i, n in enumerate(samples)
    )
    values = {
        "image_size": 64,
        "samples_per_shard": 10,
        "sources": [{"kind": "lmdb", "name": "bedroom", "entries": 14}],
        "shards": shards,
    }
    return Manifest(**(values | changes))


def test_layout_at_64_pixels_is_that_of_the_design() -> None:
    layout = Layout(64)
    assert (layout.pixel_bytes, layout.member_bytes) == (12288, 12301)
    assert (layout.stride, layout.pixel_offset) == (13312, 525)
    assert layout.shard_bytes(2) == 2 * 13312 + 1024


@pytest.mark.parametrize("size", [8, 9, 13, 99, 100, 128, 1024])
def test_layout_is_made_of_whole_tar_blocks(size: int) -> None:
    layout = Layout(size)
    assert layout.stride % 512 == 0
    assert 0 <= layout.stride - 512 - layout.member_bytes < 512


def test_a_manifest_reads_back_equal_with_the_same_digest(tmp_path: Path) -> None:
    written = manifest_of(10, 4, rejected=3)
    write_manifest(tmp_path, written)
    read = read_manifest(tmp_path)
    assert read == written and read.digest() == written.digest() and read.samples == 14
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_the_digest_is_pinned() -> None:
    # A change here makes every existing data set another one: raise FORMAT_VERSION with it.
    assert manifest_of(10, 4).digest() == "3eb37fed3304e92de098e9506ec7d186b18da68d908ad7bad062339f37941c05"


def test_the_digest_depends_on_every_field() -> None:
    changes: list[dict[str, Any]] = [
        {"samples_per_shard": 11},
        {"sources": [{"kind": "lmdb", "name": "bedroom", "entries": 15}]},
        {"sources": [{"kind": "folder", "name": "bedroom", "entries": 14}]},
        {"excluded": 1},
        {"exclude_sha256": "0" * 64},
        {"max_images": 14},
        {"lists": {"keys.jsonl": "0" * 64}},
        {"rejected": 1},
        {"order_version": 2},
        {"preparation": {"decoder": "other"}},
    ]
    digests = {manifest_of(10, 4).digest(), manifest_of(4, 10).digest(), manifest_of(10).digest()}
    digests |= {manifest_of(10, 4, **change).digest() for change in changes}
    assert len(digests) == 13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, "version 1; this version reads .* version 2: convert again"),
        ({"format": "other"}, "is 'other' version 2"),
        ({"format": "x" * 3_000_000}, r"is 'x+\.\.\.x+' version 2; this version reads"),
        (
            {"format_version": list(range(10**6))},
            r"is 'dist_dcgan-shards' version \[0, .*\.\.\..* 999999\]; this version reads",
        ),
        ({"shard 1": {"name": f"shard-{'1' * 10**6}.tar"}}, "shard 1 is named "),
        ({"digest": "0" * 64}, "its digest does not match"),
        ({"digest": None}, "its digest does not match"),
        ({"samples": 15}, "its digest does not match"),
        ({"rejected": 1}, "its digest does not match"),
        ({"imagesize": 64}, "unknown key imagesize; did you mean image_size?"),
        ({"image_size": 4}, "image_size: input should be greater than or equal to 8, got 4"),
        ({"image_size": 32}, "shard-000000.tar says 134144 bytes, but 10 samples of 32 pixels make 41984"),
        ({"image_size": ...}, "image_size is missing"),
        ({"shards": []}, "shards: .* at least 1 item"),
        ({"sources": None}, "sources: "),
        ({"shard 1": {"name": "shard-000002.tar"}}, "shard 1 is named shard-000002.tar, expected shard-000001.tar"),
        ({"shard 1": {"name": "../shard-000001.tar"}}, "shards.1.name"),
        ({"shard 1": {"bytes": 5}}, "shard-000001.tar says 5 bytes, but 4 samples"),
        ({"shard 1": {"samples": 0}}, "shards.1.samples: input should be greater than or equal to 1, got 0"),
        ({"shard 1": {"sha256": "XYZ"}}, "shards.1.sha256"),
        ({"shard 1": {"colour": 1}}, "unknown key shards.1.colour"),
        ({"shard 1": {"sha256": f"{0:064x}"}}, "shard-000001.tar has the SHA-256 of another shard, but not its size"),
        ({"shard 1": {"samples": 10**12}}, "shards.1.samples: input should be less than or equal to 4294967296"),
        ({"shard 1": {"samples": -4}}, "shards.1.samples: input should be greater than or equal to 1, got -4"),
        ({"shard 1": {"samples": float("nan")}}, "shards.1.samples"),
        ({"shard 1": {"name": "shard-000001.tar\n"}}, "shards.1.name|expected shard-000001.tar"),
        (
            {"shard 1": {"name": "shard-00000\u0661.tar"}},
            "shard 1 is named .*, expected shard-000001.tar|shards.1.name",
        ),
        ({"shard 1": {"name": "/etc/shard-000001.tar"}}, "shards.1.name"),
        ({"image_size": 10**9}, "image_size: input should be less than or equal to 1024"),
    ],
)
def test_a_changed_manifest_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """`shard 1` stands for the entry of that shard, and ... for nothing."""
    write_manifest(tmp_path, manifest_of(10, 4))
    path = tmp_path / MANIFEST_NAME
    content = json.loads(path.read_bytes())
    content["shards"][1] |= change.get("shard 1", {})
    content |= {name: value for name, value in change.items() if name != "shard 1"}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
    with pytest.raises(UserError, match=message) as caught:
        read_manifest(tmp_path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 1_000_000]
)
def test_what_is_no_manifest_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(UserError, match="is damaged: ") as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [1 << 24, 1 << 40])
def test_no_more_than_16_mib_of_a_manifest_are_read(tmp_path: Path, size: int) -> None:
    write_manifest(tmp_path, manifest_of(10, 4))
    with (tmp_path / MANIFEST_NAME).open("ab") as file:
        file.truncate(size)
    with pytest.raises(UserError, match="is damaged: Extra data" if size == 1 << 24 else "than 16,777,216 bytes"):
        read_manifest(tmp_path)


def test_a_failed_publish_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "file", b"old")

    def no_room(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_room)
    with pytest.raises(OSError, match="No space left"):
        publish(tmp_path / "file", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}
