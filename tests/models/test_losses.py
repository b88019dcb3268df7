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


@pytest.mark.parametrize(("form", "slope"), [("logits", -1), ("sigmoid_bce", 0)])
def test_a_generator_that_is_rejected_with_confidence_still_learns_from_logits_and_not_from_a_sigmoid(
    form: str, slope: float
) -> None:
    logits = torch.tensor([-100.0], requires_grad=True)
    generator_loss(logits, form).backward()
    assert logits.grad is not None and float(logits.grad) == pytest.approx(slope)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", LOSSES)
def test_half_precision_logits_give_a_float32_loss(form: str, dtype: torch.dtype) -> None:
    assert generator_loss(torch.zeros(2, dtype=dtype), form).dtype == torch.float32
