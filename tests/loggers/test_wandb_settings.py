"""W&B keeps what its own variables and settings ask for, under the name that they give, or one line says why not."""

from __future__ import annotations

import os
import pwd
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_dcgan import train
from dist_dcgan.config import Config, Invocation
from dist_dcgan.distributed.world import World
from dist_dcgan.loggers.wandb_logger import WandbLogger, sync_command
from dist_dcgan.loggers.wandb_process import Task, prepare_environment
from dist_dcgan.loggers.wandb_settings import WandbRun, client_setting, resolve_wandb, source_of_key
from dist_dcgan.preflight import machine
from dist_dcgan.preflight.results import Subject
from dist_dcgan.run.checkpoint import load_newest
from dist_dcgan.run.directory import RunDirectory
from shards.common.errors import UserError
from shards.common.files import is_private
from tests.support.wandb_fixtures import read_records

KEY = "5ec2e7ab1e5ec2e7ab1e5ec2e7ab1e5ec2e7ab1e"
SWEEP = {"WANDB_SWEEP_ID": "sweep", "WANDB_RUN_ID": "run[1]", "WANDB_PROJECT": "bedrooms", "WANDB_ENTITY": "team"}

Variables = Callable[..., None]


@pytest.fixture(autouse=True)
def variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Variables:
    """Sets W&B's variables, of which there are none before; the home and the working directory are empty."""
    for name in [name for name in os.environ if name.startswith(("WANDB", "XDG"))]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def set_variables(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No HOME, and no entry in the list of users."""

    def unknown(_: int) -> Any:
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def config(run_dir: str | Path = "runs/one", **options: str) -> Config:
    return Config(run_dir=run_dir, wandb=options)


def refusal(made: Config, stored: str | None = None) -> str:
    with pytest.raises(UserError) as refused:
        resolve_wandb(made, stored)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("asked", "flag", "mode"),
    [
        ({}, "auto", "auto"),
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, "auto", "offline"),
        ({"WANDB_MODE": "dryrun"}, "auto", "offline"),
        ({"WANDB_MODE": "online"}, "auto", "online"),
        ({"WANDB_MODE": "run"}, "auto", "online"),
        ({"WANDB_MODE": "disabled"}, "auto", "disabled"),
        ({"WANDB_MODE": ""}, "auto", "auto"),
        ({"WANDB_DISABLED": "true", "WANDB_MODE": "online"}, "auto", "disabled"),
        ({"WANDB_DISABLED": "false"}, "auto", "auto"),
        ({"WANDB_MODE": "offline"}, "online", "online"),
        ({"WANDB_MODE": "disabled"}, "offline", "offline"),
        ({"WANDB_MODE": "shared"}, "disabled", "disabled"),
    ],
)
def test_a_mode_that_is_asked_for_is_taken_and_the_flag_wins(
    asked: dict[str, str], flag: str, mode: str, variables: Variables
) -> None:
    variables(**asked)
    assert resolve_wandb(config(mode=flag), None).mode == mode


def test_a_mode_that_cannot_be_had_is_refused_before_the_run_directory_is_made(
    demo_shards: Path, tmp_path: Path, variables: Variables
) -> None:
    variables(WANDB_MODE="shared")
    flags = ["--preset", "debug", "--width", "4", "--data", str(demo_shards), "--run-dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"WANDB_MODE 'shared', .* give --wandb online, offline or disabled"):
        train.main(flags)
    assert not (tmp_path / "run").exists()


def settings_file(folder: Path, **values: str) -> None:
    folder.mkdir(parents=True)
    (folder / "settings").write_text("\n".join(["[default]", *(f"{name} = {value}" for name, value in values.items())]))


def test_the_users_settings_are_read_below_variables(tmp_path: Path, variables: Variables) -> None:
    settings_file(tmp_path / "home/.config/wandb", mode="offline", project="of the user")
    found = resolve_wandb(config(), None)
    assert (found.mode, found.project) == ("offline", "of the user")
    variables(WANDB_MODE="disabled", WANDB_PROJECT="of the variable")
    found = resolve_wandb(config(), None)
    assert (found.mode, found.project) == ("disabled", "of the variable")


@pytest.mark.parametrize("folder", ["wandb", ".wandb"])
def test_settings_in_the_working_directory_can_only_keep_what_would_be_sent(
    folder: str, tmp_path: Path, variables: Variables
) -> None:
    """`wandb offline` writes them; they may also be those of somebody whose server would get the key."""
    settings_file(tmp_path / folder, mode="offline", project="theirs", base_url="http://theirs", api_key=KEY)
    assert (client_setting("project"), client_setting("base_url"), source_of_key()) == (None, None, None)
    assert resolve_wandb(config(), None).mode == "offline"
    for mode, known in (("disabled", "disabled"), ("online", "auto"), ("nonsense", "auto")):
        (tmp_path / folder / "settings").write_text(f"[default]\nmode = {mode}\n")
        assert resolve_wandb(config(), None).mode == known
    (tmp_path / folder / "settings").unlink()
    os.mkfifo(tmp_path / folder / "settings")
    assert resolve_wandb(config(), None).mode == "auto"


def test_names_come_from_the_flag_then_the_variable_then_the_default(variables: Variables) -> None:
    found = resolve_wandb(config(), None)
    assert (found.project, found.name, found.resume) == ("dist_dcgan", "one", "allow")
    assert found.run_id is not None and len(found.run_id) == 8
    variables(WANDB_PROJECT="bedrooms", WANDB_NAME="first", WANDB_RUN_ID="abc", WANDB_RESUME="never")
    found = resolve_wandb(config(), None)
    assert (found.project, found.name, found.run_id, found.resume) == ("bedrooms", "first", "abc", "never")
    assert resolve_wandb(config(), "abc").resume == "allow"  # a run that was resumed is known to W&B
    found = resolve_wandb(config(project="mine", name="my name"), None)
    assert (found.project, found.name) == ("mine", "my name")


def test_a_run_keeps_its_id_and_says_so_if_another_is_asked_for(variables: Variables) -> None:
    assert resolve_wandb(config(), "stored").run_id == "stored"
    variables(WANDB_RUN_ID="other")
    assert refusal(config(), "stored").startswith("run directory runs/one is W&B's run stored, but WANDB_RUN_ID is")
    assert resolve_wandb(config(mode="disabled"), "stored").run_id == "stored"
    assert resolve_wandb(config(mode="disabled"), None).run_id is None  # the id is free until something is recorded


@pytest.mark.parametrize(
    ("asked", "project", "message"),
    [
        ({"WANDB_RUN_ID": "a/b"}, None, "WANDB_RUN_ID 'a/b' must not"),
        ({"WANDB_RUN_ID": " a"}, None, "WANDB_RUN_ID ' a' must not"),
        ({"WANDB_FORK_FROM": "a?_step=1"}, None, "WANDB_FORK_FROM is not supported"),
        ({"WANDB_RESUME_FROM": "a?_step=1"}, None, "WANDB_RESUME_FROM is not supported"),
        ({"WANDB_TAGS": f"a,{'b' * 65}"}, None, "WANDB_TAGS: 'bbb"),
        ({}, "team/project", "W&B's project 'team/project' must"),
        (SWEEP, "other", "--wandb.project other, but the sweep WANDB_SWEEP_ID is in WANDB_PROJECT bedrooms"),
    ],
)
def test_what_wandb_would_refuse_during_training_is_refused_before(
    asked: dict[str, str], project: str | None, message: str, variables: Variables
) -> None:
    variables(**asked)
    options = {} if project is None else {"project": project}
    assert refusal(config(**options)).startswith(message)
    assert resolve_wandb(config(mode="disabled", **options), None).mode == "disabled"


def task(run_dir: Path, mode: str = "auto") -> Task:
    names = {"run_id": "abc", "project": "p", "name": "n", "resume": "allow"}
    return Task(run_dir=str(run_dir), mode=mode, seconds=1, offset=0, pictures_since=0, **names)


def test_the_clients_variables_agree_with_the_task(tmp_path: Path, variables: Variables) -> None:
    before = dict(os.environ)
    try:
        variables(WANDB_TAGS="a,,b,", WANDB_NOTES="", WANDB_SERVICE="gone", WANDB_RESUME="never", WANDB_ENTITY="team")
        variables(SM_TRAINING_ENV="{}", TRAINING_JOB_NAME="job")
        prepare_environment(task(tmp_path))
        found = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
        names = {"WANDB_PROJECT": "p", "WANDB_RUN_ID": "abc", "WANDB_TAGS": "a,b", "WANDB_ENTITY": "team"}
        assert found == names | {"WANDB_MODE": "online", "WANDB_SILENT": "true", "WANDB_RUN_GROUP": "job"}
        assert os.environ["HOME"] == before["HOME"]
        prepare_environment(replace(task(tmp_path), mode="offline"))
        assert os.environ["WANDB_MODE"] == "offline"
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_without_a_home_none_is_looked_for_in_the_working_directory_and_the_doctor_does_not_fail(
    tmp_path: Path, homeless: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert source_of_key() is None
    alone = World.__new__(World)
    for mode in ("auto", "online", "offline", "disabled"):
        assert machine.wandb(Subject(config(mode=mode), Invocation(), alone)).level != "FAILED"
    settings_file(tmp_path / "~" / ".config" / "wandb", project="theirs", base_url="http://theirs", api_key=KEY)
    (tmp_path / "~" / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert (client_setting("project"), client_setting("base_url"), source_of_key()) == (None, None, None)


_SHOW = "import os; print(*map(os.environ.get, {}), sep='\\n', file=open({!r}, 'w')); os.stat(os.environ['HOME'])"


def test_without_a_home_the_client_gets_an_empty_one_of_its_own(
    tmp_path: Path, homeless: None, variables: Variables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run directory may come from somebody: the settings of a home name the server that gets the key."""
    settings_file(tmp_path / "run" / "wandb" / ".config" / "wandb", base_url="http://theirs")
    variables(TMPDIR=str(tmp_path), WANDB_CONFIG_DIR="~/mine", WANDB_CACHE_DIR="cache")
    monkeypatch.setattr(tempfile, "tempdir", None)
    shown = tmp_path / "shown"
    code = _SHOW.format(("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"), str(shown))
    monkeypatch.setattr(Task, "command", lambda _: [sys.executable, "-c", code])
    before = {*tmp_path.iterdir(), shown}
    logger = WandbLogger(RunDirectory(tmp_path / "run"), WandbRun("online", "p", "n", "abc", "allow"))
    (home,) = [path for path in tmp_path.iterdir() if path not in before]
    assert is_private(home) and not any(home.iterdir())
    logger.close()
    assert shown.read_text().splitlines() == [str(home), "~/mine", str(tmp_path / "cache")]
    assert not home.exists()


@pytest.mark.parametrize("stored", ["../../x", "a/b", "", " ", 3, ["a"]])
def test_a_checkpoint_that_holds_no_id_of_wandb_is_refused(stored: Any) -> None:
    assert refusal(config(), stored).endswith("which is no id of W&B: give --wandb disabled")


def test_the_command_names_the_segments_of_the_id_alone(tmp_path: Path) -> None:
    for run_id in ("a[1]", "a[1]2", "a1"):
        folder = tmp_path / "wandb" / f"offline-run-20260101_000000-{run_id}"
        folder.mkdir(parents=True)
        (folder / f"run-{run_id}.wandb").write_text("longer than a header")
    command = sync_command(tmp_path, "a[1]")
    assert command == f"wandb sync --include-online '{tmp_path}/wandb/offline-run-20260101_000000-a[1]'"


def test_a_sweeps_run_offline_is_recorded_as_it_is_asked_for(
    demo_shards: Path,
    tmp_path: Path,
    variables: Variables,
    homeless: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With a key, without a home, and with variables that wandb alone would fail on."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import pwd\npwd.getpwuid = {}.__getitem__\n")
    variables(**SWEEP, WANDB_MODE="offline", WANDB_API_KEY=KEY, WANDB_TAGS="a,,b", WANDB_NOTES="")
    variables(WANDB_SERVICE="3-999999-unix-/gone", WANDB_DIR=str(tmp_path / "elsewhere"), WANDB_USE_DOT_WANDB="1")
    variables(PYTHONPATH=f"{tmp_path / 'site'}{os.pathsep}{Path(__file__).parents[2]}")
    flags = ["--preset", "debug", "--width", 4, "--max-steps", 2, "--data", demo_shards, "--run-dir", tmp_path / "run"]
    train.main([str(flag) for flag in flags])
    (segment,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert f"have yet: wandb sync --include-online '{segment}'" in capfd.readouterr().err
    (run,) = [record.run for record in read_records(segment / "run-run[1].wandb") if record.HasField("run")]
    assert (run.run_id, run.sweep_id, run.project, run.entity) == ("run[1]", "sweep", "bedrooms", "team")
    assert list(run.tags) == ["a", "b"]
    found = load_newest(tmp_path / "run" / "checkpoints")
    assert found is not None and found.values["wandb_run_id"] == "run[1]"
    stored = (tmp_path / "run" / "config.yaml").read_bytes()
    variables(WANDB_RUN_ID="other")
    with pytest.raises(UserError, match=r"is W&B's run run\[1\], but WANDB_RUN_ID is other"):
        train.main([*map(str, flags), "--log.every-steps", "7"])
    assert capfd.readouterr().err == ""
    assert (tmp_path / "run" / "config.yaml").read_bytes() == stored
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
