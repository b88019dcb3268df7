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

from dist_dcgan.config import Config, make_plan
from dist_dcgan.data.loader import Batch, BatchLoader, to_images
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.world import World, process_group
from dist_dcgan.metrics.extractors import load_extractor
from dist_dcgan.models.batchnorm import CrossRankBatchNorm, DirectBatchNorm
from dist_dcgan.random_streams import bits, normal, stream_seed
from tests.benchmarks.measuring import constant_images
from tests.gpu.commands import ROOT
from tests.gpu.training import Arrays, largest_difference, networks_after
from tests.gpu.waiting import sync_mode
from tests.support.primitives import primitives_stood_in
from tests.support.ranks import run_ranks

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="needs CUDA")]
several = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
OWN = (CrossRankBatchNorm, DirectBatchNorm)


def steps(options: dict[str, Any], count: int) -> Arrays:
    """Networks after `count` steps on constant images, each rank on its slice of them."""
    with process_group(60) as world:
        assert world.device.type == "cuda"
        return networks_after(world, {"width": 16, "global_batch": 8, "noise": {"sigma": 0.3}} | options, count)


def trained_once(
    layer: nn.BatchNorm2d, values: Tensor, gradient: Tensor, across_ranks: bool = False
) -> dict[str, Tensor]:
    """What one forward and backward leave; with `across_ranks`, the way that several ranks take, even alone."""
    leaf = values.clone().requires_grad_()
    if across_ranks:
        assert isinstance(layer, OWN)
        output = layer._across_ranks(leaf)
    else:
        output = layer(leaf)
    output.backward(gradient)
    leaves = {"input": leaf, "weight": layer.weight, "bias": layer.bias}
    gradients = {name: each.grad for name, each in leaves.items() if each.grad is not None}
    assert gradients.keys() == leaves.keys()
    return {"output": output.detach(), **gradients, **dict(layer.named_buffers())}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Assert that each tensor has the type of the other, and equals it within the rounding of `dtype`."""
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 2e-2)
    for name, other in expected.items():
        assert found[name].dtype == other.dtype, name
        assert (found[name] - other).double().norm() <= tolerance * other.double().norm(), name


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
@pytest.mark.parametrize("own", OWN)
def test_own_batch_norms_equal_torchs(
    own: type[CrossRankBatchNorm], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    layer, native, values, gradient = layers_and_values(own, dtype, memory_format)
    with process_group(60) if own is DirectBatchNorm else contextlib.nullcontext():
        ours = trained_once(layer, values, gradient, across_ranks=True)
    assert ours["output"].stride() == ours["input"].stride() == values.stride()
    assert_equal(ours, trained_once(native, values, gradient), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_torchs_kernels_compute_what_their_stand_ins_do(dtype: torch.dtype) -> None:
    """So that what CPU tests prove with the stand-ins holds for the kernels."""
    layer, _, values, gradient = layers_and_values(DirectBatchNorm, dtype, torch.channels_last)
    with process_group(60):
        kernels = trained_once(copy.deepcopy(layer), values, gradient, across_ranks=True)
        with primitives_stood_in():
            stand_ins = trained_once(layer, values, gradient, across_ranks=True)
    assert_equal(kernels, stand_ins, dtype)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("own", OWN)
def test_own_batch_norms_wait_for_the_gpu_nowhere(own: type[CrossRankBatchNorm], frozen: bool) -> None:
    layer = own(64, device="cuda").requires_grad_(not frozen)
    values = torch.randn(8, 64, 16, 16, device="cuda", requires_grad=True)
    gradient = torch.randn_like(values)
    with process_group(60):
        layer._across_ranks(values).backward(gradient)  # the communicator is made at its first use
        with sync_mode(values.device, "error"):
            layer._across_ranks(values).backward(gradient)


@several
@pytest.mark.parametrize("kind", ["portable", "direct"])
def test_own_and_native_batch_norm_train_alike_on_two_ranks(kind: str) -> None:
    own, native = (
        run_ranks(2, steps, {"precision": "fp64", "distributed": {"batchnorm": name}}, 3)[0]
        for name in (kind, "native")
    )
    assert largest_difference(own, native) <= 1e-6  # native moments are float32 at the last


def test_items_of_the_check_pass(tmp_path: Path) -> None:
    """Every precision trains; compiled networks and two ranks over NCCL compute the same; steps wait nowhere."""
    items = "check/precisions,check/compile,check/nccl_ranks,check/synchronisations"
    words = ["--part", "check", "--only", items, "--budget", "600", "--out", str(tmp_path / "out")]
    done = subprocess.run(["bash", "tests/gpu/run.sh", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "PASS check/precisions" in done.stdout, done.stdout + done.stderr


def test_batches_are_copied_beside_the_step_and_arrive_whole(demo_shards: Path) -> None:
    config = Config(data={"path": demo_shards, "prefetch": 8}, global_batch=48, max_steps=40)
    place, device = Folder(demo_shards), torch.device("cuda", 0)
    reader, plan = ShardReader(place), make_plan(config, 1, place.manifest.samples)
    busy, found = torch.rand(4096, 4096, device=device), []
    with BatchLoader(place, config, plan, World(0, 0, 1, device), 0) as batches:
        torch.cuda.synchronize()
        with sync_mode(device, "error"):
            for batch in batches:  # the stream of the step lags behind, while memory of earlier batches is used again
                busy = busy @ busy.T / 4096
                found.append((batch.samples, to_images(batch, torch.float32)))
                del batch
    for samples, images in found:
        pixels = np.empty((48, 64, 64, 3), dtype=np.uint8)
        reader.gather(samples, pixels)
        expected = to_images(Batch(0, samples, torch.from_numpy(pixels)), torch.float32)
        assert torch.allclose(images.cpu(), expected, atol=1e-6)


def test_random_numbers_are_those_of_the_cpu() -> None:
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
