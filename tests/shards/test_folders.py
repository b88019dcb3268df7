"""Odd and hostile folders: all of their images, or one line that names what is wrong; nothing waits."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shards.conversion.sources.folder_source import FolderSource
from tests.support.shards_fixtures import (
    convert_here,
    encoded,
    entries_of,
    picture,
    refusal,
    rejected_in,
    samples_in,
    write_files,
)

IMAGE = encoded(picture(0))


def test_odd_files_of_a_folder_are_read_or_rejected_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_files(
        tmp_path / "images",
        dict.fromkeys(("a.jpg", "b.JPEG", "class/c.webp", "d.jpg/e.png", ".hidden.jpg", ".git/x.jpg", "f.txt"), IMAGE)
        | {"empty.jpg": b"", "line\nfeed.jpg": IMAGE},
    )
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.jpg")).write_bytes(IMAGE)
    (folder / "link.jpg").symlink_to("a.jpg")
    (folder / "linked").symlink_to(write_files(tmp_path / "elsewhere", {"c.webp": IMAGE}))
    (folder / "broken.jpg").symlink_to("nowhere")
    (folder / "itself.jpg").symlink_to("itself.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    os.mkfifo(folder / "fifo.jpg")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder / "socket.jpg"))
        convert_here(folder, tmp_path / "data", "--max-rejected", 1)
    assert samples_in(tmp_path / "data").keys() == {
        "a", "b", "class/c", "d.jpg/e", "line\nfeed", "fffe", "link", "linked/c"
    }  # fmt: skip
    assert rejected_in(tmp_path / "data") == {
        "empty": "not a readable JPEG, WebP, PNG or PPM image: it is empty",
        "broken": "a link to nothing",
        "itself": "a link to nothing",
        "zero": "not a plain file",
        "fifo": "not a plain file",
        "socket": "not a plain file",
    }
    assert "3 files without the extension of an image were left out" in capsys.readouterr().out


def test_a_link_to_a_folder_above_it_is_refused(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "images", {"a/b/c.jpg": IMAGE})
    (folder / "a" / "b" / "up").symlink_to("..")
    assert refusal(folder) == f"{folder}/a/b/up is a link to a folder above it: remove it"


def test_links_that_make_endless_paths_of_few_folders_are_refused(tmp_path: Path) -> None:
    for level in range(30):
        write_files(tmp_path / "pool" / str(level), {"a.jpg": IMAGE})
        for name in ("left", "right"):
            (tmp_path / "pool" / str(level) / name).symlink_to(f"../{level + 1}")
    (tmp_path / "pool" / "30").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0").symlink_to("../pool/0")
    assert re.search(r"right leads to the images of .*/left a second time: ", refusal(tmp_path / "images", seconds=5))


SECOND_NAMES = {
    "a folder and a link to it": ({"latest": "2020"}, "latest leads to the images of images/2020"),
    "a link before its folder": ({"1999": "2020/a"}, "1999 leads to the images of images/2020/a"),
    "two links": ({"b": "../pool", "c": "../pool"}, "c leads to the images of images/b"),
    "a link into another one": ({"b": "../pool", "c": "../pool/a"}, "c leads to the images of images/b/a"),
    "a link to more than another one": ({"b": "../pool/a", "c": "../pool"}, "c leads to the images of images/b"),
    "a link into a hidden folder": ({"current": ".store/1"}, ""),
    "links into the hidden folder": ({"a": ".store/1", "b": ".store"}, "b leads to the images of images/a"),
    "links to folders side by side": ({"b": "../pool/a", "c": "../pool/b"}, ""),
}
"""Links in a folder, and what is refused of them, or nothing."""


@pytest.mark.parametrize("name", SECOND_NAMES)
def test_no_image_is_read_by_two_names_of_a_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    links, message = SECOND_NAMES[name]
    write_files(tmp_path, dict.fromkeys(("images/2020/a/x.jpg", "images/.store/1/y.jpg"), IMAGE))
    write_files(tmp_path, dict.fromkeys(("pool/a/x.jpg", "pool/b/y.jpg"), IMAGE))
    for link, target in links.items():
        (tmp_path / "images" / link).symlink_to(target)
    if message:
        assert refusal(Path("images")) == f"images/{message} a second time: remove the link"
    else:
        assert len(entries_of(FolderSource(Path("images")))) == 1 + len(links)


def test_links_to_files_and_hard_links_are_entries_of_their_own(tmp_path: Path) -> None:
    folder = write_files(tmp_path, {"a.jpg": IMAGE})
    (folder / "b.jpg").symlink_to("a.jpg")
    (folder / "c.jpg").hardlink_to(folder / "a.jpg")
    assert entries_of(FolderSource(folder)) == [(b"a", IMAGE), (b"b", IMAGE), (b"c", IMAGE)]


def test_a_link_to_nothing_that_may_have_been_a_folder_is_refused(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "images", {"a.jpg": IMAGE})
    (folder / "class").symlink_to("unmounted")
    assert refusal(folder) == f"{folder}/class is a link to nothing: mend or remove it"


def test_folders_deeper_than_functions_may_call_themselves_are_walked(tmp_path: Path) -> None:
    folder, depth = tmp_path / "images", sys.getrecursionlimit() + 200
    folder.mkdir()
    below = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=below)
        above, below = below, os.open("d", os.O_RDONLY, dir_fd=below)
        os.close(above)
    os.close(os.open("a.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=below))
    os.close(below)
    try:
        assert [key for key, _ in entries_of(FolderSource(folder))] == [b"d/" * depth + b"a"]
    finally:
        subprocess.run(["rm", "-r", folder], check=True)  # Python's rmtree calls itself


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without the rights of root, where the tests have them."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("unreadable", "named"),
    [
        ("closed", "closed/images"),
        ("closed/images/class", "the folder closed/images/class"),
        ("closed/images/class/a.jpg", "closed/images/class/a.jpg"),
    ],
)
def test_what_may_not_be_read_is_an_error(
    unreadable: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, {"closed/images/class/a.jpg": IMAGE})
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # the folders above may be closed to others
    Path(unreadable).chmod(0)
    with as_nobody():
        message = refusal(Path("closed/images"))
    Path(unreadable).chmod(0o755)
    assert message.startswith(f"cannot read {named}: Permission denied")


def test_an_error_of_the_disk_is_no_rejection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    folder = write_files(tmp_path / "images", {"a.jpg": IMAGE})
    monkeypatch.setattr(os, "pread", fail)
    assert refusal(folder) == f"cannot read {folder}/a.jpg: Input/output error; --exclude leaves it out"
