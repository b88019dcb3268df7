"""The networks are the paper's, in the form that everybody uses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dist_dcgan.models.networks import IMAGE_SIZES, Discriminator, Generator, init_weights


def reference_generator(width: int) -> nn.Module:
    """The widely used 4x4 generator for 64x64 images, a layer a line."""
    return nn.Sequential(
        *(nn.ConvTranspose2d(100, width * 8, 4, 1, 0, bias=False), nn.BatchNorm2d(width * 8), nn.ReLU()),
        *(nn.ConvTranspose2d(width * 8, width * 4, 4, 2, 1, bias=False), nn.BatchNorm2d(width * 4), nn.ReLU()),
        *(nn.ConvTranspose2d(width * 4, width * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(width * 2), nn.ReLU()),
        *(nn.ConvTranspose2d(width * 2, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh()),
    )


def reference_discriminator(width: int) -> nn.Module:
    """The widely used 4x4 discriminator for 64x64 images, without its sigmoid."""
    return nn.Sequential(
        *(nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(width, width * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(width * 2), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(width * 2, width * 4, 4, 2, 1, bias=False), nn.BatchNorm2d(width * 4), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(width * 4, width * 8, 4, 2, 1, bias=False), nn.BatchNorm2d(width * 8), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(width * 8, 1, 4, 1, 0, bias=False), nn.Flatten(0)),
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("network", "reference", "inputs", "shape"),
    [
        (Generator(width=16), reference_generator(16), torch.rand(8, 100), (8, 100, 1, 1)),
        (Discriminator(width=16), reference_discriminator(16), torch.rand(8, 3, 64, 64), (8, 3, 64, 64)),
    ],
    ids=["generator", "discriminator"],
)
def test_a_network_equals_the_reference(
    network: nn.Module, reference: nn.Module, inputs: Tensor, shape: tuple[int, ...], training: bool
) -> None:
    """In every layer: the reference's weights are given to the network in their order."""
    init_weights(reference, torch.Generator().manual_seed(1))
    names, weights = network.state_dict().keys(), reference.state_dict().values()
    network.load_state_dict(dict(zip(names, weights, strict=True)))
    inputs = inputs * 2 - 1
    difference = network.train(training)(inputs) - reference.train(training)(inputs.view(shape))
    assert difference.abs().max() <= 1e-6


@pytest.mark.parametrize("kernel_size", [4, 5])
@pytest.mark.parametrize("image_size", IMAGE_SIZES)
def test_every_image_size_and_kernel_fits(image_size: int, kernel_size: int) -> None:
    images = Generator(4, image_size, latent_dim=7, kernel_size=kernel_size)(torch.zeros(2, 7))
    assert images.shape == (2, 3, image_size, image_size)
    assert Discriminator(4, image_size, kernel_size)(images).shape == (2,)


def test_an_unknown_image_size_is_refused() -> None:
    with pytest.raises(ValueError, match="image size 48 is not supported: use one of 32, 64, 128"):
        Generator(image_size=48)


def test_first_weights_have_the_papers_distribution() -> None:
    network = Generator(width=32)
    init_weights(network, torch.Generator().manual_seed(0))
    convolutions = torch.cat([m.weight.flatten() for m in network.modules() if isinstance(m, nn.ConvTranspose2d)])
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    scales = torch.cat([norm.weight for norm in norms])
    convolutions, scales = convolutions.detach(), scales.detach()
    assert abs(float(convolutions.mean())) < 1e-4
    assert float(convolutions.std()) == pytest.approx(0.02, rel=0.01)
    assert float(scales.mean()) == pytest.approx(1, abs=0.005)
    assert float(scales.std()) == pytest.approx(0.02, rel=0.15)
    assert all(bool((norm.bias == 0).all()) for norm in norms)
