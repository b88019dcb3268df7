"""Generator and discriminator of DCGAN (Radford et al. 2015, arXiv 1511.06434, figure 1 and section 3).

No convolution has a bias, not even without a batch norm after it, as in the widely used ports.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor, nn

from shards.common.errors import UserError

Norm: TypeAlias = Callable[[int], nn.Module]
"""Makes the batch norm for a number of channels."""

IMAGE_SIZES = (32, 64, 128)


def require_image_size(image_size: int, where: str) -> None:
    """Raise UserError if the networks do not support `image_size`, that of the data set `where`."""
    if image_size not in IMAGE_SIZES:
        sizes = ", ".join(map(str, IMAGE_SIZES))
        raise UserError(f"{where} has images of {image_size} pixels: convert to one of {sizes}")


def hidden_layers(image_size: int) -> int:
    """Return the number of layers between 4x4 and half the image: 4 for 64x64, as in the paper."""
    if image_size not in IMAGE_SIZES:
        raise ValueError(f"image size {image_size} is not supported: use one of {', '.join(map(str, IMAGE_SIZES))}")
    return int(math.log2(image_size)) - 2


class Generator(nn.Module):
    """Maps z to images.

    Input: z of shape (N, latent_dim). Output: (N, 3, image_size, image_size) in [-1, 1].
    `width` is the channels of the last hidden layer; each layer before it has twice as many.
    """

    def __init__(
        self,
        width: int = 128,
        image_size: int = 64,
        latent_dim: int = 100,
        kernel_size: int = 4,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        channels = [width << i for i in reversed(range(hidden_layers(image_size)))]
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent_dim, channels[0], 4, bias=False)]
        for before, after in pairwise(channels):
            layers += [norm(before), nn.ReLU(inplace=True), _upsample(before, after, kernel_size)]
        layers += [norm(width), nn.ReLU(inplace=True), _upsample(width, 3, kernel_size), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """Return one image per row of z."""
        images: Tensor = self.layers(z[:, :, None, None])
        return images


class Discriminator(nn.Module):
    """Maps images to logits, positive for images that it classifies as real.

    Input: (N, 3, image_size, image_size) in [-1, 1]. Output: logits of shape (N,).
    `width` is the channels of the first hidden layer; each layer after it has twice as many.
    """

    def __init__(
        self, width: int = 128, image_size: int = 64, kernel_size: int = 4, norm: Norm = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        channels = [width << i for i in range(hidden_layers(image_size))]
        layers: list[nn.Module] = [_downsample(3, width, kernel_size), nn.LeakyReLU(0.2, inplace=True)]
        for before, after in pairwise(channels):
            layers += [_downsample(before, after, kernel_size), norm(after), nn.LeakyReLU(0.2, inplace=True)]
        layers += [nn.Conv2d(channels[-1], 1, 4, bias=False)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Return one logit per image."""
        logits: Tensor = self.layers(images)
        return logits.flatten()


def init_weights(network: nn.Module, generator: torch.Generator) -> None:
    """Draw convolution weights from N(0, 0.02) (paper, section 4); batch-norm scales from N(1, 0.02), biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02, generator=generator)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight, 1.0, 0.02, generator=generator)
            nn.init.zeros_(module.bias)


def count_parameters(network: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def _upsample(before: int, after: int, kernel_size: int) -> nn.Module:
    """Double the resolution; 5x5 needs `output_padding` for the same output size."""
    padding, extra = (1, 0) if kernel_size == 4 else (2, 1)
    return nn.ConvTranspose2d(before, after, kernel_size, 2, padding, extra, bias=False)


def _downsample(before: int, after: int, kernel_size: int) -> nn.Module:
    """Halve the resolution."""
    return nn.Conv2d(before, after, kernel_size, 2, 1 if kernel_size == 4 else 2, bias=False)
