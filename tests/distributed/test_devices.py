"""GPU or CPU, alike on all ranks, and what each thread and the process group make of a GPU."""

from __future__ import annotations

import threading
import weakref
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dist_dcgan.config import Config, make_plan
from dist_dcgan.data.loader import BatchLoader
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed import world
from dist_dcgan.distributed.devices import agreed_device, set_up
from dist_dcgan.distributed.peers import Peers, RankProcess
from dist_dcgan.distributed.world import World
from dist_dcgan.training.steps import is_out_of_memory
from shards.common.errors import UserError

GPU = torch.device("cuda", 3)


def processes(*gpus: int, each: int = 2) -> dict[int, RankProcess]:
    """`each` ranks per host, whose numbers of GPUs are given."""
    hosts = [(f"n{host}", local, count) for host, count in enumerate(gpus) for local in range(each)]
    return {
        rank: RankProcess(name, rank, "", name, local, count, "") for rank, (name, local, count) in enumerate(hosts)
    }


def test_every_rank_takes_its_gpu() -> None:
    assert [str(agreed_device(processes(2, 8), rank)) for rank in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]


def test_all_take_the_cpu_if_nobody_has_a_gpu() -> None:
    assert str(agreed_device(processes(0, 0), 3)) == "cpu"


def test_cpus_do_not_stand_in_for_gpus_that_a_job_holds() -> None:
    """One host was given some, so that a container without its GPUs does not train on the CPU for days."""
    found = processes(0, 0)
    found[2] = found[2]._replace(promised="0,1")
    for rank in range(4):
        with pytest.raises(UserError, match=r"^CUDA_VISIBLE_DEVICES=0,1 on host n1, but torch sees no GPU: .*--nv"):
            agreed_device(found, rank)
        assert str(agreed_device(found, rank, lenient=True)) == "cpu"


@pytest.mark.parametrize(("named", "is_refused"), [("0", True), ("", False), ("-1", False), ("NoDevFiles", False)])
def test_one_process_trains_on_the_cpu_if_no_gpu_is_named(
    named: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    expected = pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES={named} on") if is_refused else nullcontext()
    with expected, world.process_group(60) as alone:
        assert str(alone.device) == "cpu"
    with world.process_group(60, "any") as alone:
        assert str(alone.device) == "cpu"


@pytest.mark.parametrize(
    ("gpus", "text"),
    [
        ((8, 0, 8), r"^host n1 shows no GPU \(ranks 8-15\), the other ranks have one each: mend the driver there "),
        ((8, 4), r"^host n1 shows 4 GPUs for 8 ranks \(ranks 12-15\), .*: use --nproc_per_node=4$"),
        ((0, 1), r"^host n0 shows no GPU \(ranks 0-7\); host n1 shows 1 GPU for 8 ranks \(ranks 9-15\), .*: mend"),
        ((1,), r"^host n0 shows 1 GPU for 8 ranks \(ranks 1-7\), .*: use --nproc_per_node=1$"),
        ((8, *[0] * 7), r"host n5 .*\); and 2 more, the other ranks"),
    ],
)
def test_hosts_that_lack_gpus_are_named_on_all_ranks(gpus: tuple[int, ...], text: str) -> None:
    all_processes = processes(*gpus, each=8)
    for rank in (0, len(all_processes) - 1):
        with pytest.raises(UserError, match=text):
            agreed_device(all_processes, rank)
        assert str(agreed_device(all_processes, rank, lenient=True)) == "cpu"


def test_float32_on_a_gpu_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", mock.Mock())
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    set_up(torch.device("cpu"))
    assert torch.backends.cudnn.allow_tf32
    set_up(GPU)
    assert not torch.backends.cudnn.allow_tf32
    torch.cuda.set_device.assert_called_once_with(GPU)


def test_the_loaders_thread_takes_its_ranks_gpu_before_all_else(
    demo_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    def noting(name: str) -> Any:
        def call(argument: Any = None, **_: Any) -> Any:
            if threading.current_thread().name == "batch loader":
                calls.append((name, argument))
            return nullcontext()

        return call

    for name in ("set_device", "stream", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, noting(name))
    monkeypatch.setattr(torch.cuda, "Stream", mock.Mock())
    place = Folder(demo_shards)
    config = Config(global_batch=16)
    plan = make_plan(config, 1, place.manifest.samples)
    with BatchLoader(place, config, plan, World(0, 3, 1, GPU), 0) as batches, pytest.raises(RuntimeError):
        next(iter(batches))  # pinned memory needs a GPU
    assert [name for name, _ in calls] == ["set_device", "stream"]
    assert calls[0][1] == GPU


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """A default group over NCCL; `mock_calls` has what happens to it, in order."""
    group = mock.Mock()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_group", lambda: group.default)
    monkeypatch.setattr(dist, "init_process_group", group.init)
    monkeypatch.setattr(dist, "destroy_process_group", group.destroy)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    return group


def test_nccl_waits_longer_than_gloo_and_the_watch_explain(group: mock.Mock) -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    world._init(store, Peers(store, 0, 1), GPU, 60)
    assert group.init.call_args.args == ("cpu:gloo,cuda:nccl",)
    assert group.init.call_args.kwargs["timeout"] == timedelta(seconds=60)
    backend = group.default._get_backend
    backend.assert_called_once_with(GPU)
    backend.return_value._set_default_timeout.assert_called_once_with(timedelta(seconds=180))


@pytest.mark.parametrize("all_ranks_end", [False, True])
def test_a_rank_that_fails_alone_aborts_its_communicators_first(group: mock.Mock, all_ranks_end: bool) -> None:
    world._leave_group(all_ranks_end)
    aborted = [] if all_ranks_end else ["default._get_backend", "default._get_backend().abort"]
    assert [call[0] for call in group.mock_calls] == [*aborted, "destroy"]


class Recorded:
    """Stands for a recorded graph."""


@pytest.mark.parametrize("kind", [UserError, RuntimeError])
def test_what_an_error_left_behind_is_gone_before_the_group_is(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL waits for ever for the end of a graph that has recorded its calls."""
    kept: list[weakref.ref[Recorded]] = []
    alive: list[bool] = []

    def train() -> None:
        graph = Recorded()
        kept.append(weakref.ref(graph))
        try:
            raise OSError("disk full")
        except OSError as error:
            raise kind("not saved") from error

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(world, "_leave_group", lambda _: alive.append(kept[0]() is not None))
    with pytest.raises(kind), world._left_at_the_end(mock.Mock()):
        train()
    assert alive == [False]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_memory_that_runs_out_is_known_in_all_its_forms(error: RuntimeError) -> None:
    assert is_out_of_memory(error)


def test_other_errors_of_a_gpu_are_not_taken_for_it() -> None:
    assert not is_out_of_memory(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
