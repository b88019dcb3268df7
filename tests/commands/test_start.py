"""It starts wherever it can: without network, name, home or empty folders; or it says in one line why not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from dist_dcgan import arithmetic, config, evaluate, export, report, sample, timelapse, walk
from shards.__main__ import COMMANDS
from shards.__main__ import main as shards_main
from shards.common.command_line import parse_flags
from shards.common.errors import UserError
from tests.slurm.needs import require
from tests.support.commands import environment, metrics, module, one_line_error, succeed, train_command

ROOT = Path(__file__).parents[2]
TINY = ("--preset", "debug", "--width", "4", "--global-batch", "8", "--max-steps", "2", "--quality.extractor", "none")
VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_ERROR_FILE"),
    *("TORCHELASTIC_USE_AGENT_STORE", "TORCH_DISTRIBUTED_DEBUG", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
    *("SLURM_NTASKS", "SLURM_PROCID", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "PMI_SIZE"),
    *("WANDB_MODE", "WANDB_API_KEY", "XDG_CACHE_HOME", "HOME", "REQUESTS_CA_BUNDLE"),
)


def flags(data: Path, run_dir: Path) -> list[str]:
    return ["--data", str(data), "--run-dir", str(run_dir), "--wandb", "disabled", *TINY]


def test_one_process_trains_with_empty_variables_and_anothers_interface(demo_shards: Path, tmp_path: Path) -> None:
    env = environment() | dict.fromkeys(VARIABLES, "")
    succeed(module("dist_dcgan.train", *flags(demo_shards, tmp_path / "empty")), env=env)
    env = environment() | {"GLOO_SOCKET_IFNAME": "ib7", "LOCAL_RANK": "3", "TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
    succeed(module("dist_dcgan.train", *flags(demo_shards, tmp_path / "other")), env=env)
    assert metrics(tmp_path / "empty")[-1]["loss/d"] == metrics(tmp_path / "other")[-1]["loss/d"]


@pytest.mark.parametrize(
    "command", ["train", *(pytest.param(name, marks=pytest.mark.slow) for name in ("doctor", "evaluate"))]
)
def test_tasks_of_srun_are_refused_with_the_command_to_use(command: str) -> None:
    """Each would train alone, or find its run directory in use."""
    env = environment() | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}
    told = one_line_error(module(f"dist_dcgan.{command}", "--dry-run"), env=env)
    assert told.startswith("error: SLURM_NTASKS=2: ") and "`torchrun --nproc_per_node=2 " in told


def test_a_mistake_is_told_although_a_local_rank_is_left_over(tmp_path: Path) -> None:
    env = environment() | {"LOCAL_RANK": "1", "RANK": "1", "TORCHELASTIC_MAX_RESTARTS": "3"}
    assert "no data set" in one_line_error(module("dist_dcgan.train", "--data", tmp_path), env=env)


def path_fields(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from path_fields(field.annotation)
        elif "Path" in str(field):
            yield f"{model.__name__}.{name}: {field}"


def test_every_path_option_expands_the_home() -> None:
    models: list[type[BaseModel]] = [config.Config, config.Invocation, evaluate.Evaluate, sample.Sample]
    models += [walk.Walk, timelapse.Timelapse, arithmetic.Arithmetic, export.Export, report.Report]
    fields = [
        field
        for model in (*models, *[command.options for command in COMMANDS.values()])
        for field in path_fields(model)
    ]
    assert len(fields) == 35
    assert [field for field in fields if not re.search("AfterValidator|expand_home|_location", field)] == []


def test_a_tilde_is_the_home_on_the_command_line_and_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("run_dir: ~/a\ndata: {path: ~/b, cache_dir: ~/c}\n")
    made, _ = config.from_command_line(["--config=~/run.yaml", "--quality.weights=~/w"])
    assert [made.run_dir, made.data.path, made.data.cache_dir, made.quality.weights] == [tmp_path / c for c in "abcw"]
    made, _ = config.from_command_line(["--run-dir", "~nobody-of-this-name/x", "--data", "pipe:cat ~/{}"])
    assert (made.run_dir, made.data.path) == (Path("~nobody-of-this-name/x"), "pipe:cat ~/{}")


def test_without_a_home_only_a_tilde_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: str(path))
    assert config.from_command_line(["--run-dir", "runs/x"])[0].run_dir == Path("runs/x")
    for words in (["--run-dir=~/x"], ["--data", "~/x"]):
        with pytest.raises(UserError, match=r"this user has no home: set HOME, or give a path without ~, got '~/x'"):
            config.from_command_line(words)


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_certificates_that_are_not_there_are_named(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.setenv(variable, "/no/bundle.pem")
    words = ["download", "bedroom", "--split", "val", "--out", str(tmp_path), "--address", "https://127.0.0.1:1/"]
    with pytest.raises(UserError, match=rf"{variable}=/no/bundle\.pem has to name a file of certificates"):
        shards_main(words)
    with pytest.raises(UserError, match=rf"{variable}=/no/bundle\.pem has to name a file of certificates"):
        config_data = ["--data", "https://127.0.0.1:1/", "--data.cache-dir", str(tmp_path / "cache"), "--dry-run"]
        train_main(config_data)


def train_main(words: list[str]) -> None:
    from dist_dcgan.train import main

    main(words)


@pytest.mark.slow
def test_folders_named_like_the_packages_do_not_hide_an_editable_install(demo_shards: Path, tmp_path: Path) -> None:
    """An editable install finds packages after the working directory, whose folders are packages without files."""
    work, site = tmp_path / "work", tmp_path / "site"
    for name in ("dist_dcgan", "shards"):
        (work / name).mkdir(parents=True)
    site.mkdir()
    (site / "sitecustomize.py").write_text(FINDER.format(root=str(ROOT)))
    env = environment() | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        module("dist_dcgan.train", *flags(demo_shards, tmp_path / "run")),
        cwd=work,
        env=env,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    done = subprocess.run(module("shards", "verify", demo_shards), cwd=work, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


FINDER = """
import importlib.machinery, importlib.util, pathlib, sys

class Finder:  # as setuptools installs it: by the whole name, behind the finder of folders
    @staticmethod
    def find_spec(name, path=None, target=None):
        place = pathlib.Path({root!r}, *name.split("."))
        if name.split(".")[0] not in ("dist_dcgan", "shards"):
            return None
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file():
                return importlib.util.spec_from_file_location(name, file)

sys.meta_path.insert(sys.meta_path.index(importlib.machinery.PathFinder) + 1, Finder)
"""


@pytest.mark.slow
def test_the_launcher_says_what_is_missing(tmp_path: Path) -> None:
    launcher = ["bash", str(ROOT / "launch" / "torchrun.sh")]
    env = environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for variables, message in (
        ({}, "torch sees no GPU on"),
        ({"RANKS": "gpu"}, "RANKS=2 trains with two processes on the CPU"),
        ({"RANKS": "two"}, "RANKS=two: it must be a number"),
        ({"NODES": "x"}, "NODES=x: it must be a number"),
    ):
        done = subprocess.run(launcher, env=env | variables, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_the_crash_of_torch_at_the_highest_debug_level_is_named(demo_shards: Path, tmp_path: Path) -> None:
    env = environment() | {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
    command = train_command(2, *flags(demo_shards, tmp_path / "run"))
    done = subprocess.run(command, env=env, capture_output=True, text=True)  # torch reads it when it is imported
    assert done.returncode != 0 and "error: TORCH_DISTRIBUTED_DEBUG=DETAIL: torch's DDP crashes" in done.stderr


@pytest.mark.system
@pytest.mark.parametrize("command", ["train", "doctor"])
def test_one_process_needs_no_network_and_no_name(command: str, demo_shards: Path, tmp_path: Path) -> None:
    require(("unshare",), ("unshare", "--net", "--uts", "true"))
    words = module(f"dist_dcgan.{command}", *flags(demo_shards, tmp_path / "run"))
    nowhere = ["unshare", "--net", "--uts", "bash", "-c", 'hostname nowhere-7; exec "$@"', "_"]
    done = subprocess.run([*nowhere, *words], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.system
def test_one_machine_needs_no_name_that_resolves(demo_shards: Path, tmp_path: Path) -> None:
    require(("unshare",), ("unshare", "--uts", "true"))
    nowhere = ["unshare", "--uts", "bash", "-c", 'hostname nowhere-7; exec "$@"', "_"]
    torchrun = module("torch.distributed.run", "--local-addr=localhost", "--nproc_per_node=2", "-m", "dist_dcgan.train")
    env = environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RANKS": "2"}
    for name, words in {"launcher": ["bash", str(ROOT / "launch" / "torchrun.sh")], "torchrun": torchrun}.items():
        run_dir = tmp_path / name
        command = [*nowhere, *words, *flags(demo_shards, run_dir)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and metrics(run_dir)[-1]["step"] == 2, done.stderr


@pytest.mark.system
@pytest.mark.parametrize("command", ["train", "doctor"])
def test_a_user_without_a_home_and_an_entry_in_passwd(command: str, demo_shards: Path, tmp_path: Path) -> None:
    somebody = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"]
    somebody += [
        "--inh-caps=+dac_override",
        "--ambient-caps=+dac_override",
        "env",
        "-u",
        "HOME",
    ]  # may read this checkout
    require(("setpriv",), [*somebody, "true"])
    words = [*somebody, *module(f"dist_dcgan.{command}", *flags(demo_shards, tmp_path / "run"))]
    if command == "doctor":
        words += ["--wandb", "auto"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "name", ["a,b", "2024", "[x]", "{x}", "null", 'a"b', "a\\", '\\"', " a ", "true", "ä🛏", "\udcff", "''"]
)
def test_a_folder_of_any_name_can_be_given(name: str) -> None:
    """Also as one of several, which a library would read as a list of its own syntax."""
    assert parse_flags(report.Report, [name, "b"], "x")["run_dirs"] == [name, "b"]
