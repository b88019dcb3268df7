"""Checks of the data set and of the disks that a run writes to; test files are removed."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from dist_dcgan.config import Config, LocationOptions, make_plan, to_yaml
from dist_dcgan.data.order import SampleOrder
from dist_dcgan.data.prefetch import shards_at_a_time
from dist_dcgan.data.storage.cache import staged
from dist_dcgan.data.storage.location import DatasetLocation
from dist_dcgan.data.storage.opening import open_location
from dist_dcgan.distributed.world import world_size_of_launch
from dist_dcgan.loggers.wandb_settings import resolve_wandb
from dist_dcgan.models.networks import Discriminator, Generator, count_parameters, require_image_size
from dist_dcgan.preflight.results import Finding, Subject, counted
from dist_dcgan.run.checkpoint import load_newest
from dist_dcgan.run.directory import RunDirectory, require_fitting, require_new, require_same_run, require_unclaimed
from shards.common.errors import UserError
from shards.common.files import check_room, publish
from shards.common.locks import Lock, NoLocksError

_PROBE = ".dist_dcgan-doctor-"
_FEW_BATCHES = 10


def data_set(subject: Subject, stack: ExitStack) -> Finding:
    """Read the manifest and the file sizes, as training does; `stack` removes what is made for it."""
    options = subject.config.data
    location = stack.enter_context(opened_for_a_look(options, subject.invocation.allow_commands))
    manifest = location.manifest
    require_image_size(manifest.image_size, options.name)
    subject.location = location
    digest = manifest.digest()[:12]
    shards = counted(len(manifest.shards), "shard")
    found = f"{manifest.samples:,} images of {manifest.image_size} pixels in {shards}, digest {digest}"
    same = {"the digest of the data set": digest}
    return Finding("ok", found, same, "copy one data set to all nodes")


def first_shard(subject: Subject) -> Finding:
    """Check the SHA-256 of training's first shard."""
    location = subject.location
    shard = _order(subject).window(0).shards[0]
    started = time.perf_counter()
    location.ready(shard)
    seconds = time.perf_counter() - started
    entry = location.manifest.shards[shard]
    rate = entry.bytes / 1e6 / seconds
    return Finding("ok", f"{entry.name} matches its SHA-256: {entry.bytes / 1e6:,.1f} MB at {rate:,.0f} MB/s")


def plan(subject: Subject) -> Finding:
    """Compute the plan of the run: steps, and batch per rank."""
    config, invocation = subject.config, subject.invocation
    made = make_plan(config, world_size_of_launch(invocation.world_size), subject.location.manifest.samples)
    subject.plan = made
    found = (
        f"{made.total_steps:,} steps of {made.global_batch} images, {made.batch_per_rank} per rank; "
        f"{made.steps_per_epoch:,} steps an epoch"
    )
    same = {"the configuration": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:12]}
    return Finding("ok", found, same, "start all nodes with the same flags")


def shuffling(subject: Subject) -> Finding:
    """Report the number of images that are shuffled together."""
    order, made = _order(subject), subject.plan
    shards = order.window(0).shards
    images = sum(subject.location.manifest.shards[shard].samples for shard in shards)
    found = f"among {images:,} images at a time ({counted(len(shards), 'shard')})"
    everything = len(shards) == len(subject.location.manifest.shards)
    if everything or images >= _FEW_BATCHES * made.global_batch:
        return Finding("ok", found)
    return Finding("ok", f"{found}, few batches of {made.global_batch}: a larger --data.window-shards shuffles better")


def cache(subject: Subject) -> Finding | None:
    """Test the disk of the cache, if there is one."""
    folder, gigabytes = subject.config.data.cache_dir, subject.config.data.cache_gb
    if folder is None:
        return None
    location = subject.location
    location.require_room(shards_at_a_time(_order(subject), subject.plan.global_batch))
    try_writing(folder)
    total = sum(entry.bytes for entry in location.manifest.shards)
    present = sum(status.st_size for _, status in staged(folder, os.geteuid()))
    required = max(min(round(gigabytes * 1e9), total) - present, 0)
    check_room(folder, required, "the cache takes", ": use a smaller --data.cache-gb, or another --data.cache-dir")
    return Finding("ok", f"{folder} can be written and has room for {required / 1e9:,.3g} GB")


def run_directory(subject: Subject) -> Finding:
    """Check that this run may start or continue in its folder; only rank 0 writes there."""
    run = RunDirectory(subject.config.run_dir)
    require_fitting(run, subject.config, subject.invocation.resume)
    require_unclaimed(run)
    newest = load_newest(run.checkpoints)
    if newest is None:
        require_new(run)
        return Finding("ok", f"{run.path} is free for a new run")
    if hasattr(subject, "plan"):  # else the check of the data set or of the plan has failed
        digest = subject.location.manifest.digest()
        require_same_run(run, subject.config, subject.plan.global_batch, digest, newest.values)
    resolve_wandb(subject.config, newest.values["wandb_run_id"])  # WANDB_RUN_ID may name another run
    return Finding("ok", f"{run.path} holds this run, which goes on from step {newest.values['step']:,}")


def writing(subject: Subject) -> Finding:
    """Test the disk of the run directory."""
    try:
        folder = try_writing(subject.config.run_dir)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"run directory {subject.config.run_dir} cannot be used: {reason}: name another with --run-dir"
        ) from None
    return Finding("ok", f"files can be written, renamed, locked and removed in {folder}")


def room(subject: Subject) -> Finding:
    """Compare the free space for the run directory with the size of its files."""
    run, config = RunDirectory(subject.config.run_dir), subject.config
    image_size, steps = subject.location.manifest.image_size, subject.plan.total_steps
    each, exports = checkpoint_bytes(config, image_size), export_bytes(config, image_size)
    # One more than are kept, because the next is written before the oldest is removed.
    kept = config.checkpoint.keep + 1 + steps // (config.checkpoint.keep_every_steps or steps + 1)
    there = sum(path.stat().st_size for path in run.checkpoints.rglob("*") if path.is_file())
    required = max(kept * each - there, each) + exports
    purpose = f"{kept} checkpoints of {each:,} bytes and the generator take"
    check_room(run.path, required, purpose, ": use a smaller --checkpoint.keep, or another --run-dir")
    return Finding("ok", f"for {kept} checkpoints of {each / 1e6:,.1f} MB and the generator, twice")


def checkpoint_bytes(config: Config, image_size: int) -> int:
    """Return the bytes of the tensors of a checkpoint: both networks, the averaged generator, Adam's moments."""
    generator, discriminator = networks_on_meta(config, image_size)
    total = 2 * _bytes(generator) + _bytes(discriminator)
    for network in (generator, discriminator):
        step_bytes = 4  # Adam counts its steps per parameter, in float32
        total += sum(2 * parameter.nbytes + step_bytes for parameter in network.parameters())
    return total


def export_bytes(config: Config, image_size: int) -> int:
    """Return the bytes of the two exported generators, the latest and the best."""
    return 2 * _bytes(networks_on_meta(config.model_copy(update={"precision": "fp32"}), image_size)[0])


def gradient_elements(config: Config, image_size: int) -> int:
    """Return the number of gradient values that a step sums over the ranks."""
    return sum(map(count_parameters, networks_on_meta(config, image_size)))


def try_writing(path: Path) -> Path:
    """Write, sync, rename, lock and remove files and a folder in `path` or its nearest existing parent; returns that.

    Raises OSError or UserError if one of these fails.
    """
    with probe_folder(path) as folder:
        (folder / "step.tmp").mkdir()
        publish(folder / "step.tmp" / "probe", b"written by dist_dcgan.doctor\n")
        (folder / "step.tmp").rename(folder / "step")  # as a checkpoint is: some object stores cannot
        (folder / "step" / "probe").unlink()
        try:
            with Lock(folder / "lock") as first, Lock(folder / "lock") as second:
                if first.take() and second.take():
                    raise UserError(f"file locks hold nobody off in {folder.parent}: use another file system")
        except NoLocksError:
            raise UserError(f"there are no file locks in {folder.parent}: use another file system") from None
        return folder.parent


@contextmanager
def opened_for_a_look(options: LocationOptions, allow_commands: bool) -> Iterator[DatasetLocation]:
    """Open a data set as training does; a cache is replaced by a folder that is removed at the end."""
    with ExitStack() as stack:
        if options.cache_dir is not None:
            folder = stack.enter_context(probe_folder(options.cache_dir))
            options = options.model_copy(update={"cache_dir": folder / "cache"})
        yield open_location(options, allow_commands)


@contextmanager
def probe_folder(path: Path) -> Iterator[Path]:
    """Make a folder in `path` or its nearest existing parent, and remove it with its content at the end."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    with tempfile.TemporaryDirectory(prefix=_PROBE, dir=existing, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def networks_on_meta(config: Config, image_size: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return both networks on the meta device, without memory."""
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    with torch.device("meta"):
        generator = Generator(**config.architecture(image_size))
        discriminator = Discriminator(config.width, image_size, config.model.kernel_size)
    return generator.to(dtype), discriminator.to(dtype)


def _bytes(network: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in network.state_dict().values())


def _order(subject: Subject) -> SampleOrder:
    return SampleOrder(subject.location.manifest, subject.config.seed, subject.config.data.window_shards)
