"""Each check sees what it is for, names the rank that has it, and leaves nobody waiting and nothing behind."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_dcgan.config import Config, Invocation, WandbOptions, make_plan
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.world import World, process_group
from dist_dcgan.preflight import distributed_checks, machine, storage
from dist_dcgan.preflight.results import Check, Finding, Subject, agree, attempt, examine_all
from dist_dcgan.preflight.run_checks import checks, examine
from dist_dcgan.run.checkpoint import Retention, load_newest, save_checkpoint
from dist_dcgan.run.export import export_generator
from dist_dcgan.training import steps
from dist_dcgan.training.train_state import TrainState
from shards.common.errors import UserError
from shards.common.locks import Lock
from shards.conversion.convert import Settings, convert
from shards.conversion.sources.lmdb_source import LmdbSource
from shards.manifest import read_manifest
from tests.support.commands import succeed, train_command
from tests.support.mistakes import flip_bit
from tests.support.ranks import run_ranks
from tests.support.shards_fixtures import contents
from tests.support.training import raw_discriminator

ALONE = World(0, 0, 1, torch.device("cpu"))
EMPTY: Mapping[str, Any] = MappingProxyType({})
KEY = "0123456789abcdef" * 3


def config(**options: Any) -> Config:
    return Config(width=4, global_batch=12, max_steps=20, wandb={"mode": "disabled"}, **options)


def subject(world: World = ALONE, **options: Any) -> Subject:
    return Subject(config(**options), Invocation(), world)


def with_data(path: Path, world: World = ALONE, data: Mapping[str, Any] = EMPTY, **options: Any) -> Subject:
    made = subject(world, data={"path": path, **data}, **options)
    made.location = Folder(path)
    made.plan = make_plan(made.config, world.world_size, made.location.manifest.samples)
    return made


def failure(check: Any, of: Subject) -> str:
    found = attempt(Check("thing", check), of)
    assert found is not None and found.level == "FAILED", found
    return found.text


# What all ranks make of what each has found.


def test_the_worst_counts_and_its_ranks_are_named() -> None:
    ok, bad = Finding("ok", "fine"), Finding("FAILED", "broken: mend it")
    assert agree([ok, ok]) == ok
    assert agree([None, ok]) == ok
    assert agree([None, None]) is None
    assert agree([ok, Finding("warning", "slow"), ok]) == Finding("warning", "rank 1: slow")
    assert agree([ok, bad, Finding("warning", "slow"), bad]) == Finding("FAILED", "ranks 1, 3: broken: mend it")
    assert agree([bad, bad]) == bad
    assert agree([bad, Finding("FAILED", "lost")]) == Finding("FAILED", "rank 0: broken: mend it; rank 1: lost")
    many = [ok, *(Finding("FAILED", f"number {number}") for number in range(5))]
    assert agree(many) == Finding("FAILED", "rank 1: number 0; rank 2: number 1; rank 3: number 2; and 2 more")


def test_the_rank_that_differs_from_most_is_named() -> None:
    def having(torch_version: str) -> Finding:
        return Finding("ok", "fine", {"python": "3", "torch": torch_version}, "install one")

    assert agree([having("2.10"), having("2.10")]) == Finding("ok", "fine")
    found = agree([having("2.9"), having("2.10"), having("2.10")])
    assert found == Finding("FAILED", "torch differs: rank 0 has 2.9, rank 1 has 2.10: install one")
    found = agree([having("2.9"), having("2.10")])
    assert found == Finding("FAILED", "torch differs: rank 1 has 2.10, rank 0 has 2.9: install one")
    found = agree([Finding("ok", "fine", {"torch": "2.9"}, "r"), Finding("ok", "fine", {"weight": "1"}, "r")])
    assert found is not None and found.level == "FAILED"


def test_what_needs_a_failed_check_is_skipped_and_the_rest_is_made() -> None:
    broken = mock.Mock(side_effect=ZeroDivisionError("by\n nought"))
    fine = mock.Mock(return_value=Finding("ok", "fine"))
    made = [Check("a", broken), Check("b", fine, ("a",)), Check("c", fine, ("b",)), Check("d", fine)]
    told: list[str] = []
    found = examine_all([*made, Check("e", lambda _: None)], subject(), lambda thing, _: told.append(thing))
    assert {thing: (finding.level, finding.text) for thing, finding in found.items()} == {
        "a": ("FAILED", "ZeroDivisionError: by nought"),
        "b": ("skipped", "it needs this first: a"),
        "c": ("skipped", "it needs this first: b"),
        "d": ("ok", "fine"),
    }
    assert told == ["a", "b", "c", "d"]


def test_every_need_is_a_check_before() -> None:
    before: set[str] = set()
    for check in checks(ExitStack()):
        assert set(check.needs) <= before
        before.add(check.thing)


# Software and machine.


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


# Data and disks.


@pytest.mark.parametrize("options", [{}, {"precision": "fp64", "model": {"kernel_size": 5, "latent_dim": 7}}])
def test_the_bytes_of_a_checkpoint_are_counted_exactly(options: dict[str, Any], tmp_path: Path) -> None:
    made = config(**options)
    with process_group(60, "cpu") as world:
        state = TrainState(made, make_plan(made, 1, 100), world, 64)
        tensors = state.tensors()
        assert storage.checkpoint_bytes(made, 64) == sum(tensor.nbytes for tensor in tensors.values())
        export_generator(tmp_path / "generator.safetensors", state.generator_ema, made, 64, 1)
        path = save_checkpoint(tmp_path, tensors, state.values(), Retention(1))
    written = sum(file.stat().st_size for file in path.iterdir())
    assert 0 < written - storage.checkpoint_bytes(made, 64) < 30_000  # names, shapes and counters
    exported = (tmp_path / "generator.safetensors").stat().st_size
    assert 0 < exported - storage.export_bytes(made, 64) / 2 < 5_000


def takes_exactly(count: int, check: Any, of: Subject) -> str:
    """Require that a check finds enough room in `count` bytes, and not in one less; return what it says then."""
    with mock.patch.object(shutil, "disk_usage", return_value=SimpleNamespace(total=1 << 50, free=count)):
        assert check(of) is not None
    with mock.patch.object(shutil, "disk_usage", return_value=SimpleNamespace(total=1 << 50, free=count - 1)):
        return failure(check, of)


def test_too_small_a_disk_fails_by_one_byte(demo_shards: Path, tmp_path: Path) -> None:
    of = with_data(demo_shards, run_dir=tmp_path / "no" / "run", checkpoint={"keep": 2})
    each, exports = storage.checkpoint_bytes(of.config, 64), storage.export_bytes(of.config, 64)
    text = takes_exactly(3 * each + exports, storage.room, of)
    assert text.startswith(f"no room at {tmp_path}/no/run: 3 checkpoints of {each:,} bytes and the generator take")
    assert text.endswith("use a smaller --checkpoint.keep, or another --run-dir")
    forever = with_data(demo_shards, run_dir=tmp_path, checkpoint={"keep": 2, "keep_every_steps": 5})  # of 20 steps
    takes_exactly(7 * each + exports, storage.room, forever)
    (tmp_path / "no" / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "no" / "run" / "checkpoints" / "there").write_bytes(bytes(1000))
    takes_exactly(3 * each + exports - 1000, storage.room, of)


def test_a_cache_has_room_for_what_it_may_hold(demo_shards: Path, tmp_path: Path) -> None:
    assert storage.cache(with_data(demo_shards)) is None
    total = sum(entry.bytes for entry in read_manifest(demo_shards).shards)
    for gigabytes, required in ((1.0, total), (5e-4, 500_000)):
        of = with_data(demo_shards, data={"cache_dir": tmp_path / "cache", "cache_gb": gigabytes})
        assert "a smaller --data.cache-gb" in takes_exactly(required, storage.cache, of)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_below_what_is_in_use_at_a_time_fails(demo_shards: Path, tmp_path: Path) -> None:
    of = subject(data={"path": demo_shards, "cache_dir": tmp_path / "cache", "cache_gb": 2e-4})
    with ExitStack() as stack:
        assert storage.data_set(of, stack).level == "ok"
        assert storage.plan(of).level == "ok"
        assert "data.cache_gb 0.0002 is too small" in failure(storage.cache, of)
    assert list(tmp_path.iterdir()) == []


def test_locks_that_hold_nobody_off_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.try_writing(tmp_path / "not" / "yet") == tmp_path
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with pytest.raises(UserError, match=f"file locks hold nobody off in {tmp_path}"):
        storage.try_writing(tmp_path / "not" / "yet")
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with pytest.raises(UserError, match="there are no file locks"):
        storage.try_writing(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_whose_folders_cannot_be_renamed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a checkpoint is; training would find out at the first one."""
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.is_dir():
            raise OSError(errno.ENOSYS, "Function not implemented")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    text = failure(storage.writing, subject(run_dir=tmp_path / "run"))
    assert text == f"run directory {tmp_path}/run cannot be used: Function not implemented: name another with --run-dir"
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_or_fails_to_sync_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(28, "No space left on device")))
    text = failure(storage.writing, subject(run_dir=tmp_path / "run"))
    assert text == f"run directory {tmp_path}/run cannot be used: No space left on device: name another with --run-dir"
    assert list(tmp_path.iterdir()) == []


def test_a_first_shard_that_is_damaged_is_named(demo_shards: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(demo_shards, tmp_path / "data"))
    sound = storage.first_shard(with_data(data))
    assert sound is not None
    first = data / sound.text.split(" matches its SHA-256: ")[0]
    flip_bit(first, 600)
    assert failure(storage.first_shard, with_data(data)).startswith(f"shard {first} is damaged: sha256 ")


def test_another_number_of_ranks_than_expected_fails(demo_shards: Path) -> None:
    of = with_data(demo_shards)
    of.invocation = Invocation(world_size=2)
    assert "this is one process without torchrun" in failure(storage.plan, of)


def test_a_run_that_is_there_is_looked_at_and_not_touched(
    demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--width", 4, "--global-batch", 12, "--wandb", "disabled", "--max-steps", 2, "--ema.statistics-images", 32]
    succeed(train_command(1, *flags, "--data", demo_shards, "--run-dir", tmp_path))
    before = contents(tmp_path)
    of, other = (with_data(demo_shards, run_dir=tmp_path, seed=seed, ema={"statistics_images": 32}) for seed in (0, 1))
    assert storage.run_directory(of) == Finding("ok", f"{tmp_path} holds this run, which goes on from step 2")
    assert "holds a run of another configuration (seed: 0 -> 1)" in failure(storage.run_directory, other)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("WANDB_RUN_ID", "another")
        found = load_newest(tmp_path / "checkpoints")
        assert found is not None
        found.values["wandb_run_id"] = "this"
        elsewhere.setattr(storage, "load_newest", lambda _: found)
        of.config = of.config.model_copy(update={"wandb": WandbOptions(mode="offline")})
        assert "is W&B's run this, but WANDB_RUN_ID is another" in failure(storage.run_directory, of)
    with Lock(tmp_path / "run.lock") as lock:
        assert lock.take()
        holder = (tmp_path / "run.holder.json").read_text()
        assert f"{tmp_path} is in use by {holder}: wait" in failure(storage.run_directory, of)
    of.invocation = Invocation(resume="never")
    assert "holds a run already" in failure(storage.run_directory, of)
    assert contents(tmp_path) == before


def test_small_windows_are_told(demo_shards: Path) -> None:
    assert storage.shuffling(with_data(demo_shards)) == Finding("ok", "among 96 images at a time (10 shards)")
    found = storage.shuffling(with_data(demo_shards, data={"window_shards": 2}))
    assert found.level == "ok"
    assert found.text.endswith("few batches of 12: a larger --data.window-shards shuffles better")


# The ranks together.


def examined(data: Path, run_dir: Path, timeout_seconds: float = 60) -> dict[str, Finding]:
    made = config(data={"path": data}, run_dir=run_dir, distributed={"timeout_seconds": timeout_seconds})
    return examine(made, Invocation(), lambda *_: None)


def with_a_step_of_its_own(
    data: Path, run_dir: Path, rank: int, step: Callable[[TrainState, Tensor], steps.Metrics], timeout_seconds: float
) -> dict[str, Finding]:
    """One rank takes `step` for its step."""

    def train_step(state: TrainState, images: Tensor) -> steps.Metrics:
        return (step if state.world.rank == rank else steps.train_step)(state, images)

    with mock.patch("dist_dcgan.training.graph.train_step", train_step):
        return examined(data, run_dir, timeout_seconds)


def another_gradient(state: TrainState, images: Tensor) -> steps.Metrics:
    """One element of it differs, by less than a comparison with tolerance would see."""
    metrics = steps.train_step(state, images)
    gradient = state.generator.get_parameter("layers.0.weight").grad
    assert gradient is not None
    gradient[0, 0, 0, 0] *= 1 + 2**-22
    return metrics


def no_memory(state: TrainState, images: Tensor) -> steps.Metrics:
    """The other ranks wait for this one in a collective."""
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")


def with_a_raw_discriminator(data: Path, run_dir: Path) -> dict[str, Finding]:
    with raw_discriminator():
        return examined(data, run_dir)


def with_data_of_its_own(data: Path, other: Path, run_dir: Path) -> dict[str, Finding]:
    return examined(other if os.environ["RANK"] == "1" else data, run_dir)


def test_a_rank_with_another_gradient_is_named(demo_shards: Path, tmp_path: Path) -> None:
    results = run_ranks(3, with_a_step_of_its_own, demo_shards, tmp_path / "run", 1, another_gradient, 60)
    for found in results:
        assert found["gradients"].level == "FAILED"
        assert found["gradients"].text.startswith("the gradient of generator.layers.0.weight differs: rank 1 has ")
        assert found["training step"].level == "ok"
    assert list(tmp_path.iterdir()) == []


def test_gradients_that_are_not_reduced_are_found(demo_shards: Path, tmp_path: Path) -> None:
    found = run_ranks(2, with_a_raw_discriminator, demo_shards, tmp_path / "run")[0]
    assert found["gradients"].text.startswith("the gradient of discriminator.layers.0.weight differs: rank 1 has ")
    assert found["parameters"].text.startswith("after a step, discriminator.layers.0.weight differs: rank 1 has ")


def test_a_rank_that_fails_leaves_nobody_waiting(demo_shards: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    results = run_ranks(2, with_a_step_of_its_own, demo_shards, tmp_path / "run", 1, no_memory, 3)
    assert time.monotonic() - started < 60
    for found in results:
        step = found["training step"]
        assert step.level == "FAILED"
        assert "rank 1: out of memory with 6 images per rank at width 4: use more ranks, or a smaller" in step.text
        assert "rank 0: " in step.text
        assert [found[thing].level for thing in ("gradients", "parameters", "scores")] == ["skipped"] * 3
        assert found["writing"].level == "ok"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("none", r"rank 1: no data set at .*none: make one with"),
        ("other", r"the digest of the data set differs: rank 1 has .*: copy one data set to all nodes$"),
    ],
)
def test_a_rank_without_the_data_set_of_the_others_is_named_and_all_skip_alike(
    demo_shards: Path, demo_lmdb: Path, tmp_path: Path, other: str, said: str
) -> None:
    convert([LmdbSource(demo_lmdb)], tmp_path / "other", Settings(samples_per_shard=20), workers=1)
    results = run_ranks(2, with_data_of_its_own, demo_shards, tmp_path / other, tmp_path / "run")
    mine, others = ({thing: finding.level for thing, finding in found.items()} for found in results)
    assert mine == others
    assert results[0]["data set"].level == "FAILED" and re.match(said, results[0]["data set"].text)
    assert results[0]["first shard"] == Finding("skipped", "it needs this first: data set")
    assert results[0]["all-reduce"].level == "ok"


def test_ranks_that_do_not_find_each_other_are_told_and_the_rest_is_checked(
    demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("dist_dcgan.distributed.world.MEETING_SECONDS", 1.0)
    found = examined(demo_shards, tmp_path / "run", timeout_seconds=1)
    assert found["process group"].level == "FAILED"
    assert found["process group"].text.startswith("2 ranks do not find each other at 127.0.0.1:0: ")
    assert found["all-reduce"] == Finding("skipped", "it needs this first: process group")
    assert found["training step"].level == "skipped"
    assert [found[thing].level for thing in ("data set", "plan", "run directory", "room")] == ["ok"] * 4


def test_a_sum_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    of = subject(World(0, 0, 2, torch.device("cpu")))
    monkeypatch.setattr(dist, "all_reduce", lambda content: content.fill_(3))
    assert distributed_checks.all_reduce(of).text.startswith("1 KB in ")
    monkeypatch.setattr(dist, "all_reduce", lambda content: content.fill_(3)[5].add_(1))
    text = failure(distributed_checks.all_reduce, of)
    assert text.startswith("1 of 256 sums over the ranks are wrong, such as 4.0 for 3.0: ")


def test_gradients_that_are_missing_or_not_finite_are_named(demo_shards: Path) -> None:
    with process_group(60, "cpu") as world:
        of = with_data(demo_shards, world)
        assert distributed_checks.training_step(of).level == "ok"
        assert distributed_checks.gradients(of) == Finding("ok", "24 tensors", mock.ANY, mock.ANY)
        assert of.state is not None
        weight = of.state.discriminator.get_parameter("layers.2.weight")
        assert weight.grad is not None
        weight.grad[0, 0, 0, 0] = float("nan")
        text = "the gradient of discriminator.layers.2.weight is not finite: use --precision fp32"
        assert distributed_checks.gradients(of) == Finding("FAILED", text)
        weight.grad = None
        assert distributed_checks.gradients(of).text.startswith("discriminator.layers.2.weight got no gradient")


def test_a_fingerprint_is_of_the_values_whatever_their_strides() -> None:
    values = torch.randn(2, 3, 4, 4)
    assert distributed_checks.fingerprint(values) == distributed_checks.fingerprint(
        values.to(memory_format=torch.channels_last)
    )
    assert distributed_checks.fingerprint(values) != distributed_checks.fingerprint(values + 1e-6)
    assert distributed_checks.fingerprint(torch.tensor(1.0)) != distributed_checks.fingerprint(torch.tensor(2.0))


@pytest.mark.parametrize(
    ("precision", "device", "steps"), [("fp32", "cpu", 1), ("bf16", "cuda", 15), ("fp16", "cuda", 17)]
)
def test_the_step_that_is_timed_comes_after_the_warm_up(precision: str, device: str, steps: int) -> None:
    state = mock.Mock(precision=precision, world=World(0, 0, 1, torch.device(device)))
    assert distributed_checks._steps(state) == steps
