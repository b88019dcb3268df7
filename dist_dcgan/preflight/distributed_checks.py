"""Checks across ranks: process group, all-reduce, and a training step."""

from __future__ import annotations

import hashlib
import os
import resource
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch import Tensor

from dist_dcgan.data.reader import ShardReader
from dist_dcgan.distributed.launch import launched
from dist_dcgan.distributed.world import World, process_group
from dist_dcgan.preflight.results import Finding, Subject, counted, gathered
from dist_dcgan.preflight.storage import gradient_elements
from dist_dcgan.random_streams import normal, stream_seed
from dist_dcgan.run.directory import RunDirectory
from dist_dcgan.training.graph import prepare_step, training_stream
from dist_dcgan.training.quality import QualityMeter
from dist_dcgan.training.steps import is_out_of_memory, memory_remedy
from dist_dcgan.training.train_state import TrainState
from shards.common.errors import UserError

_SMALL_ELEMENTS = 256
_SMALL_REPEATS = 20
_LARGE_REPEATS = 3
_STEPS = 1
_STEPS_CUDA = 15
"""The last is timed. On several GPUs the first ones select algorithms, beyond the warm-up of `prepare_step`."""
_STEPS_FP16 = 17
"""Enough for the loss scale to fall from 2**16 to 1 if necessary."""
_NOTHING_TO_REDUCE = Finding("ok", "none: one rank exchanges nothing")


def join(timeout_seconds: float, stack: ExitStack) -> tuple[World, str | None]:
    """Join the other ranks until `stack` ends; if that fails, return a World without a group and the reason."""
    try:
        return stack.enter_context(process_group(timeout_seconds, "any")), None
    except (RuntimeError, ValueError, OSError, UserError) as error:  # torch's errors are RuntimeErrors
        launch = launched()
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        return World(launch.rank, launch.local_rank, launch.world_size, torch.device("cpu")), reason


def process_group_found(subject: Subject) -> Finding:
    """Report the ranks, hosts and backend of the process group."""
    world = subject.world
    if subject.lost is not None:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return Finding(
            "FAILED",
            f"{world.world_size} ranks do not find each other at {where}: {subject.lost}: is every node started, "
            "is the port open, does GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) name the network between them?",
        )
    if world.world_size == 1:
        return Finding("ok", f"1 rank on 1 host ({socket.gethostname()}), which needs no network")
    hosts = list(dict.fromkeys(gathered(world, socket.gethostname())))
    shown = ", ".join(hosts[:8]) + (", …" if len(hosts) > 8 else "")
    backend = "NCCL" if world.device.type == "cuda" else "gloo"
    found = f"{counted(world.world_size, 'rank')} on {counted(len(hosts), 'host')} ({shown}) over {backend}"
    return Finding("ok", found)


def all_reduce(subject: Subject) -> Finding:
    """Check and time an all-reduce of 1 KB."""
    if subject.world.world_size == 1:
        return _NOTHING_TO_REDUCE
    return Finding("ok", f"1 KB in {1000 * _seconds_of_sum(subject.world, _SMALL_ELEMENTS, _SMALL_REPEATS):.2f} ms")


def all_reduce_gradients(subject: Subject) -> Finding:
    """Check and time an all-reduce of as many values as a step has gradients."""
    if subject.world.world_size == 1:
        return _NOTHING_TO_REDUCE
    elements = gradient_elements(subject.config, subject.location.manifest.image_size)
    seconds = _seconds_of_sum(subject.world, elements, _LARGE_REPEATS)
    return Finding("ok", f"{4 * elements / 1e6:,.1f} MB, the gradients of a step, in {1000 * seconds:,.1f} ms")


def training_step(subject: Subject) -> Finding:
    """Build networks and optimizers and take some training steps on random images; time the last."""
    world, made = subject.world, subject.plan
    seconds = 0.0
    try:
        with training_stream(world.device):
            state = TrainState(subject.config, made, world, subject.location.manifest.image_size)
            take_step = prepare_step(state, subject.location.manifest.image_size)
            for _ in range(_steps(state)):
                images = _random_images(state, subject.location.manifest.image_size)
                started = _now(world)
                take_step(images)
                seconds = _now(world) - started
            state.assert_equal_strides()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory {memory_remedy(error, subject.config, made)}") from None
    subject.state = state
    rate = made.global_batch / seconds
    return Finding("ok", f"{seconds:.3f} s, {rate:,.0f} images/s over all ranks; peak memory {_peak(world)}")


def gradients(subject: Subject) -> Finding:
    """Check that every parameter has a finite gradient, the same on all ranks."""
    found: dict[str, Tensor] = {}
    for name, gradient in subject.state.gradients().items():
        if gradient is None:
            return Finding("FAILED", f"{name} got no gradient: a part of the network is cut off")
        if not torch.isfinite(gradient).all():
            return Finding("FAILED", f"the gradient of {name} is not finite: use --precision fp32")
        found[f"the gradient of {name}"] = gradient
    return _equal(found, subject.world)


def parameters(subject: Subject) -> Finding:
    """Check that all tensors of a checkpoint are the same on all ranks after these steps."""
    return _equal({f"after a step, {name}": tensor for name, tensor in subject.state.tensors().items()}, subject.world)


def scores(subject: Subject) -> Finding:
    """Load the feature network that scores images during training; every rank takes part."""
    meter = QualityMeter(subject.state, ShardReader(subject.location), RunDirectory(subject.config.run_dir))
    options = subject.config.quality
    if subject.state.plan.total_steps * subject.state.plan.global_batch < options.every_images:
        return Finding("ok", f"none: the run ends before {options.every_images:,} images")
    if meter.extractor is None:
        asked = "--quality.extractor is none" if options.extractor == "none" else "the `eval` extra is not installed"
        return Finding("ok", f"none: {asked}")
    return Finding("ok", f"every {options.every_images:,} images, by extractor {meter.extractor.name}")


def fingerprint(tensor: Tensor) -> str:
    """Return a short hash of a tensor's bits, independent of its memory format."""
    content = tensor.detach().cpu().reshape(-1).view(torch.uint8)  # in the order of indices
    return hashlib.sha256(content.numpy().tobytes()).hexdigest()[:12]


def _equal(tensors: Mapping[str, Tensor], world: World) -> Finding:
    equal = f", equal to the bit on {world.world_size} ranks" if world.world_size > 1 else ""
    same = {name: fingerprint(tensor) for name, tensor in tensors.items()}
    remedy = "its GPU, memory or network is at fault, or its software: take that node out and try again"
    return Finding("ok", f"{len(same)} tensors{equal}", same, remedy)


def _steps(state: TrainState) -> int:
    if state.precision == "fp16":
        return _STEPS_FP16
    return _STEPS_CUDA if state.world.device.type == "cuda" else _STEPS


def _random_images(state: TrainState, image_size: int) -> Tensor:
    key = stream_seed(state.config.seed, "preflight", state.step)
    noise = normal(key, state.slots, 3 * image_size * image_size, state.world.device).clamp_(-1, 1)
    return noise.view(-1, image_size, image_size, 3).permute(0, 3, 1, 2).to(state.dtype)


def _seconds_of_sum(world: World, elements: int, repeats: int) -> float:
    """Return the median seconds of an all-reduce; raises UserError if a sum is wrong."""
    expected = world.world_size * (world.world_size + 1) / 2
    seconds = []
    for _ in range(1 + repeats):  # the first opens connections
        content = torch.full((elements,), world.rank + 1.0, device=world.device)
        started = _now(world)
        dist.all_reduce(content)
        seconds.append(_now(world) - started)
        wrong = int((content != expected).sum())
        if wrong:
            example = content[content != expected][0]
            raise UserError(
                f"{wrong:,} of {elements:,} sums over the ranks are wrong, such as {example} for {expected}: "
                "the network, a GPU or its driver is at fault"
            )
    return sorted(seconds[1:])[repeats // 2]


def _now(world: World) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()


def _peak(world: World) -> str:
    """Return the peak memory so far: torch's on the GPU, or that of the process."""
    if world.device.type == "cuda":
        total = torch.cuda.get_device_properties(world.device).total_memory
        return f"{torch.cuda.max_memory_allocated(world.device) / 2**30:.2f} of {total / 2**30:.0f} GiB a GPU"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB a process"
