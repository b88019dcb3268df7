"""What the study trains: recipes that differ from the plain one in one factor each, and which of them on what."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

Loss = Literal["sigmoid_bce", "logits", "hinge", "lsgan"]


@dataclass(frozen=True)
class Recipe:
    """A way to train; the defaults are the paper's networks and rates with a loss on logits."""

    width: int = 128
    loss: Loss = "logits"
    lr_g: float = 2e-4
    lr_d: float = 2e-4
    sigma: float = 0.0
    """Instance noise on D's inputs, where images span [-1, 1]."""
    sigma_zero_at: int | None = None
    """Step at which the noise has faded to nothing, linearly; None keeps it."""
    lr_by_fan_in: Literal["", "d", "gd"] = ""
    """In which networks the rate of layers whose fan-in grows with the width is scaled by 64 / width (arXiv 2203.03466,
    the rule for Adam)."""
    lr_logit: float = 1.0
    """Factor of the rate of D's last layer."""
    l2: float = 0.0
    """Weight decay added to the gradients, as in the paper's code."""
    alternate: bool = False
    """Update D and G on alternating mini-batches, as in the paper's code."""
    r1: float = 0.0
    """Weight of the gradient penalty on real images (Mescheder et al. 2018, gamma)."""


PLAIN = Recipe(loss="sigmoid_bce")
LOGITS = Recipe()

SIGMAS = (0.1, 0.3, 0.5)
RECIPES: dict[str, Recipe] = {
    "plain": PLAIN,
    "plain, width 64": replace(PLAIN, width=64),
    "logits": LOGITS,
    "hinge": replace(LOGITS, loss="hinge"),
    "lsgan": replace(LOGITS, loss="lsgan"),
    "rate 1e-4": replace(LOGITS, lr_g=1e-4, lr_d=1e-4),
    "rate 5e-5": replace(LOGITS, lr_g=5e-5, lr_d=5e-5),
    "rate by fan-in": replace(LOGITS, lr_by_fan_in="gd"),
    "rate of D's last layer / 10": replace(LOGITS, lr_logit=0.1),
    "L2 1e-5": replace(LOGITS, l2=1e-5),
    "alternating": replace(LOGITS, alternate=True),
    "R1 1": replace(LOGITS, r1=1.0),
    **{f"noise {sigma}": replace(LOGITS, sigma=sigma) for sigma in SIGMAS},
    **{f"noise {sigma} to 0": replace(LOGITS, sigma=sigma, sigma_zero_at=200) for sigma in SIGMAS},
    "D's rate by fan-in": replace(LOGITS, lr_by_fan_in="d"),
    "noise 0.1, D's rate by fan-in": replace(LOGITS, sigma=0.1, lr_by_fan_in="d"),
    "noise 0.1, rate by fan-in": replace(LOGITS, sigma=0.1, lr_by_fan_in="gd"),
}


SURVIVORS = ("logits", "noise 0.1", "rate of D's last layer / 10")
"""Recipes at full width that the screening left; the first goes through all phases."""
SEEDS = (0, 1, 2)


class Trial(NamedTuple):
    """One run of the study."""

    recipe: str
    data: str
    seed: int
    batch: int
    steps: int
    precision: Literal["fp32", "bf16"] = "fp32"

    @property
    def name(self) -> str:
        """A name for its folder."""
        words = f"{self.recipe} {self.data} seed {self.seed} batch {self.batch} steps {self.steps}"
        words += "" if self.precision == "fp32" else f" {self.precision}"
        return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in words)


def screen() -> list[Trial]:
    """Every recipe once: which factor matters."""
    return [Trial(name, "photos", 0, 32, 200) for name in RECIPES]


def compare() -> list[Trial]:
    """What survived the screening on three seeds, the first and the plain nets of both widths on two data sets."""
    on_both = ("plain, width 64", SURVIVORS[0], "plain")
    photos = [Trial(name, "photos", seed, 32, 300) for seed in SEEDS for name in (*on_both, *SURVIVORS[1:])]
    return photos + [Trial(name, "rooms", seed, 32, 300) for seed in SEEDS for name in on_both]


def batches() -> list[Trial]:
    """The first survivor at larger batches, in the precision that it has on a GPU."""
    return [Trial(SURVIVORS[0], "photos", 0, batch, 150, "bf16") for batch in (64, 128)]


def prove() -> list[Trial]:
    """The first survivor for longer, in the precision that it has on a GPU."""
    return [Trial(SURVIVORS[0], data, 0, 32, 2000, "bf16") for data in ("photos", "rooms")]


PHASES = {"screen": screen, "compare": compare, "batches": batches, "prove": prove}
