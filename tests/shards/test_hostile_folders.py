"""Folders that came from somebody else, or in which others write, as output or source of the data tools.

Those of a run are in `tests/run/test_hostile_folders.py`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.location import Folder
from shards.common.errors import UserError
from shards.common.files import (
    ForeignLinkError,
    NotPlainError,
    atomic_file,
    final_name,
    open_folder,
    open_in_place,
    open_plain,
    publish,
    read_plain,
    remove_leftovers,
)
from shards.common.locks import Lock
from shards.conversion.reports import FOLDER_NAME
from shards.conversion.sources.entries import read_keys
from shards.manifest import read_manifest
from shards.verify import verify
from tests.support.hostile import NOBODY, foreign_link, secret
from tests.support.shards_fixtures import (
    contents,
    convert_here,
    data_set,
    encoded,
    error_of,
    numbered,
    output_of,
    picture,
    run_shards,
    within,
    write_lmdb,
)

SMALL = ("--image-size", 16, "--samples-per-shard", 2, "--workers", 1)
DIGITS = "0123456789abcdef"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give links away")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lmdb(tmp_path_factory.mktemp("source") / "lmdb", numbered(3))


def last_line(*words: object) -> str:
    """What a command says at its end, after progress, when it fails."""
    done = run_shards(*words)
    assert done.returncode == 2
    return done.stderr.splitlines()[-1].removeprefix("error: ")


def test_a_file_is_new_whatever_has_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, path = secret(tmp_path), tmp_path / "name"
    path.symlink_to(file)
    (tmp_path / "name.tmp").symlink_to(file)
    publish(path, b"content")
    assert (file.read_bytes(), path.read_bytes(), path.is_symlink()) == (b"this user's own", b"content", False)
    monkeypatch.setattr("secrets.token_hex", lambda _: DIGITS)  # though it were guessed
    (tmp_path / f"name.{DIGITS}.tmp").symlink_to(file)
    with pytest.raises(FileExistsError):
        publish(path, b"another")
    assert (file.read_bytes(), path.read_bytes()) == (b"this user's own", b"content")


def test_a_temporary_name_cannot_be_foretold_and_tells_its_file(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "shard-000000.tar") as first, atomic_file(tmp_path / "shard-000000.tar") as second:
        assert len({first.name, second.name}) == 2
        assert {final_name(Path(file.name).name) for file in (first, second)} == {"shard-000000.tar"}
    names = ["a", "a.tmp", f"a.{DIGITS}.tmp", f"a.{DIGITS}", ".tmp", "a.tmp\n", "a.0123.tmp"]
    assert [final_name(name) for name in names] == ["a", "a", "a", f"a.{DIGITS}", ".tmp", "a.tmp\n", "a.0123"]


def test_a_file_goes_to_the_folder_that_was_there_at_first(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (other / "name").write_bytes(b"this user's own")
    with atomic_file(folder / "name") as file:
        file.write(b"content")
        folder.rename(tmp_path / "moved")
        folder.symlink_to(other)
    assert contents(other) == {"name": b"this user's own"}
    assert contents(tmp_path / "moved") == {"name": b"content"}


def test_leftovers_are_removed_by_their_final_names_and_age(tmp_path: Path) -> None:
    file = secret(tmp_path)
    (tmp_path / "mine.tmp").symlink_to(file)
    for name in (f"mine.{DIGITS}.tmp", "theirs.tmp", "mine"):
        (tmp_path / name).touch()
    (tmp_path / f"mine.{DIGITS[::-1]}.tmp").mkdir()
    remove_leftovers(tmp_path, "mine".__eq__, seconds=60)
    assert (tmp_path / "mine.tmp").is_symlink()
    remove_leftovers(tmp_path, "mine".__eq__)
    remove_leftovers(tmp_path / "absent", "mine".__eq__)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["mine", f"mine.{DIGITS[::-1]}.tmp", "secret", "theirs.tmp"]
    )


def test_leftovers_are_not_removed_through_a_link_that_takes_the_place_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    for path in (folder, other):
        path.mkdir()
        (path / "name.tmp").write_bytes(b"this user's own")

    def late(name: str) -> bool:
        folder.rename(tmp_path / "moved")
        folder.symlink_to(other)
        return name == "name"

    remove_leftovers(folder, late)
    assert (contents(tmp_path / "moved"), contents(other)) == ({}, {"name.tmp": b"this user's own"})
    folder.unlink()
    link = foreign_link(folder, other, monkeypatch)
    with pytest.raises(ForeignLinkError):
        remove_leftovers(link, "name".__eq__)
    assert contents(other) == {"name.tmp": b"this user's own"}


def test_a_folder_to_write_to_may_be_ones_own_link_but_not_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "mine").symlink_to("disk")
    publish(tmp_path / "mine" / "name", b"content")
    link = foreign_link(tmp_path / "theirs", tmp_path / "disk", monkeypatch)
    with pytest.raises(ForeignLinkError, match="a link of another user"):
        publish(link / "name", b"another")
    assert contents(tmp_path / "disk") == {"name": b"content"}


def test_a_link_that_is_exchanged_while_it_is_followed_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, real = tmp_path / "link", os.open
    for name in ("disk", "other"):
        (tmp_path / name).mkdir()
    link.symlink_to("disk")

    def exchanged(path: str, flags: int, *more: int, **options: int) -> int:
        if flags & os.O_NOFOLLOW:
            return real(path, flags, *more, **options)
        link.unlink()
        link.symlink_to("other")
        return real(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", exchanged)
    with pytest.raises(ForeignLinkError, match="a link that changes"):
        open_folder(link)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir])
def test_only_regular_files_are_opened(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "name")
    with within(20):
        for call in (open_plain, read_plain, open_in_place):
            with pytest.raises(NotPlainError):
                call(tmp_path / "name")
        if not (tmp_path / "name").is_dir():
            with pytest.raises(OSError, match=r"link|plain"):
                Lock(tmp_path / "name")


def test_a_file_that_becomes_a_fifo_after_the_look_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "name", os.open
    path.touch()

    def exchanged(name: Path, flags: int, mode: int) -> int:
        path.unlink()
        os.mkfifo(path)
        return real(name, flags, mode)

    monkeypatch.setattr(os, "open", exchanged)
    with within(20), pytest.raises(NotPlainError):
        open_plain(path)


def test_what_came_with_an_unfinished_conversion_changes_nothing_elsewhere(source: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", secret(tmp_path)
    convert_here(source, tmp_path / "expected", *SMALL)
    (out / FOLDER_NAME).mkdir(parents=True)
    for name in ("shard-000000.tar", "shard-000001.tar", "manifest.json"):
        (out / f"{name}.tmp").symlink_to(file)
        (out / f"{name}.{DIGITS}.tmp").touch()
    (out / "shard-000001.tar").symlink_to(file)
    for name in ("shard-000000.json", "part-1-of-1.json"):
        (out / FOLDER_NAME / f"{name}.tmp").symlink_to(file)
    convert_here(source, out, *SMALL)
    assert file.read_bytes() == b"this user's own"
    assert contents(out) == contents(tmp_path / "expected")
    assert not any(path.is_symlink() for path in out.iterdir())


def test_a_shard_that_is_a_link_is_written_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    output_of("convert", source, "--out", out, *SMALL, "--part", "1/2")
    (out / "shard-000000.tar").rename(tmp_path / "elsewhere")
    (out / "shard-000000.tar").symlink_to(tmp_path / "elsewhere")
    output_of("convert", source, "--out", out, *SMALL, "--part", "1/2")
    assert not (out / "shard-000000.tar").is_symlink()


def test_reports_are_not_written_or_removed_elsewhere(source: Path, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    for folder in (out, elsewhere):
        folder.mkdir()
    (elsewhere / "shard-000000.json").write_bytes(b"this user's own")
    (out / FOLDER_NAME).symlink_to(elsewhere)
    message = f"{out / FOLDER_NAME} is a link, which no conversion leaves: remove it"
    assert error_of("convert", source, "--out", out, *SMALL) == message
    assert error_of("merge", out) == message
    assert contents(elsewhere) == {"shard-000000.json": b"this user's own"}


@pytest.mark.parametrize("content", [b"", b"x", b"0", b"-1", b"9" * 400, b"\xff"])
def test_a_lock_that_holds_no_number_of_parts_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FOLDER_NAME).mkdir()
    (tmp_path / FOLDER_NAME / "lock").write_bytes(content)
    assert "does not hold the number of parts" in error_of("merge", tmp_path)


def test_fifos_in_a_data_set_or_a_conversion_hang_nothing(source: Path, tmp_path: Path) -> None:
    data, _ = data_set(tmp_path)
    out = tmp_path / "out"
    output_of("convert", source, "--out", out, *SMALL, "--part", "1/2")
    for path in (data / "keys.jsonl", data / "shard-000001.tar", out / FOLDER_NAME / "shard-000000.json"):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    with within(60):
        assert "not a plain file" in last_line("convert", source, "--out", out, *SMALL, "--part", "1/2")
        assert "shard-000001.tar is missing" in error_of("preview", data, "--out", tmp_path / "sheet.png")
        assert verify(data, 1)[1] == ["shard-000001.tar: is missing", "keys.jsonl: cannot be read: not a plain file"]
        os.unlink(data / "manifest.json")
        os.mkfifo(data / "manifest.json")
        assert "it has no manifest.json" in error_of("verify", data)


def test_a_shard_that_becomes_a_fifo_hangs_no_training(tmp_path: Path) -> None:
    data, manifest = data_set(tmp_path)
    pixels = np.empty((1, 16, 16, 3), dtype=np.uint8)
    place = Folder(data)
    for path in (data / "shard-000000.tar", data / "shard-000001.tar"):
        path.unlink()
        os.mkfifo(path)
    with within(20):
        with pytest.raises(UserError, match=r"shard-000001.tar cannot be read: not a plain file"):
            ShardReader(place).gather(np.array([4]), pixels)
        with pytest.raises(UserError, match=r"shard-000000.tar is missing"):
            Folder(data)
    assert manifest == read_manifest(data)


def test_a_list_of_keys_is_a_file_or_what_the_shell_gives_and_no_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "keys")
    with within(20), pytest.raises(UserError, match="not a plain file"):
        read_keys(tmp_path / "keys")
    reader, writer = os.pipe()
    os.write(writer, b"a\nb\n")
    os.close(writer)
    assert read_keys(Path(f"/dev/fd/{reader}")) == {b"a", b"b"}  # as in --exclude <(COMMAND)
    os.close(reader)


@needs_root
def test_links_of_others_are_followed_only_to_what_is_theirs(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    (folder / "linked").mkdir(parents=True)
    elsewhere.mkdir()
    for number, owner in enumerate((0, NOBODY)):
        (elsewhere / f"{owner}.jpg").write_bytes(encoded(picture(number)))
        os.chown(elsewhere / f"{owner}.jpg", owner, owner)
    for name, owner, target in (("mine", 0, 0), ("theirs", NOBODY, NOBODY), ("taken", NOBODY, 0)):
        (folder / f"{name}.jpg").symlink_to(elsewhere / f"{target}.jpg")
        os.lchown(folder / f"{name}.jpg", owner, owner)
    output_of("convert", folder, "--out", tmp_path / "out", *SMALL, "--max-rejected", 0.5)
    assert (tmp_path / "out" / "rejected.jsonl").read_text() == (
        '{"key": "taken", "reason": "another user\'s link to a file that is not his"}\n'
    )
    assert read_manifest(tmp_path / "out").samples == 2
    (folder / "more").symlink_to(elsewhere)
    os.lchown(folder / "more", NOBODY, NOBODY)
    message = f"{folder}/more is another user's link to a folder that is not his: remove it"
    assert last_line("convert", folder, "--out", tmp_path / "again", *SMALL) == message


@needs_root
def test_a_tar_that_is_anothers_link_is_not_read(tmp_path: Path) -> None:
    data, _ = data_set(tmp_path)
    folder = tmp_path / "tars"
    folder.mkdir()
    (folder / "mine.tar").symlink_to(data / "shard-000000.tar")
    assert "4 images" in output_of("convert", folder, "--out", tmp_path / "out", *SMALL)
    (folder / "taken.tar").symlink_to(data / "shard-000001.tar")
    os.lchown(folder / "taken.tar", NOBODY, NOBODY)
    message = f"{folder}/taken.tar is another user's link to a file that is not his: remove it"
    assert last_line("convert", folder, "--out", tmp_path / "again", *SMALL) == message


_ATTACKER = """
import os, sys
folder, secret = sys.argv[1:]
print("ready", flush=True)
while True:
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        try:
            os.rename(path, path + ".moved")
            os.symlink(secret, path)
            os.unlink(path)
            os.rename(path + ".moved", path)
        except OSError:
            pass
"""


@contextmanager
def another_user(folder: Path, file: Path) -> Iterator[None]:
    """Have another user exchange everything in a folder for links to `file`, and back, again and again."""
    user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    command = [*user, sys.executable, "-c", _ATTACKER, str(folder), str(file)]
    with subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield
        process.kill()


@pytest.mark.system
@needs_root
def test_another_user_who_exchanges_files_for_links_changes_nothing_elsewhere(tmp_path: Path) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("not installed: setpriv")
    folder, file = Path("/tmp", f"shared-{os.getpid()}"), secret(tmp_path)
    folder.mkdir()
    folder.chmod(0o777)
    try:
        with another_user(folder, file):
            end, done = time.monotonic() + 5, dict.fromkeys(("published", "appended", "refused"), 0)
            while time.monotonic() < end:
                try:
                    publish(folder / "name", b"content")
                    done["published"] += 1
                    with open_in_place(folder / "rows") as rows:
                        os.pwrite(rows.fileno(), b"row", 0)
                    done["appended"] += 1
                except OSError:
                    done["refused"] += 1
        assert all(done.values()), done
        assert file.read_bytes() == b"this user's own"
    finally:
        shutil.rmtree(folder)


def test_another_users_link_for_the_data_of_an_lmdb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, theirs = write_lmdb(tmp_path / "own", numbered(2)), tmp_path / "theirs"
    theirs.mkdir()
    foreign_link(theirs / "data.mdb", own / "data.mdb", monkeypatch)
    for command, options in (("convert", SMALL), ("export", ())):
        line = error_of(command, theirs, "--out", tmp_path / "out", *options)
        assert "is another user's link to a file that is not his" in line
    assert not (tmp_path / "out" / FOLDER_NAME).exists()


def test_no_export_goes_through_another_users_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lmdb(tmp_path / "source", numbered(1))  # i/m/a/g/e/0/image0000.jpg
    out, private = tmp_path / "out", tmp_path / "private"
    private.mkdir()
    for folder in (Path(), Path("i"), Path("i/m/a/g/e/0")):
        shutil.rmtree(out, ignore_errors=True)
        (out / folder).parent.mkdir(parents=True, exist_ok=True)
        link = foreign_link(out / folder, private, monkeypatch)
        done = run_shards("export", source, "--out", out)
        assert done.returncode == 2 and "a link of another user" in done.stderr
        assert contents(private) == {}
        link.unlink()
