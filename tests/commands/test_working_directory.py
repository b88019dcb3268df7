"""The working directory may be somebody's: nothing in it is imported, and no settings in it are obeyed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dist_dcgan import train
from dist_dcgan.config import Config, Plan, from_command_line, to_yaml
from dist_dcgan.distributed.world import World
from dist_dcgan.loggers import pictures
from dist_dcgan.loggers.wandb_logger import WandbLogger
from dist_dcgan.loggers.wandb_settings import WandbRun
from dist_dcgan.run.directory import RunDirectory
from dist_dcgan.training.train_state import TrainState
from shards.common.environment import in_safe_directory
from shards.common.errors import UserError
from tests.commands.test_launch import launcher, script
from tests.support.commands import environment
from tests.support.http_server import Answer, serve
from tests.support.shards_fixtures import numbered, write_lmdb
from tests.support.wandb_fixtures import fake_client

ROOT = Path(__file__).parents[2]
RUN_MODULE = ROOT / "launch" / "run_module.py"
PLANTED = (
    *("runpy", "selectors", "pickle", "socket", "signal", "multiprocessing", "json", "random", "sitecustomize"),
    *("usercustomize", "torch", "numpy", "yaml", "pydantic", "PIL", "lmdb", "wandb", "dist_dcgan", "shards", "launch"),
)


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with modules, packages and scripts that leave `pwned`; at the end there must be none."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    code = f"open({str(tmp_path / 'pwned')!r}, 'a').write(__name__ + chr(10))\n"
    for name in PLANTED:
        (folder / f"{name}.py").write_text(code)
    for name in ("torchrun.sh", "train.sbatch", "evaluate.sbatch", "convert.sbatch"):
        script(folder / "launch" / name, f"touch {tmp_path}/pwned", "bash")
    (folder / "launch" / "run_module.py").write_text(code)
    monkeypatch.chdir(folder)
    yield folder
    assert not (tmp_path / "pwned").exists(), (tmp_path / "pwned").read_text()


def shell_environment(folder: Path, **variables: str) -> dict[str, str]:
    """The environment of a shell that finds the stand-ins in a folder, and this Python."""
    env = environment() | {"PYTHONPATH": str(ROOT)} | variables
    env.pop("PYTHONSAFEPATH", None)
    return env | {"PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"}


JOBS = """
import os
from shards.common.workers import map_in_order

def work(job, tick):
    return job, os.path.basename(os.getcwd())

if __name__ == "__main__":
    print(list(map_in_order(work, range(2), 2, print)))
"""


def test_workers_import_nothing_from_there(hostile: Path, tmp_path: Path) -> None:
    """They, and what multiprocessing starts beside them, are new Pythons; relative names stay those of the user."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "jobs.py").write_text(JOBS)
    env = shell_environment(tmp_path, PYTHONPATH=str(tmp_path / "site"))
    done = subprocess.run([sys.executable, RUN_MODULE, "jobs"], env=env, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[(0, 'theirs'), (1, 'theirs')]"


@pytest.mark.slow
def test_a_conversion_with_workers_imports_nothing_from_there(hostile: Path, tmp_path: Path) -> None:
    source = write_lmdb(tmp_path / "source", numbered(6))
    words = ["shards", "convert", os.path.relpath(source), "--out", "data", "--samples-per-shard", "2", "--workers=2"]
    subprocess.run([sys.executable, RUN_MODULE, *words], env=shell_environment(tmp_path), check=True)
    assert (hostile / "data" / "manifest.json").is_file()  # relative names are those of the working directory


def test_the_launcher_counts_gpus_and_starts_ranks_from_its_own_repository(hostile: Path, tmp_path: Path) -> None:
    script(tmp_path / "bin" / "torchrun", f'printf "%s\\n" "$@" > {tmp_path}/told', "bash")
    (tmp_path / "site").mkdir()
    count = "class cuda:\n    device_count = staticmethod(lambda: 3)\n"
    (tmp_path / "site" / "torch.py").write_text(count)  # takes the place of torch, which takes seconds to import
    env = shell_environment(tmp_path, PYTHONPATH=str(tmp_path / "site"))
    subprocess.run(launcher("torchrun.sh", "--dry-run"), env=env, check=True)
    told = (tmp_path / "told").read_text().splitlines()
    assert "--nproc_per_node=3" in told and told[-3:] == [str(RUN_MODULE), "dist_dcgan.train", "--dry-run"]


@pytest.mark.slow
def test_ranks_of_the_launcher_import_nothing_from_there(hostile: Path, tmp_path: Path, demo_shards: Path) -> None:
    words = ["--preset", "debug", "--data", str(demo_shards), "--run-dir", str(tmp_path / "run"), "--max-steps", "2"]
    env = shell_environment(tmp_path, RANKS="2", RESTARTS="0")
    subprocess.run(launcher("torchrun.sh", *words, "--wandb", "offline"), env=env, check=True)
    assert (tmp_path / "run" / "generator_ema.json").is_file()


@pytest.mark.parametrize("name", ["train.sbatch", "evaluate.sbatch", "convert.sbatch"])
def test_a_job_runs_what_is_beside_its_own_script(name: str, hostile: Path, tmp_path: Path) -> None:
    """SLURM runs a copy, and knows the original with the arguments behind it."""
    own = tmp_path / "own place"
    own.mkdir()
    (own / name).write_bytes((ROOT / "launch" / name).read_bytes())
    script(own / "torchrun.sh", f"echo here >> {tmp_path}/ran", "bash")
    (own / "run_module.py").write_text(f"print('here', file=open({str(tmp_path / 'ran')!r}, 'a'))")
    copy = tmp_path / "spool" / "slurm_script"
    script(copy, "", "bash")
    copy.write_bytes((own / name).read_bytes())
    command = f"{own}/{name} --data a b*c"
    script(tmp_path / "bin" / "scontrol", f"printf 'JobId=7 JobName=x\\n   Command=%s\\n   WorkDir=/x\\n' '{command}'")
    script(tmp_path / "bin" / "srun", 'while [ "$1" != bash ]; do shift; done; exec "$@"')
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"}
    subprocess.run(["/bin/bash", copy, "--data", "a b*c"], env=shell_environment(tmp_path, **job), check=True)
    assert set((tmp_path / "ran").read_text().splitlines()) == {"here"}


def test_wandb_runs_where_nobody_else_puts_settings_and_imports_what_training_does(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_CONFIG_DIR", "conf")
    fake_client(tmp_path / "client", "import", monkeypatch)
    told = "raise RuntimeError(f'{os.getcwd()} {os.environ[\"WANDB_CONFIG_DIR\"]} {os.path.abspath(os.curdir)}')"
    (tmp_path / "client" / "wandb" / "__init__.py").write_text(f"import os\n{told}\n")
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    logger = WandbLogger(run, WandbRun("online", "p", "n", "abc", "allow"))
    logger.close()
    assert f"RuntimeError('/ {hostile}/conf /')" in capfd.readouterr().err


@pytest.mark.slow
def test_no_settings_of_others_name_the_server_that_gets_the_key(
    hostile: Path, tmp_path: Path, demo_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real client; the settings of the user are obeyed, those in the working and in the run directory are not."""
    for name in [name for name in os.environ if name.startswith(("WANDB", "XDG"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    refused = Answer(status=401, headers={"Content-Length": "0"})
    with serve(refused) as mine, serve(refused) as theirs:
        for folder, server in ((tmp_path / "home/.config", mine), (hostile, theirs), (tmp_path / "run", theirs)):
            (folder / "wandb").mkdir(parents=True)
            address = server.address.removesuffix("/scenes/")
            (folder / "wandb" / "settings").write_text(f"[default]\nbase_url = {address}\n")
        (tmp_path / "run" / "config.yaml").write_text(to_yaml(from_command_line(["--preset", "debug"])[0]))
        words = [
            "--preset",
            "debug",
            "--data",
            str(demo_shards),
            "--run-dir",
            str(tmp_path / "run"),
            "--max-steps",
            "2",
        ]
        train.main([*words, "--wandb", "online"])
        assert mine.requests and not theirs.requests


def test_matplotlib_is_imported_where_nobody_else_puts_its_settings(
    hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[str] = []
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    monkeypatch.setattr(pictures, "import_module", lambda _: places.append(os.getcwd()))
    pictures.import_matplotlib()
    assert (places, os.getcwd()) == (["/"], str(hostile))


def test_pythons_that_torch_starts_to_compile_do_not_search_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.10 does not know the variable."""
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    config = Config(width=4, global_batch=8, compile=True)
    TrainState(config, Plan(1, 8, 1, 1), World(0, 0, 1, torch.device("cpu")), 32)
    assert os.environ["PYTHONSAFEPATH"] == "1"


def test_the_working_directory_comes_back_after_an_error(hostile: Path) -> None:
    with pytest.raises(ZeroDivisionError), in_safe_directory() as before:
        assert (before, os.getcwd()) == (str(hostile), "/")
        raise ZeroDivisionError
    assert os.getcwd() == str(hostile)


def test_a_working_directory_that_has_gone_is_told(hostile: Path) -> None:
    (hostile / "gone").mkdir()
    os.chdir(hostile / "gone")
    try:
        (hostile / "gone").rmdir()
        with pytest.raises(UserError, match="start in a folder that you may enter"), in_safe_directory():
            pass
    finally:
        os.chdir(hostile)
