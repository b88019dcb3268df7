"""Two ranks: on one GPU over gloo, which copies CUDA tensors through the host; on two GPUs as training has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dist_dcgan.distributed.world import World, process_group
from tests.gpu.items import Context, Figures, Skipped, kinds_on
from tests.gpu.training import Arrays, largest_difference, networks_after
from tests.support.ranks import run_ranks

RANKS = 2
STEPS = 5
_TIMEOUT = timedelta(seconds=60)


@contextmanager
def gloo_group(device: torch.device) -> Iterator[World]:
    """Join the other rank over gloo for CPU and CUDA tensors alike; ranks may share the device, which NCCL refuses."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield World(dist.get_rank(), dist.get_rank(), RANKS, device)
    finally:
        dist.destroy_process_group()


def check_two_ranks(context: Context) -> Figures:
    """Compare two ranks on one device with one, in float64, with every batch norm that runs here."""
    kinds = kinds_on(context.device)
    (alone,) = run_ranks(1, trained, context.device.type)
    both: list[dict[str, Arrays]] = run_ranks(RANKS, trained_on_one_device, context.device, kinds)
    figures: Figures = {}
    for kind in kinds:
        figures[f"{kind}_from_one_rank"] = largest_difference(both[0][kind], alone)
        figures[f"{kind}_between_ranks"] = largest_difference(both[0][kind], both[1][kind])
        assert figures[f"{kind}_from_one_rank"] <= 1e-9, f"{kind}: 2 ranks differ from 1: {figures}"
        assert figures[f"{kind}_between_ranks"] <= 1e-9, f"{kind}: the ranks differ: {figures}"
    return figures


def check_nccl_ranks(context: Context) -> Figures:
    """Compare two ranks as training starts them, over NCCL on two GPUs, with one."""
    if context.machine.gpus == 1:
        raise Skipped("needs two GPUs")
    (alone,) = run_ranks(1, trained, context.device.type)
    difference = max(largest_difference(rank, alone) for rank in run_ranks(RANKS, trained, context.device.type))
    assert difference <= 1e-9, f"2 ranks differ from 1 by {difference:.3g}"
    return {"largest_difference": difference}


def options_of(kind: str, sigma: float = 0.3) -> dict[str, Any]:
    """Return the options of a small training in float64."""
    small = {"width": 8, "global_batch": 8, "precision": "fp64", "noise": {"sigma": sigma}}
    return small | {"distributed": {"batchnorm": kind}}


def trained(device_type: str) -> Arrays:
    """Return what training leaves on this rank, started as torchrun does."""
    with process_group(60, device_type) as world:
        return networks_after(world, options_of("portable"), STEPS)


def trained_on_one_device(device: torch.device, kinds: list[str]) -> dict[str, Arrays]:
    """Return the same for each batch norm, with all ranks on one device."""
    with gloo_group(device) as world:
        return {kind: networks_after(world, options_of(kind), STEPS) for kind in kinds}
