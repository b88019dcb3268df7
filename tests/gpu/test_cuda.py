"""What needs CUDA: batch norm against torch's own, half precision, 1 = N over NCCL, compilation."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_dcgan.config import Config, NoiseOptions, make_plan
from dist_dcgan.data.loader import Batch, BatchLoader, to_images
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.world import World, process_group
from dist_dcgan.metrics.extractors import load_extractor
from dist_dcgan.models.batchnorm import CrossRankBatchNorm, DirectBatchNorm
from dist_dcgan.training.steps import train_step
from dist_dcgan.training.train_state import TrainState
from tests.support.primitives import primitives_stood_in
from tests.support.ranks import run_ranks

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="needs CUDA")]
several = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")


def constant_images(count: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    images = torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return images.to(device, dtype).contiguous(memory_format=torch.channels_last)


def steps(options: dict[str, Any], count: int) -> dict[str, np.ndarray]:
    """Final tensors of `count` steps on constant images, each rank on its slice of them."""
    config = Config(width=16, global_batch=8, noise=NoiseOptions(sigma=0.3), **options)
    with process_group(60) as world:
        assert world.device.type == "cuda"
        state = TrainState(config, make_plan(config, world.world_size, 100), world, 64)
        real = constant_images(8, world.device, state.dtype)[state.slots.start : state.slots.stop]
        for _ in range(count):
            metrics = train_step(state, real)
        state.assert_equal_strides()
        assert all(torch.isfinite(value) for value in metrics.values())
        return {name: tensor.detach().cpu().numpy().copy() for name, tensor in state.tensors().items()}


def largest_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    networks = [name for name in a if name.startswith(("generator", "discriminator"))]
    return max(float(np.abs(a[name] - b[name]).max()) for name in networks)


def trained_once(
    layer: nn.BatchNorm2d, values: Tensor, gradient: Tensor, across_ranks: bool = False
) -> dict[str, Tensor]:
    """What one forward and backward leave; with `across_ranks`, the way that several ranks take, even alone."""
    leaf = values.clone().requires_grad_()
    output = layer._across_ranks(leaf) if across_ranks else layer(leaf)
    output.backward(gradient)
    gradients = {"input": leaf.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    return {"output": output.detach(), **gradients, **dict(layer.named_buffers())}


def layers_and_values(
    own: type[nn.BatchNorm2d], dtype: torch.dtype, memory_format: torch.memory_format
) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d, Tensor, Tensor]:
    """Own and torch's layer with equal weights, an input and the gradient of its output."""
    torch.manual_seed(0)
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    native = nn.BatchNorm2d(64, device="cuda", dtype=parameters)
    nn.init.normal_(native.weight)
    layer = own(64, device="cuda", dtype=parameters)
    layer.load_state_dict(native.state_dict())
    values = torch.randn(32, 64, 16, 16, device="cuda", dtype=torch.float64).mul(2).add(3).to(dtype)
    values = values.contiguous(memory_format=memory_format)
    return layer, native, values, torch.randn_like(values)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own", [CrossRankBatchNorm, DirectBatchNorm])
def test_own_batch_norms_equal_torchs(
    own: type[CrossRankBatchNorm], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    layer, native, values, gradient = layers_and_values(own, dtype, memory_format)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 2e-2)
    with process_group(60) if own is DirectBatchNorm else contextlib.nullcontext():
        ours = trained_once(layer, values, gradient, across_ranks=True)
    assert ours["output"].stride() == ours["input"].stride() == values.stride()
    for name, theirs in trained_once(native, values, gradient).items():
        assert ours[name].dtype == theirs.dtype, name
        assert (ours[name] - theirs).double().norm() <= tolerance * theirs.double().norm(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_torchs_kernels_compute_what_their_stand_ins_do(dtype: torch.dtype) -> None:
    """So that what CPU tests prove with the stand-ins holds for the kernels."""
    layer, _, values, gradient = layers_and_values(DirectBatchNorm, dtype, torch.channels_last)
    with process_group(60):
        kernels = trained_once(copy.deepcopy(layer), values, gradient, across_ranks=True)
        with primitives_stood_in():
            stand_ins = trained_once(layer, values, gradient, across_ranks=True)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 2e-2)
    for name, expected in stand_ins.items():
        assert kernels[name].dtype == expected.dtype, name
        assert (kernels[name] - expected).double().norm() <= tolerance * expected.double().norm(), name


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("own", [CrossRankBatchNorm, DirectBatchNorm])
def test_own_batch_norms_wait_for_the_gpu_nowhere(own: type[CrossRankBatchNorm], frozen: bool) -> None:
    layer = own(64, device="cuda").requires_grad_(not frozen)
    values = torch.randn(8, 64, 16, 16, device="cuda", requires_grad=True)
    gradient = torch.randn_like(values)
    with process_group(60):
        layer._across_ranks(values).backward(gradient)  # the communicator is made at its first use
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer._across_ranks(values).backward(gradient)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@several
@pytest.mark.parametrize("kind", ["portable", "direct"])
def test_own_and_native_batch_norm_train_alike_on_two_ranks(kind: str) -> None:
    own, native = (
        run_ranks(2, steps, {"precision": "fp64", "distributed": {"batchnorm": name}}, 3)[0]
        for name in (kind, "native")
    )
    assert largest_difference(own, native) <= 1e-6  # native moments are float32 at the last


@several
def test_two_ranks_over_nccl_equal_one() -> None:
    options = {"precision": "fp64", "distributed": {"batchnorm": "portable"}}
    alone = run_ranks(1, steps, options, 5)[0]
    for rank in run_ranks(2, steps, options, 5):
        assert largest_difference(rank, alone) <= 1e-9


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("batchnorm", ["native", "direct", "portable"])
def test_every_precision_trains(precision: str, batchnorm: str) -> None:
    steps({"precision": precision, "distributed": {"batchnorm": batchnorm}}, 3)


def test_compiled_networks_train_alike() -> None:
    eager, compiled = (steps({"precision": "fp64", "compile": flag}, 2) for flag in (False, True))
    assert largest_difference(eager, compiled) <= 1e-9


def test_the_step_waits_for_the_gpu_nowhere() -> None:
    """With own batch norm; torch's own synchronises in every forward."""
    config = Config(width=16, global_batch=8, distributed={"batchnorm": "portable"})
    with process_group(60) as world:
        state = TrainState(config, make_plan(config, 1, 100), world, 64)
        real = constant_images(8, world.device, state.dtype)
        for _ in range(3):
            train_step(state, real)
        torch.cuda.set_sync_debug_mode("error")
        try:
            train_step(state, real)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_batches_are_copied_beside_the_step_and_arrive_whole(demo_shards: Path) -> None:
    config = Config(data={"path": demo_shards, "prefetch": 8}, global_batch=48, max_steps=40)
    place, device = Folder(demo_shards), torch.device("cuda", 0)
    reader, plan = ShardReader(place), make_plan(config, 1, place.manifest.samples)
    busy, found = torch.rand(4096, 4096, device=device), []
    with BatchLoader(place, config, plan, World(0, 0, 1, device), 0) as batches:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches:  # the stream of the step lags behind, while memory of earlier batches is used again
                busy = busy @ busy.T / 4096
                found.append((batch.samples, to_images(batch, torch.float32)))
                del batch
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for samples, images in found:
        pixels = np.empty((48, 64, 64, 3), dtype=np.uint8)
        reader.gather(samples, pixels)
        expected = to_images(Batch(0, samples, torch.from_numpy(pixels)), torch.float32)
        assert torch.allclose(images.cpu(), expected, atol=1e-6)


def test_random_numbers_are_those_of_the_cpu() -> None:
    from dist_dcgan.random_streams import bits, normal, stream_seed

    key = stream_seed(0, "z", 0)
    assert torch.equal(bits(key, range(4), 100, torch.device("cuda")).cpu(), bits(key, range(4), 100))
    difference = normal(key, range(4), 1000, torch.device("cuda")).cpu() - normal(key, range(4), 1000)
    assert difference.abs().max() <= 1e-5


def test_the_step_benchmark_runs(tmp_path: Path) -> None:
    arguments = ["--width", "16", "--batch", "16", "--rounds", "1", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run([sys.executable, "-m", "tests.benchmarks.step", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


def test_features_of_the_gpu_are_those_of_the_cpu() -> None:
    pixels = constant_images(8, torch.device("cpu"), torch.float32).add(1).mul(127.5).to(torch.uint8)
    cpu = load_extractor("efficientnet-lite0", None, torch.device("cpu")).features(pixels)
    gpu = load_extractor("efficientnet-lite0", None, torch.device("cuda")).features(pixels.cuda()).cpu()
    assert (cpu - gpu).norm() <= 1e-2 * cpu.norm()  # TF32 convolutions
