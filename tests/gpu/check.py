"""Is what the CPU shows also true on this GPU?"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dist_dcgan.config import Config, make_plan
from dist_dcgan.data.loader import BatchLoader, to_images
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed import world
from dist_dcgan.distributed.collectives import average_across_ranks, from_rank_zero
from dist_dcgan.distributed.peers import Peers
from dist_dcgan.distributed.world import World
from dist_dcgan.run.checkpoint import Retention, load_newest, save_checkpoint
from dist_dcgan.training.steps import train_step
from dist_dcgan.training.train_state import TrainState
from tests.gpu import commands
from tests.gpu.graph import check_equality
from tests.gpu.items import Context, Figures, Item, kinds_on, need_compiler, need_norm, norm_kinds
from tests.gpu.ranks import check_nccl_ranks, check_two_ranks, options_of
from tests.gpu.training import arrays, largest_difference, make_state, networks, networks_after, own_images, train
from tests.gpu.waiting import sync_mode, synchronisations

STEPS = 5
WARM_UP_STEPS = 12
"""DDP synchronises in its first 10 iterations."""
MAY_WAIT = ("native",)
"""Kinds of batch norm that are known to wait for the device; how often is counted."""


def check_against_cpu(context: Context) -> Figures:
    """Compare five steps in float64 with the CPU's, for every batch norm that runs here.

    Without noise, whose logarithms and cosines are taken in float32: they differ in the last bits between devices.
    """
    torch.set_num_threads(1)  # tensors are small, and other items use the other cores
    cpu_world = World(0, 0, 1, torch.device("cpu"))
    context.world  # noqa: B018  # the process group, which serves both devices
    expected = networks_after(cpu_world, options_of("portable", sigma=0), STEPS)
    figures: Figures = {
        kind: largest_difference(networks_after(context.world, options_of(kind, sigma=0), STEPS), expected)
        for kind in kinds_on(context.device)
    }
    assert all(difference <= 1e-9 for difference in figures.values()), f"parameters are off: {figures}"
    noisy = networks_after(cpu_world, options_of("portable"), STEPS)
    figures["with_noise"] = largest_difference(networks_after(context.world, options_of("portable"), STEPS), noisy)
    assert figures["with_noise"] <= 1e-5, f"parameters are off: {figures}"
    return figures


def check_repeats(context: Context) -> Figures:
    """Train twice in the default precision from the same seed: are the networks the same to the bit?"""
    options = {"width": context.sized(64, 8), "global_batch": context.sized(64, 8)}
    once, again = (networks_after(context.world, options, context.sized(20, 3)) for _ in range(2))
    return {"largest_difference": largest_difference(again, once)}


def check_precisions(context: Context) -> Figures:
    """Take steps in every precision with every batch norm: all metrics are finite, strides stay equal."""
    options = {"width": context.sized(32, 8), "global_batch": context.sized(32, 8)}
    tried = 0
    for precision in ("fp32", "bf16", "fp16"):
        for kind in kinds_on(context.device):
            networks_after(context.world, options | {"precision": precision, "distributed": {"batchnorm": kind}}, 3)
            tried += 1
    return {"combinations": tried}


def check_nccl(context: Context) -> Figures:
    """Make the process group of one rank as several have it, and use it with tensors of both devices."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    world._init(store, Peers(store, 0, 1), context.device, 60)
    try:
        values = torch.ones(4, device=context.device)
        dist.all_reduce(values)
        assert from_rank_zero(lambda: "rank 0") == "rank 0"
        assert average_across_ranks([{"value": values.sum()}]) == [{"value": 4.0}]
        return {"backend": str(dist.get_backend_config())}
    finally:
        dist.destroy_process_group()


def check_skipped_step(context: Context, kind: str) -> Figures:
    """Skip the update if a gradient is NaN, without a look at it by the host; the next step is taken."""
    need_norm(kind, context.device)
    state = make_state(context.world, _small(context, kind))
    real = own_images(state)
    train(state, real, WARM_UP_STEPS)
    before = networks(state)
    hooks = [next(net.parameters()).register_hook(_not_a_number) for net in (state.generator, state.discriminator)]
    with synchronisations(context.device) as waits:
        metrics = train_step(state, real)
    assert kind in MAY_WAIT or not waits, f"the host waits: {dict(waits)}"
    for hook in hooks:
        hook.remove()
    assert not torch.isfinite(metrics["grad_norm/g"]) and not torch.isfinite(metrics["grad_norm/d"])
    names = [f"generator.{name}" for name, _ in state.generator.named_parameters()]
    names += [f"discriminator.{name}" for name, _ in state.discriminator.named_parameters()]
    after = networks(state)
    assert all((before[name] == after[name]).all() for name in names), "a parameter has changed"
    assert torch.isfinite(train_step(state, real)["grad_norm/g"]), "the step after it is not finite"
    assert largest_difference(networks(state), after) > 0, "nothing is trained"
    return {"synchronisations": sum(waits.values())}


def check_save_and_load(context: Context) -> Figures:
    """Write a checkpoint, load it into a fresh state, and go on alike, with equal strides."""
    options = options_of("portable")
    state, fresh = make_state(context.world, options), make_state(context.world, options)
    real = own_images(state)
    train(state, real, STEPS)
    train_step(fresh, -real)  # other moments than those that are loaded
    folder = context.folder / "saved"
    save_checkpoint(folder, state.tensors(), state.values(), Retention(1))
    found = load_newest(folder)
    assert found is not None
    fresh.load_tensors(found.tensors)
    fresh.load_values(found.values)
    loaded = largest_difference(arrays(fresh.tensors()), arrays(state.tensors()))
    assert loaded == 0, f"what is loaded differs by {loaded:.3g}"
    for each in (state, fresh):
        train(each, real, STEPS)
    fresh.assert_equal_strides()
    difference = largest_difference(networks(fresh), networks(state))
    assert difference <= 1e-9, f"going on after loading differs by {difference:.3g}"
    return {"largest_difference": difference, "tensors": len(found.tensors)}


def check_synchronisations(context: Context, kind: str) -> Figures:
    """Count where the host waits for the GPU while steps follow each other on batches of the loader.

    Left out is what the loop does beside: the metrics, read every `log.every_steps`; checkpoints, grids and scores.
    Kinds that must not wait take a few more steps in the mode in which waiting is an error.
    """
    need_norm(kind, context.device)
    config = Config(data={"path": context.data}, max_steps=100, **_small(context, kind))
    place = Folder(context.data)
    plan = make_plan(config, 1, place.manifest.samples)
    state = TrainState(config, plan, context.world, place.manifest.image_size)
    with BatchLoader(place, config, plan, context.world, 0) as loader:
        batches = iter(loader)

        def steps(count: int) -> None:
            for _ in range(count):
                train_step(state, to_images(next(batches), state.dtype))

        steps(WARM_UP_STEPS)
        with synchronisations(context.device) as control:
            (state.inputs.ema_weight + 1).item()
        assert control, "waiting for the device is not seen"
        with synchronisations(context.device) as waits:
            steps(STEPS)
        if kind not in MAY_WAIT:
            assert not waits, f"the host waits: {dict(waits)}"
            with sync_mode(context.device, "error"):
                steps(STEPS)
    return {"synchronisations_per_step": sum(waits.values()) / STEPS, "places": dict(waits)}


def check_compile(context: Context) -> Figures:
    """Compare compiled networks with plain ones in float64."""
    need_compiler(context.device)
    plain, compiled = (
        networks_after(context.world, options_of("portable") | {"compile": flag}, 2) for flag in (False, True)
    )
    difference = largest_difference(compiled, plain)
    assert difference <= 1e-9, f"compiled networks differ by {difference:.3g}"
    return {"largest_difference": difference}


def _small(context: Context, kind: str) -> dict[str, Any]:
    return {
        "width": context.sized(32, 8),
        "global_batch": context.sized(32, 8),
        "distributed": {"batchnorm": kind},
    }


def _not_a_number(gradient: torch.Tensor) -> torch.Tensor:
    return gradient * float("nan")


def _items() -> list[Item]:
    kinds = norm_kinds()
    graphs = {
        f"{kind}/{precision}": partial(check_equality, precision=precision, kind=kind)
        for kind in kinds
        for precision in ("fp64", "auto", "fp16")
    }
    return [
        Item("check/train_kill_resume", commands.check_training, 75, "commands"),
        Item("check/sample", commands.check_sample, 30, "commands"),
        Item("check/evaluate", commands.check_evaluate, 45, "commands"),
        Item("check/nccl", check_nccl, 30, "step"),
        Item("check/against_cpu", check_against_cpu, 40, "step"),
        Item("check/precisions", check_precisions, 40, "step"),
        Item("check/repeats", check_repeats, 30, "step"),
        *(Item(f"check/synchronisations/{k}", partial(check_synchronisations, kind=k), 30, "step") for k in kinds),
        *(Item(f"check/skipped_step/{kind}", partial(check_skipped_step, kind=kind), 30, "step") for kind in kinds),
        Item("check/save_and_load", check_save_and_load, 30, "step"),
        Item("check/two_ranks", check_two_ranks, 60, "ranks"),
        Item("check/nccl_ranks", check_nccl_ranks, 60, "ranks"),
        *(Item(f"check/graph/{name}", run, 40, "graph") for name, run in graphs.items()),
        Item("check/doctor", commands.check_doctor, 60, "doctor"),
        Item("check/compile", check_compile, 90, "compile"),
        Item("check/pytest", commands.check_pytest, 110, "pytest"),
    ]


ITEMS = _items()
