"""Downloads against a real server that cuts, lies and changes its mind: the right folder, or one line and no folder."""

from __future__ import annotations

import os
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shards.__main__ import main
from shards.common.errors import UserError
from shards.common.http import FetchOptions, fetch
from shards.lsun.catalog import CATEGORIES, lmdb_names
from shards.lsun.download import download
from tests.support.commands import module, start
from tests.support.downloads import FOLDER, NAME, NO_ZIP, ZIP, fetched, lsun_zip, refused
from tests.support.http_server import Answer, serve
from tests.support.shards_fixtures import (
    contents,
    error_of,
    largest_file,
    numbered,
    output_of,
    run_shards,
    write_files,
    write_lmdb,
)

pytestmark = pytest.mark.usefixtures("waits")


def part(out: Path) -> Path:
    return out / f"{NAME}.zip.part"


# The transfer


def test_one_request_brings_the_folder(tmp_path: Path, waits: list[float]) -> None:
    server = fetched(tmp_path / "new" / "folder", Answer(ZIP))
    assert [(request.path, request.range, request.served) for request in server.requests] == [
        (f"/scenes/{NAME}.zip", None, len(ZIP))
    ]
    assert waits == []


def test_the_query_of_a_mirror_follows_the_name_of_the_archive(tmp_path: Path) -> None:
    with serve(Answer(ZIP)) as server:
        assert download(NAME, tmp_path, f"{server.address}?signature=1/2#part")
    assert [request.path for request in server.requests] == [f"/scenes/{NAME}.zip?signature=1/2"]


def test_a_connection_cut_again_and_again_goes_on_where_it_was(tmp_path: Path, waits: list[float]) -> None:
    server = fetched(tmp_path, *[Answer(ZIP, cut=17_000)] * 11, Answer(ZIP))
    assert server.ranges == [None, *(f"bytes={17_000 * i}-" for i in range(1, 12))]
    assert server.served == len(ZIP)  # not a byte twice
    assert waits == [1.0] * 11  # more cuts than attempts are allowed: each brought something


TWO, NO_ETAG = {"ETag": '"two"'}, {"ETag": None}
WEAK_ETAG = {"ETag": 'W/"one"'}  # allows other bytes
DATE = {"ETag": None, "Last-Modified": "Mon, 01 Jan 2018 00:00:00 GMT"}
NO_LENGTH = {"Content-Length": None}
HALF, OF_ANOTHER = Answer(ZIP, cut=150_000), Answer(bytes(len(ZIP)), cut=150_000)
ON: list[str | None] = ["bytes=150000-"]
ANEW: list[str | None] = [None]
AGAIN = ON + ANEW


def in_range(content_range: str | None) -> Answer:
    return Answer(ZIP, headers={"Content-Range": content_range})


CONTINUED: dict[str, tuple[list[Answer], list[str | None], int | None]] = {
    "ranges are ignored": ([HALF, Answer(ZIP, ranges=False)], ON, 150_000 + len(ZIP)),
    "a range ends early without an error": (
        [Answer(ZIP, cut=9_000), Answer(ZIP, cut=50_000, headers=NO_LENGTH), Answer(ZIP)],
        ["bytes=9000-", "bytes=59000-"],
        len(ZIP),
    ),
    "the file changed": ([OF_ANOTHER, Answer(ZIP, headers=TWO)], ON, None),
    "the file changed, If-Range ignored": ([OF_ANOTHER, Answer(ZIP, headers=TWO, if_range=False)], AGAIN, None),
    "the length changed": ([Answer(bytes(len(ZIP) + 1), cut=150_000), Answer(ZIP)], AGAIN, None),
    "no ETag": ([replace(OF_ANOTHER, headers=NO_ETAG), Answer(ZIP, headers=NO_ETAG)], ANEW, None),
    "a weak ETag": ([replace(OF_ANOTHER, headers=WEAK_ETAG), Answer(ZIP, headers=WEAK_ETAG)], ANEW, None),
    "a date, no ETag": ([replace(HALF, headers=DATE), Answer(ZIP, headers=DATE)], ON, len(ZIP)),
    "an earlier range": ([HALF, in_range(f"bytes 149999-{len(ZIP) - 1}/{len(ZIP)}"), Answer(ZIP)], AGAIN, None),
    "another length": ([HALF, in_range(f"bytes 150000-{len(ZIP) - 1}/{len(ZIP) + 1}"), Answer(ZIP)], AGAIN, None),
    "a range that is none": ([HALF, in_range("nonsense"), Answer(ZIP)], AGAIN, None),
    "no range": ([HALF, in_range(None), Answer(ZIP)], AGAIN, None),
    "no length": ([Answer(ZIP, headers=NO_LENGTH)], [], len(ZIP)),
    "a claimed encoding": ([Answer(ZIP, headers={"Content-Encoding": "gzip"})], [], len(ZIP)),
}
"""Answers, the ranges asked for after the first request, and the bytes of all bodies together if that is promised."""


@pytest.mark.parametrize("name", CONTINUED)
def test_what_came_is_continued_only_if_the_rest_is_of_the_same_file(tmp_path: Path, name: str) -> None:
    answers, ranges, served = CONTINUED[name]
    server = fetched(tmp_path, *answers)
    assert server.ranges == [None, *ranges]
    assert served in (None, server.served)


WRONG_RANGE = {"Content-Range": f"bytes 0-{len(ZIP) - 1}/{len(ZIP)}"}


@pytest.mark.parametrize(
    ("answers", "line", "kept"),
    [
        ([Answer(ZIP, cut=9_000, ranges=False)], "the connection was cut", 9_000),
        ([Answer(ZIP + b"more", cut=100_000), Answer(ZIP + b"more", cut=0)], "the connection was cut", 100_000),
        ([Answer(ZIP, cut=9_000, headers=WRONG_RANGE)], "the connection was cut", 9_000),
        ([Answer(status=500)], "the server answers 500 (Internal Server Error)", 0),
    ],
)
def test_a_server_without_progress_is_given_up_and_what_came_is_kept(
    tmp_path: Path, waits: list[float], answers: list[Answer], line: str, kept: int
) -> None:
    server, found = refused(tmp_path, *answers)
    rest = f"{kept:,} bytes are kept, the same command goes on" if kept else "the same command tries again"
    assert found == f"cannot get ADDRESS: {line}, after 8 attempts without progress; {rest}"
    assert len(server.requests) == 8 + bool(kept)  # the first made progress
    assert waits[-7:] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0]
    assert (part(tmp_path).read_bytes() if kept else b"") == ZIP[:kept]


def test_a_silent_server_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient(address: str, part: Path, options: FetchOptions) -> None:
        fetch(address, part, options._replace(silence_seconds=0.2))

    monkeypatch.setattr("shards.lsun.download.fetch", impatient)
    server = fetched(tmp_path, Answer(ZIP, hang=1 << 16), Answer(ZIP))
    assert server.ranges == [None, "bytes=65536-"]


@pytest.mark.parametrize(
    ("answers", "waited"),
    [
        ([Answer(status=500), Answer(status=503)], [1.0, 2.0]),
        *[
            ([Answer(status=429, headers={"Retry-After": retry_after})], [waited])
            for retry_after, waited in (
                ("7", 7.0),
                ("99999999", 300.0),
                ("Thu, 01 Jan 1970 00:00:00 GMT", 1.0),
                ("soon", 1.0),
                ("9" * 400, 300.0),
            )
        ],
    ],
)
def test_errors_of_the_server_are_waited_out_as_long_as_it_says(
    tmp_path: Path, waits: list[float], answers: list[Answer], waited: list[float]
) -> None:
    fetched(tmp_path, *answers, Answer(ZIP))
    assert waits == waited


def test_nobody_there_is_told_with_the_cause(tmp_path: Path) -> None:
    with serve() as server:
        pass
    with pytest.raises(UserError, match=r"cannot get http://127.*: Connection refused, after 8 attempts"):
        download(NAME, tmp_path, server.address)


def test_a_length_announced_too_short_is_damage(tmp_path: Path) -> None:
    _, line = refused(tmp_path, Answer(ZIP, headers={"Content-Length": "150000"}))
    assert line == f"ADDRESS cannot be used: {NO_ZIP}; it was removed, and the same command downloads it again"
    assert not part(tmp_path).exists()
    assert fetched(tmp_path, Answer(ZIP)).ranges == [None]


def test_more_than_announced_is_never_written(tmp_path: Path) -> None:
    longer = Answer(ZIP * 2, headers={"Content-Length": None, "Content-Range": f"bytes 9000-{len(ZIP) - 1}/{len(ZIP)}"})
    with largest_file(len(ZIP)):
        server = fetched(tmp_path, Answer(ZIP, cut=9_000), longer, Answer(ZIP))
    assert server.ranges == [None, "bytes=9000-", None]


@pytest.mark.parametrize("changed", [False, True])
def test_all_there_but_of_unknown_length_is_asked_for(tmp_path: Path, changed: bool) -> None:
    held = ZIP + b"x" if changed else ZIP
    part(tmp_path).write_bytes(held)
    part(tmp_path).with_name(f"{NAME}.zip.part.json").write_text('{"validator": "\\"one\\"", "total": null}')
    server = fetched(tmp_path, Answer(ZIP))
    assert server.ranges == [f"bytes={len(held)}-", *([None] if changed else [])]


@pytest.mark.parametrize("known", ["", "{", '{"validator": 1, "total": "x"}', '{"validator": null, "total": 9}'])
def test_a_part_of_unknown_origin_is_replaced(tmp_path: Path, known: str) -> None:
    part(tmp_path).write_bytes(bytes(1000))
    part(tmp_path).with_name(f"{NAME}.zip.part.json").write_text(known)
    assert fetched(tmp_path, Answer(ZIP)).ranges == [None]


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_followed(tmp_path: Path, status: int) -> None:
    server = fetched(tmp_path, Answer(status=status, headers={"Location": "/elsewhere?file=../x"}), Answer(ZIP))
    assert server.requests[1].path == "/elsewhere?file=../x"


@pytest.mark.parametrize(
    "location", [None, "file:///etc/passwd", "ftp://127.0.0.1/x.zip", "http://[", "\xff\xfe://x", "?again"]
)
def test_a_missing_file_or_a_redirect_elsewhere_is_told_at_once(
    tmp_path: Path, location: str | None, waits: list[float]
) -> None:
    server, line = refused(tmp_path, Answer(status=302 if location else 404, headers={"Location": location}))
    reason = "" if location else "the server answers 404 (Not Found)"
    assert line.startswith(f"cannot get ADDRESS: {reason}") and line.endswith("; check the address")
    assert waits == [] and (location == "?again" or len(server.requests) == 1)


# The disk


def test_room_is_needed_for_the_archive_and_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=2 * len(ZIP) - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    _, line = refused(tmp_path, Answer(ZIP))
    assert line == (
        f"no room at {tmp_path}: {NAME}.zip, unpacked, takes about {2 * len(ZIP):,} bytes, "
        f"{2 * len(ZIP) - 1:,} are free: make room"
    )
    assert not part(tmp_path).exists()
    free = free._replace(free=2 * len(ZIP))
    fetched(tmp_path, Answer(ZIP))


def test_room_is_checked_again_before_unzipping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = lsun_zip({"data.mdb": bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
    free = shutil.disk_usage(tmp_path)._replace(free=(1 << 20) - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    _, line = refused(tmp_path, Answer(zeros))
    assert line == (
        f"no room at {tmp_path}: the images of {NAME}.zip take 1,048,576 bytes, 1,048,575 are free: make room"
    )
    assert part(tmp_path).read_bytes() == zeros


def test_a_disk_that_fails_is_told_and_what_came_is_kept(tmp_path: Path) -> None:
    with largest_file(100_000):
        _, line = refused(tmp_path, Answer(ZIP))
    assert line.startswith(f"cannot write to {tmp_path} (File too large): mend that and give the same command again")
    assert fetched(tmp_path, Answer(ZIP)).ranges == ["bytes=100000-"]


@pytest.mark.parametrize(
    ("held", "out", "message"),
    [
        (
            "file",
            "file",
            "cannot write to {}/file (File exists): mend that and give the same command again, or another --out",
        ),
        (f"{NAME}/mine", "", f"{{}}/{NAME} is in the way: it holds no data.mdb; remove it"),
        (
            f"{NAME}.zip",
            "",
            f"{{}}/{NAME}.zip cannot be used: it is damaged, or no zip file (File is not a zip file); "
            "remove it, and the same command downloads it",
        ),
    ],
)
def test_what_somebody_else_has_put_there_is_told_and_stays(tmp_path: Path, held: str, out: str, message: str) -> None:
    write_files(tmp_path, {held: ZIP[:100_000]})
    with pytest.raises(UserError) as caught:
        download(NAME, tmp_path / out, "http://127.0.0.1:1/")
    assert str(caught.value) == message.format(tmp_path)
    assert contents(tmp_path).pop(held) == ZIP[:100_000]
    assert not (tmp_path / NAME / "data.mdb").exists()


# Again, and at once


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    fetched(tmp_path, Answer(ZIP))
    part(tmp_path).write_bytes(b"left by a kill just before the end")
    with serve(Answer(status=500)) as server:
        assert not download(NAME, tmp_path, server.address)
    assert server.requests == []
    assert [path.name for path in tmp_path.iterdir()] == [NAME] and contents(tmp_path) == FOLDER


def test_the_archive_is_kept_where_that_is_asked_for_and_used_again(tmp_path: Path) -> None:
    with serve(Answer(ZIP)) as server:
        download(NAME, tmp_path, server.address, keep_zip=True)
        assert contents(tmp_path) == FOLDER | {f"{NAME}.zip": ZIP}
        shutil.rmtree(tmp_path / NAME)
        download(NAME, tmp_path, server.address)
    assert contents(tmp_path) == FOLDER | {f"{NAME}.zip": ZIP}
    assert len(server.requests) == 1


# The command


def test_names_of_the_archives() -> None:
    assert lmdb_names(["bedroom"]) == ["bedroom_train_lmdb", "bedroom_val_lmdb"]
    assert lmdb_names(["kitchen", "tower", "kitchen"], "train") == ["kitchen_train_lmdb", "tower_train_lmdb"]
    assert lmdb_names(["test"]) == lmdb_names(["test"], "val") == ["test_lmdb"]
    assert len(lmdb_names(["all"])) == 21 and lmdb_names(["all"])[-1] == "test_lmdb"
    assert lmdb_names(["all"], "val") == [f"{category}_val_lmdb" for category in CATEGORIES]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A real LMDB of 6 images, with zeros behind it, so that it takes a while to unzip and little to send."""
    source = write_lmdb(tmp_path_factory.mktemp("large") / "source", numbered(6))
    return {name: content + bytes(96 << 20 if name == "data.mdb" else 0) for name, content in contents(source).items()}


def kill_when(condition: Callable[[], bool], *words: object, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Start a command and kill it, without a chance to tidy up, as soon as a condition holds."""
    process = start(module("shards", *words))
    try:
        deadline = time.monotonic() + 60
        while not condition():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        meanwhile()
    finally:
        process.kill()
        process.wait()


def test_a_killed_command_goes_on_and_only_one_runs_at_a_time(tmp_path: Path, large: dict[str, bytes]) -> None:
    archive = lsun_zip(large, zipfile.ZIP_DEFLATED)
    folder, unzipping = tmp_path / NAME, tmp_path / f"{NAME}.tmp" / "data.mdb"
    with serve(Answer(archive, hang=80_000), Answer(archive)) as server:
        words = ("download", "test", "--out", tmp_path, "--address", server.address)
        second: list[str] = []

        def run_second() -> None:
            second.append(error_of(*words))

        kill_when(lambda: part(tmp_path).exists() and part(tmp_path).stat().st_size == 1 << 16, *words,
                    meanwhile=run_second)  # fmt: skip
        assert second == [f"another process is downloading {folder}: wait for it, or give another --out"]
        assert not folder.exists()

        kill_when(lambda: unzipping.exists() and unzipping.stat().st_size > 0, *words)
        assert unzipping.stat().st_size < len(large["data.mdb"]) and not folder.exists()
        assert server.ranges == [None, "bytes=65536-"]
        assert server.served == 80_000 + len(archive) - (1 << 16)

        assert output_of(*words) == f"6 images at {folder}\n"
        assert contents(folder) == large and [path.name for path in tmp_path.iterdir()] == [NAME]
        assert len(server.requests) == 2  # the archive was complete

        done = run_shards(*words)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"6 images already at {folder}\n", "")


def test_a_folder_copied_incompletely_is_not_taken_for_whole(tmp_path: Path, large: dict[str, bytes]) -> None:
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "data.mdb").write_bytes(large["data.mdb"][:9000])
    with pytest.raises(UserError, match=r"data.mdb has 9000 bytes of \d+: an incomplete copy"):
        main(["download", "test", "--out", str(tmp_path), "--address", "http://127.0.0.1:1"])
    assert os.listdir(tmp_path) == [NAME]
