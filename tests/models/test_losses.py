"""The losses, and why logits."""

from __future__ import annotations

import math

import pytest
import torch

from dist_dcgan.models.losses import LOSSES, discriminator_loss_fake, discriminator_loss_real, generator_loss


@pytest.mark.parametrize("form", LOSSES)
def test_values_are_those_of_cross_entropy(form: str) -> None:
    logits = torch.tensor([0.0, 2.0], dtype=torch.float64)
    real = (math.log(2) + math.log1p(math.exp(-2))) / 2
    fake = (math.log(2) + math.log1p(math.exp(2))) / 2
    assert float(discriminator_loss_real(logits, form)) == pytest.approx(real)
    assert float(discriminator_loss_fake(logits, form)) == pytest.approx(fake)
    assert float(generator_loss(logits, form)) == pytest.approx(real)


def gradient_of_a_rejected_fake(form: str) -> float:
    logits = torch.tensor([-100.0], requires_grad=True)
    generator_loss(logits, form).backward()
    return float(logits.grad)  # type: ignore[arg-type]


def test_a_generator_that_is_rejected_with_confidence_still_learns_from_logits() -> None:
    assert gradient_of_a_rejected_fake("logits") == pytest.approx(-1)


def test_it_learns_nothing_any_more_from_a_sigmoid() -> None:
    assert gradient_of_a_rejected_fake("sigmoid_bce") == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", LOSSES)
def test_half_precision_logits_give_a_float32_loss(form: str, dtype: torch.dtype) -> None:
    assert generator_loss(torch.zeros(2, dtype=dtype), form).dtype == torch.float32
