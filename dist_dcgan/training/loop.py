"""The training loop, from the process group to the exported generator."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from typing import Any

from dist_dcgan.config import Config, Plan, to_values
from dist_dcgan.data.loader import BatchLoader, to_images
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.location import DatasetLocation
from dist_dcgan.distributed.collectives import barrier, broadcast_from_rank_zero, from_rank_zero, gather, require_same
from dist_dcgan.distributed.node import node_store
from dist_dcgan.distributed.world import World, process_group
from dist_dcgan.loggers.composite import make_logger
from dist_dcgan.loggers.pictures import draw_curves
from dist_dcgan.loggers.wandb_settings import WandbRun, resolve_wandb
from dist_dcgan.metrics.extractors import Extractor
from dist_dcgan.run.checkpoint import Retention, load_newest
from dist_dcgan.run.directory import (
    RunDirectory,
    claimed,
    foreign_content,
    record,
    record_saved,
    record_stopped,
    require_new,
    require_same_run,
)
from dist_dcgan.run.export import export_generator, is_finite
from dist_dcgan.run.saver import Saver, make_schedule
from dist_dcgan.run.starts import how_it_ended, new_start, place, record_start
from dist_dcgan.training.ema import recompute_statistics
from dist_dcgan.training.graph import prepare_step, training_stream
from dist_dcgan.training.meter import Meter
from dist_dcgan.training.quality import QualityMeter
from dist_dcgan.training.reporting import log_samples, report_steps
from dist_dcgan.training.stopping import StepAgreement
from dist_dcgan.training.train_state import TrainState, resolve_precision
from shards.common.errors import UserError
from shards.common.messages import tell, warn
from shards.manifest import Manifest


def train(config: Config, plan: Plan, location: DatasetLocation, resume_mode: str, words: Sequence[str] = ()) -> None:
    """Train until the last step or a stop signal; every rank calls it with the same arguments.

    `words`, the arguments of the command line, are recorded.
    """
    with process_group(config.distributed.timeout_seconds) as world:
        train_in(world, config, plan, location, resume_mode, words)


def train_in(
    world: World,
    config: Config,
    plan: Plan,
    location: DatasetLocation,
    resume_mode: str,
    words: Sequence[str] = (),
) -> None:
    """Train as one rank of `world`."""
    manifest = location.manifest
    with ExitStack() as stack:
        # Agree on data set and precision, and claim the run directory.
        schedule = make_schedule(config.checkpoint, world.device)
        agreement = stack.enter_context(StepAgreement(schedule.seconds))
        digest = agree(config, manifest, world)
        run = RunDirectory(config.run_dir)
        from_rank_zero(lambda: asdict(resolve_wandb(config, None)))  # refuses before anything is written
        from_rank_zero(lambda: stack.enter_context(claimed(run, config, resume_mode)))
        ended = how_it_ended(run) if world.is_main else None

        # Build networks and optimizers, warm up, load the newest checkpoint.
        stack.enter_context(training_stream(world.device))
        state = TrainState(config, plan, world, manifest.image_size)
        take_step = prepare_step(state, manifest.image_size)
        wandb_run = resume(state, run, digest)

        # Open what training writes and reads; wait until all ranks have data and can score, which may take minutes.
        retention = Retention(config.checkpoint.keep, config.checkpoint.keep_every_steps)
        saver = stack.enter_context(Saver(run.checkpoints, retention, world.device, partial(record_saved, run)))
        logger = stack.enter_context(closing(make_logger(plan, world, run, state.step, wandb_run)))
        batches = stack.enter_context(BatchLoader(location, config, plan, world, state.step, node_store(world)))
        batches.wait_for_first(agreement.end_if_signalled)
        quality = QualityMeter(state, ShardReader(location), run)
        barrier(world)
        record_this_start(state, run, location, words, ended, quality.extractor)

        # Train.
        meter = Meter(state, batches)
        for batch in batches:
            assert batch.step == state.step
            meter.add(take_step(to_images(batch, state.dtype)))
            last = state.step == plan.total_steps
            with meter.paused():
                scores = quality.read()
            if saver.failed:
                agreement.request_stop()
            stopping, save_is_due = agreement.agreed()
            saving = last or stopping or save_is_due or schedule.due_at(state.step)
            logging = last or scores or state.step % config.log.every_steps == 0 or state.step == 1
            if saving or logging:
                report_steps(logger, state, run, meter.read(), scores if logging else None)
            if last or state.passed(config.log.samples_every_images):
                log_samples(logger, state)
            if saving:
                save(state, saver, digest)
            if stopping:
                break

        # Export the generator and draw the curves.
        from_rank_zero(lambda: finish(state, run, saver, manifest), world.slow_group)


def agree(config: Config, manifest: Manifest, world: World) -> str:
    """Return the data set's digest; raises UserError on all ranks if it, or the precision, differs between them."""
    digest, precision = manifest.digest(), resolve_precision(config.precision, world.device)
    require_same(digest, f"the data set at {config.data.name}", "let every node see the same")
    require_same(precision, f"what --precision {config.precision} means", "name one that all GPUs support")
    return digest


def resume(state: TrainState, run: RunDirectory, digest: str) -> WandbRun:
    """Load the newest sound checkpoint, if there is one: rank 0 reads it and broadcasts it.

    Return how W&B records the run, which keeps the id of the checkpoint.
    """

    def read() -> tuple[dict[str, Any] | None, dict[str, Any]]:
        size = sum(tensor.nbytes for tensor in state.tensors().values())
        found = load_newest(run.checkpoints, 2 * size + (1 << 20))  # it may come from anybody
        with foreign_content(run):
            wandb_run = resolve_wandb(state.config, None if found is None else found.values["wandb_run_id"])
            if found is not None:
                require_same_run(run, state.config, state.plan.global_batch, digest, found.values)
                state.load_tensors(found.tensors)
                warn_of_other_precision(found.values, state.precision)
                state.load_values(found.values)
        if found is None:
            require_new(run)
        else:
            record_saved(run, found.values["step"])
            tell(how_it_goes_on(run, found.values["step"], state.plan.total_steps))
        if found is None or found.values["step"] <= state.plan.total_steps:
            record(run, state.config)
        return None if found is None else found.values, asdict(wandb_run)

    values, fields = from_rank_zero(read, state.world.slow_group)  # gigabytes, and other jobs may read as well
    wandb_run = WandbRun(**fields)
    if values is not None:
        broadcast_from_rank_zero(state.tensors().values())
        state.load_values(values)
    state.wandb_run_id = wandb_run.run_id
    return wandb_run


def how_it_goes_on(run: RunDirectory, step: int, total_steps: int) -> str:
    """Return what becomes of a run that has `step` steps if `total_steps` are asked for."""
    if step > total_steps:
        return f"{run.path} has {step} steps already, and {total_steps} are asked for: nothing is trained"
    done = ", which is the last: nothing is left to train" if step == total_steps else ""
    return f"going on after step {step} of {run.path}{done}"


def warn_of_other_precision(values: Mapping[str, Any], precision: str) -> None:
    """Say so if `--precision auto` selects another one here than where the checkpoint was written."""
    before = values.get("precision", precision)
    if before != precision:
        warn(f"the steps so far were made in {before}; here --precision auto selects {precision}")


def record_this_start(
    state: TrainState,
    run: RunDirectory,
    location: DatasetLocation,
    words: Sequence[str],
    ended: str | None,
    extractor: Extractor | None,
) -> None:
    """Append this start to the record of the run; every rank calls it. `ended`: how the last start ended."""
    places = gather(place(state.world.device), state.world.slow_group)
    if not state.world.is_main:
        return
    manifest, scores = location.manifest, {}
    if extractor is not None:
        scores = {"extractor": extractor.name, "sha256": extractor.weights_sha256, "resize": extractor.resize}
    start = new_start(
        words,
        places,
        step=state.step,
        last=ended,
        precision=state.precision,
        total_steps=state.plan.total_steps,
        global_batch=state.plan.global_batch,
        data={
            "name": state.config.data.name,
            "digest": manifest.digest(),
            "samples": manifest.samples,
            "image_size": manifest.image_size,
        },
        scores=scores,
    )
    record_start(run, start)


def save(state: TrainState, saver: Saver, digest: str) -> None:
    """Begin to write a checkpoint; raises UserError on all ranks if the one before could not be written."""
    values = state.values() | {"manifest_digest": digest, "config": to_values(state.config)}
    from_rank_zero(lambda: saver.save(state.tensors(), values), state.world.slow_group)  # may wait for the one before


def finish(state: TrainState, run: RunDirectory, saver: Saver, manifest: Manifest) -> None:
    """On rank 0, wait for the last checkpoint, export the averaged generator and draw the curves.

    Also write a marker file if the run was stopped before its last step. Raises UserError if a file that is due cannot
    be written: of a stopped run the checkpoint and the marker, as the same command goes on from them. A finished run
    without a generator that is finite is a UserError, too.
    """
    saver.wait()
    stopped = state.step < state.plan.total_steps
    if stopped:
        record_stopped(run, state.step)
    failure = export(state, run, manifest)
    draw_curves(run.metrics, run.curves)
    tell(f"to see how it went: python -m dist_dcgan.report {shlex.quote(str(run.path))}")
    if failure and not stopped:
        raise UserError(failure)
    if failure:
        warn(failure)


def export(state: TrainState, run: RunDirectory, manifest: Manifest) -> str | None:
    """Export the averaged generator; return None, or the reason why it is not exported, and an earlier export stays."""
    recompute_statistics(state.generator_ema, state.config, state.world.device, state.dtype)
    if not is_finite(state.generator_ema):
        return (
            f"the averaged generator of step {state.step} is not exported to {run.generator}, as its weights are not "
            "finite: begin again with another --run-dir, and a smaller --optimizer.lr-g and --optimizer.lr-d"
        )
    try:
        export_generator(run.generator, state.generator_ema, state.config, manifest.image_size, state.step)
    except OSError as error:
        reason = error.strerror or error
        return (
            f"the generator cannot be exported to {run.generator}: {reason}: mend that, and the same command exports it"
        )
    return None
