"""Export of the averaged generator as a file, with a description to rebuild it on any machine."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, StringConstraints
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dist_dcgan.config import Config, ModelOptions
from dist_dcgan.models.networks import Generator
from dist_dcgan.run.tensor_file import require_size, serialised
from shards.common.command_line import build
from shards.common.errors import UserError
from shards.common.files import atomic_file, content_sha256, name_of, open_plain, publish, read_plain, sync

MODEL, MODEL_DESCRIPTION = "model.safetensors", "config.json"
"""Files of a folder that `dist_dcgan.export` writes."""
_IN_HEADER = "dist_dcgan"
"""Name of the description in the header of the weights."""
_MOST_BYTES = 1 << 20
"""Of a description."""
_MOST_WEIGHTS_BYTES = 1 << 33
_AGAIN_SECONDS = 0.2
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
    """Write the weights (float32, safetensors), with architecture, step and scores in their header, to `path`.

    One rename so decides what is read, whatever becomes of this process. The JSON beside it is for people, and for
    older versions of this program. `generator` must hold batch-norm statistics of its own weights
    (`recompute_statistics`).
    """
    weights, description = _packed(
        generator,
        {
            "step": step,
            "scores": dict(scores or {}),
            "latent": config.model.latent,
            "architecture": config.architecture(image_size),
        },
    )
    with atomic_file(path) as file, atomic_file(_beside(path)) as description_file:
        file.write(weights)
        file.flush()
        sync(file.fileno())  # before either gets its name, so that a full disk leaves the generator that was there
        description_file.write((json.dumps(description, indent=1) + "\n").encode())


def export_folder(folder: Path, generator: nn.Module, description: Mapping[str, Any]) -> None:
    """Write weights and description as the hubs of models name them; `load_generator` reads both."""
    weights, values = _packed(generator, description)
    publish(folder / MODEL, weights)
    publish(folder / MODEL_DESCRIPTION, (json.dumps(values, indent=1) + "\n").encode())


def _packed(generator: nn.Module, description: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """Return the file of the weights with their description in its header, and that description with its SHA-256."""
    tensors = {name: _float32(tensor) for name, tensor in generator.state_dict().items()}
    known = build(_Description, {**description, "sha256": _sha256(tensors)})
    values = {"format_version": 1, **known.model_dump()}
    weights = save(tensors, {_IN_HEADER: json.dumps(values)})
    return weights, values | {"sha256": hashlib.sha256(weights).hexdigest()}


def load_generator(path: Path, description_path: Path | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Return the exported generator in eval mode, and its description; raises UserError if it is not sound.

    The description is in the file; older versions wrote it beside it, or to `description_path`. Its `sha256` is that of
    the file.
    """
    if not path.is_file():
        raise UserError(f"no exported generator at {path}: it is written at the end of a run and when it is stopped")
    with _errors_of(path):
        try:
            return _loaded(path, description_path)
        except _UNUSABLE:
            time.sleep(_AGAIN_SECONDS)  # an older version, in training, replaces two files one after the other
            return _loaded(path, description_path)


def read_description(path: Path) -> dict[str, Any]:
    """Return the description of an exported generator, without its weights; raises UserError if it is not sound."""
    with _errors_of(path), open_plain(path) as file:
        require_size(file, _MOST_WEIGHTS_BYTES)
        return (_in_header(name_of(file)) or _description(read_plain(_beside(path), _MOST_BYTES))).model_dump()


def _loaded(path: Path, description_path: Path | None) -> tuple[nn.Module, dict[str, Any]]:
    with open_plain(path) as file:
        require_size(file, _MOST_WEIGHTS_BYTES)
        inside = _in_header(name_of(file))
        description = inside or _description(read_plain(description_path or _beside(path), _MOST_BYTES))
        _require_shapes(description.architecture, name_of(file))
        whole, weights = content_sha256(file), load_file(name_of(file))
    if description.sha256 != (_sha256(weights) if inside else whole):
        raise ValueError("the weights do not match their checksum")
    generator = Generator(**description.architecture.model_dump())
    generator.load_state_dict(weights)
    if not is_finite(generator):
        raise ValueError("its weights are not finite")
    return generator.eval().requires_grad_(False), description.model_dump() | {"sha256": whole}


def _in_header(weights: str) -> _Description | None:
    """Return the description in the header of a file of weights, None if it is of an older version."""
    with safe_open(weights, "pt") as file:
        content = (file.metadata() or {}).get(_IN_HEADER)
    return None if content is None else _description(content[:_MOST_BYTES])


def _beside(path: Path) -> Path:
    return path.with_suffix(".json")


def _description(content: str | bytes) -> _Description:
    return build(_Description, dict(json.loads(content)))


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Turn the errors of a file that is no export into a UserError."""
    try:
        yield
    except _UNUSABLE as error:
        raise UserError(f"exported generator {path} cannot be used: {' '.join(str(error).split())}") from None


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hex, of a file of these tensors without a description."""
    digest = hashlib.sha256()
    for part in serialised(tensors):
        digest.update(part)
    return digest.hexdigest()


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
