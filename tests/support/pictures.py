"""Images of a trained generator, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dist_dcgan.trained import Trained

CPU = torch.device("cpu")


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def by_seed(trained: Trained, seeds: Sequence[int]) -> torch.Tensor:
    return trained.images(trained.latents(seeds))
