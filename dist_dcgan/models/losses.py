"""GAN losses: pure functions of logits, computed in at least float32, independent of the networks' precision.

`generator_loss` is the non-saturating form of Goodfellow et al. 2014 (section 3): cross-entropy against "real".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


def logits_bce(logits: Tensor, target: float) -> Tensor:
    """Return the mean cross-entropy of sigmoid(logits) against `target`, with a gradient that never vanishes."""
    logits = _at_least_float32(logits)
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def sigmoid_bce(logits: Tensor, target: float) -> Tensor:
    """Return the same value computed from the sigmoid.

    Below a logit of about -27 its gradient vanishes, so that G stops learning once D rejects its images with confidence
    (soumith/dcgan.torch#81). Kept to demonstrate that.
    """
    probabilities = _at_least_float32(logits).sigmoid()
    return F.binary_cross_entropy(probabilities, torch.full_like(probabilities, target))


LOSSES: Mapping[str, Callable[[Tensor, float], Tensor]] = {"logits": logits_bce, "sigmoid_bce": sigmoid_bce}


def discriminator_loss_real(logits_real: Tensor, form: str) -> Tensor:
    """Return D's loss on real images, a scalar."""
    return LOSSES[form](logits_real, 1.0)


def discriminator_loss_fake(logits_fake: Tensor, form: str) -> Tensor:
    """Return D's loss on generated images, a scalar."""
    return LOSSES[form](logits_fake, 0.0)


def generator_loss(logits_fake: Tensor, form: str) -> Tensor:
    """Return G's loss, a scalar."""
    return LOSSES[form](logits_fake, 1.0)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
