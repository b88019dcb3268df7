"""How fast is it here, against the loop that people have, and where does the time go?"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from dist_dcgan.config import Config, make_plan
from dist_dcgan.data.loader import BatchLoader, to_images
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.run.directory import RunDirectory
from dist_dcgan.training.graph import WARM_UP_STEPS, training_stream
from dist_dcgan.training.quality import QualityMeter
from dist_dcgan.training.train_state import TrainState
from tests.benchmarks.measuring import Call, Products, compute_dtype, constant_batch, images, pace, step_flops, timed
from tests.benchmarks.plain import PlainLoop
from tests.benchmarks.step import checkpoint_stall, our_step
from tests.gpu.across import LAYERS, across_ranks
from tests.gpu.commands import need_scores
from tests.gpu.graph import prepare
from tests.gpu.items import Context, Figures, Item, Skipped, need_compiler, need_norm, norm_kinds
from tests.gpu.training import make_state
from tests.gpu.waiting import synchronisations

PROFILED_STEPS = 3
LONGEST = 25
USES = {
    "batch norm": ("batch_norm",),
    "convolutions and products": ("xmma", "cudnn", "cutlass", "gemm", "conv"),
    "optimizers": ("FusedAdam", "fused_adam", "multi_tensor_apply"),
    "ranks": ("nccl",),
    "copies and casts": ("Memcpy", "Memset", "copy"),
    "sums": ("reduce_kernel",),
    "elementwise": ("elementwise",),
}
"""Words in the names of kernels, by what they are for; the first that fits."""


class Shape(NamedTuple):
    """Width of the networks and images per step."""

    width: int
    batch: int

    def __str__(self) -> str:
        return f"{self.width}x{self.batch}"


PAPER = Shape(128, 128)
SHAPES = (PAPER, Shape(128, 16), Shape(128, 512), Shape(64, 128))
TOY = Shape(8, 4)


def measure_ours(
    context: Context,
    shape: Shape,
    kind: str = "auto",
    *,
    recorded: bool = True,
    tune: bool = False,
    **options: Any,
) -> Figures:
    """Time this project's step, by replay of a graph or one kernel at a time, with a batch norm and other changes."""
    if kind != "auto":
        need_norm(kind, context.device)
    if "compile" in options:
        if context.device.type == "cpu":  # at this size it takes longer than all else
            raise Skipped("needs CUDA")
        need_compiler(context.device)
    shape = context.sized(shape, TOY)
    with cudnn(benchmark=tune), training_stream(context.device):
        step = step_of(context, shape, kind, recorded=recorded, **options)
        return figures_of(context, step, shape)


def measure_across(context: Context, shape: Shape, kind: str, *, recorded: bool) -> Figures:
    """Time the step with batch norms that exchange statistics as those of several ranks do, and count the waits."""
    need_norm(kind, context.device)
    with across_ranks(kind), training_stream(context.device):
        step = step_of(context, shape, "auto", recorded=recorded)
        figures = figures_of(context, step, shape)
        with synchronisations(context.device) as waits:
            for _ in range(PROFILED_STEPS):
                step()
    return figures | {"waits_per_step": sum(waits.values()) / PROFILED_STEPS}


def measure_plain(context: Context, shape: Shape, *, tuned: bool) -> Figures:
    """Time the loop that people have."""
    shape = context.sized(shape, TOY)
    layout = torch.channels_last if tuned else torch.contiguous_format
    real = images(shape.batch, context.device).contiguous(memory_format=layout)
    loop = PlainLoop(shape.width, context.device, tuned=tuned)
    with cudnn(allow_tf32=True):  # as torch has it, unless one asks for float32
        return figures_of(context, partial(loop.step, real), shape)


def measure_products(context: Context) -> Figures:
    """Find the best rate at which the device multiplies in the precision of training."""
    shape = context.sized(PAPER, TOY)
    dtype = compute_dtype(context.device)
    products = Products(shape.width, shape.batch, context.device, dtype, context.sized(None, 64))
    for _ in range(context.sized(5, 2)):
        products.measure()
    return {"tflops": products.best / 1e12, "shape": products.shape}


def profile_step(context: Context, kind: str) -> Figures:
    """Count the kernels of a step by what they do, and name those that take longest; on a CPU, its operations."""
    need_norm(kind, context.device)
    with training_stream(context.device):
        step = step_of(context, context.sized(PAPER, TOY), kind, recorded=False)
        timed(step, context.device, context.sized(3, 1))
        on_gpu = context.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            timed(step, context.device, PROFILED_STEPS)
    ms: Counter[str] = Counter()
    by_use: dict[str, list[float]] = {}
    for event in profiler.events() or []:
        if event.device_type.name == context.device.type.upper():
            took = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / PROFILED_STEPS
            ms[event.name] += took
            use = by_use.setdefault(use_of(event.name), [0.0, 0.0])
            use[0] += took
            use[1] += 1 / PROFILED_STEPS
    assert ms, "the profiler has seen nothing"
    return {
        "kernels_per_step": sum(kernels for _, kernels in by_use.values()),
        "device_ms_per_step": ms.total(),
        "ms_and_kernels_by_use": by_use,
        "longest": {name[:120]: spent / ms.total() for name, spent in ms.most_common(LONGEST)},
    }


def use_of(kernel: str) -> str:
    """Return what a kernel is for, by its name."""
    return next((use for use, words in USES.items() if any(word in kernel for word in words)), "other")


def measure_loader(context: Context) -> Figures:
    """Train from the loader and on one constant batch, at the narrow width, which asks most of the loader."""
    shape = context.sized(Shape(64, 128), TOY)
    place = Folder(context.data)
    config = Config(width=shape.width, global_batch=shape.batch, max_steps=1_000_000, data={"path": context.data})
    plan = make_plan(config, 1, place.manifest.samples)
    with training_stream(context.device):
        state = TrainState(config, plan, context.world, place.manifest.image_size)
        take_step = prepare(state, recorded=True)
        constant = pace(partial(take_step, constant_batch(state)), context.device, seconds_of(context))
        with BatchLoader(place, config, plan, context.world, 0) as loader:
            batches = iter(loader)
            fed = pace(lambda: take_step(to_images(next(batches), state.dtype)), context.device, seconds_of(context))
    return {
        "images_per_second": shape.batch / fed.seconds,
        "constant_images_per_second": shape.batch / constant.seconds,
        "ratio": constant.seconds / fed.seconds,
    }


def measure_checkpoint(context: Context) -> Figures:
    """Find how long a checkpoint at the paper's width holds up training."""
    shape = context.sized(PAPER, TOY)
    config = Config(width=shape.width, global_batch=shape.batch)
    plan = make_plan(config, 1, 10 * shape.batch)
    return {"stall_seconds": checkpoint_stall(config, plan, context.world, context.sized(3.0, 0.1))}


def measure_scores(context: Context) -> Figures:
    """Find how long scores hold up training, the first time and later, when the real images' features are known."""
    need_scores()
    count = context.sized(10_000, 16)
    quality = {"every_images": 1, "fakes": count, "reals": count, "extractor": "efficientnet-lite0", "time_share": 1}
    shape = context.sized(PAPER, TOY)
    config = Config(width=shape.width, global_batch=shape.batch, quality=quality, data={"path": context.data})
    place = Folder(context.data)
    step, state = our_step(config, make_plan(config, 1, place.manifest.samples), context.world)
    seconds = []
    with (
        tempfile.TemporaryDirectory(dir=context.folder) as folder,
        mock.patch.dict("os.environ", {"XDG_CACHE_HOME": folder}),
    ):
        meter = QualityMeter(state, ShardReader(place), RunDirectory(Path(folder)))
        for _ in range(context.sized(2, 1)):
            timed(step, context.device)
            started = time.perf_counter()
            assert meter.read(), "there is no score"
            seconds.append(time.perf_counter() - started)
    return {"first_seconds": seconds[0], "later_seconds": seconds[-1], "fakes": count}


@contextmanager
def cudnn(**flags: bool) -> Iterator[None]:
    """Set flags of `torch.backends.cudnn`."""
    before = {name: getattr(torch.backends.cudnn, name) for name in flags}
    for name, value in flags.items():
        setattr(torch.backends.cudnn, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(torch.backends.cudnn, name, value)


def figures_of(context: Context, step: Call, shape: Shape) -> Figures:
    """Time a step at its own pace, and return what the table of speeds needs."""
    measured = pace(step, context.device, seconds_of(context), context.sized(WARM_UP_STEPS, 1))
    figures: Figures = {
        "images_per_second": shape.batch / measured.seconds,
        "step_ms": 1e3 * measured.seconds,
        "host_ms": 1e3 * measured.host_seconds,
        "gflop_per_image": step_flops(shape.width, shape.batch) / shape.batch / 1e9,
    }
    return figures | ({} if measured.peak_bytes is None else {"peak_gib": measured.peak_bytes / 2**30})


def step_of(context: Context, shape: Shape, kind: str, *, recorded: bool, **options: Any) -> Call:
    """Return this project's step on constant images; call in `training_stream`."""
    usual = {"width": shape.width, "global_batch": shape.batch, "distributed": {"batchnorm": kind}}
    state = make_state(context.world, usual | options)
    return partial(prepare(state, recorded=recorded), constant_batch(state))


def seconds_of(context: Context) -> float:
    """Return the seconds of a measurement."""
    return context.sized(1.0, 0.02)


def _items_of(shape: Shape) -> list[Item]:
    """Return the items that time a step of one shape."""
    kinds = norm_kinds()
    runs: dict[str, Any] = {f"{kind}+graph": partial(measure_ours, kind=kind) for kind in kinds}
    runs |= {kind: partial(measure_ours, kind=kind, recorded=False) for kind in kinds}
    runs["plain"] = partial(measure_plain, tuned=False)
    runs["tuned"] = partial(measure_plain, tuned=True)
    runs["auto+graph+cudnn.benchmark"] = partial(measure_ours, tune=True)
    runs["auto+graph+fp16"] = partial(measure_ours, precision="fp16")
    runs["auto+graph+fp32"] = partial(measure_ours, precision="fp32")
    return [Item(f"speed/{shape}/{name}", partial(run, shape=shape), 15, "speed") for name, run in runs.items()]


def _items() -> list[Item]:
    first, *others = SHAPES
    across = {
        f"speed/{first}/{kind}+across{'+graph' if recorded else ''}": partial(
            measure_across, shape=first, kind=kind, recorded=recorded
        )
        for kind in LAYERS
        for recorded in (False, True)
    }
    return [
        *_items_of(first),
        Item("speed/products", measure_products, 15, "speed"),
        *(Item(f"speed/profile/{kind}", partial(profile_step, kind=kind), 15, "speed") for kind in norm_kinds()),
        *(Item(name, run, 15, "speed") for name, run in across.items()),
        Item("speed/loader", measure_loader, 15, "speed"),
        Item("speed/checkpoint", measure_checkpoint, 20, "speed"),
        Item("speed/scores", measure_scores, 40, "speed"),
        *(item for shape in others for item in _items_of(shape)),
        Item(f"speed/{first}/auto+graph+compile", partial(measure_ours, shape=first, compile=True), 60, "speed"),
    ]


ITEMS = _items()
