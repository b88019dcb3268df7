"""Dump of the training state when gradients stay non-finite."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_dcgan.run.directory import RunDirectory
from dist_dcgan.training.train_state import TrainState
from dist_dcgan.training.watchdog import Row
from shards.common.files import publish


def write_dump(run: RunDirectory, state: TrainState, rows: Sequence[Row]) -> Path:
    """Write the last rows, and per tensor and gradient the number of non-finite elements; return the file's path."""
    path = run.path / f"not_finite-step-{state.step:08d}.json"
    gradients = {
        f"{prefix}.{name}": parameter.grad
        for prefix, network in (("generator", state.generator), ("discriminator", state.discriminator))
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }
    content = {
        "values": state.values(),
        "rows": [{name: repr(value) for name, value in row.items()} for row in rows],
        "tensors": {name: _summary(tensor) for name, tensor in state.tensors().items()},
        "gradients": {name: _summary(tensor) for name, tensor in gradients.items()},
    }
    publish(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def _summary(tensor: Tensor) -> dict[str, Any]:
    finite = torch.isfinite(tensor)
    largest = tensor[finite].abs().max().item() if finite.any() else None
    return {"elements": tensor.numel(), "not_finite": int((~finite).sum()), "largest_finite": largest}
