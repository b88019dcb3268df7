"""The networks are the paper's, in the form that everybody uses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_dcgan.models.networks import IMAGE_SIZES, Discriminator, Generator, count_parameters, init_weights


def reference_generator(width: int) -> nn.Module:
    """The widely used 4x4 generator for 64x64 images, layer by layer."""
    return nn.Sequential(
        nn.ConvTranspose2d(100, width * 8, 4, 1, 0, bias=False),
        nn.BatchNorm2d(width * 8),
        nn.ReLU(),
        nn.ConvTranspose2d(width * 8, width * 4, 4, 2, 1, bias=False),
        nn.BatchNorm2d(width * 4),
        nn.ReLU(),
        nn.ConvTranspose2d(width * 4, width * 2, 4, 2, 1, bias=False),
        nn.BatchNorm2d(width * 2),
        nn.ReLU(),
        nn.ConvTranspose2d(width * 2, width, 4, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False),
        nn.Tanh(),
    )


def reference_discriminator(width: int) -> nn.Module:
    """The widely used 4x4 discriminator for 64x64 images, without its sigmoid."""
    return nn.Sequential(
        nn.Conv2d(3, width, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, width * 2, 4, 2, 1, bias=False),
        nn.BatchNorm2d(width * 2),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width * 2, width * 4, 4, 2, 1, bias=False),
        nn.BatchNorm2d(width * 4),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width * 4, width * 8, 4, 2, 1, bias=False),
        nn.BatchNorm2d(width * 8),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width * 8, 1, 4, 1, 0, bias=False),
        nn.Flatten(0),
    )


def load_reference(network: nn.Module, reference: nn.Module) -> None:
    """Draw the reference's weights and give them to the network, by the order of layers."""
    init_weights(reference, torch.Generator().manual_seed(1))
    names, weights = network.state_dict().keys(), reference.state_dict().values()
    network.load_state_dict(dict(zip(names, weights, strict=True)))


@pytest.mark.parametrize("training", [True, False])
def test_generator_equals_the_reference(training: bool) -> None:
    network, reference = Generator(width=16), reference_generator(16)
    load_reference(network, reference)
    z = torch.rand(8, 100) * 2 - 1
    difference = network.train(training)(z) - reference.train(training)(z[:, :, None, None])
    assert difference.abs().max() <= 1e-6


@pytest.mark.parametrize("training", [True, False])
def test_discriminator_equals_the_reference(training: bool) -> None:
    network, reference = Discriminator(width=16), reference_discriminator(16)
    load_reference(network, reference)
    images = torch.rand(8, 3, 64, 64) * 2 - 1
    difference = network.train(training)(images) - reference.train(training)(images)
    assert difference.abs().max() <= 1e-6


def test_the_paper_width_has_the_papers_parameters() -> None:
    with torch.device("meta"):
        assert count_parameters(Generator(width=128)) == 12_658_432
        assert count_parameters(Discriminator(width=128)) == 11_036_160
        channels = [layer.in_channels for layer in Generator(128).modules() if isinstance(layer, nn.ConvTranspose2d)]
    assert channels == [100, 1024, 512, 256, 128]


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


def test_batch_norm_stands_everywhere_but_at_the_images() -> None:
    generator = [type(layer).__name__ for layer in Generator(4).layers]
    discriminator = [type(layer).__name__ for layer in Discriminator(4).layers]
    assert generator[-2:] == ["ConvTranspose2d", "Tanh"]
    assert generator[:-2] == ["ConvTranspose2d", "BatchNorm2d", "ReLU"] * 4
    assert discriminator[:2] == ["Conv2d", "LeakyReLU"]
    assert discriminator[2:] == ["Conv2d", "BatchNorm2d", "LeakyReLU"] * 3 + ["Conv2d"]
