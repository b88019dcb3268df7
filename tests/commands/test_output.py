"""What commands print and leave: no secret, and nothing by which a name of others moves, colours or fakes a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest import mock

import matplotlib
import pytest
import torch
import yaml
from torch.distributed.elastic.multiprocessing.errors import record

from dist_dcgan import doctor, evaluate, sample, train
from dist_dcgan.config import Config, from_command_line, to_yaml
from dist_dcgan.distributed.error_file import ErrorFile
from dist_dcgan.models.networks import Generator
from dist_dcgan.preflight.results import Finding
from dist_dcgan.run import checkpoint, directory
from dist_dcgan.run.export import export_generator
from shards.__main__ import main as tools
from shards.common.command_line import run as run_command
from tests.support.commands import environment, module, run, train_command
from tests.support.exports import describe
from tests.support.http_server import signed_server
from tests.support.shards_fixtures import numbered, write_files, write_lmdb

# Names and metadata of others.

HOSTILE = "x\r\nerror: the disk is full\x1b[2J\x1b]0;title\x07\x9b1m\u202e\u200b\u2066\u2028"


def printed(main: Callable[[Sequence[str]], None], words: Sequence[object], capfd: pytest.CaptureFixture[str]) -> str:
    """Run a command as a user does; require clean lines of which at most the last is an error, and return them."""
    capfd.readouterr()
    failed = False
    try:
        run_command(main, [str(word) for word in words])
    except SystemExit as ended:
        failed = ended.code == 2
    output, errors = capfd.readouterr()
    for line in (output + errors).split("\n"):
        assert line.isprintable(), line
    faked = [line for line in (output + errors).split("\n") if line.startswith("error:")]
    assert len(faked) == (1 if failed else 0), faked
    return output + errors


def seal(path: Path, changes: Mapping[str, object]) -> None:
    """Change the values of a checkpoint, with the checksum that goes with them."""
    content = json.loads(path.read_text())
    content["values"] |= changes.get("values", {})
    content |= {name: value for name, value in changes.items() if name != "values"}
    content.pop("sha256")
    path.write_text(json.dumps(content | {"sha256": checkpoint._json_sha256(content)}))


def test_a_checkpoint_of_others_cannot_speak_for_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / HOSTILE
    for step in (1, 2, 3):
        tensors = {"a": torch.zeros(1)}
        checkpoint.save_checkpoint(run_dir / "checkpoints", tensors, {"step": step}, checkpoint.Retention(5))
    seal(run_dir / "checkpoints" / "step-00000001" / "values.json", {"values": {"step": HOSTILE}})
    seal(run_dir / "checkpoints" / "step-00000003" / "values.json", {"values": {"step": 3, HOSTILE: HOSTILE}})
    seal(run_dir / "checkpoints" / "step-00000002" / "values.json", {"format_version": HOSTILE})
    for command in ("inspect", "verify", "prune"):
        found = printed(checkpoint.main, [command, run_dir], capfd)
        assert "step-00000001: DAMAGED, step: input should be a valid integer, got 'x\\r\\nerror: the disk" in found
        assert "step-00000003: sound, step 3" in found
        assert "step-00000002: DAMAGED, format version x\\r\\nerror: the disk is full" in found


def exported(run_dir: Path) -> Path:
    run_dir.mkdir()
    path = directory.RunDirectory(run_dir).generator
    export_generator(path, Generator(width=4).eval(), Config(width=4), image_size=64, step=5)
    return path


def test_a_generator_of_others_cannot_speak_for_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = exported(tmp_path / HOSTILE)
    describe(path, step=HOSTILE)
    found = printed(sample.main, [path.parent, "--seeds", 0, "--out", tmp_path / f"{HOSTILE}.png"], capfd)
    assert "step: input should be a valid integer, got 'x\\r\\nerror: the disk is full\\x1b[2J" in found
    evaluate.show({"kid": 0.5}, {"generator": f"run, step {HOSTILE}", "data": HOSTILE}, as_json=False)
    evaluate.show({"kid": 0.5}, {"generator": f"run, step {HOSTILE}", "data": HOSTILE}, as_json=True)
    *table, line = capfd.readouterr().out.splitlines()
    assert len(table) == 3 and all(row.isprintable() for row in table)
    assert json.loads(line)["data"] == HOSTILE  # escaped, and whole


def test_a_source_and_a_data_set_of_others_cannot_speak_for_the_command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    key = HOSTILE.encode(errors="surrogateescape")
    source = write_lmdb(tmp_path / "lmdb", numbered(6) | {key: b"no image"})
    (tmp_path / "keys").write_bytes(b"\x1b[2Jmissing\nimage0001\n")
    out = tmp_path / f"data{HOSTILE}"
    words = ["convert", source, "--out", out, "--workers", 1, "--max-rejected", 0.5, "--exclude", tmp_path / "keys"]
    assert "\\x1b[2Jmissing" in printed(tools, words, capfd)
    assert (out / "rejected.jsonl").read_text().isascii() and "\x1b" not in (out / "rejected.jsonl").read_text()
    printed(tools, ["preview", out, "--out", tmp_path / f"{HOSTILE}.png", "--num", 4], capfd)
    (out / f"shard-{HOSTILE}.tar").touch()
    assert "shard-x\\r\\nerror: the disk" in printed(tools, ["verify", out, "--workers", 1], capfd)
    manifest = json.loads((out / "manifest.json").read_text())
    for field, value in (("format", HOSTILE), ("sources", [{"kind": HOSTILE}]), (HOSTILE, 1), ("digest", HOSTILE)):
        (out / "manifest.json").write_text(json.dumps(manifest | {field: value}))
        assert "error: " in printed(tools, ["verify", out, "--workers", 1], capfd)
    folder = write_files(tmp_path / "folder", {f"a/{HOSTILE[:40]}.jpg": b"", f"{HOSTILE[:40]}.tgz": b""})
    assert "error: " in printed(tools, ["convert", folder, "--out", tmp_path / "d", "--workers", 1], capfd)


def test_a_run_of_others_and_the_doctor(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({HOSTILE: HOSTILE}))
    assert "error: " in printed(train.main, ["--config", tmp_path / "c.yaml"], capfd)
    (tmp_path / "c.yaml").write_text(f"a: [{HOSTILE}")
    assert "error: " in printed(train.main, ["--config", tmp_path / "c.yaml"], capfd)
    run_dir = tmp_path / "run"
    with directory.locked(run_dir):
        (run_dir / "run.holder.json").write_text(HOSTILE)
        found = printed(lambda _: directory.require_unclaimed(directory.RunDirectory(run_dir)), [], capfd)
    assert "is in use by x\\r\\nerror: the disk is full" in found
    printed(lambda _: doctor.show("data set", Finding("ok", f"{HOSTILE} fine")), [], capfd)


def test_a_launcher_gets_the_run_directory_byte_for_byte(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    for name in ("plain", "a b?c=https://me:word@h", "\udcff", "\u200bx"):
        run_command(directory.main, ["--run-dir", str(tmp_path / name)])
        assert capfdbinary.readouterr().out == bytes(tmp_path / name) + b"\n"
    with pytest.raises(SystemExit):
        run_command(directory.main, ["--run-dir", str(tmp_path / "a\nb")])
    assert b"has a control character in it" in capfdbinary.readouterr().err


# Secrets: each has the sentinel in it, so that one search finds all of them.

SENTINEL = "S3NTINEL"
NAMED = "no-secret-S3NTINEL"
"""A name of a run, which is stored: the search must find it."""
SMALL = ["--preset", "debug", "--width", 4, "--global-batch", 8]
MISTAKES: list[list[object]] = [
    ["--data.pth", f"https://me:{SENTINEL}-1@h/"],
    [f"--data.pth=pipe:curl -H 'X: {SENTINEL}-2' {{}}"],
    [f"https://me:{SENTINEL}-3@h/d?sig={SENTINEL}-4"],
    ["--data", f"pipe:curl -H 'X: {SENTINEL}-5' {{}}", "--data.cache-dir", "c"],
    ["--data", f"pipe:curl -H 'X: {SENTINEL}-6'", "--data.cache-dir", "c", "--data.allow-commands"],
    ["--data", f"https://me:{SENTINEL}-7@h/d", "--data.cache-dir", "c"],
    ["--data", f"s3://{SENTINEL}-8:{SENTINEL}-9@bucket/d?key={SENTINEL}-10", "--data.cache-dir", "c"],
    ["--data", f"https//me:{SENTINEL}-11@h/d?sig={SENTINEL}-12"],
    ["--data", f"https:/me:{SENTINEL}-13@h/d?sig={SENTINEL}-14"],
    ["--data", f"me:{SENTINEL}-15@h:/d"],
    ["--data", f"PIPE:curl -H 'X: {SENTINEL}-26' {{}}", "--data.cache-dir", "c"],
    ["--data", f"pip:curl -H 'X: {SENTINEL}-27' {{}}", "--data.cache-dir", "c"],
    ["--data", f"http://[h/d?sig={SENTINEL}-16", "--data.cache-dir", "c"],
    ["--data", f"http://127.0.0.1:9/d?sig={SENTINEL} 17 '&x=y", "--data.cache-dir", "c"],
    ["--run-dir", f"s3://me:{SENTINEL}-18@bucket/run"],
    ["--data.cache-dir", f"https://me:{SENTINEL}-19@h/cache"],
    ["--data.cache-gb", f"https://me:{SENTINEL}-20@h/d"],
    ["--data.window-shards", f"pipe:TOKEN={SENTINEL}-21 x"],
    ["--preset", f"https://h/?token={SENTINEL}-22"],
    ["--config", f"https://h/c.yaml?token={SENTINEL}-23"],
    ["--wandb.project", f"https://{SENTINEL}-24:{SENTINEL}-24@h/?", "--wandb", "offline"],
    ["--help", "--data", f"https://me:{SENTINEL}-25@h"],
]
"""Flags that are refused."""
FILES = [
    f"data: https://me:{SENTINEL}-1@h/d",
    f"data: {{path: 'pipe:curl -H \"Authorization: {SENTINEL}-2\" {{}}', x: 1}}",
    f'data: {{path: "pipe:curl -H {SENTINEL}-3',
    f"data: {{cache_gb: 'https://me:{SENTINEL}-4 5@h/d?x'}}",
    f"[a, 'https://h?sig={SENTINEL}-6'",
    f"token={SENTINEL}-7",
    f"run_dir: 's3://me:{SENTINEL}-8@bucket'",
    f"seed: ['https://h?sig={SENTINEL}-9', {{password: {SENTINEL}-10}}]",
]
"""Configurations that are refused."""


def user(home: Path) -> dict[str, str]:
    """The environment of a user with secrets in each variable that has one, and a proxy that refuses."""
    home.mkdir(exist_ok=True)
    folders = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(home))
    folders["MPLCONFIGDIR"] = matplotlib.get_cachedir()  # else it looks for fonts for seconds
    proxy = f"http://me:{SENTINEL}-proxy@127.0.0.1:9"
    secrets = {
        "WANDB_API_KEY": f"{SENTINEL}key".ljust(40, "0"),
        "WANDB_BASE_URL": f"https://me:{SENTINEL}-base@wandb.example.org",
        "HF_TOKEN": f"hf_{SENTINEL}abcdefghijklmnopqrstuv",
        "AWS_SECRET_ACCESS_KEY": f"{SENTINEL}/aws+key",
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    return environment() | folders | secrets


def holding(folder: Path, text: str = SENTINEL) -> list[str]:
    """Return the files and names of files below a folder in which the text is, as it is or as JSON or a URL has it."""
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if text in path.name or (path.is_file() and text.encode() in path.read_bytes())
    ]


def test_no_mistake_shows_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shards.common.http.sleep", mock.Mock())
    monkeypatch.setattr("time.sleep", mock.Mock())
    for words in MISTAKES:
        for main in (train.main, doctor.main) if words[0] != "--preset" else (train.main,):
            found = printed(main, [*words, "--run-dir", "r"] if "--run-dir" not in words else words, capfd)
            assert found != "" and SENTINEL not in found, (words, found)
    for content in FILES:
        (tmp_path / "given.yaml").write_text(content)
        found = printed(train.main, ["--config", "given.yaml"], capfd)
        assert "error: given.yaml" in found and SENTINEL not in found, (content, found)
    (tmp_path / "given.yaml").unlink()
    assert holding(tmp_path) == []


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (evaluate.main, ["r", "--data", f"https://me:{SENTINEL}@h"]),
        (evaluate.main, [f"s3://me:{SENTINEL}@b/run"]),
        (sample.main, [f"s3://me:{SENTINEL}@b/run", "--out", "x.png"]),
        (sample.main, ["r", "--out", f"https://h/x.png?sig={SENTINEL}"]),
        (checkpoint.main, [f"https://h/?sig={SENTINEL}"]),
        (checkpoint.main, ["inspect", f"https://me:{SENTINEL}@h/run"]),
        (tools, [f"https://h/?sig={SENTINEL}"]),
        (tools, ["convert", f"https://me:{SENTINEL}@h/d", "--out", "x"]),
        (tools, ["convert", "x", "--out", f"s3://me:{SENTINEL}@h/d"]),
        (tools, ["download", "bedroom", "--address", f"ftp://me:{SENTINEL}@h/d"]),
        (tools, ["download", "bedroom", "--address", f"http://me:{SENTINEL}-1@127.0.0.1:9/d?sig={SENTINEL}-2"]),
        (tools, ["download", f"https://me:{SENTINEL}@h/d"]),
        (tools, ["verify", f"https://me:{SENTINEL}@h/d"]),
    ],
)
def test_no_command_repeats_a_secret_that_stands_in_a_wrong_place(
    main: Callable[[Sequence[str]], None],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shards.common.http.sleep", mock.Mock())
    found = printed(main, words, capfd)
    assert "error: " in found and SENTINEL not in found
    assert holding(tmp_path) == []


COMMAND = f"pipe:T={SENTINEL}-in-command; echo \"> Authorization: Bearer $T\" >&2; cat '%s'/{{}}"


def test_a_run_fed_by_a_command_stores_no_word_of_it_and_goes_on_with_another(
    demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in user(tmp_path).items():
        monkeypatch.setenv(name, value)
    data = ["--data", COMMAND % demo_shards, "--data.allow-commands", "--data.cache-dir", tmp_path / "cache"]
    words = [*SMALL, "--wandb", "disabled", "--run-dir", tmp_path / "run", *data]
    dry = printed(train.main, [*words, "--dry-run"], capfd)
    assert "path: pipe:***\n" in dry and "data set:          pipe:***, 96 images" in dry
    first = printed(train.main, [*words, "--max-steps", 2], capfd)
    assert "pipe:***: > Authorization: ***" in first  # what the command says is shown
    stored = ["--config", tmp_path / "run" / "config.yaml", "--data.allow-commands", "--max-steps", 4]
    lacking = printed(train.main, stored, capfd)
    assert "error: pipe:*** stands for a command, which is not stored: give it with --data" in lacking
    second = printed(train.main, [*stored, "--data", (COMMAND % demo_shards).replace("-in-command", "-2")], capfd)
    assert "going on after step 2" in second
    assert checkpoint.load_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000004").values["step"] == 4
    assert holding(tmp_path) == []
    assert SENTINEL not in dry + first + lacking + second


def test_torchruns_error_file_has_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("HF_TOKEN", f"{SENTINEL}-token")

    def fail() -> None:
        try:
            raise OSError(f"https://me:{SENTINEL}-1@h refused")
        except OSError as error:
            raise RuntimeError(f"{HOSTILE}: 401 for {SENTINEL}-token") from error

    with pytest.raises(RuntimeError, match="401"):
        record(fail, ErrorFile())()
    content = json.loads((tmp_path / "error.json").read_text())["message"]
    assert content["message"].startswith("RuntimeError: x\\r\\nerror: the disk is full\\x1b[2J")
    stack = content["extraInfo"]["py_callstack"]
    assert "OSError: https://h refused" in stack and "in fail\n" in stack  # as torchrun prints it
    assert holding(tmp_path) == []


@pytest.mark.slow
def test_nothing_that_a_run_prints_and_leaves_has_a_secret(demo_shards: Path, demo_lmdb: Path, tmp_path: Path) -> None:
    left, run_dir, said = tmp_path / "left", tmp_path / "left" / "run", list[str]()
    variables = user(left)

    def do(status: int, command: list[str]) -> str:
        done = run(command, env=variables, cwd=left)
        assert done.returncode == status, done.stdout + done.stderr
        said.append(done.stdout + done.stderr)
        return said[-1]

    signatures = [f"sv=1&sig={SENTINEL}%2Bfirst"]
    with signed_server(demo_shards, signatures) as (address, _):
        words = [*SMALL, "--run-dir", run_dir, "--wandb", "offline", "--wandb.name", NAMED]
        for steps, query in ((2, "first"), (4, "second")):
            signatures.append(f"sv=1&sig={SENTINEL}%2B{query}")
            data = ["--data", f"{address}/?{signatures[-1]}", "--data.cache-dir", left / f"cache-{query}"]
            do(0, module("shards", "convert", demo_lmdb, "--out", left / f"data-{query}", "--workers", 1))
            assert "offline, in the run directory" in do(0, module("dist_dcgan.doctor", *words, *data))
            do(0, module("dist_dcgan.train", *words, *data, "--dry-run"))
            do(0, train_command(steps // 2, *words, *data, "--max-steps", steps))
        assert "going on after step 2" in said[-1]
        scored = ["--data", COMMAND % demo_shards, "--data.allow-commands", "--data.cache-dir", left / "c"]
        for words_of_it in ([], ["--as-json"]):
            do(0, module("dist_dcgan.evaluate", run_dir, *scored, "--fakes", 8, "--reals", 8, *words_of_it))
        do(0, module("dist_dcgan.sample", run_dir, "--out", left / "x.png", "--seeds", "0-1"))
        do(0, module("dist_dcgan.run.checkpoint", "inspect", run_dir))
        expired = ["--data", f"{address}/?{signatures[0]}", "--data.cache-dir", left / "cache"]
        logs = ["--standalone", "--nproc_per_node=2", f"--log-dir={left / 'logs'}", "--tee=3", "-m", "dist_dcgan.train"]
        assert "and its signature" in do(1, module("torch.distributed.run", *logs, *words, *expired))
        for mistake in MISTAKES[:5]:
            do(1, module("torch.distributed.run", *logs, "--run-dir", left / "other", *mistake))
    assert {Path(path).suffix for path in holding(left, NAMED)} >= {".wandb", ".yaml"}  # the search sees what is stored
    for path in left.rglob("*"):
        assert SENTINEL not in path.name
        if path.is_file():
            assert SENTINEL.encode() not in path.read_bytes().replace(NAMED.encode(), b""), path
    assert SENTINEL not in "".join(said).replace(NAMED, "")


def test_the_search_sees_what_is_stored(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\0" + NAMED.encode())
    (tmp_path / SENTINEL).mkdir()
    assert sorted(holding(tmp_path)) == sorted(["a", SENTINEL])


@pytest.mark.parametrize("path", [f"https://me:{SENTINEL}@h/d?sig={SENTINEL}", f"pipe:curl {SENTINEL} {{}}"])
def test_a_stored_configuration_can_be_read_again(path: str) -> None:
    config, _ = from_command_line(["--data", path])
    assert SENTINEL not in to_yaml(config)
    assert to_yaml(Config(**yaml.safe_load(to_yaml(config)))) == to_yaml(config)
