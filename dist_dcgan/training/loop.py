"""The training loop, from the process group to the exported generator."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dist_dcgan.config import Config, Invocation, make_plan
from dist_dcgan.data.loader import BatchLoader, flip, to_images
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.distributed import World, average_across_ranks, from_rank_zero, process_group, require_same
from dist_dcgan.training.checkpoint import load_newest, save_checkpoint
from dist_dcgan.training.ema import recompute_statistics, sample_images
from dist_dcgan.training.export import export_generator
from dist_dcgan.training.loggers import Logger, draw_curves, make_logger
from dist_dcgan.training.run_directory import RunDirectory, claimed
from dist_dcgan.training.steps import Metrics, train_step
from dist_dcgan.training.stopping import StopRequest
from dist_dcgan.training.train_state import TrainState
from shards.errors import UserError
from shards.manifest import Manifest


def train(config: Config, invocation: Invocation, manifest: Manifest) -> None:
    """Train until the last step or a stop signal; every rank calls it with the same arguments."""
    with process_group(config.distributed.timeout_seconds) as world:
        train_in(world, config, invocation, manifest)


def train_in(world: World, config: Config, invocation: Invocation, manifest: Manifest) -> None:
    """Train as one rank of `world`."""
    with contextlib.ExitStack() as stack:
        # Agree on the data set and claim the run directory.
        stop = stack.enter_context(StopRequest())
        require_same(manifest.digest(), f"the data set in {config.data.path}")
        plan = make_plan(config, world.world_size, manifest.samples)
        run = RunDirectory(config.run_dir)
        from_rank_zero(lambda: stack.enter_context(claimed(run, config, invocation.resume)))
        reader = ShardReader(config.data.path, manifest)

        # Build networks and optimizers, warm them up, go on from the newest checkpoint.
        state = TrainState(config, plan, world, manifest.image_size)
        dry_step(state, manifest.image_size)
        resume(state, run, manifest)
        state.wandb_run_id = state.wandb_run_id or from_rank_zero(lambda: secrets.token_hex(4))

        # Train.
        logger = make_logger(config, plan, world, run, state.step, state.wandb_run_id)
        batches = stack.enter_context(BatchLoader(reader, config, plan, world, state.step))
        meter = Meter(state, batches)
        for batch in batches:
            images = to_images(batch, world.device, state.dtype)
            if config.data.random_flip:
                images = flip(images, config.seed, state.step, state.slots)
            metrics = train_step(state, images)
            last = state.step == plan.total_steps
            if last or state.step % config.log.every_steps == 0 or state.step == 1:
                log_metrics(logger, state, metrics, meter)
            if last or _crosses(state, config.log.samples_every_images):
                log_samples(logger, state)
            stopping = stop.agreed()
            if last or stopping or state.step % config.checkpoint.every_steps == 0:
                save(state, run, manifest)
            if stopping:
                break

        # Leave the generator, the curves, and a marker where the run is to go on.
        from_rank_zero(lambda: finish(state, run, manifest, unfinished=state.step < plan.total_steps))
        logger.close()


def dry_step(state: TrainState, image_size: int) -> None:
    """Take one step on grey images and undo it.

    DDP rebuilds its gradient buckets after its first backward, which changes the order of summation: without this
    step, a resumed run of 4 ranks would differ in the last bits from one that was never interrupted. It warms up the
    allocator and shows at once whether memory suffices.
    """
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    values = state.values()
    shape = (state.plan.batch_per_rank, 3, image_size, image_size)
    grey = torch.zeros(shape, dtype=state.dtype, device=state.world.device)
    train_step(state, grey.contiguous(memory_format=torch.channels_last))
    state.assert_equal_strides()
    state.load_tensors(before)
    state.load_values(values)


def resume(state: TrainState, run: RunDirectory, manifest: Manifest) -> None:
    """Load the newest sound checkpoint, where there is one: rank 0 reads it and tells the others."""

    def read() -> dict[str, Any] | None:
        found = load_newest(run.checkpoints)
        if found is None:
            return None
        tensors, values = found
        _require_same_data(values, state, run, manifest)
        state.load_tensors(tensors)
        return values

    values = from_rank_zero(read)
    if values is not None:
        state.broadcast()
        state.load_values(values)


def save(state: TrainState, run: RunDirectory, manifest: Manifest) -> None:
    """Write a checkpoint; returns on all ranks when it is on disk."""
    values = state.values() | {"manifest_digest": manifest.digest()}
    keep = state.config.checkpoint.keep
    from_rank_zero(lambda: save_checkpoint(run.checkpoints, state.tensors(), values, keep) and None)


def finish(state: TrainState, run: RunDirectory, manifest: Manifest, unfinished: bool) -> None:
    """Write what a run leaves behind, on rank 0."""
    recompute_statistics(state.generator_ema, state.config, state.world.device, state.dtype)
    export_generator(run.generator, state.generator_ema, state.config, manifest.image_size, state.step)
    draw_curves(run.metrics, run.curves)
    if unfinished:
        run.stopped.write_text(f"stopped by a signal at step {state.step}\n")


def _require_same_data(values: Mapping[str, Any], state: TrainState, run: RunDirectory, manifest: Manifest) -> None:
    if values["manifest_digest"] != manifest.digest():
        raise UserError(
            f"run directory {run.path} was trained on another data set than {state.config.data.path}: "
            "name that one with --data, or another --run-dir"
        )
    if values["global_batch"] != state.plan.global_batch:
        raise UserError(
            f"run directory {run.path} was trained with global batch {values['global_batch']}, "
            f"this start makes it {state.plan.global_batch}: give --global-batch {values['global_batch']}"
        )


def log_metrics(logger: Logger, state: TrainState, metrics: Metrics, meter: Meter) -> None:
    """Log the metrics of this step, averaged over ranks."""
    row: dict[str, float] = {"step": state.step, "images_seen": state.images_seen}
    row["epoch"] = state.step / state.plan.steps_per_epoch
    logger.metrics(row | average_across_ranks(metrics) | meter.read(state))


def log_samples(logger: Logger, state: TrainState) -> None:
    """Log a grid from fixed z by the averaged generator; only a logger that wants it has it drawn."""

    def draw() -> Tensor:
        recompute_statistics(state.generator_ema, state.config, state.world.device, state.dtype)
        return sample_images(state.generator_ema, state.config, state.config.log.samples, state.world.device)

    logger.samples(state.step, draw)


def _crosses(state: TrainState, every_images: int) -> bool:
    """Return whether the last step reached or passed a multiple of `every_images`."""
    before = state.images_seen - state.plan.global_batch
    return state.images_seen // every_images > before // every_images


class Meter:
    """Measures throughput and the share of time spent waiting for data, from one reading to the next."""

    def __init__(self, state: TrainState, batches: BatchLoader) -> None:
        self._batches = batches
        self._seconds, self._waited, self._step = time.perf_counter(), batches.waited, state.step

    def read(self, state: TrainState) -> dict[str, float]:
        """Return the figures since the last reading."""
        seconds, waited, steps = time.perf_counter(), self._batches.waited, state.step - self._step
        elapsed, waiting = seconds - self._seconds, waited - self._waited
        self._seconds, self._waited, self._step = seconds, waited, state.step
        return {
            "time/step": elapsed / steps,
            "time/data_wait": waiting / elapsed,
            "throughput/images_per_second": steps * state.plan.global_batch / elapsed,
        }
