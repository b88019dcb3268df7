"""What a run logs beside metrics: alerts of the watchdog, which may end it with a dump, and grids of samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_dcgan.distributed.collectives import from_rank_zero
from dist_dcgan.loggers.base import Logger, Row
from dist_dcgan.run.directory import RunDirectory
from dist_dcgan.training.ema import recompute_statistics, sample_images
from dist_dcgan.training.train_state import TrainState
from dist_dcgan.training.watchdog import was_skipped
from shards.common.errors import UserError
from shards.common.files import publish


def report_steps(
    logger: Logger, state: TrainState, run: RunDirectory, rows: list[dict[str, float]], scores: dict[str, float] | None
) -> None:
    """Count the skipped steps in `rows`, a row of metrics per step, and have the watchdog look at all of them.

    Unless `scores` is None, log the last row with them. Raises UserError as `watch` does.
    """
    state.skipped_steps += sum(map(was_skipped, rows))
    if scores is not None:
        logger.metrics(rows[-1] | {"steps/skipped": state.skipped_steps} | scores)
    watch(logger, state, run, rows)


def watch(logger: Logger, state: TrainState, run: RunDirectory, rows: list[dict[str, float]]) -> None:
    """Have the watchdog look at the metrics of some steps, a row each, and log what it finds.

    Raises UserError on all ranks if it finds a collapse and the configuration says to stop, or all steps are skipped.
    """
    for collapse in state.watchdog.observe(rows):
        logger.alert(state.step, str(collapse))
        if collapse.rule.fatal:
            details = from_rank_zero(lambda: _details(run, state, rows))
            raise UserError(f"training is stopped at step {state.step}: {collapse.rule.mode}; {details}")
        if state.config.on_collapse == "stop":
            mode = collapse.rule.mode
            raise UserError(f"training is stopped at step {state.step}, as --on-collapse stop asks: {mode}")


def _details(run: RunDirectory, state: TrainState, rows: Sequence[Row]) -> str:
    """Write the dump, and return where it is, or why there is none: that must not hide why training is stopped."""
    try:
        return f"{write_dump(run, state, rows)} has the details"
    except OSError as error:
        return f"the details cannot be written: {error.strerror or error}"


def write_dump(run: RunDirectory, state: TrainState, rows: Sequence[Row]) -> Path:
    """Write the last rows, and per tensor and gradient the number of non-finite elements; return the file's path."""
    path = run.path / f"not_finite-step-{state.step:08d}.json"
    gradients = {name: _summary(gradient) for name, gradient in state.gradients().items() if gradient is not None}
    content = {
        "values": state.values(),
        "rows": [{name: repr(value) for name, value in row.items()} for row in rows],
        "tensors": {name: _summary(tensor) for name, tensor in state.tensors().items()},
        "gradients": gradients,
    }
    publish(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def _summary(tensor: Tensor) -> dict[str, Any]:
    finite = torch.isfinite(tensor)
    largest = tensor[finite].abs().max().item() if finite.any() else None
    return {"elements": tensor.numel(), "not_finite": int((~finite).sum()), "largest_finite": largest}


def log_samples(logger: Logger, state: TrainState) -> None:
    """Log a grid from fixed z by the averaged generator; only a logger that wants it has it drawn."""

    def draw() -> Tensor:
        recompute_statistics(state.generator_ema, state.config, state.world.device, state.dtype)
        return sample_images(state.generator_ema, state.config, range(state.config.log.samples), state.world.device)

    logger.samples(state.step, draw)
