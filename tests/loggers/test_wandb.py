"""W&B can never hurt: whatever it does, training takes the same steps, ends soon after the last, and keeps secrets.

Promise 9 (nothing off the critical path stops training) of dist_dcgan/README.md.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_dcgan import train
from dist_dcgan.loggers.pictures import SampleFiles
from dist_dcgan.loggers.wandb_logger import WandbLogger, without_secrets
from dist_dcgan.run.checkpoint import list_checkpoints
from tests.support.commands import environment, metrics, start, succeed, train_command
from tests.support.http_server import Answer, serve
from tests.support.wandb_fixtures import black_hole, fake_client, processes_with, read_records

KEY = "5ec2e7ab1e5ec2e7ab1e5ec2e7ab1e5ec2e7ab1e"
OTHER_SECRET = "another-secret-of-the-environment"
STEPS = 3
PROMISE_SECONDS, SLACK_SECONDS = 5, 1


def flags(data: Path, run_dir: Path, mode: str, steps: int = STEPS) -> list[object]:
    settings = ["--preset", "debug", "--width", 4, "--max-steps", steps, "--wandb", mode]
    return [*settings, "--data", data, "--run-dir", run_dir]


def train_here(data: Path, run_dir: Path, mode: str, steps: int = STEPS) -> None:
    """The command in this process: torch is imported already, and what W&B leaves behind can be seen."""
    threads, handlers = set(threading.enumerate()), list(map(signal.getsignal, (signal.SIGINT, signal.SIGTERM)))
    train.main([str(flag) for flag in flags(data, run_dir, mode, steps)])
    assert list(map(signal.getsignal, (signal.SIGINT, signal.SIGTERM))) == handlers
    assert not any(thread.name.lower().startswith("wandb") for thread in set(threading.enumerate()) - threads)


def outcome(run_dir: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Rows without what measures time, and the tensors of the last checkpoint."""
    rows = [
        {key: value for key, value in row.items() if not key.startswith(("time/", "throughput/"))}
        for row in metrics(run_dir)
    ]
    files = sorted(list_checkpoints(run_dir / "checkpoints")[-1].glob("*.safetensors"))
    tensors = {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}
    assert rows and tensors
    return rows, tensors


def require_same(run_dir: Path, reference: Path) -> None:
    rows, tensors = outcome(run_dir)
    wanted_rows, wanted_tensors = outcome(reference)
    assert rows == wanted_rows
    assert tensors.keys() == wanted_tensors.keys()
    assert all(torch.equal(tensors[name], wanted) for name, wanted in wanted_tensors.items())


@pytest.fixture(scope="module")
def without_wandb(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with W&B disabled, to compare with."""
    run_dir = tmp_path_factory.mktemp("without") / "run"
    train_here(demo_shards, run_dir, "disabled")
    return run_dir


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A user with a home of their own, a key and another secret; only processes of this test have the marker."""
    home = tmp_path / "home"
    home.mkdir()
    variables = {
        "HOME": str(home),
        "TMPDIR": str(home),
        "WANDB_API_KEY": KEY,
        "OTHER_SECRET": OTHER_SECRET,
        "MARKER": str(tmp_path),
    }
    for name in ("WANDB_BASE_URL", "WANDB_MODE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


@pytest.fixture
def seconds_lost(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the end of runs in this process waits for W&B after wandb is imported."""
    lost: list[float] = []
    wait, close = WandbLogger._wait_for_import, WandbLogger.close

    def timed_wait(logger: WandbLogger) -> None:
        wait(logger)
        lost.append(time.monotonic())

    def timed_close(logger: WandbLogger) -> None:
        close(logger)
        lost[-1] = time.monotonic() - lost[-1]

    monkeypatch.setattr(WandbLogger, "_wait_for_import", timed_wait)
    monkeypatch.setattr(WandbLogger, "close", timed_close)
    return lost


def require_kept_promise(seconds: list[float], run_dir: Path, reference: Path) -> None:
    assert len(seconds) == 1
    assert seconds[0] <= PROMISE_SECONDS + SLACK_SECONDS
    require_same(run_dir, reference)


def require_no_process(tmp_path: Path) -> None:
    """Require that all processes of a test end; wandb-core looks for its parent now and then."""
    end = time.monotonic() + 10
    while left := processes_with(f"MARKER={tmp_path}"):
        assert time.monotonic() < end, left
        time.sleep(0.1)


def require_no_secret(folder: Path, *texts: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    contents = {str(path): path.read_bytes() for path in files} | {text[:20]: text.encode() for text in texts}
    for secret in (KEY, OTHER_SECRET):
        assert [name for name, content in contents.items() if secret.encode() in content] == []


def told(error_output: str) -> list[str]:
    """What is said beside progress."""
    return [line for line in error_output.splitlines() if "%  step" not in line]


def sync_paths(error_output: str) -> list[Path]:
    """The segments in the one command that a run prints at its end."""
    lines = [line for line in told(error_output) if "wandb sync" in line]
    assert len(lines) == 1, error_output
    words = shlex.split(lines[0].partition("have yet: ")[2])
    assert words[:3] == ["wandb", "sync", "--include-online"]
    return [Path(word) for word in words[3:]]


def steps_in(segment: Path) -> list[int]:
    """The steps of rows, not pictures, in a segment."""
    (file,) = segment.glob("*.wandb")
    rows = [
        {item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item}
        for record in read_records(file)
        if record.WhichOneof("record_type") == "history"
    ]
    return [int(json.loads(row["step"])) for row in rows if "loss/d" in row]


@contextmanager
def server(kind: str) -> Iterator[str]:
    if kind == "refused":
        yield "http://127.0.0.1:9"
    elif kind == "silent":
        with black_hole() as address:
            yield address
    else:
        with serve(Answer(status=401, headers={"Content-Length": "0"})) as running:
            yield running.address.removesuffix("/scenes/")


@pytest.mark.parametrize("kind", ["refused", "silent", "401"])
def test_a_server_that_does_not_take_the_run_costs_seconds_and_no_row(
    kind: str,
    demo_shards: Path,
    without_wandb: Path,
    tmp_path: Path,
    user: dict[str, str],
    seconds_lost: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "the run"  # a name that a shell must be told in quotes
    with server(kind) as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        train_here(demo_shards, run_dir, "auto")
    output, errors = capfd.readouterr()
    require_kept_promise(seconds_lost, run_dir, without_wandb)
    assert output == ""
    assert "\r" not in errors
    warnings = [line for line in told(errors) if line.startswith("warning")]
    assert len(warnings) == 1 and "W&B" in warnings[0]
    (segment,) = sync_paths(errors)
    assert steps_in(segment) == list(range(1, STEPS + 1))
    require_no_process(tmp_path)
    require_no_secret(tmp_path, output, errors)


@pytest.mark.parametrize("behaviour", ["import", "init", "log", "finish", "hang at log", "hang at finish"])
def test_a_client_that_fails_is_reported_once_and_left(
    behaviour: str,
    demo_shards: Path,
    without_wandb: Path,
    tmp_path: Path,
    user: dict[str, str],
    seconds_lost: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in fake_client(tmp_path / "client", behaviour).items():
        monkeypatch.setenv(name, value)
    mode = "online" if behaviour.startswith("hang") else "offline"
    train_here(demo_shards, tmp_path / "run", mode)
    errors = capfd.readouterr().err
    require_kept_promise(seconds_lost, tmp_path / "run", without_wandb)
    (warning,) = [line for line in told(errors) if line.startswith("warning")]
    assert ("did not finish in time" if behaviour.startswith("hang") else f"broken at {behaviour}") in warning
    require_no_secret(tmp_path, errors)
    require_no_process(tmp_path)


def test_without_a_key_nothing_is_said_or_left(
    demo_shards: Path,
    without_wandb: Path,
    tmp_path: Path,
    user: dict[str, str],
    seconds_lost: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    train_here(demo_shards, tmp_path / "run", "auto")
    require_kept_promise(seconds_lost, tmp_path / "run", without_wandb)
    assert told("".join(capfd.readouterr())) == []
    assert not (tmp_path / "run" / "wandb").exists()


def test_a_process_that_does_not_come_up_is_left(
    demo_shards: Path,
    without_wandb: Path,
    tmp_path: Path,
    user: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in fake_client(tmp_path / "client", "hang at import").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(WandbLogger, "_IMPORT_SECONDS", 1)
    train_here(demo_shards, tmp_path / "run", "online")
    assert "W&B did not end in time and is killed" in capfd.readouterr().err
    require_same(tmp_path / "run", without_wandb)
    require_no_process(tmp_path)


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Mount a disk of 64 KiB with 8 KiB of room."""
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        (folder / "file").write_bytes(bytes(56 * 1024))
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("pictures", [True, False])
def test_a_full_disk_is_reported_once(
    pictures: bool,
    demo_shards: Path,
    without_wandb: Path,
    tmp_path: Path,
    user: dict[str, str],
    seconds_lost: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    train_here(demo_shards, run_dir, "disabled", steps=1)
    if not pictures:  # wandb raises where it cannot copy one, and keeps silent where it cannot write rows
        monkeypatch.setattr(SampleFiles, "samples", lambda _, step, draw: draw())
    with full_disk(run_dir / "wandb"):
        train_here(demo_shards, run_dir, "offline")
    require_kept_promise(seconds_lost, run_dir, without_wandb)
    (warning,) = [line for line in told(capfd.readouterr().err) if line.startswith("warning")]
    assert "W&B is turned off" in warning and "No space left on device" in warning


def test_segments_of_a_run_offline_are_one_run_with_each_step_once(
    demo_shards: Path, tmp_path: Path, user: dict[str, str]
) -> None:
    run_dir, env = tmp_path / "the run", environment() | user
    output = ""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        before = len(list(run_dir.glob("wandb/offline-run-*/run-*.wandb")))
        process = start(train_command(1, *flags(demo_shards, run_dir, "offline", 10_000)), env=env)
        while len(list(run_dir.glob("wandb/offline-run-*/run-*.wandb"))) == before:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        for each, line in processes_with(f"MARKER={tmp_path}").items():
            if "dist_dcgan" in line:  # as schedulers do: ours beside training are signalled, too
                os.kill(each, number)
        output += process.communicate(timeout=60)[0]
        assert process.returncode == 0, output
        assert (run_dir / "STOPPED").exists()
    last = last_step(run_dir) + 2
    done = succeed(train_command(2, *flags(demo_shards, run_dir, "offline", last)), env=env)
    segments = sync_paths(done.stderr)
    assert len(segments) == 3
    assert segments == sorted((run_dir / "wandb").glob("offline-run-*"))
    assert [step for segment in segments for step in steps_in(segment)] == list(range(1, last + 1))
    values = json.loads((list_checkpoints(run_dir / "checkpoints")[-1] / "values.json").read_text())
    for segment in segments:
        require_complete(segment, values["values"]["wandb_run_id"])
    require_no_secret(tmp_path, done.stdout, done.stderr, output)
    dry = subprocess.run(["wandb", "sync", "--dry-run", *map(str, segments)], env=env, capture_output=True, text=True)
    assert dry.returncode == 0 and all(segment.name in dry.stdout + dry.stderr for segment in segments), dry


def require_complete(segment: Path, run_id: str) -> None:
    """Require the run's id, its configuration, the step metric, an end and nothing of the command line."""
    (file,) = segment.glob("*.wandb")
    assert file.name == f"run-{run_id}.wandb"
    records = list(read_records(file))
    kinds = {record.WhichOneof("record_type") for record in records}
    assert "exit" in kinds
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert run.run_id == run_id
    assert json.loads({item.key: item.value_json for item in run.config.update}["width"]) == 4
    (metric,) = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    assert (metric.glob_name, metric.step_metric) == ("*", "step")
    assert b"--max-steps" not in file.read_bytes()


def last_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return json.loads(whole[-1])["step"] if whole else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_is_obeyed_while_the_server_is_silent(
    number: signal.Signals, demo_shards: Path, tmp_path: Path, user: dict[str, str]
) -> None:
    with black_hole() as address:
        env = environment() | user | {"WANDB_BASE_URL": address}
        process = start(train_command(1, *flags(demo_shards, tmp_path / "run", "online", 10_000)), env=env)
        while not list((tmp_path / "run").glob("wandb/run-*/run-*.wandb")):  # it waits for the server now
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        assert any("wandb-core" in line for line in processes_with(f"MARKER={tmp_path}").values())
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]  # every holder of the pipe closes it
    require_no_process(tmp_path)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        return
    assert process.returncode == 0, output
    step = metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "STOPPED").exists()
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == f"step-{step:08d}"
    (segment,) = sync_paths(output)
    assert steps_in(segment) == list(range(1, step + 1))


def test_addresses_go_to_wandb_without_secrets() -> None:
    def told_of(path: str) -> str:
        return without_secrets({"data": {"path": path, "cache_gb": 1}})["data"]["path"]

    assert told_of("https://me:secret@example.org:80/bedrooms?token=secret#x") == "https://example.org:80/bedrooms"
    assert told_of("pipe:curl -H 'Authorization: secret' {}") == "pipe:"
    assert told_of("data/bedroom_train") == "data/bedroom_train"
