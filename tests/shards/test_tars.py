"""Odd and hostile tars: all of their images, or one line that names the tar; never some of them in silence."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from shards.common.errors import UserError
from shards.conversion.sources import tar_source
from shards.conversion.sources.kinds import open_source
from shards.conversion.sources.tar_source import TarSource
from tests.support.shards_fixtures import (
    convert_here,
    encoded,
    entries_of,
    picture,
    refusal,
    rejected_in,
    samples_in,
    within,
    write_files,
    write_tar,
)

IMAGE = encoded(picture(0))


def header(
    name: bytes,
    size: int = 0,
    kind: bytes = b"0",
    size_field: bytes = b"",
    magic: bytes = b"ustar\00000",
    more: int = 0,
) -> bytes:
    """One header block, as nobody's library would write it; `more`: the old sparse map goes on in the next block."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = size_field or b"%011o\0" % size
    block[156:157], block[257:265], block[482] = kind, magic, more
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * 32)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def pax(kind: bytes = b"x", **records: bytes) -> bytes:
    """An extension header of PAX records, for one member or, of kind `g`, for all."""
    lines = b""
    for keyword, value in records.items():
        rest = b" %s=%s\n" % (keyword.replace("_", ".").encode(), value)
        length = next(n for n in range(len(rest), len(rest) + 9) if n == len(b"%d" % n) + len(rest))
        lines += b"%d" % length + rest
    return header(b"pax", len(lines), kind) + padded(lines)


def member(name: bytes, content: bytes = IMAGE) -> bytes:
    return header(name, len(content)) + padded(content)


END = bytes(1024)
GNU = b"ustar  \0"
MORE_OF_A_MAP = bytes(504) + b"\1" + bytes(7)
"""A block of the map of a sparse file that another one follows."""


def tar_of(tmp_path: Path, *parts: bytes) -> Path:
    path = tmp_path / "images.tar"
    path.write_bytes(b"".join(parts))
    return path


def tar_zoo(path: Path, format: int, long: str) -> Path:
    """A tar of everything that a tar can hold."""
    ignored = ("code.pyd", "data.pickle", "data.pkl", "data.json", "0001.cls", "no-extension", "folder/._plain.jpg")
    special = {"fifo": tarfile.FIFOTYPE, "device": tarfile.CHRTYPE, "disk": tarfile.BLKTYPE}
    links = {"symlink": (tarfile.SYMTYPE, "/etc/passwd"), "hardlink": (tarfile.LNKTYPE, "folder/plain.jpg")}
    with tarfile.open(path, "w", format=format) as tar:

        def add(name: str, content: bytes = IMAGE, kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            info.size = len(content) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(content))

        add("folder", kind=tarfile.DIRTYPE)
        for name in ("folder/plain.jpg", "../../evil.jpg", "/absolute.jpg", f"{long}.jpg", "a.left.JPG", "schön.jpg"):
            add(name)
        for name in ignored:
            add(name, pickle.dumps(name))
        for name, kind in special.items():
            add(f"{name}.jpg", kind=kind)
        for name, (kind, target) in links.items():
            add(f"{name}.jpg", kind=kind, target=target)
        add("folder/plain.jpg", encoded(picture(1)))
        add("last.png", encoded(picture(2), "PNG"))
    return path


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_everything_gives_its_plain_files_and_names_the_others(
    format: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "long/" + "n" * (90 if format == tarfile.USTAR_FORMAT else 250)
    path, out = tar_zoo(tmp_path / "zoo.tar", format, long), tmp_path / "out" / "data"
    convert_here(path, out, "--max-rejected", 1)
    assert samples_in(out).keys() == {"folder/plain", "../../evil", "/absolute", long, "a", "schön", "last"}
    rejected = rejected_in(out)
    assert rejected.pop("folder/plain") == "folder/plain.jpg comes a second time; the first is used"
    assert rejected.pop("hardlink") == "a hard link in its tar, without content: pack with tar --hard-dereference"
    assert rejected.pop("symlink") == "a symbolic link in its tar, without content: pack with tar --dereference"
    assert rejected == dict.fromkeys(("fifo", "device", "disk"), "not a plain file in its tar")
    assert capsys.readouterr().out.splitlines().count("7 files without the extension of an image were left out") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "zoo.tar"]
    assert not (tmp_path.parent / "evil.jpg").exists()


def test_a_sparse_member_is_rejected_and_what_follows_is_read(tmp_path: Path) -> None:
    old = header(b"old.jpg", 512, b"S", magic=GNU) + bytes(512)
    older = header(b"older.jpg", 512, b"S", magic=GNU, more=1) + MORE_OF_A_MAP + bytes(1024)
    parts = [old, older, pax(GNU_sparse_major=b"1"), member(b"new.jpg")]
    found = entries_of(TarSource(tar_of(tmp_path, *parts, member(b"plain.jpg"), END)))
    rejected = "a sparse file in its tar: pack without tar --sparse"
    assert found == [(b"old", rejected), (b"older", rejected), (b"new", rejected), (b"plain", IMAGE)]


def three_members() -> bytes:
    return b"".join(member(b"%d.jpg" % i, encoded(picture(i, 20, 20))) for i in range(3))


def test_a_tar_cut_anywhere_is_refused_unless_all_members_are_there(tmp_path: Path) -> None:
    members = three_members()
    whole = members + END
    for kept in {*range(0, len(whole), 211), *range(0, len(whole), 512), *range(len(members) - 2, len(whole))}:
        path = tar_of(tmp_path, whole[:kept])
        if kept < len(members) + 512:
            assert "an incomplete copy" in refusal(path)
        else:
            assert len(entries_of(TarSource(path))) == 3


def test_a_flipped_bit_anywhere_in_a_header_is_noticed(tmp_path: Path) -> None:
    members, start = three_members(), THIRD
    sound = entries_of(TarSource(tar_of(tmp_path, members, END)))
    outcomes = []
    for place in range(start, start + 512):
        path = tar_of(tmp_path, members[:place], bytes([members[place] ^ 4]), members[place + 1 :], END)
        with suppress(UserError):
            outcomes.append(entries_of(TarSource(path)))
    assert all(found == sound for found in outcomes)
    assert len(outcomes) <= 1  # behind the digits of the checksum nothing counts
    path = tar_of(tmp_path, members[: start + 7], b"?", members[start + 8 :], END)
    assert refusal(path) == f"{path} is damaged, or no tar: no sound header at byte {start}"


def test_zeros_for_the_rest_are_noticed(tmp_path: Path) -> None:
    start = len(three_members())
    path = tar_of(tmp_path, three_members(), bytes(20_000))
    assert f"has nothing but zeros from byte {start} on, more than tar writes: an incomplete copy" in refusal(path)
    assert len(entries_of(TarSource(tar_of(tmp_path, three_members(), bytes(10_240))))) == 3


def in_records(members: bytes, blocks: int) -> bytes:
    """A tar as `tar -b blocks` writes it."""
    whole = members + END
    return whole + bytes(-len(whole) % (512 * blocks))


@pytest.mark.parametrize("blocks", [1, 2, 20, 32, 64, 128, 256, 512, 1024, 2048])
@pytest.mark.parametrize("times", [1, 400])
def test_a_tar_padded_to_a_whole_number_of_its_records_is_read(times: int, blocks: int, tmp_path: Path) -> None:
    path = tar_of(tmp_path, in_records(three_members() * times, blocks))
    assert len(list(TarSource(path).walk())) == 3 * times


def test_zeros_for_the_rest_of_a_padded_tar_are_noticed(tmp_path: Path) -> None:
    """The length is a whole number of records, but zeros fill more than one record, or the end of the last member."""
    members = three_members() * 400
    for blocks, kept in ((512, THIRD), (512, len(members) - THIRD + 600), (20, THIRD * 1100), (2048, THIRD // 2)):
        whole = in_records(members, blocks)
        path = tar_of(tmp_path, whole[:kept], bytes(len(whole) - kept))
        assert "more than tar writes: an incomplete copy (if tar -t lists all its files, unpack it" in refusal(path)
    path = tar_of(tmp_path, three_members(), bytes(-len(three_members()) % (1 << 18)), bytes(1024))
    assert "an incomplete copy" in refusal(path)  # not a whole number of records


def test_content_behind_the_padding_of_a_large_record_is_noticed(tmp_path: Path) -> None:
    path = tar_of(tmp_path, in_records(three_members(), 512)[:-1], b"x")
    assert "but content behind them (were tars joined by cat? Then convert a folder of them)" in refusal(path)


@pytest.mark.parametrize("blocks", [1, 20, 512])
@pytest.mark.parametrize("program", ["tar", "bsdtar"])
def test_the_tars_of_other_programs_are_read(program: str, blocks: int, tmp_path: Path) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed: --all installs it")
    images = {f"{i}.jpg": encoded(picture(i)) for i in range(3)}
    folder = write_files(tmp_path / "images", images)
    for format in ("ustar", "pax", "gnutar" if program == "bsdtar" else "gnu"):
        path = tmp_path / f"{format}.tar"
        subprocess.run([program, "--format", format, "-b", str(blocks), "-cf", path, "-C", folder, *images], check=True)
        assert entries_of(TarSource(path)) == [(name[:1].encode(), data) for name, data in images.items()]


def test_a_tar_is_known_by_its_content_too(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(three_members() + END)
    assert len(entries_of(open_source(path))) == 3


def test_tars_within_a_tar_or_below_a_folder_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inner = {f"class-{i}.tar": three_members() + END for i in range(2)}
    path = write_tar(tmp_path / "all.tar", inner)
    remedy = "class-0.tar is not looked into: unpack it once, and convert the folder that holds its files"
    with pytest.raises(UserError, match=rf"^no images in all.tar: nothing to convert \({remedy}\)$"):
        convert_here(path, tmp_path / "data")
    with pytest.raises(UserError, match=r"\(train/class-0.tar is not looked into: convert the folder that holds it\)$"):
        convert_here(write_files(tmp_path / "above", {f"train/{name}": b"" for name in inner}), tmp_path / "data")
    convert_here(write_tar(tmp_path / "mixed.tar", {"a.jpg": IMAGE} | inner), tmp_path / "mixed")
    assert "class-0.tar was not looked into: unpack it once" in capsys.readouterr().out


def test_two_images_of_a_sample_are_named_with_the_rule_for_keys(tmp_path: Path) -> None:
    names = ("a.left.jpg", "a.right.jpg", "b c 0.5.jpg", "b c 0.7.jpg")
    path = write_tar(tmp_path / "pairs.tar", dict.fromkeys(names, IMAGE))
    convert_here(path, tmp_path / "data", "--max-rejected", 1)
    rule = "a key is the name up to its first dot: rename one, or unpack the tar and convert the folder"
    assert rejected_in(tmp_path / "data") == {
        "a": f"the key of a.right.jpg is taken by a.left.jpg before it; {rule}",
        "b c 0": f"the key of b c 0.7.jpg is taken by b c 0.5.jpg before it; {rule}",
    }
    folder = write_files(tmp_path / "unpacked", dict.fromkeys(names, IMAGE))
    assert convert_here(folder, tmp_path / "all").samples == 4


THIRD = len(three_members()) // 3
"""Bytes of the first of three members."""
HUGE = b"\x80" + (1 << 62).to_bytes(11, "big")

DAMAGED: dict[str, tuple[list[bytes], str]] = {
    "nothing at all": ([], "ends at byte 0 without the zeros"),
    "text": ([b"no tar" * 2000], "no sound header at byte 0"),
    "a member of 4 EiB": ([header(b"huge.jpg", size_field=HUGE), END], "ends in the member at byte 0"),
    "a member of 8 GiB": ([header(b"huge.jpg", size_field=b"77777777777\0"), END], "ends in the member at byte 0"),
    "a size below zero": ([header(b"a.jpg", size_field=b"\xff" * 11 + b"\0"), END], "no sound header at byte 0"),
    "a size of 2**90": ([header(b"a.jpg", size_field=b"\x80" + b"\x7f" * 11), END], "no sound header at byte 0"),
    "a size that is none": ([header(b"a.jpg", size_field=b"0x_+12     \0"), END], "no sound header at byte 0"),
    "records of a negative size": ([pax(size=b"-512"), member(b"a.jpg"), END], "no sound header at byte 1024"),
    "records that lead back": (
        [header(b"x"), pax(size=b"-1536"), member(b"a.jpg"), END],
        "no sound header at byte 1536",
    ),
    "records of a huge size": ([pax(size=b"9" * 19), member(b"a.jpg"), END], "ends in the member at byte 1024"),
    "records of a size of many digits": ([pax(size=b"9" * 5000), member(b"a.jpg"), END], "no sound header at byte"),
    "records that overrun": ([header(b"p", 8, b"x"), padded(b"99 a=b\n\n"), member(b"a.jpg"), END], "byte 0"),
    "records of no length": ([header(b"p", 6, b"x"), padded(b"0 a=b\n"), member(b"a.jpg"), END], "byte 0"),
    "records that are none": ([header(b"p", 20, b"x"), padded(b"9" * 20), member(b"a.jpg"), END], "byte 0"),
    "a long name of 2 MiB": ([header(b"L", 1 << 21, b"L"), bytes(1 << 21), member(b"a.jpg"), END], "byte 0"),
    "a long name that is cut": ([header(b"L", 1000, b"L"), bytes(512)], "ends in the member at byte 0"),
    "a long name of nothing": ([header(b"L", 3, b"L"), padded(b"a\0\0"), END], "zeros at byte 1024 for the header"),
    "a tar behind a tar": ([three_members(), END, three_members(), END], "but content behind them"),
    "zeros for a header": (
        [three_members()[:THIRD], bytes(512), three_members()[THIRD + 512 :], END],
        f"is damaged: zeros at byte {THIRD} for a header, but content behind them",
    ),
    "a sparse map that goes on to the end": (
        [header(b"s.jpg", 0, b"S", magic=GNU, more=1), MORE_OF_A_MAP * 3000],
        "ends in the member at byte 0",
    ),
    "a sparse map without an end": ([header(b"s.jpg", 0, b"S")[:482] + b"\1" + bytes(29)] * 9, "no sound header"),
}
"""Parts of a tar, and what is said of them."""


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_tar_is_refused_at_once(name: str, tmp_path: Path) -> None:
    parts, message = DAMAGED[name]
    assert message in refusal(tar_of(tmp_path, *parts), seconds=5)


def test_a_chain_of_long_names_keeps_the_last(tmp_path: Path) -> None:
    links = [header(b"L", 9, b"L") + padded(b"%04d.jpg\0" % i) for i in range(5000)]
    assert entries_of(TarSource(tar_of(tmp_path, *links, member(b"short.jpg"), END)), 10) == [(b"4999", IMAGE)]


def test_records_for_all_members_do_not_outdo_those_for_one(tmp_path: Path) -> None:
    parts = [pax(b"g", path=b"all.jpg"), pax(path=b"one.jpg"), member(b"x.jpg"), member(b"y.jpg"), END]
    assert [key for key, _ in entries_of(TarSource(tar_of(tmp_path, *parts)))] == [b"one", b"all"]


def test_an_archive_of_another_kind_under_the_name_of_a_tar_says_what_to_do(tmp_path: Path) -> None:
    for magic, remedy in ((b"PK\3\4", "unzip"), (b"\x28\xb5\x2f\xfd", "unzstd"), (b"\x04\x22\x4d\x18", "unlz4")):
        assert f": {remedy} it first" in refusal(tar_of(tmp_path, magic, bytes(2000)))


@pytest.mark.parametrize("name", ["images.tar", "images.tar.gz", "images.tgz"])
def test_a_compressed_tar_says_what_to_do(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(three_members() + END))
    assert "gunzip it first" in refusal(path)
    assert "gunzip it first" in refusal(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)])
def test_what_has_the_name_of_a_tar_and_is_none_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "images.tar")
    with within(5):
        assert f"cannot read {tmp_path}/images.tar: " in refusal(tmp_path)


def test_a_member_too_large_for_an_image_is_rejected_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_source, "MAX_ENTRY_BYTES", len(IMAGE))
    path = tar_of(tmp_path, member(b"a.jpg"), member(b"b.jpg", IMAGE + b"x"), END)
    assert entries_of(TarSource(path)) == [(b"a", IMAGE), (b"b", f"too large: {len(IMAGE) + 1:,} bytes")]
