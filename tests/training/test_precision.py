"""What is not finite on one rank skips the step on all; half precision on CPU autocast, as it would be on GPUs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_dcgan.config import Config, make_plan
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.world import process_group
from dist_dcgan.training import loop, steps
from shards.common.errors import UserError
from tests.gpu.training import arrays, make_state
from tests.support.ranks import run_ranks

NETWORKS = ("generator.", "discriminator.", "generator_ema.")


def steps_with_overflow(network: str, precision: str, factor: float) -> dict[str, Any]:
    """Three steps; in the second, rank 1's loss of `network` is multiplied by `factor`."""
    with process_group(60, "cpu") as world:
        state = make_state(world, {"width": 4, "global_batch": 4, "precision": precision})
        if precision == "fp16":
            for scaler in (state.scaler_g, state.scaler_d):
                scaler.load_state_dict(scaler.state_dict() | {"scale": 8.0})
        loss_name = {"g": "generator_loss", "d": "discriminator_loss_fake"}[network]
        loss: Callable[[Tensor, str], Tensor] = getattr(steps, loss_name)

        def broken_on_rank_1(logits: Tensor, form: str) -> Tensor:
            return loss(logits, form) * (factor if world.rank == 1 else 1)

        record = []
        for step in range(3):
            torch.manual_seed(10 * step + world.rank)
            real = (torch.rand(2, 3, 64, 64, dtype=state.dtype) * 2 - 1).contiguous(memory_format=torch.channels_last)
            replacement = broken_on_rank_1 if step == 1 else loss
            with mock.patch.object(steps, loss_name, replacement):
                steps.train_step(state, real)
            tensors = arrays(state.tensors())
            scales = {"scale_g": state.scaler_g.get_scale(), "scale_d": state.scaler_d.get_scale()}
            record.append({"tensors": tensors, **scales})
        return {"steps": record, "step": state.step}


def refusal_of_two_precisions(data: Path, run_dir: Path) -> str:
    """What training says on a rank whose GPU would compute in another precision."""
    config = Config(width=4, global_batch=4, max_steps=1, data={"path": data}, run_dir=run_dir)
    found = {"0": "bf16", "1": "fp16"}[os.environ["RANK"]]
    with mock.patch.object(loop, "resolve_precision", return_value=found), pytest.raises(UserError) as caught:
        loop.train(config, make_plan(config, 2, 96), Folder(data), "auto")
    return str(caught.value)


def test_ranks_of_two_precisions_do_not_begin(demo_shards: Path, tmp_path: Path) -> None:
    line = "what --precision auto means differs between ranks: rank 0 has bf16, rank 1 has fp16: name one"
    for message in run_ranks(2, refusal_of_two_precisions, demo_shards, tmp_path / "run"):
        assert message.startswith(line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("before", "scale"), [("fp16", 8.0), ("bf16", 2.0**16)])
def test_only_a_run_in_half_precision_has_a_loss_scale_to_go_on_from(before: str, scale: float) -> None:
    """`--precision auto` may select another precision on another machine; from a scale of 1 gradients would vanish."""
    with process_group(60, "cpu") as world:
        old, new = (
            make_state(world, {"width": 4, "global_batch": 4, "precision": precision}) for precision in (before, "fp16")
        )
        if before == "fp16":
            old.scaler_d.load_state_dict(old.scaler_d.state_dict() | {"scale": 8.0})
        new.load_values(old.values())
        assert new.scaler_d.get_scale() == scale


def changed(before: dict[str, Any], after: dict[str, Any], prefix: str) -> bool:
    """Whether a trained value differs; batch-norm statistics belong to the forward pass and move anyway."""
    names = [name for name in before["tensors"] if name.startswith(prefix) and name.endswith(("weight", "bias"))]
    assert names
    return any((before["tensors"][name] != after["tensors"][name]).any() for name in names)


@pytest.mark.parametrize("network", ["g", "d"])
@pytest.mark.parametrize(
    ("precision", "factor", "scales"),
    [
        ("fp16", math.inf, [8, 4, 4]),
        ("bf16", math.nan, [1, 1, 1]),
        ("fp32", math.nan, [1, 1, 1]),
        ("fp64", math.inf, [1, 1, 1]),
    ],
)
def test_what_is_not_finite_on_one_rank_skips_the_step_on_all(
    network: str, precision: str, factor: float, scales: list[float]
) -> None:
    ranks = run_ranks(2, steps_with_overflow, network, precision, factor)
    hit, other = {"g": ("generator.", "discriminator."), "d": ("discriminator.", "generator.")}[network]
    for outcome in ranks:
        first, second, third = outcome["steps"]
        assert not changed(first, second, hit)
        assert changed(first, second, other)
        assert changed(first, second, "generator_ema.") == (network == "d")
        assert [step[f"scale_{network}"] for step in outcome["steps"]] == scales
        assert [step["scale_d" if network == "g" else "scale_g"] for step in outcome["steps"]] == scales[:1] * 3
        assert all(changed(second, third, prefix) for prefix in NETWORKS)
        assert outcome["step"] == 3
    for name, tensor in ranks[0]["steps"][2]["tensors"].items():
        assert np.isfinite(tensor).all(), name
        assert (tensor == ranks[1]["steps"][2]["tensors"][name]).all(), name
