"""The checks of software and machine."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from dist_dcgan.config import Config, Invocation
from dist_dcgan.distributed.world import World
from dist_dcgan.preflight import machine
from dist_dcgan.preflight.results import Check, Finding, Subject, attempt
from dist_dcgan.preflight.run_checks import checks
from tests.support.subjects import ALONE, subject

KEY = "0123456789abcdef" * 3


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions that are put in the place of the real ones; an empty one is missing."""
    versions: dict[str, str] = {}
    real = metadata.version

    def version(package: str) -> str:
        if versions.get(package) == "":
            raise metadata.PackageNotFoundError(package)
        return versions.get(package) or real(package)

    asked = ["numpy>=1.26", "pillow>=12.2", "pytest>=99; extra == 'test'", "torch-fidelity>=0.4; extra == 'eval'"]
    asked.append("numpy>=99; sys_platform == 'plan9'")
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda package: asked)
    return versions


def test_a_requirement_below_its_floor_is_named_with_the_command(installed: dict[str, str]) -> None:
    installed |= {"numpy": "1.26", "pillow": "12.2.1"}
    assert machine.requirements(subject()) == Finding("ok", "2 packages, none below its floor")
    installed |= {"numpy": "1.9.3"}
    text = "numpy is 1.9.3, >=1.26 is needed: pip install -U 'numpy>=1.26'"
    assert machine.requirements(subject()) == Finding("FAILED", text)
    installed |= {"pillow": ""}
    found = machine.requirements(subject())
    assert found.text.endswith("; pillow is missing: pip install -U 'numpy>=1.26' 'pillow>=12.2'")


def test_a_missing_extra_is_a_warning_that_says_what_is_lost(installed: dict[str, str]) -> None:
    installed |= {"torch-fidelity": "0.4.0"}
    assert machine.eval_extra(subject()).level == "ok"
    installed |= {"torch-fidelity": ""}
    found = machine.eval_extra(subject())
    assert found.level == "warning"
    assert found.text.startswith("torch-fidelity is missing, so no scores in training")
    assert found.text.endswith("pip install -U -e '.[eval]'")


def test_without_the_distribution_its_requirements_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", mock.Mock(side_effect=metadata.PackageNotFoundError))
    assert machine.requirements(subject()).level == "warning"
    assert machine.eval_extra(subject()).level == "ok"


def test_a_python_below_its_floor_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.versions(subject()).level == "ok"
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    found = machine.versions(subject())
    assert found.level == "FAILED"
    assert "Python >=3.10 is needed" in found.text


def test_another_checkout_is_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(machine.__file__).parents[1]
    copy = Path(shutil.copytree(package, tmp_path / "dist_dcgan", ignore=shutil.ignore_patterns("__pycache__")))
    before = machine.versions(subject()).same["the code of dist_dcgan"]
    monkeypatch.setattr(machine, "__file__", str(copy / "preflight" / "machine.py"))
    assert machine.versions(subject()).same["the code of dist_dcgan"] == before
    (copy / "models" / "losses.py").write_text("# another\n")
    assert machine.versions(subject()).same["the code of dist_dcgan"] != before


def set_ranks_of_node(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    variables = {"RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "x", "MASTER_PORT": 1}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_more_ranks_than_gpus_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    set_ranks_of_node(monkeypatch, 4)
    text = "4 ranks on this node, but 2 GPUs: use --nproc_per_node=2"
    assert machine.devices(subject()) == Finding("FAILED", text)


def test_more_threads_than_cores_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    set_ranks_of_node(monkeypatch, 2)
    assert machine.threads(subject()) == Finding("ok", "2 ranks of 2 threads on 4 cores")
    set_ranks_of_node(monkeypatch, 3)
    found = machine.threads(subject())
    assert (found.level, found.text.split("; ")[1]) == ("warning", "set OMP_NUM_THREADS=1")
    set_ranks_of_node(monkeypatch, 5)
    assert machine.threads(subject()).text.endswith("; use --nproc_per_node=4")


@pytest.mark.skipif(sys.platform != "linux", reason="looks at Linux's /dev/shm")
def test_small_shared_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for mib, level in ((65, "ok"), (64, "warning"), (1, "warning")):
        usage = SimpleNamespace(total=mib << 20, free=0)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        found = machine.shared_memory(subject())
        assert found is not None and found.level == level
    assert found is not None and "--shm-size=1g" in found.text
    unlimited = SimpleNamespace(total=0, free=0)  # tmpfs with size=0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: unlimited)
    assert machine.shared_memory(subject()) == Finding("ok", "/dev/shm has no limit")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert machine.shared_memory(subject()) is None


@pytest.mark.parametrize(
    ("mode", "variables", "files", "expected"),
    [
        ("disabled", {"WANDB_API_KEY": KEY}, {}, ("ok", "disabled")),
        ("offline", {}, {}, ("ok", "offline")),
        ("auto", {}, {}, ("ok", "disabled, no key")),
        ("auto", {"WANDB_API_KEY": KEY}, {}, ("ok", "online, with the key of WANDB_API_KEY")),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, {}, ("ok", "offline, in the run directory")),
        ("online", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, {}, ("ok", "online, with")),
        ("online", {}, {}, ("warning", "online, but no key")),
        ("auto", {"WANDB_MODE": "online"}, {}, ("warning", "online, but no key")),
        ("auto", {}, {".netrc": f"machine api.wandb.ai login user password {KEY}"}, ("ok", "online, with the key of")),
        ("auto", {}, {".netrc": f"machine example.org login user password {KEY}"}, ("ok", "disabled, no key")),
        (
            "auto",
            {"WANDB_BASE_URL": "https://example.org"},
            {"_netrc": f"machine example.org login user password {KEY}"},
            ("ok", "online, with the key of"),
        ),
        ("auto", {}, {".config/wandb/settings": f"[default]\napi_key = {KEY}\n"}, ("ok", "online, with the key of")),
        ("auto", {}, {".config/wandb/settings": f"{KEY}", ".netrc": "machine"}, ("ok", "disabled, no key")),
    ],
)
def test_the_mode_of_wandb_is_told_and_no_key_is(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    mode: str,
    variables: dict[str, str],
    files: dict[str, str],
    expected: tuple[str, str],
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": str(tmp_path), **variables}.items():
        monkeypatch.setenv(name, value)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    found = machine.wandb(Subject(Config(wandb={"mode": mode}), Invocation(), ALONE))
    assert found.level == expected[0]
    assert found.text.startswith(expected[1])
    assert KEY not in found.text


@pytest.mark.parametrize("rank", range(4))
def test_a_check_of_a_disk_runs_where_the_table_says(rank: int) -> None:
    world = World(rank, rank % 2, 4, torch.device("cpu"))
    with ExitStack() as stack:
        elsewhere = {check.thing for check in checks(stack) if not check.runs_on(world)}
    of_rank_0 = {"run directory", "writing", "room", "W&B"}
    of_a_node = {"first shard", "cache"}
    assert elsewhere == (of_rank_0 if rank else set()) | (of_a_node if rank % 2 else set())
    check = Check("W&B", machine.wandb, ranks="rank 0")
    assert (attempt(check, Subject(Config(), Invocation(), world)) is None) == (rank > 0)
