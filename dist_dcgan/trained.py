"""The averaged generator of a run, whatever has become of the run, and its images by their seeds."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.backends import cudnn

from dist_dcgan.config import Config
from dist_dcgan.drawing import to_pixels
from dist_dcgan.models.networks import Generator
from dist_dcgan.random_streams import stream_seed
from dist_dcgan.run.checkpoint import list_checkpoints, load_newest
from dist_dcgan.run.directory import RunDirectory
from dist_dcgan.run.export import MODEL, MODEL_DESCRIPTION, is_finite, load_generator, read_description, sampling_config
from dist_dcgan.run.history import reported_reading
from dist_dcgan.training.ema import draw_latents, recompute_statistics
from shards.common.command_line import build
from shards.common.errors import UserError
from shards.common.messages import warn
from shards.common.plain_yaml import read_yaml
from shards.common.progress import Progress

BATCH = 32
"""Images drawn at a time. Always so many: values differ by 3e-7 from those of another number, with two threads."""
CHANGED_MEANWHILE = "it is in training and has just saved: give the same command again"
_MANY = 500
"""Images from which on progress is shown."""
_MOST_SEEDS = 10_000_000
_RANGE = re.compile(r"(\d{1,19})(?:-(\d{1,19}))?")


@dataclass(frozen=True)
class Trained:
    """A generator to draw from."""

    network: nn.Module
    """In eval mode, on `device`."""
    description: dict[str, Any]
    """Step, architecture and distribution of z, as in an export's JSON."""
    device: torch.device

    def latents(self, seeds: Sequence[int]) -> Tensor:
        """Return the z of each seed, float32 (len(seeds), latent_dim): a function of the seed alone."""
        config = sampling_config(self.description, 0)
        rows = [draw_latents(config, stream_seed(seed, "samples", 0), range(1), self.device) for seed in seeds]
        return torch.cat(rows)

    def images(self, z: Tensor) -> Tensor:
        """Return the images of z, uint8 (len(z), 3, size, size), on the CPU; one does not depend on the others."""
        images = []
        with Progress(len(z), "images", shown=len(z) >= _MANY) as progress:
            for part in z.split(BATCH):
                padded = torch.cat([part, part.new_zeros(BATCH - len(part), part.shape[1])])
                with torch.no_grad(), _same_everywhere():
                    images.append(to_pixels(self.network(padded)[: len(part)].float()).cpu())
                progress.advance(len(part))
        return torch.cat(images)


def load_trained(path: Path, best: bool, device: torch.device | None = None) -> Trained:
    """Return the generator of an exported folder, or of a run: its export, or a checkpoint that is newer or sound.

    A run exports its generator at its end and when it is stopped; one that is being trained, or that died, has
    checkpoints only. Without `device` it is the GPU, if there is one. Raises UserError if there is neither export nor
    checkpoint, or what there is cannot be used.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with reported_reading(path):
        network, description = _loaded(path, best, device)
    return Trained(network.to(device).to(memory_format=torch.channels_last), description, device)


def _loaded(path: Path, best: bool, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    run = RunDirectory(path)
    if not path.is_dir():
        raise UserError(f"no folder {path}: name that of a run, or of an export")
    if (path / MODEL).is_file():
        if best:
            raise UserError(f"{path} holds one exported model: leave out --best")
        return load_generator(path / MODEL, path / MODEL_DESCRIPTION)
    if best:
        _require_best(run)
        return load_generator(run.best)
    return _latest(run, device)


def _latest(run: RunDirectory, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """Return the generator of the export, or of a later checkpoint; with a warning, of the other if one is unusable."""
    exported, stored = partial(load_generator, run.generator), partial(_of_newest_checkpoint, run, device)
    outdated = _is_outdated(run)
    try:
        return stored() if outdated else exported()
    except UserError as error:
        if not (os.path.lexists(run.generator) and list_checkpoints(run.checkpoints)):
            raise
        warn(f"{error}: {'the earlier export' if outdated else 'the newest checkpoint'} is taken")
    return exported() if outdated else stored()


def _require_best(run: RunDirectory) -> None:
    if not os.path.lexists(run.best):
        raise UserError(
            f"no score has been taken in {run.path}, and so no generator is the best: leave out --best (scores need "
            "the extra `eval`, and are taken every --quality.every-images)"
        )


def parse_seeds(text: str, flag: str) -> list[int]:
    """Return the seeds of a list such as `0-63,100`, in its order; raises UserError if it is none."""
    seeds: list[int] = []
    for part in text.split(","):
        found = _RANGE.fullmatch(part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if not first <= last < 2**63:
            raise UserError(f"{flag} {text}: {part.strip()!r} is no seed and no range of seeds, as in 0-63,100")
        if len(seeds) + last - first >= _MOST_SEEDS:
            raise UserError(f"{flag} {text}: these are more than {_MOST_SEEDS:,} seeds: give them in parts")
        seeds += range(first, last + 1)
    return seeds


def _same_everywhere() -> AbstractContextManager[None]:
    """Return the context in which cuDNN computes in float32 and always alike; its default would be to switch it off."""
    return cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def _is_outdated(run: RunDirectory) -> bool:
    """Return whether there is a checkpoint, and no export or an earlier one; what is wrong with it, loading it says."""
    checkpoints = list_checkpoints(run.checkpoints)
    if not checkpoints or not os.path.lexists(run.generator):
        return bool(checkpoints)
    with suppress(UserError):
        step: int = read_description(run.generator)["step"]
        return step < _step_of(checkpoints[-1])
    return False


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _of_newest_checkpoint(run: RunDirectory, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    found = load_newest(run.checkpoints)
    if found is None:  # removed since they were listed
        return load_generator(run.generator)
    config = build(Config, read_yaml(run.config), where=str(run.config))
    prefix = "generator_ema."
    weights = {name.removeprefix(prefix): value for name, value in found.tensors.items() if name.startswith(prefix)}
    convolutions = sum(tensor.dim() == 4 for tensor in weights.values())
    architecture = config.architecture(image_size=2 ** (convolutions + 1))
    try:
        with torch.device("meta"):  # before memory is taken: both files may come from others
            network = Generator(**architecture)
        network.load_state_dict(weights, assign=True)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the newest checkpoint in {run.checkpoints} is not of {run.config}: {reason}") from None
    network = network.float().to(device).to(memory_format=torch.channels_last)  # as in training
    if not is_finite(network):
        raise UserError(f"the weights of the newest checkpoint in {run.checkpoints} are not finite")
    content = save({name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()})
    with _same_everywhere():
        recompute_statistics(network, config, device, torch.float32)
    description = {
        "step": found.values["step"],
        "scores": {},
        "latent": config.model.latent,
        "architecture": architecture,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return network.requires_grad_(False), description
