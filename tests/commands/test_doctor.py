"""The doctor as people start it: a line for every check, status 0 or 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from dist_dcgan.data.order import SampleOrder
from shards.common.locks import Lock
from shards.manifest import read_manifest
from tests.support.commands import environment, module, run, succeed, train_command

FLAGS = ["--preset", "debug", "--width", 4, "--wandb", "disabled"]
OF_THE_MACHINE = {"eval extra", "threads", "shared memory"}
THINGS = [
    "versions",
    "requirements",
    "eval extra",
    "devices",
    "threads",
    "shared memory",
    "process group",
    "all-reduce",
    "data set",
    "first shard",
    "plan",
    "shuffling",
    "run directory",
    "writing",
    "room",
    "W&B",
    "gradients' sum",
    "training step",
    "gradients",
    "parameters",
    "scores",
]


def doctor(ranks: int, *flags: object) -> list[str]:
    if ranks == 1:
        return module("dist_dcgan.doctor", *flags)
    torchrun = ["--standalone", f"--nproc_per_node={ranks}", "-m", "dist_dcgan.doctor"]
    return module("torch.distributed.run", *torchrun, *flags)


def table(done: CompletedProcess[str]) -> dict[str, tuple[str, str]]:
    """Level and text of each thing."""
    rows = [(line[:8].strip(), line[9:24].strip(), line[25:]) for line in done.stdout.splitlines()]
    assert all(level in ("ok", "warning", "FAILED", "skipped") for level, _, _ in rows), done.stdout
    return {thing: (level, text) for level, thing, text in rows}


def failed(done: CompletedProcess[str], *things: str) -> dict[str, tuple[str, str]]:
    """The table, after requiring that these checks failed and no others, and that the last line says so once."""
    rows = table(done)
    assert [thing for thing, (level, _) in rows.items() if level == "FAILED"] == list(things), done.stdout + done.stderr
    assert done.returncode != 0
    line = f"error: {len(things)} of {len(rows)} checks failed: {', '.join(things)}"
    assert [text for text in done.stderr.splitlines() if text.startswith("error: ")] == [line]
    assert "Traceback" not in done.stderr.partition(line)[0]
    return rows


def files(*folders: Path) -> dict[str, bytes | None]:
    paths: Sequence[Path] = sorted(path for folder in folders for path in folder.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_where_all_is_well_every_check_is_ok_and_nothing_is_left(
    demo_shards: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, ranks: int, cached: bool
) -> None:
    flags = [*FLAGS, "--data", demo_shards, "--run-dir", tmp_path / "deep" / "run"]
    flags += ["--data.cache-dir", tmp_path / "cache" / "of" / "shards", "--data.cache-gb", 0.1] if cached else []
    scratch = tmp_path_factory.mktemp("scratch")
    before = files(demo_shards, tmp_path)
    done = succeed(doctor(ranks, *flags), env=environment() | {"TMPDIR": str(scratch)})
    rows = table(done)
    assert [thing for thing in rows if thing != "cache"] == THINGS
    assert ("cache" in rows) == cached
    assert {thing for thing, (level, _) in rows.items() if level != "ok"} <= OF_THE_MACHINE, done.stdout
    assert rows["process group"][1].startswith(f"{ranks} rank")
    assert rows["gradients"][1] == "24 tensors" + (", equal to the bit on 2 ranks" if ranks == 2 else "")
    assert rows["data set"][1].startswith("96 images of 64 pixels in 10 shards, digest ")
    assert rows["plan"][1] == f"20 steps of 16 images, {16 // ranks} per rank; 6 steps an epoch"
    assert 0 < float(rows["training step"][1].split()[0]) < 60
    assert files(demo_shards, tmp_path) == before
    assert [path for path in files(scratch) if "dist_dcgan" in path] == []  # torchrun has folders there


def test_missing_data_hides_nothing_that_can_do_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    run_dir = tmp_path / "file" / "run"
    rows = failed(run(doctor(1, *FLAGS, "--data", "nowhere", "--run-dir", run_dir)), "data set", "writing")
    assert list(rows) == [*THINGS[:12], "cache", *THINGS[12:]]
    assert rows["data set"][1].startswith("no data set at nowhere: make one with `python -m shards convert")
    assert rows["writing"][1].startswith(f"run directory {run_dir} cannot be used: Not a directory: name another")
    assert rows["plan"] == ("skipped", "it needs this first: data set")
    assert rows["training step"] == ("skipped", "it needs this first: plan")
    assert rows["all-reduce"][0] == rows["run directory"][0] == rows["W&B"][0] == "ok"
    assert files(tmp_path) == {str(tmp_path / "file"): b"mine"}


def test_a_damaged_shard_is_named(demo_shards: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(demo_shards, tmp_path / "data"))
    first = data / read_manifest(data).shards[SampleOrder(read_manifest(data), 0, 16).window(0).shards[0]].name
    content = bytearray(first.read_bytes())
    content[600] ^= 1
    first.write_bytes(content)
    rows = failed(run(doctor(1, *FLAGS, "--data", data, "--run-dir", tmp_path / "run")), "first shard")
    assert rows["first shard"][1].startswith(f"shard {first} is damaged: sha256 ")
    assert rows["training step"][0] == "ok"
    first.unlink()
    rows = failed(run(doctor(1, *FLAGS, "--data", data, "--run-dir", tmp_path / "run")), "data set")
    assert f"{first.name} is missing" in rows["data set"][1]


def test_a_batch_that_the_ranks_cannot_share_is_said_once(demo_shards: Path, tmp_path: Path) -> None:
    flags = [*FLAGS, "--data", demo_shards, "--run-dir", tmp_path / "run", "--global-batch", 7]
    rows = failed(run(doctor(2, *flags)), "plan")
    assert rows["plan"][1] == "global_batch 7 is not divisible by 2 ranks: use --global-batch 6 or 8"
    assert rows["room"] == ("skipped", "it needs this first: plan")
    assert rows["gradients' sum"][0] == "ok"


def test_a_run_directory_in_use_is_named_with_its_holder(demo_shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    holder = {"host": "elsewhere", "pid": 4711, "since": "2026-01-01"}
    (run_dir / "run.holder.json").write_text(json.dumps(holder))
    flags = [*FLAGS, "--data", demo_shards, "--run-dir", run_dir]
    with Lock(run_dir / "run.lock") as lock:
        assert lock.take()
        rows = failed(run(doctor(1, *flags)), "run directory")
    assert rows["run directory"][1].startswith(f"run directory {run_dir} is in use by {json.dumps(holder)}: wait")
    succeed(doctor(1, *flags))


def test_a_run_that_is_there_is_looked_at_and_not_touched(demo_shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    flags = [*FLAGS, "--data", demo_shards, "--run-dir", run_dir]
    succeed(train_command(1, *flags, "--max-steps", 2))
    before = files(run_dir)
    rows = table(succeed(doctor(1, *flags, "--max-steps", 4)))
    assert rows["run directory"][1] == f"{run_dir} holds this run, which goes on from step 2"
    rows = failed(run(doctor(1, *flags, "--seed", 1)), "run directory")
    assert "holds a run of another configuration (seed: 0 -> 1)" in rows["run directory"][1]
    rows = failed(run(doctor(1, *flags, "--resume", "never")), "run directory")
    assert "holds a run already" in rows["run directory"][1]
    assert files(run_dir) == before


def test_a_key_is_never_printed(demo_shards: Path, tmp_path: Path) -> None:
    key = "5ec2e7" * 7
    env = environment() | {"WANDB_API_KEY": key, "HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    flags = ["--preset", "debug", "--width", 4, "--data", demo_shards, "--run-dir", tmp_path / "run"]
    done = succeed(doctor(1, *flags, "--wandb", "auto"), env=env)
    assert table(done)["W&B"] == ("ok", "online, with the key of WANDB_API_KEY")
    assert key not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def test_a_misspelt_flag_gets_one_line(tmp_path: Path) -> None:
    done = run(doctor(1, "--dta", "x"), cwd=tmp_path, env=environment() | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == 2
    assert done.stderr.strip() == "error: unknown option --dta; did you mean --data? (--help lists them all)"


def test_another_number_of_ranks_than_expected_fails(demo_shards: Path, tmp_path: Path) -> None:
    flags = [*FLAGS, "--data", demo_shards, "--run-dir", tmp_path / "run", "--world-size", 2]
    assert "this is one process without torchrun" in failed(run(doctor(1, *flags)), "plan")["plan"][1]
