"""How a step is prepared; that a replay computes what the step does is shown in `test_gpu_groups.py` and on a GPU."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from dist_dcgan.config import Config
from dist_dcgan.distributed.world import World, process_group
from dist_dcgan.training.graph import prepare_step, takes_graph
from dist_dcgan.training.steps import is_out_of_memory
from shards.common.errors import UserError
from tests.gpu.graph import prepare
from tests.gpu.training import make_state, snapshot

ALONE = World(0, 0, 1, torch.device("cpu"))
SMALL = {"width": 4, "global_batch": 4}


@pytest.mark.parametrize("recorded", [False, True])
def test_preparing_leaves_the_state_as_it_was(recorded: bool) -> None:
    with process_group(60):
        state = make_state(ALONE, SMALL)
        before, values = snapshot(state), state.values()
        take_step = prepare(state, recorded=recorded)
        assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors().items())
        assert state.values() == values
        take_step(torch.zeros(4, 3, 64, 64))  # the control: a step does change it
        assert any(not torch.equal(tensor, before[name]) for name, tensor in state.tensors().items())
        assert state.step == 1


def test_metrics_of_one_replay_outlive_the_next() -> None:
    with process_group(60):
        take_step = prepare(make_state(ALONE, SMALL), recorded=True)
        first = take_step(torch.zeros(4, 3, 64, 64))
        kept = {name: float(value) for name, value in first.items()}
        second = take_step(torch.ones(4, 3, 64, 64))
    assert {name: float(value) for name, value in first.items()} == kept
    assert float(second["loss/d"]) != kept["loss/d"]


def test_a_graph_is_taken_on_one_gpu_or_if_asked_for() -> None:
    with process_group(60):
        state = make_state(ALONE, SMALL)
        assert not takes_graph(state)
        state.world = mock.Mock(device=torch.device("cuda", 0), world_size=1)
        assert takes_graph(state)
        state.world.world_size = 2
        assert not takes_graph(state)
        state.config = Config(cuda_graph=True)
        assert takes_graph(state)
        state.world.world_size, state.config = 1, Config(cuda_graph=False)
        assert not takes_graph(state)


def test_a_graph_on_a_cpu_is_refused() -> None:
    with process_group(60), pytest.raises(UserError, match="--cuda-graph needs a GPU: leave it out"):
        prepare_step(make_state(ALONE, SMALL | {"cuda_graph": True}), 64)


def test_memory_that_ran_out_while_a_graph_was_recorded_is_told() -> None:
    """Ending the recording then raises an error of its own, which hides the first."""
    with pytest.raises(RuntimeError) as caught:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("CUDA error: operation failed due to a previous error during capture"))
