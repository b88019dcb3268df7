"""Walking and reading sources: every entry once, in order and lazily; and one line for every unusable source."""

from __future__ import annotations

import codecs
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset

from shards.common.errors import UserError
from shards.conversion.sources.entries import Selection, Source, Walk, read_keys
from shards.conversion.sources.folder_source import FolderSource, key_of
from shards.conversion.sources.kinds import open_source, open_sources
from shards.conversion.sources.lmdb_source import LmdbSource
from shards.conversion.sources.tar_source import TarSource
from shards.writer import tar_header
from tests.support.shards_fixtures import contents, data_set, entries_of, write_files, write_lmdb, write_tar

ENTRIES = {b"%03d" % i: bytes([i % 256]) * (i * 37) for i in range(1, 101)}


@pytest.mark.parametrize("length", [1, 7, 50, 99, 100, 101, 4096])
def test_runs_give_every_entry_once_in_key_order_and_change_nothing_on_the_disk(tmp_path: Path, length: int) -> None:
    path = write_lmdb(tmp_path / "source", ENTRIES)
    (path / "lock.mdb").unlink()
    before = contents(path)
    with LmdbSource(path) as source:
        runs = list(Walk([source], Selection()).runs(length))
        read = [(entry.key, source.read(entry.key, entry.place)) for run in runs for entry in run]
    assert read == sorted(ENTRIES.items())
    assert {len(run) for run in runs[:-1]} <= {length} and len(runs) == -(-100 // length)
    assert contents(path) == before


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("image.jpg", "image"),
        ("image.v2.jpg", "image.v2"),
        ("class/image.jpg", "class/image"),
        ("a/b/c/abcd.webp", "abcd"),
        ("0/1.png", "0/1"),
        ("a/b/other.jpg", "a/b/other"),
        ("ab/c/abc.jpg", "ab/c/abc"),
        ("a/a.jpg", "a"),
    ],
)
def test_the_key_of_a_file_is_its_path_but_for_folders_that_spell_its_name(path: str, key: str) -> None:
    assert key_of(path.encode()) == key.encode()


def test_a_folder_is_walked_in_the_order_of_names_whatever_the_order_of_their_making(tmp_path: Path) -> None:
    names = ["b/2.jpg", "b/10.png", "a.jpg", "c.WEBP", "B.ppm", "b.jpeg", "b/c/1.jpg"]
    made = [write_files(tmp_path / str(i), dict.fromkeys(order, b"")) for i, order in enumerate((names, names[::-1]))]
    walks = [list(FolderSource(path).walk()) for path in made]
    expected = ["B.ppm", "a.jpg", "b/10.png", "b/2.jpg", "b/c/1.jpg", "b.jpeg", "c.WEBP"]
    assert [place.decode() for _, place in walks[0]] == expected
    assert walks[0] == walks[1]


def test_what_is_no_image_by_its_name_is_counted(tmp_path: Path) -> None:
    files = {"a.jpg": b"1", "notes.txt": b"", "b/labels.json": b"", "b/data.pickle": b"", ".thumbnails/a.jpg": b""}
    source = FolderSource(write_files(tmp_path, files))
    for _ in range(2):  # a second walk counts anew
        assert entries_of(source) == [(b"a", b"1")]
        assert source.left_out.count == 4


TAR_NAMES = ["a.jpg", "b.left.png", "dir.x/c.JPEG", "./d.webp", "e/f/g.ppm", "h.i.j.jpg", "../k.jpg", "/l.jpg"]


def test_names_are_split_as_webdataset_splits_them(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {name: name.encode() for name in TAR_NAMES})
    found = entries_of(TarSource(path))
    assert found == [(webdataset.tariterators.base_plus_ext(name)[0].encode(), name.encode()) for name in TAR_NAMES]
    assert all(key for key, _ in found)


def test_a_folder_of_tars_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("2", "10", "1"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}-{i}.jpg": b"%d" % i for i in range(2)} | {f"{name}.cls": b"0"})
    write_files(tmp_path, {".hidden.tar": b"no tar", "README.md": b""})
    source = open_source(tmp_path)
    assert isinstance(source, TarSource)
    assert [key for key, _ in entries_of(source)] == [b"1-0", b"1-1", b"10-0", b"10-1", b"2-0", b"2-1"]
    assert source.left_out.count == 3
    assert entries_of(pickle.loads(pickle.dumps(source))) == entries_of(source)


@pytest.mark.parametrize("below", ["cats/a.jpg", "cats/more/b.tar", "cats/more/data.mdb", "linked/a.png"])
@pytest.mark.parametrize("own", ["data.mdb", "old.tar"])
def test_images_that_a_tar_or_an_lmdb_would_hide_are_refused(own: str, below: str, tmp_path: Path) -> None:
    folder = tmp_path / "mix"
    if own == "data.mdb":
        write_lmdb(folder, {b"a": b""})
    else:
        write_tar(write_files(folder, {}) / own, {"a.jpg": b""})
    odd = {".thumbnails/a.jpg": b"", "logs/1.txt": b"", "index/old.idx": b"", "README.md": b"", ".b.jpg": b""}
    write_files(folder, odd)
    (folder / "logs" / "up").symlink_to("..")
    (folder / "logs" / "itself").symlink_to("itself")
    data_set(folder / "made")  # by an earlier conversion, as the next one is
    write_files(folder / "begun", {"unfinished-conversion/lock": b"", "shard-000000.tar": b""})
    assert len(entries_of(open_source(folder))) == 1
    write_files(tmp_path / "elsewhere", {"a.png": b""})
    if below.startswith("linked"):
        (folder / "linked").symlink_to("../elsewhere")
    else:
        write_files(folder, {below: b""})
    what = {"data.mdb": "an LMDB", "old.tar": "tars"}[own]
    with pytest.raises(UserError, match=rf"^{folder} holds both {what} and .* \({folder}/{below}\), .*: part them$"):
        open_source(folder)


def test_an_image_beside_an_lmdb_is_refused(tmp_path: Path) -> None:
    write_files(write_lmdb(tmp_path / "lmdb", {b"a": b""}), {"a.jpg": b""})
    with pytest.raises(UserError, match=rf"^{tmp_path}/lmdb holds both an LMDB and images \({tmp_path}/lmdb/a.jpg\)"):
        open_source(tmp_path / "lmdb")


def keys_of_run(sources: list[Source], exclude: bytes) -> list[bytes]:
    [run] = Walk(sources, Selection(frozenset({exclude}))).runs(10)
    return [entry.key for entry in run]


def test_keys_are_excluded_with_or_without_the_number_of_their_source(tmp_path: Path) -> None:
    sources: list[Source] = [FolderSource(write_files(tmp_path / n, {"x.jpg": b"", "y.jpg": b""})) for n in "ab"]
    assert keys_of_run(sources, b"x") == [b"y", b"y"]
    assert keys_of_run(sources, b"1_x") == [b"x", b"y", b"y"]
    assert keys_of_run(sources[:1], b"0_x") == [b"x", b"y"]


def test_a_list_of_keys_may_have_windows_lines_blanks_and_any_bytes(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"one\r\n\n  two\nthree \n\xff\xfe")
    assert read_keys(tmp_path / "keys") == {b"one", b"  two", b"three ", b"\xff\xfe"}


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_list_of_keys_is_read_in_each_encoding_that_says_so(mark: bytes, end: str, tmp_path: Path) -> None:
    encoding = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}.get(mark, "utf-8")
    (tmp_path / "keys").write_bytes(mark + end.join(["a/b", " schön\t", "", "last"]).encode(encoding))
    found = {b"a/b", " schön\t".encode(), b"last"}
    assert read_keys(tmp_path / "keys") == found


def test_sources_that_have_images_in_common_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, {"photos/2020/a.jpg": b"", "photos/.old/a.jpg": b"", "other/a.jpg": b""})
    write_tar(tmp_path / "tars.tar", {"a.jpg": b""})
    write_lmdb(tmp_path / "lmdb", {b"a": b""})
    write_tar(write_files(tmp_path / "tars", {}) / "a.tar", {"a.jpg": b""})
    for name, target in {"latest": "photos/2020", "tars/b.tar": "a.tar", "link.tar": "tars.tar", "l": "lmdb"}.items():
        Path(name).symlink_to(target)
    twice = [
        "photos photos",
        "photos/2020 latest",
        "latest photos",
        "photos latest",
        "tars",
        "link.tar tars.tar",
        "l lmdb",
    ]
    for line in twice:
        with pytest.raises(UserError, match=r" holds the images of .* a second time: leave one of them out$"):
            open_sources([Path(word) for word in line.split()])
    for words, line in {
        "photos photos/2020": "photos/2020 .* of photos a",
        "photos latest": "latest .* photos/2020 a",
    }.items():
        with pytest.raises(UserError, match=f"^{line} second time"):
            open_sources([Path(word) for word in words.split()])
    assert len(open_sources([Path("photos"), Path("photos/.old"), Path("other"), Path("tars.tar"), Path("lmdb")])) == 5


def test_a_link_in_a_source_to_another_source_is_refused(tmp_path: Path) -> None:
    sources = [write_files(tmp_path / name, {"below/a.jpg": b""}) for name in "ab"]
    (sources[0] / "link").symlink_to("../b/below")
    with pytest.raises(UserError, match=r"a/link leads to the images of .*/b/below a second time: remove the link$"):
        list(Walk(open_sources(sources), Selection()).runs(10))
    assert len(entries_of(open_source(sources[0]))) == 2


def many_members(path: Path, count: int) -> Path:
    path.write_bytes(b"".join(tar_header(f"{i:06d}", 0) for i in range(count)) + bytes(1024))
    return path


def many_values(path: Path, count: int) -> Path:
    return write_lmdb(path, {b"%06d" % i: b"value" for i in range(count)})


class Watched:
    """A source that counts how far it was walked."""

    def __init__(self, source: Source) -> None:
        self.source, self.walked = source, 0

    def walk(self) -> Iterator[tuple[bytes, Any]]:
        for found in self.source.walk():
            self.walked += 1
            yield found


@pytest.mark.parametrize("write", [many_members, many_values])
def test_the_first_run_comes_before_the_walk_ends(write: Callable[[Path, int], Path], tmp_path: Path) -> None:
    watched = Watched(open_source(write(tmp_path / "many.tar", 5000)))
    runs = Walk([watched], Selection()).runs(100)  # type: ignore[list-item]  # a walk does not read
    assert len(next(runs)) == 100 and watched.walked == 100
    assert sum(map(len, runs)) == 4900


def peak_of(walk: Callable[[], object]) -> int:
    """Bytes of memory that a walk holds at most at a time."""
    tracemalloc.start()
    walk()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("write", [many_members, many_values])
def test_the_memory_of_a_walk_does_not_grow(write: Callable[[Path, int], Path], tmp_path: Path) -> None:
    def walk(path: Path) -> Callable[[], object]:
        return lambda: sum(1 for _ in open_source(path).walk())

    few, many = (peak_of(walk(write(tmp_path / f"{count}.tar", count))) for count in (1000, 10_000))
    assert many < few + 50_000


def test_python_s_own_walk_of_a_tar_would_grow(tmp_path: Path) -> None:
    with tarfile.open(many_members(tmp_path / "many.tar", 3000)) as tar:
        assert peak_of(tar.getmembers) > 1_000_000
