"""Export of the averaged generator as a file, with a description to rebuild it on any machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, StringConstraints
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dist_dcgan.config import Config, ModelOptions
from dist_dcgan.models.networks import Generator
from dist_dcgan.run.tensor_file import require_size
from shards.common.command_line import build
from shards.common.errors import UserError
from shards.common.files import atomic_file, content_sha256, name_of, open_plain, publish, read_plain, sync

MODEL, MODEL_DESCRIPTION = "model.safetensors", "config.json"
"""Files of a folder that `dist_dcgan.export` writes."""
_MOST_DESCRIPTION_BYTES = 1 << 20
_MOST_WEIGHTS_BYTES = 1 << 33
_UNUSABLE = (UserError, OSError, ValueError, TypeError, RuntimeError, ArithmeticError, MemoryError, SafetensorError)
"""Exceptions for files that are no export: from reading them, and from a generator of other sizes."""


class _Architecture(BaseModel, strict=True, extra="forbid"):
    """Arguments of the generator."""

    width: int = Field(ge=1)
    image_size: int
    latent_dim: int = Field(ge=1)
    kernel_size: Literal[4, 5]


_Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_/]{1,100}$")]
"""Of a score; it goes into the model card."""


class _Description(BaseModel, strict=True):
    """What of an export's JSON is used; the file may come from anybody."""

    step: int
    scores: dict[_Name, float] = {}
    latent: Literal["uniform", "normal"]
    architecture: _Architecture
    sha256: str


def export_generator(
    path: Path,
    generator: nn.Module,
    config: Config,
    image_size: int,
    step: int,
    scores: Mapping[str, float] | None = None,
) -> None:
    """Write the weights to `path` (float32, safetensors), and beside them a JSON with architecture, step and scores.

    `generator` must hold batch-norm statistics of its own weights (`recompute_statistics`).
    """
    weights = save({name: _float32(tensor) for name, tensor in generator.state_dict().items()})
    description = {
        "format_version": 1,
        "step": step,
        "scores": dict(scores or {}),
        "latent": config.model.latent,
        "architecture": config.architecture(image_size),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    with atomic_file(path) as file, atomic_file(path.with_suffix(".json")) as description_file:
        file.write(weights)
        file.flush()
        sync(file.fileno())  # before either gets its name, so that a full disk leaves the generator that was there
        description_file.write((json.dumps(description, indent=1) + "\n").encode())


def export_folder(folder: Path, generator: nn.Module, description: Mapping[str, Any]) -> None:
    """Write weights and description as the hubs of models name them; `load_generator` reads both."""
    weights = save({name: _float32(tensor) for name, tensor in generator.state_dict().items()})
    values = {"format_version": 1, **description, "sha256": hashlib.sha256(weights).hexdigest()}
    publish(folder / MODEL, weights)
    publish(folder / MODEL_DESCRIPTION, (json.dumps(values, indent=1) + "\n").encode())


def load_generator(path: Path, description_path: Path | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Return the exported generator in eval mode, and its description; raises UserError if it is not sound.

    The description is the JSON of the same name, unless `description_path` is given.
    """
    if not path.is_file():
        raise UserError(f"no exported generator at {path}: it is written at the end of a run and when it is stopped")
    try:
        description = _description(description_path or path.with_suffix(".json"))
        with open_plain(path) as file:
            require_size(file, _MOST_WEIGHTS_BYTES)
            _require_shapes(description.architecture, name_of(file))
            if description.sha256 != content_sha256(file):
                raise ValueError("the weights do not match their checksum")
            generator = Generator(**description.architecture.model_dump())
            generator.load_state_dict(load_file(name_of(file)))
        if not is_finite(generator):
            raise ValueError("its weights are not finite")
    except _UNUSABLE as error:
        raise UserError(f"exported generator {path} cannot be used: {' '.join(str(error).split())}") from None
    return generator.eval().requires_grad_(False), description.model_dump()


def read_description(path: Path) -> dict[str, Any]:
    """Return the description of an exported generator, without its weights; raises UserError if it is not sound."""
    try:
        return _description(path.with_suffix(".json")).model_dump()
    except _UNUSABLE as error:
        raise UserError(f"exported generator {path} cannot be used: {' '.join(str(error).split())}") from None


def _description(path: Path) -> _Description:
    content = read_plain(path, _MOST_DESCRIPTION_BYTES)
    return build(_Description, dict(json.loads(content)))


def _require_shapes(architecture: _Architecture, weights: str) -> None:
    """Raise ValueError unless a file holds the weights of a generator, before memory or time is taken for either."""
    with torch.device("meta"):
        expected = Generator(**architecture.model_dump()).state_dict()
    with safe_open(weights, "pt") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # no mapping
    if found != {name: list(tensor.shape) for name, tensor in expected.items()}:
        raise ValueError("the weights are not of the architecture that it describes")


def is_finite(network: nn.Module) -> bool:
    """Return whether all weights are finite; pixels, and so scores, would hide values that are not."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in network.parameters())


def sampling_config(description: Mapping[str, Any], seed: int) -> Config:
    """Return the configuration that draws z for an exported generator."""
    latent = ModelOptions(latent_dim=description["architecture"]["latent_dim"], latent=description["latent"])
    return Config(seed=seed, model=latent)


def _float32(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor
