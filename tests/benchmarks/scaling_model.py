"""Estimates steps on 1 to 512 GPUs from bytes, latencies and floating-point operations: a model, not a measurement.

    python -m tests.benchmarks.scaling_model [--achieved 0.25] [--launch-floor-ms 4] [--network-gb-per-s 40]

A step takes its compute, then its collectives:

    compute   = max(9.0 GFLOP x images per rank / (peak x achieved), launch floor)
    wire(n)   = 2 (g-1)/g x n / NVLink  +  2 (N-1)/N x n/g / network
    small(n)  = 6.8 us + 2 ((g-1) x 0.6 us + ceil(log2 N) x 5 us) + 4 x wire(n)
    large(n)  = 8.4 us + 2 ((g-1) x 4 us + ceil(log2 N) x 14 us) + wire(n)
    reduction = min(small, large), nothing for one rank

for n bytes over N nodes of g GPUs: summed up within the node, then between nodes each GPU its share, then spread within
the node. Small and large are NCCL's protocols LL (a tree of low latency, at a quarter of the bandwidth) and Simple.
The collectives are those that a step was seen to issue (`collectives.py`). All of batch norm's wait: what comes after
needs their result. Those of gradients are taken as not hidden behind the compute, as in one communicator they delay
the moments of the next layer; "at best" they hide behind the backward passes of which they are.

A step is never shorter than its share of the flag that stops a run, which goes round all ranks over TCP beside it.

Batch norm is taken to be this project's. torch's (`native`) speaks as often, but gathers in its forward pass
8 bytes a channel from every rank: 30 MB a step at 512 ranks and the paper's width.

Left out: differences between ranks in speed, feeding, logging, checkpoints, and other traffic in the network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import Field

from dist_dcgan.config import Config, make_plan
from dist_dcgan.training.stopping import steps_between_agreements
from dist_dcgan.training.train_state import TrainState
from shards.common.command_line import run
from tests.benchmarks.collectives import Collective, moments_and_gradients, one_of, recorded_step, reduce_at_once
from tests.benchmarks.command import Benchmark, options_of
from tests.benchmarks.tables import Row, markdown

FLOP_PER_IMAGE = 9.0e9
"""Of a step at the paper's width and 64x64 (`measuring.py` counts them), 11 passes of one network."""
HIDING_PASSES = 4 / 11
"""Share of the passes behind which gradients may hide: backward of D's fake half, and of G, 2 each."""
SMALL_WIRE = 4
"""Bytes on the wire per byte of a small reduction: each word travels with a flag, and by short messages."""
STRONG = (1, 2, 4, 8, 16, 32, 64, 128)
WEAK = (1, 8, 64, 512)


class Model(Benchmark):
    """Estimate steps on many GPUs."""

    achieved: float = Field(0.25, gt=0, le=1)
    """ASSUMED share of the peak rate that a step's compute reaches with many images per GPU."""
    launch_floor_ms: float = Field(4.0, ge=0)
    """ASSUMED least milliseconds of a step's compute, however few images: launching its kernels one by one."""
    peak_tflops: float = Field(989.0, gt=0)
    """Peak rate in bf16, dense: H100 SXM (NVIDIA, H100 data sheet)."""
    gpus_per_node: int = Field(8, ge=1)
    """GPUs of a node: DGX H100 (NVIDIA, DGX H100 data sheet)."""
    nvlink_gb_per_s: float = Field(360.0, gt=0)
    """GB/s each way of a GPU within a node: 450 nominal (H100 data sheet: 900 both ways), 0.8 ASSUMED."""
    network_gb_per_s: float = Field(40.0, gt=0)
    """GB/s each way of a GPU between nodes: 50 nominal (one NDR port of 400 Gb/s each, DGX H100), 0.8 ASSUMED."""
    small_base_us: float = Field(6.8, ge=0)
    """Microseconds of any small reduction; this and the next five: NCCL's own cost model, src/graph/tuning.cc."""
    small_nvlink_us: float = Field(0.6, ge=0)
    """Microseconds of a small reduction from one GPU of a node to the next."""
    small_network_us: float = Field(5.0, ge=0)
    """Microseconds of a small reduction from node to node."""
    large_base_us: float = Field(8.4, ge=0)
    """Microseconds of any large reduction."""
    large_nvlink_us: float = Field(4.0, ge=0)
    """Microseconds of a large reduction from one GPU of a node to the next."""
    large_network_us: float = Field(14.0, ge=0)
    """Microseconds of a large reduction from node to node."""
    stop_hop_us: float = Field(15.0, ge=0)
    """ASSUMED microseconds from rank to rank over TCP, for the flag that stops a run."""
    batch_per_rank: int = Field(128, ge=1)
    """Images per step and GPU in weak scaling."""


class Estimate(NamedTuple):
    """Seconds of one step."""

    compute: float
    moments: float
    gradients: float
    gradients_at_best: float
    """What of them cannot be hidden behind the compute."""
    stop_flag: float
    """From rank to rank and back, as a share of the steps for which it has time; shorter ones wait for it."""

    @property
    def total(self) -> float:
        """With nothing of the gradients hidden."""
        return max(self.compute + self.moments + self.gradients, self.stop_flag)

    @property
    def at_best(self) -> float:
        """With gradients hidden as far as they may be."""
        return max(self.compute + self.moments + self.gradients_at_best, self.stop_flag)


def main(argv: Sequence[str]) -> None:
    """Print both tables."""
    model = options_of(Model, argv)
    collectives = collectives_of_a_step()
    tables = {
        "Strong scaling, 128 images a step": table(model, collectives, {size: 128 // size for size in STRONG}),
        f"Weak scaling, {model.batch_per_rank} images per GPU": table(
            model, collectives, dict.fromkeys(WEAK, model.batch_per_rank)
        ),
    }
    assumed = f"{model.achieved:g} of the peak, at least {model.launch_floor_ms:g} ms of launches"
    for title, rows in tables.items():
        print(f"{title}: a model, nothing of it measured (H100; assumed {assumed})\n\n{markdown(rows)}\n")
    model.keep({"model": model.model_dump(exclude={"json_"})} | tables)


def collectives_of_a_step(width: int = Config().width) -> list[Collective]:
    """Return what one rank issues in a step; neither the number of ranks nor that of images changes it."""
    config = Config(width=width, batch_per_rank=1)
    with one_of(2) as world:
        state = TrainState(config, make_plan(config, 2, 2), world, 64)
        reduce_at_once(state)
        return recorded_step(state)


def table(model: Model, collectives: Sequence[Collective], images: Mapping[int, int]) -> list[Row]:
    """Return a row for each number of GPUs, by the images of each GPU; efficiency is against the first."""
    first, rate_of_first = next(iter(images)), 0.0
    rows: list[Row] = []
    for world_size, images_per_rank in images.items():
        step = estimate(model, collectives, world_size, images_per_rank)
        rate = world_size * images_per_rank / step.total
        rate_of_first = rate_of_first or rate
        ideal = rate_of_first * world_size / first
        rows.append(
            {
                "GPUs": world_size,
                "images per GPU": images_per_rank,
                "step, ms": 1e3 * step.total,
                "images/s": rate,
                "efficiency": rate / ideal,
                "at best": rate / ideal * step.total / step.at_best,
                "share of moments": step.moments / step.total,
                "share of gradients": step.gradients / step.total,
                "stop flag, ms": 1e3 * step.stop_flag,
            }
        )
    return rows


def estimate(model: Model, collectives: Sequence[Collective], world_size: int, images_per_rank: int) -> Estimate:
    """Return the seconds of a step of `images_per_rank` images on each of `world_size` GPUs."""
    rate = model.peak_tflops * 1e12 * model.achieved
    compute = max(FLOP_PER_IMAGE * images_per_rank / rate, model.launch_floor_ms / 1e3)
    moments, gradients = (
        sum(reduction_seconds(model, size, world_size) for size in sizes)
        for sizes in moments_and_gradients(collectives)
    )
    at_best = max(0.0, gradients - HIDING_PASSES * compute)
    # gloo sums up a single number in a ring: once round for the sum, once more to tell it (gloo/allreduce.cc).
    stop_flag = 2 * (world_size - 1) * model.stop_hop_us / 1e6 / steps_between_agreements(world_size)
    return Estimate(compute, moments, gradients, at_best, stop_flag)


def reduction_seconds(model: Model, size: int, world_size: int) -> float:
    """Return the seconds in which `world_size` GPUs sum up `size` bytes."""
    gpus = min(world_size, model.gpus_per_node)
    nodes, rest = divmod(world_size, gpus)
    assert rest == 0, f"{world_size} GPUs do not fill nodes of {gpus}"
    if world_size == 1:
        return 0.0
    hops, levels = 2 * (gpus - 1), 2 * math.ceil(math.log2(nodes))
    wire = hops / gpus * size / (model.nvlink_gb_per_s * 1e9)
    wire += 2 * (nodes - 1) / nodes * size / gpus / (model.network_gb_per_s * 1e9)
    small = model.small_base_us + hops * model.small_nvlink_us + levels * model.small_network_us
    large = model.large_base_us + hops * model.large_nvlink_us + levels * model.large_network_us
    return min(small / 1e6 + SMALL_WIRE * wire, large / 1e6 + wire)


if __name__ == "__main__":
    run(main)
