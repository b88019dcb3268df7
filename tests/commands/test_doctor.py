"""The doctor as people start it: a line for every check, status 0 or 2, and nothing left behind.

What each check finds: `tests/preflight`.
"""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.support.commands import environment, module, run, succeed
from tests.support.shards_fixtures import contents

FLAGS = ["--preset", "debug", "--width", 4, "--wandb", "disabled"]
OF_THE_MACHINE = {"eval extra", "threads", "shared memory"}
THINGS = [
    *("versions", "requirements", "eval extra", "devices", "threads", "shared memory"),
    *("process group", "all-reduce"),
    *("data set", "first shard", "plan", "shuffling", "cache", "run directory", "writing", "room", "W&B"),
    *("gradients' sum", "training step", "gradients", "parameters", "scores"),
]
"""Of the machine, of the ranks, of data and disks, of a step."""


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


@pytest.mark.parametrize(("ranks", "cached"), [(1, False), (2, True)])
def test_if_all_is_well_every_check_is_ok_and_nothing_is_left(
    demo_shards: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, ranks: int, cached: bool
) -> None:
    flags = [*FLAGS, "--data", demo_shards, "--run-dir", tmp_path / "deep" / "run"]
    flags += ["--data.cache-dir", tmp_path / "cache" / "of" / "shards", "--data.cache-gb", 0.1] if cached else []
    scratch = tmp_path_factory.mktemp("scratch")
    before = contents(demo_shards)
    done = succeed(doctor(ranks, *flags), env=environment() | {"TMPDIR": str(scratch)})
    rows = table(done)
    assert list(rows) == [thing for thing in THINGS if thing != "cache" or cached]
    assert {thing for thing, (level, _) in rows.items() if level != "ok"} <= OF_THE_MACHINE, done.stdout
    assert rows["process group"][1].startswith(f"{ranks} rank")
    assert rows["gradients"][1] == "24 tensors" + (", equal to the bit on 2 ranks" if ranks == 2 else "")
    assert rows["data set"][1].startswith("96 images of 64 pixels in 10 shards, digest ")
    assert rows["plan"][1] == f"20 steps of 16 images, {16 // ranks} per rank; 6 steps an epoch"
    assert 0 < float(rows["training step"][1].split()[0]) < 60
    assert contents(demo_shards) == before
    assert not list(tmp_path.iterdir())
    assert not list(scratch.rglob("*dist_dcgan*"))  # torchrun has folders there


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_fails_hides_nothing_that_can_do_without_it_and_is_summed_up_once(tmp_path: Path, ranks: int) -> None:
    (tmp_path / "file").write_text("mine")
    run_dir = tmp_path / "file" / "run"
    done = run(doctor(ranks, *FLAGS, "--data", "nowhere", "--run-dir", run_dir))
    rows = table(done)
    assert list(rows) == THINGS
    failed = [thing for thing, (level, _) in rows.items() if level == "FAILED"]
    assert failed == ["data set", "writing"], done.stdout + done.stderr
    assert rows["data set"][1].startswith("no data set at nowhere: make one with `python -m shards convert")
    assert rows["writing"][1].startswith(f"run directory {run_dir} cannot be used: Not a directory: name another")
    assert rows["plan"] == ("skipped", "it needs this first: data set")
    assert rows["training step"] == ("skipped", "it needs this first: plan")
    assert rows["all-reduce"][0] == rows["run directory"][0] == rows["W&B"][0] == "ok"
    assert done.returncode == (2 if ranks == 1 else 1)  # torchrun has a status of its own
    line = "error: 2 of 22 checks failed: data set, writing"
    assert [text for text in done.stderr.splitlines() if text.startswith("error: ")] == [line]
    assert "Traceback" not in done.stderr.partition(line)[0]
    assert [path.read_text() for path in tmp_path.rglob("*")] == ["mine"]
