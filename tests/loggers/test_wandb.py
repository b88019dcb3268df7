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
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from dist_dcgan import train
from dist_dcgan.loggers.pictures import SampleFiles
from dist_dcgan.loggers.wandb_logger import WandbLogger
from dist_dcgan.loggers.wandb_process import without_secrets
from dist_dcgan.run.checkpoint import list_checkpoints
from tests.faults.disks import mounted
from tests.faults.harness import Outcome
from tests.support.commands import environment, metrics, start, succeed, train_command
from tests.support.forks import Forked, context
from tests.support.wandb_fixtures import fake_client, processes_with, read_records, server

KEY = "5ec2e7ab1e5ec2e7ab1e5ec2e7ab1e5ec2e7ab1e"
OTHER_SECRET = "another-secret-of-the-environment"
STEPS = 3
HANDLED = (signal.SIGINT, signal.SIGTERM)

TrainHere: TypeAlias = Callable[[str], list[str]]


def flags(data: Path, run_dir: Path, mode: str, steps: int = STEPS) -> list[str]:
    settings = ["--preset", "debug", "--width", 4, "--max-steps", steps, "--log.samples-every-images", 60]
    return list(map(str, [*settings, "--wandb", mode, "--data", data, "--run-dir", run_dir]))


@pytest.fixture(scope="module")
def without_wandb(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run with W&B disabled, to compare with."""
    outcome = Outcome(tmp_path_factory.mktemp("without"))
    train.main(flags(demo_shards, outcome.run_dir, "disabled"))
    return outcome


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A user with a home of their own, a key and another secret; only processes of this test have the marker."""
    context()  # the server of forked processes outlives the test, and so must not have its marker
    variables = dict.fromkeys(("HOME", "TMPDIR", "MARKER"), str(tmp_path))
    variables |= {"WANDB_API_KEY": KEY, "OTHER_SECRET": OTHER_SECRET}
    for name in [name for name in os.environ if name.startswith(("WANDB", "XDG"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory that a shell must be told in quotes."""
    return Outcome(tmp_path / "a user").run_dir


@pytest.fixture
def train_here(
    demo_shards: Path,
    without_wandb: Outcome,
    tmp_path: Path,
    run_dir: Path,
    user: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> TrainHere:
    """The command in this process, in a mode; requires what holds whatever W&B does, and returns what is said."""
    lost: list[float] = []  # seconds that the end of the run waits for W&B while it does not import wandb
    next_state = WandbLogger._next_state

    def timed(logger: WandbLogger, seconds: float) -> bytes | None:
        started = time.monotonic()
        state = next_state(logger, seconds)
        lost.append(0.0 if seconds == WandbLogger._IMPORT_SECONDS else time.monotonic() - started)
        return state

    def trained(mode: str) -> list[str]:
        monkeypatch.setattr(WandbLogger, "_next_state", timed)
        threads, handlers = set(threading.enumerate()), [signal.getsignal(number) for number in HANDLED]
        train.main(flags(demo_shards, run_dir, mode))
        assert [signal.getsignal(number) for number in HANDLED] == handlers
        assert not any(thread.name.lower().startswith("wandb") for thread in set(threading.enumerate()) - threads)
        assert len(lost) >= 1
        assert sum(lost) <= 5 + 1  # what is promised, and slack
        outcome = Outcome(run_dir.parent)
        assert len(outcome.rows()) == STEPS
        assert (outcome.rows(), outcome.state()) == (without_wandb.rows(), without_wandb.state())
        output, errors = capfd.readouterr()
        assert output == ""
        assert "\r" not in errors
        require_no_process(tmp_path)
        require_no_secret(tmp_path, errors)
        return told(errors)

    return trained


def require_no_process(tmp_path: Path) -> None:
    """Require that all processes of a test end; wandb-core looks for its parent now and then."""
    end = time.monotonic() + 20
    while left := processes_with(f"MARKER={tmp_path}"):
        assert time.monotonic() < end, left
        time.sleep(0.1)


def require_no_secret(folder: Path, *texts: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    contents = {str(path): path.read_bytes() for path in files} | {text[:20]: text.encode() for text in texts}
    for secret in (KEY, OTHER_SECRET):
        assert [name for name, content in contents.items() if secret.encode() in content] == []


def told(error_output: str) -> list[str]:
    """What is said beside progress and the command that makes the report."""
    lines = [line for line in error_output.splitlines() if "%  step" not in line]
    return [line for line in lines if not line.startswith("to see how it went: ")]


def warning_in(lines: list[str]) -> str:
    (warning,) = [line for line in lines if line.startswith("warning")]
    return warning


def sync_paths(lines: list[str]) -> list[Path]:
    """The segments in the one command that a run prints at its end."""
    (line,) = [line for line in lines if "wandb sync" in line]
    words = shlex.split(line.partition("have yet: ")[2])
    assert words[:3] == ["wandb", "sync", "--include-online"]
    return [Path(word) for word in words[3:]]


def steps_in(segment: Path, key: str = "loss/d") -> list[int]:
    """The steps in a segment at which `key` is logged: by default those of rows, not pictures."""
    (file,) = segment.glob("*.wandb")
    rows = [
        {item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item}
        for record in read_records(file)
        if record.WhichOneof("record_type") == "history"
    ]
    return [int(json.loads(row["step"])) for row in rows if key in row]


def slow(*values: str) -> Any:
    """A second instance of what is tested without it."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", ["silent", slow("refused"), slow("401")])
def test_a_server_that_does_not_take_the_run_costs_seconds_and_no_row(
    kind: str, train_here: TrainHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(kind) as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        lines = train_here("auto")
    assert "W&B" in warning_in(lines)
    (segment,) = sync_paths(lines)
    assert steps_in(segment) == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("mode", "behaviour", "message"),
    [
        ("online", "hang at finish", "did not finish in time"),
        slow("online", "hang at log", "did not finish in time"),
        slow("online", "hang at import", "W&B did not end in time and is killed"),
        *[slow("offline", place, f"broken at {place}") for place in ("import", "init", "log", "finish")],
    ],
)
def test_a_client_that_fails_is_reported_once_and_left(
    mode: str, behaviour: str, message: str, train_here: TrainHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_client(tmp_path / "client", behaviour, monkeypatch)
    if behaviour == "hang at import":
        monkeypatch.setattr(WandbLogger, "_IMPORT_SECONDS", 1)
    assert message in warning_in(train_here(mode))


def test_without_a_key_nothing_is_said_or_left(
    train_here: TrainHere, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    assert train_here("auto") == []
    assert not (run_dir / "wandb").exists()


@pytest.mark.slow
@pytest.mark.parametrize("pictures", [True, False])
def test_a_full_disk_is_reported_once(
    pictures: bool, train_here: TrainHere, demo_shards: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.main(flags(demo_shards, run_dir, "disabled", steps=1))
    if not pictures:  # wandb raises where it cannot copy one, and keeps silent where it cannot write rows
        monkeypatch.setattr(SampleFiles, "samples", lambda _, step, draw: draw())
    with mounted(run_dir / "wandb", "64k") as allowed:
        if not allowed:
            pytest.skip("a small disk cannot be mounted here: root on Linux can")
        (run_dir / "wandb" / "file").write_bytes(bytes(56 * 1024))
        warning = warning_in(train_here("offline"))
    assert "W&B is turned off" in warning and "No space left on device" in warning


def wait_for(found: Callable[[], bool], process: subprocess.Popen[str] | Forked) -> None:
    while not found():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def test_segments_of_a_run_offline_are_one_run_with_each_step_once(
    demo_shards: Path, tmp_path: Path, run_dir: Path, user: dict[str, str]
) -> None:
    env, output = environment() | user, ""
    for starts, number in enumerate((signal.SIGTERM, signal.SIGUSR1), start=1):
        process = start(train_command(1, *flags(demo_shards, run_dir, "offline", 10_000)), env=env)
        wait_for(lambda: len(list(run_dir.glob("wandb/offline-run-*/run-*.wandb"))) == starts, process)  # noqa: B023
        beside = [each for each, line in processes_with(f"MARKER={tmp_path}").items() if "dist_dcgan" in line]
        assert len(beside) >= 1
        for each in {process.pid, *beside}:  # schedulers signal ours beside training, too
            os.kill(each, number)
        output += process.communicate(timeout=60)[0]
        assert process.returncode == 0, output
        assert (run_dir / "STOPPED").exists()
    last = metrics(run_dir)[-1]["step"] + 2
    done = succeed(train_command(2, *flags(demo_shards, run_dir, "offline", last)), env=env)
    segments = sync_paths(told(done.stderr))
    assert len(segments) == 3
    assert segments == sorted((run_dir / "wandb").glob("offline-run-*"))
    assert [step for segment in segments for step in steps_in(segment)] == list(range(1, last + 1))
    pictures = sorted(int(path.stem.removeprefix("step-")) for path in (run_dir / "samples").iterdir())
    assert [step for segment in segments for step in steps_in(segment, "samples")] == pictures != []
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
    assert not any(words in file.read_bytes() for words in (b"--max-steps", b"pictures_since"))


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_signal_is_obeyed_while_the_server_is_silent(
    number: signal.Signals, demo_shards: Path, tmp_path: Path, run_dir: Path, user: dict[str, str]
) -> None:
    with server("silent") as address:
        env = environment() | user | {"WANDB_BASE_URL": address}
        process = start(train_command(1, *flags(demo_shards, run_dir, "online", 10_000)), env=env)
        wait_for(lambda: any(run_dir.glob("wandb/run-*/run-*.wandb")), process)  # it waits for the server now
        assert any("wandb-core" in line for line in processes_with(f"MARKER={tmp_path}").values())
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]  # every holder of the pipe closes it
    require_no_process(tmp_path)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 0), output
    if number == signal.SIGKILL:
        return
    step = metrics(run_dir)[-1]["step"]
    assert (run_dir / "STOPPED").exists()
    assert list_checkpoints(run_dir / "checkpoints")[-1].name == f"step-{step:08d}"
    (segment,) = sync_paths(told(output))
    assert steps_in(segment) == list(range(1, step + 1))


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("https://me:secret@example.org:80/bedrooms?token=secret#x", "https://example.org:80/bedrooms"),
        ("pipe:curl -H 'Authorization: secret' {}", "pipe:***"),
        ("data/bedroom_train", "data/bedroom_train"),
    ],
)
def test_addresses_go_to_wandb_without_secrets(path: str, sent: str) -> None:
    assert without_secrets({"data": {"path": path, "cache_gb": 1}}) == {"data": {"path": sent, "cache_gb": 1}}
