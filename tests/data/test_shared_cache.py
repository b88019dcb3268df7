"""A cache in a folder that others write to, and sources that nobody trusts: only checked bytes, only one's own files.

Promise 10 (integrity) of dist_dcgan/README.md.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_dcgan.config import DataOptions
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage import remote
from dist_dcgan.data.storage.location import DatasetLocation, Folder
from dist_dcgan.data.storage.opening import open_location
from dist_dcgan.data.storage.remote import OtherFolder
from shards.common.errors import OneRankError, UserError
from shards.common.ownership import Ownership
from shards.manifest import Layout, Manifest, ShardEntry, read_manifest, shard_name, write_manifest

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user: needs root")


@pytest.fixture
def source(demo_shards: Path, tmp_path: Path) -> Path:
    """96 images in 10 shards."""
    return Path(shutil.copytree(demo_shards, tmp_path / "source"))


@pytest.fixture
def cache(source: Path, tmp_path: Path) -> Path:
    """A cache with all shards, which their source no longer has."""
    all_pixels(staged(source, tmp_path / "cache"))
    for path in source.glob("*.tar"):
        path.unlink()
    return tmp_path / "cache"


def staged(location: Path | str, folder: Path, **options: Any) -> DatasetLocation:
    return open_location(DataOptions(path=location, cache_dir=folder, **options), allow_commands=True)


def all_pixels(place: DatasetLocation) -> np.ndarray:
    samples, size = place.manifest.samples, place.manifest.image_size
    out = np.empty((samples, size, size, 3), dtype=np.uint8)
    ShardReader(place).gather(np.arange(samples), out)
    return out


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*.tar")}


def entry_file(folder: Path, shard: int = 0) -> Path:
    """The file of a shard in a cache of the demo's."""
    return sorted(folder.glob("*.tar"))[shard]


# Files of others


def test_files_of_this_user_that_others_cannot_write_are_used_in_place(source: Path, cache: Path) -> None:
    for path in cache.glob("*.tar"):
        path.chmod(0o644)  # as caches of earlier versions have them
    before = inodes(cache)
    all_pixels(staged(source, cache))
    assert inodes(cache) == before


def test_files_that_others_may_write_are_copied_and_not_fetched_again(
    source: Path, cache: Path, demo_shards: Path
) -> None:
    """As caches of earlier versions have them if the umask is 002."""
    before = inodes(cache)
    with contextlib.ExitStack() as opened:  # so that no new file gets the inode of an old one
        for path in cache.glob("*.tar"):
            path.chmod(0o664)
            opened.enter_context(path.open("rb"))
        assert np.array_equal(all_pixels(staged(source, cache)), all_pixels(Folder(demo_shards)))
        after = inodes(cache)
    assert after.keys() == before.keys() and not set(after.values()) & set(before.values())
    assert {stat.S_IMODE(path.stat().st_mode) & 0o022 for path in cache.glob("*.tar")} == {0}


def change_unseen(path: Path) -> None:
    """Change a file as its owner can: inode, size and mtime stay."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(600)
        file.write(bytes(range(256)) * 40)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@as_root
@pytest.mark.parametrize("mode", [0o644, 0o666])
def test_a_change_by_another_user_after_the_check_is_not_seen_by_training(
    mode: int, source: Path, cache: Path, demo_shards: Path
) -> None:
    expected, others = all_pixels(Folder(demo_shards)), sorted(cache.glob("*.tar"))
    for path in others:
        os.chown(path, NOBODY, NOBODY)
        path.chmod(mode)
    place = staged(source, cache)
    for shard in range(10):
        place.ready(shard)
    for path in others:
        change_unseen(path)
    assert np.array_equal(all_pixels(place), expected)
    assert np.array_equal(all_pixels(staged(source, cache)), expected)
    assert all(path.stat().st_uid == NOBODY for path in others)
    own = [path for path in cache.glob("*.tar") if path not in others]
    assert sorted(path.name for path in own) == [f"{path.stem}.{os.geteuid()}.tar" for path in others]


@as_root
def test_a_file_of_another_user_in_place_of_a_checked_one_is_not_read(source: Path, cache: Path) -> None:
    """Even one that looks the same: the inode of a removed file is soon given to another."""
    place = staged(source, cache)
    file = place.ready(0)
    os.chown(file.path, NOBODY, NOBODY)
    change_unseen(file.path)
    with pytest.raises(UserError, match=r"no shard-000000\.tar in"):  # it is fetched again
        ShardReader(place, lambda _: file).gather(np.arange(1), np.empty((1, 64, 64, 3), dtype=np.uint8))


@as_root
def test_only_files_of_this_user_are_counted_and_evicted(source: Path, cache: Path, demo_shards: Path) -> None:
    shard_bytes = read_manifest(source).shards[0].bytes
    others = sorted(cache.glob("*.tar"))
    for path in others:
        os.chown(path, NOBODY, NOBODY)
    (cache / f"{'0' * 64}.tar").touch()
    os.truncate(cache / f"{'0' * 64}.tar", 1 << 40)
    os.chown(cache / f"{'0' * 64}.tar", NOBODY, NOBODY)
    place = staged(source, cache, cache_gb=2.5 * shard_bytes / 1e9)
    assert np.array_equal(all_pixels(place), all_pixels(Folder(demo_shards)))
    assert all(path.exists() for path in others)
    assert len([path for path in cache.glob("*.tar") if path.stat().st_uid != NOBODY]) == 2


def plant(kind: str, path: Path, elsewhere: Path) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": Path("/dev/zero"), "link": elsewhere, "dangling": Path("nowhere")}[kind])


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "link", "dangling"])
def test_what_was_planted_under_a_shards_name_is_neither_opened_nor_removed(
    kind: str, source: Path, tmp_path: Path
) -> None:
    cache, mine = tmp_path / "cache", tmp_path / "mine"
    cache.mkdir()
    mine.write_bytes(bytes(134_144))
    for entry in read_manifest(source).shards:
        plant(kind, cache / f"{entry.sha256}.tar", mine)
    plant("fifo", cache / "parts-fifo", mine)
    planted = sorted(cache.iterdir())
    expected = all_pixels(Folder(source))
    assert np.array_equal(all_pixels(staged(source, cache)), expected)
    for path in source.glob("*.tar"):
        path.unlink()
    assert np.array_equal(all_pixels(staged(source, cache)), expected)  # what was fetched is found again
    assert mine.read_bytes() == bytes(134_144)
    assert set(planted) <= set(cache.iterdir())
    assert len(list(cache.glob(f"*.{os.geteuid()}.tar"))) == 10


def test_folders_of_others_under_the_name_of_parts_stay(source: Path, tmp_path: Path) -> None:
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    results = cache / "parts-results"
    results.mkdir(parents=True)
    elsewhere.mkdir()
    for folder in (results, elsewhere):
        (folder / "precious").write_bytes(b"mine")
    (results / f"{'0' * 64}.tar").write_bytes(b"a part")
    (cache / "parts-link").symlink_to(elsewhere)
    for folder in (results, elsewhere):
        os.utime(folder, (0, 0))
    staged(source, cache)
    assert [path.name for path in results.iterdir()] == ["precious"]
    assert [path.name for path in elsewhere.iterdir()] == ["precious"] and (cache / "parts-link").is_symlink()


def test_the_owner_of_the_folder_cannot_lead_a_download_elsewhere(source: Path, tmp_path: Path) -> None:
    place = staged(source, tmp_path / "cache")
    (parts,) = (tmp_path / "cache").glob("parts-*")
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / f"{place.manifest.shards[0].sha256}.tar"
    target.symlink_to(tmp_path / "mine")
    (tmp_path / "mine").write_bytes(b"precious")
    parts.rename(tmp_path / "moved")
    parts.symlink_to(tmp_path / "elsewhere")
    assert np.array_equal(all_pixels(place), all_pixels(Folder(source)))
    assert (tmp_path / "mine").read_bytes() == b"precious" and target.is_symlink()


def test_a_file_system_that_keeps_no_owners_is_used_as_it_is(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as NFS that maps root to nobody: every file looks like somebody else's."""
    own = os.geteuid()
    monkeypatch.setattr("os.geteuid", lambda: own + 1000)
    assert Ownership.on_disk_of(tmp_path) == Ownership(own, 0)
    expected = all_pixels(staged(source, tmp_path / "cache"))
    before = inodes(tmp_path / "cache")
    assert np.array_equal(all_pixels(staged(source, tmp_path / "cache")), expected)
    assert inodes(tmp_path / "cache") == before and len(before) == 10


# Manifests against the budget and the disk


def enormous(folder: Path, *samples: int) -> Path:
    """A data set that is only a manifest."""
    folder.mkdir()
    shards = tuple(
        ShardEntry(name=shard_name(i), samples=n, bytes=Layout(64).shard_bytes(n), sha256=f"{i:064x}")
        for i, n in enumerate(samples)
    )
    origin = {"kind": "lmdb", "name": "x", "entries": 1}
    write_manifest(folder, Manifest(image_size=64, samples_per_shard=1, sources=[origin], shards=shards))
    return folder


def test_a_shard_that_can_never_fit_evicts_nothing(cache: Path, tmp_path: Path) -> None:
    before = inodes(cache)
    with pytest.raises(UserError, match=r"data\.cache_gb 0\.001\d* is too small"):
        staged(enormous(tmp_path / "bad", 10, 1_000_000_000), cache, cache_gb=0.0014)
    assert inodes(cache) == before


def test_a_shard_without_room_on_the_disk_is_refused_before_it_is_written(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = staged(enormous(tmp_path / "bad", 1_000_000_000), cache, cache_gb=1e5)
    monkeypatch.setattr("shutil.disk_usage", lambda path, real=shutil.disk_usage: real(path)._replace(free=1 << 20))
    with pytest.raises(UserError, match=r"no room at .*cache: shard-000000\.tar takes 13,312,000,001,024 bytes"):
        place.ready(0)


def test_a_manifest_with_the_checksum_of_another_data_set_does_not_evict_it(cache: Path, tmp_path: Path) -> None:
    folder, victim = enormous(tmp_path / "bad", 1), entry_file(cache)
    entry = ShardEntry(name=shard_name(0), samples=1, bytes=Layout(64).shard_bytes(1), sha256=victim.stem)
    write_manifest(folder, read_manifest(folder).model_copy(update={"shards": (entry,)}))
    with pytest.raises(UserError, match=r"the manifest of .*bad is wrong: .* bytes, the manifest says 14336"):
        staged(folder, cache).ready(0)
    assert victim.exists()


# Sources


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
@pytest.mark.parametrize("name", ["shard-000000.tar", "manifest.json"])
def test_what_is_no_file_in_a_folder_of_others_is_named(
    kind: str, name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    (source / name).unlink()
    plant(kind, source / name, source)
    with pytest.raises(UserError, match=rf"{name} cannot be had from .*source: it is not a plain file"):
        staged(source, tmp_path / "cache").ready(0)


def test_a_file_that_has_more_than_its_size_is_cut(tmp_path: Path) -> None:
    """As one that grows while it is copied, or a file of /proc."""
    assert os.stat("/proc/self/status").st_size == 0
    OtherFolder(Path("/proc/self")).fetch("status", tmp_path / "copy", 10)
    assert (tmp_path / "copy").stat().st_size == 10


def test_a_command_that_drips_is_given_up(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_SILENCE_SECONDS", 1.0)
    monkeypatch.setattr("dist_dcgan.data.storage.cache._ATTEMPTS", 1)
    drip = "while echo -n X; do sleep 0.05; done; :"
    with pytest.raises(OneRankError, match="the command prints less than 10,000 bytes a second"):
        staged(f"pipe:{drip} {{}}", tmp_path / "cache")


def test_a_command_that_prints_for_ever_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_dcgan.data.storage.cache._ATTEMPTS", 1)
    with pytest.raises(OneRankError, match="the command prints more than 16,777,216 bytes"):
        staged("pipe:cat /dev/zero; : {}", tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*.json")) == []
