"""A GPU is lent for minutes: whatever happens to one item, the others tell what they have to tell."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dist_dcgan.training.steps import Metrics
from dist_dcgan.training.train_state import TrainState
from shards.common.errors import UserError
from tests.benchmarks.measuring import Products, images
from tests.benchmarks.plain import PlainLoop
from tests.gpu import graph
from tests.gpu.groups import Budget, run_items
from tests.gpu.items import Context, Figures, Item, Machine, Outcome, Skipped, norm_kinds, selected
from tests.gpu.results import Results
from tests.gpu.train import distances
from tests.gpu.waiting import synchronisations

MACHINE = Machine("Some GPU 80GB", 0, 2, {"torch": "2"})
CPU = torch.device("cpu")


def passes(context: Context) -> Figures:
    return {"pid": os.getpid()}


def fails(context: Context) -> Figures:
    raise AssertionError("1 is not 2")


def does_not_apply(context: Context) -> Figures:
    raise Skipped("needs CUDA")


def fails_twice(context: Context) -> Figures:
    try:
        raise RuntimeError("not permitted while capturing")
    finally:
        raise RuntimeError("capture has failed")


def hangs(context: Context) -> Figures:
    time.sleep(60)
    return {}


def hangs_with_a_child(context: Context) -> Figures:
    if os.fork() == 0:
        (context.folder / "child").write_text(str(os.getpid()))
        time.sleep(60)
        os._exit(0)
    return hangs(context)


def crashes(context: Context) -> Figures:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def leaves(context: Context) -> Figures:
    sys.exit(0)


def outcomes(
    folder: Path, *functions: Callable[[Context], Figures], seconds: float = 3.0, budget: float = 60.0, at_once: int = 1
) -> list[Outcome]:
    items = [Item(f"check/{i}", function, seconds, "group") for i, function in enumerate(functions)]
    ends = Budget(time.monotonic() + budget, 1.0)
    return list(run_items(items, Context(MACHINE, True, folder), ends, at_once))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (fails, "1 is not 2"),
        (hangs, "not done within its time limit"),
        (crashes, "its process ended with status -9"),
        (leaves, "its process ended with status 0"),
    ],
)
def test_items_after_one_that_fails_are_run(tmp_path: Path, harm: Callable[[Context], Figures], reason: str) -> None:
    found = outcomes(tmp_path, passes, harm, passes)
    assert [outcome.status for outcome in found] == ["PASS", "FAIL", "PASS"]
    assert found[1].reason == reason


def test_items_of_a_group_share_a_process_that_is_not_this_one(tmp_path: Path) -> None:
    first, second = outcomes(tmp_path, passes, passes)
    assert first.figures == second.figures != {"pid": os.getpid()}


def test_a_failure_has_a_traceback_and_what_does_not_apply_is_skipped(tmp_path: Path) -> None:
    failed, skipped = outcomes(tmp_path, fails, does_not_apply)
    assert "in fails" in failed.details
    assert (skipped.status, skipped.reason) == ("SKIP", "needs CUDA")


def test_the_first_of_two_errors_is_named(tmp_path: Path) -> None:
    (failed,) = outcomes(tmp_path, fails_twice)
    assert failed.reason == "RuntimeError: capture has failed (first: RuntimeError: not permitted while capturing)"


def test_what_an_item_has_started_ends_with_it(tmp_path: Path) -> None:
    outcomes(tmp_path, hangs_with_a_child)
    child = int((tmp_path / "child").read_text())
    for _ in range(100):  # it is killed at once, and dies when the system comes to it
        if not lives(child):
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} lives on")


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_items_that_the_budget_has_no_time_for_are_skipped(tmp_path: Path) -> None:
    found = outcomes(tmp_path, passes, passes, budget=0.0)
    assert {(outcome.status, outcome.reason) for outcome in found} == {("SKIP", "no time is left")}


def test_a_name_that_no_item_has_is_refused() -> None:
    items = [Item("check/a", passes, 1, "g"), Item("speed/a", passes, 1, "g")]
    assert selected(items, ["check", "speed"], "speed") == items[1:]
    with pytest.raises(UserError, match="names no item of check: use parts of check/a"):
        selected(items, ["check"], "speed")


def test_results_of_two_calls_stay_beside_each_other(tmp_path: Path) -> None:
    names = ["speed/products", "speed/128x128/tuned", "speed/128x128/native"]
    speed = {"step_ms": 2.0, "host_ms": 1.0, "gflop_per_image": 9.0}
    Results(tmp_path, MACHINE, names).add(
        Outcome("speed/128x128/native", "PASS", 1.0, "", speed | {"images_per_second": 20_000.0})
    )
    second = Results(tmp_path, MACHINE, names)
    second.add(Outcome("speed/128x128/tuned", "PASS", 1.0, "", speed | {"images_per_second": 10_000.0}))
    second.add(Outcome("speed/products", "PASS", 1.0, "", {"tflops": 600.0}))
    content = json.loads((tmp_path / "some-gpu-80gb-results.json").read_text())
    assert list(content["items"]) == names
    assert "| 128x128: native | 20,000 | 2 | 0.3 | 2 | 1 |  |" in (tmp_path / "some-gpu-80gb-results.md").read_text()


def test_reading_a_value_back_is_counted_and_arithmetic_is_not() -> None:
    values = torch.ones(4)
    with synchronisations(CPU) as waits:
        total = (values * 2).sum()
        assert not waits
        total.item()
    assert sum(waits.values()) == 1


def test_a_graph_that_repeats_the_step_it_captured_is_found_out(tmp_path: Path) -> None:
    """As it would be if what changes from step to step were not read from the device."""
    context = Context(MACHINE, True, tmp_path)
    prepare = graph.prepare

    def repeats(state: TrainState, *, recorded: bool) -> Callable[[torch.Tensor], Metrics]:
        take_step = prepare(state, recorded=recorded)

        def replay(real: torch.Tensor) -> Metrics:
            reached, state.step = state.step, 0
            metrics = take_step(real)
            state.step = reached + 1
            return metrics

        return replay

    with context.stack, mock.patch.object(graph, "STEPS", 2):
        assert graph.check_equality(context, "fp64", "portable")["largest_difference"] == 0
        with mock.patch.object(graph, "prepare", repeats), pytest.raises(AssertionError, match="networks differ"):
            graph.check_equality(context, "fp64", "portable")


def test_the_tuned_loop_computes_what_the_plain_one_does() -> None:
    """In float32, as on a CPU."""
    networks = []
    for tuned in (False, True):
        loop = PlainLoop(4, CPU, tuned=tuned)
        torch.manual_seed(0)
        loop.step(images(4, CPU))
        networks.append(loop.discriminator.state_dict())
    for name, plain in networks[0].items():
        assert torch.allclose(plain, networks[1][name], atol=1e-3), name


def test_the_floor_is_the_best_of_all_products_and_rounds() -> None:
    products = Products(4, 2, CPU, torch.float32, square=64)
    products.measure()
    first = products.best
    products.measure()
    assert products.best >= first > 0
    assert products.shape in products.shapes
    assert {"64x64x64", "512x64x8", "convolution 4 to 8 channels"} <= set(products.shapes)


def test_seconds_of_training_are_those_of_the_rows() -> None:
    kid = "quality/kid_efficientnet_lite0"
    rows: list[dict[str, Any]] = [
        {"step": 10, "images_seen": 80, "time/step": 0.5},
        {"step": 10, "alert": "mode collapse"},
        {"step": 30, "images_seen": 240, "time/step": 0.1, kid: 0.4, f"{kid}_std": 0.01},
    ]
    assert distances(rows) == [(240, 7.0, 0.4)]


def test_the_kinds_of_batch_norm_are_those_of_the_configuration() -> None:
    assert {"native", "portable"} <= set(norm_kinds()) and "auto" not in norm_kinds()
