"""What the study trains: recipes that differ from the plain one in one factor each, and which of them on what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

Loss = Literal["sigmoid_bce", "logits", "hinge", "lsgan", "paired"]
"""`paired` compares each real image with a generated one (arXiv 1807.00734, and R3GAN, arXiv 2501.05441)."""


@dataclass(frozen=True)
class Recipe:
    """A way to train; the defaults are the paper's networks and rates with a loss on logits."""

    width: int = 128
    loss: Loss = "logits"
    lr_g: float = 2e-4
    lr_d: float = 2e-4
    sigma: float = 0.0
    """Instance noise on D's inputs, where images span [-1, 1]."""
    sigma_on_colour: bool = False
    """Take from that noise its mean over the three colours, so that D sees lightness as it is."""
    sigma_zero_at: int | None = None
    """Step at which the noise has faded to nothing, linearly; None keeps it."""
    lr_by_fan_in: Literal["", "d", "gd"] = ""
    """In which networks the rate of layers whose fan-in grows with the width is scaled by 64 / width (arXiv 2203.03466,
    the rule for Adam)."""
    lr_logit: float = 1.0
    """Factor of the rate of D's last layer."""
    lr_image: float = 1.0
    """Factor of the rate of G's last layer."""
    l2: float = 0.0
    """Weight decay added to the gradients, as in the paper's code."""
    alternate: bool = False
    """Update D and G on alternating mini-batches, as in the paper's code."""
    r1: float = 0.0
    """Weight of the gradient penalty on real images (Mescheder et al. 2018, gamma)."""
    r2: float = 0.0
    """The same on generated images."""
    beta2: float = 0.999
    fade: Literal["", "linear", "cosine"] = ""
    """How both rates fall to 0 over the trial."""
    spectral: bool = False
    """Divide each weight of D by its largest singular value (arXiv 1802.05957)."""
    flip: bool = False
    """Mirror real images with probability 1/2."""
    half_colour: bool = False
    """Show D the colours of every image at half of their resolution."""
    augment: bool = False
    """Change colours, place and a square of every image that D sees (DiffAugment, arXiv 2006.10738)."""


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


SCREENED = tuple(RECIPES)
SURVIVORS = ("logits", "noise 0.1", "rate of D's last layer / 10")
"""Recipes at full width that the screening left; the first goes through all phases."""
SEEDS = (0, 1, 2)


class Factor(NamedTuple):
    """A change of today's default that could pay over a long run, and what was expected of it before it was tried."""

    change: Mapping[str, Any]
    expected: str
    batch: int = 32


FACTORS = {
    "default": Factor({}, "the measure of the others; at 32x32 full width ahead by a tenth from 80,000 images on"),
    "beta2 0.99": Factor({"beta2": 0.99}, "faster: steps follow gradients that shrink by an order of magnitude"),
    "D's rate 1e-4": Factor({"lr_d": 1e-4}, "better: D wins less, so G's gradient has more to say"),
    "G's rate 4e-4": Factor({"lr_g": 4e-4}, "as D's rate 1e-4, and faster"),
    "DiffAugment": Factor({"augment": True}, "slower early; better on the photographs from some 30 passes on"),
    "spectral norm": Factor({"spectral": True}, "slower early, better late: D's gradient stays bounded"),
    "batch 128": Factor({}, "much slower by images: a quarter of the updates", 128),
    "rates fall linearly": Factor({"fade": "linear"}, "better in the last third, more so at full width"),
    "rates 1e-4": Factor({"lr_g": 1e-4, "lr_d": 1e-4}, "slower early, level or better at the end at full width only"),
    "rates 4e-4": Factor({"lr_g": 4e-4, "lr_d": 4e-4}, "better at half the width, worse at full width"),
    "paired, R1 and R2 1": Factor({"loss": "paired", "r1": 1.0, "r2": 1.0}, "the best late, at three times the cost"),
    "batch 16": Factor({}, "faster early; noisier, so level or worse at the end", 16),
    "R1 1": Factor({"r1": 1.0}, "better late at full width, at twice the cost"),
    "batch 64": Factor({}, "slower by images early, level at the end", 64),
    "mirrored": Factor({"flip": True}, "no difference before 100 passes over the photographs, none on CIFAR-10"),
    "D's rate 5e-5": Factor({"lr_d": 5e-5}, "worse: D cannot follow G, diversity falls"),
    "G's rate 5e-5": Factor({"lr_g": 5e-5}, "worse: G cannot follow D"),
    "rates fall by a cosine": Factor({"fade": "cosine"}, "as linearly"),
    "rates by fan-in": Factor({"lr_by_fan_in": "gd"}, "full width slower early and better late"),
    "batch 8": Factor({}, "as batch 16, and more so", 8),
    "rates 4e-4, batch 16": Factor(
        {"lr_g": 4e-4, "lr_d": 4e-4}, "more and larger updates: the fastest, if it lives", 16
    ),
    "rates 8e-4, batch 16": Factor(
        {"lr_g": 8e-4, "lr_d": 8e-4}, "better than 4e-4 at first, and less stable; D may win for long", 16
    ),
    "rates 4e-4, batch 8": Factor({"lr_g": 4e-4, "lr_d": 4e-4}, "more updates: better than batch 16", 8),
    "beta2 0.99, batch 16": Factor({"beta2": 0.99}, "both gains together", 16),
    "rates 4e-4, batch 128": Factor(
        {"lr_g": 4e-4, "lr_d": 4e-4}, "half of what batch 128 loses: an update moves a weight by its rate", 128
    ),
    "rates 4e-4, batch 16, noise 0.05": Factor(
        {"lr_g": 4e-4, "lr_d": 4e-4, "sigma": 0.05}, "lives on CIFAR-10; on photographs level with it", 16
    ),
    "rates 4e-4, batch 16, noise 0.05 on colour": Factor(
        {"lr_g": 4e-4, "lr_d": 4e-4, "sigma": 0.05, "sigma_on_colour": True},
        "lives on small JPEGs as with noise of 0.05, and costs less: D sees edges as they are",
        16,
    ),
    "rates 4e-4, batch 16, coarse colour": Factor(
        {"lr_g": 4e-4, "lr_d": 4e-4, "half_colour": True},
        "lives on small JPEGs at no cost, but nothing holds the finest colour that G draws",
        16,
    ),
}
ONLY_QUICK = ("batch 8", "rates 8e-4, batch 16", "rates 4e-4, batch 8", "beta2 0.99, batch 16")
FASTER = "rates 4e-4, batch 16"
"""What makes most of the quickstart's picture."""
HIDING = tuple(f"{FASTER}, {change}" for change in ("noise 0.05", "noise 0.05 on colour", "coarse colour"))
"""What hides from D how a JPEG stores colours."""
WIDE = [name for name in FACTORS if name not in (*ONLY_QUICK, *HIDING)]
"""What is tried at the widths that are compared."""
WIDTHS = (128, 64)
DOUBLED = (16, 32, 64, 128)
"""Widths of which each is compared with the next."""
QUICK = ["default", FASTER, "batch 16", "beta2 0.99", "rates 8e-4, batch 16", "rates 4e-4, batch 8"]
QUICK += ["G's rate 4e-4", "rates 4e-4", "D's rate 1e-4", "batch 8", "beta2 0.99, batch 16", "rates fall linearly"]
QUICK += ["spectral norm", "paired, R1 and R2 1"]
"""What is tried for the quickstart."""
QUICK_IMAGES = 38_400
JPEGS = {"jpegs420": "4:2:0", "jpegs444": "4:4:4"}
"""The photographs of 32x32 as small JPEGs, by how these store colours."""
LARGE = ("photos", "rooms")
"""Data sets of 64x64."""
RECIPES |= {
    f"{name} at {width}": replace(LOGITS, width=width, **factor.change)
    for name, factor in FACTORS.items()
    for width in DOUBLED
}


class Trial(NamedTuple):
    """One run of the study."""

    recipe: str
    data: str
    seed: int
    batch: int
    steps: int
    precision: Literal["fp32", "bf16"] = "fp32"
    score_every: int = 100
    """Steps between scores."""

    @property
    def name(self) -> str:
        """A name for its folder."""
        words = f"{self.recipe} {self.data} seed {self.seed} batch {self.batch} steps {self.steps}"
        words += "" if self.precision == "fp32" else f" {self.precision}"
        return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in words)


def screen() -> list[Trial]:
    """Every recipe once: which factor matters."""
    return [Trial(name, "photos", 0, 32, 200) for name in SCREENED]


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


FACTOR_SCORES = 5


def factors() -> list[Trial]:
    """What could make full width worth its price, on images of 32x32, for long; the most telling trials first."""
    first = ("default", FASTER)
    trials = [factor_trial(name, width, "photos32") for name in first for width in WIDTHS]
    half = [name for name in WIDE if name != "rates by fan-in"]  # they are the default there
    trials += [factor_trial(name, 64, "photos32") for name in half if name not in first]
    trials += [factor_trial("default", 64, "photos32", seed) for seed in SEEDS[1:]]
    trials += [factor_trial(name, 128, "photos32") for name in WIDE if name not in first]
    pairs = [(name, width) for name in WIDE for width in WIDTHS if width == 128 or name in half]
    return trials + [factor_trial(name, width, "cifar") for name, width in pairs]


SCORED_IMAGES = 20_480
"""Images between their scores."""


def widths() -> list[Trial]:
    """What a doubling of the width brings: by the default, by more and larger updates, and with details hidden from D.

    Then, and on small JPEGs of the photographs, only full width and half of it are trained; at 64x64, where full
    width takes a core seven hours, only smaller ones.
    """
    trials = [
        width_trial(name, width, data, seed)
        for data in ("photos32", "cifar")
        for name in ("default", FASTER, *HIDING)
        for seed in SEEDS
        for width in (WIDTHS if name in HIDING else reversed(DOUBLED))
    ]
    trials += [width_trial(name, width, data, 0) for data in JPEGS for name in (FASTER, *HIDING) for width in WIDTHS]
    return trials + [width_trial(FASTER, width, data, 0) for data in LARGE for width in (64, 32, 16)]


def width_trial(name: str, width: int, data: str, seed: int) -> Trial:
    """Return the trial of a width, of as many images as a core makes in about two hours."""
    images = 102_400 if data in LARGE else 204_800 if width < 64 else 163_840
    batch = FACTORS[name].batch
    return Trial(f"{name} at {width}", data, seed, batch, images // batch, score_every=SCORED_IMAGES // batch)


def quickstart() -> list[Trial]:
    """What could make the first picture that people see a better one, from as many images."""
    trials = [factor_trial(name, 32, "rooms", 0, QUICK_IMAGES) for name in QUICK]
    again = [factor_trial(name, 32, "rooms", seed, QUICK_IMAGES) for seed in SEEDS[1:] for name in QUICK[:2]]
    return [*trials[:4], *again, *trials[4:]]


def factor_trial(name: str, width: int, data: str, seed: int = 0, images: int = 102_400) -> Trial:
    """Return the trial of a factor: in float32, as not every processor computes in bf16."""
    batch = FACTORS[name].batch
    steps = images // batch
    return Trial(f"{name} at {width}", data, seed, batch, steps, score_every=steps // FACTOR_SCORES)


PHASES = {
    "screen": screen,
    "compare": compare,
    "batches": batches,
    "prove": prove,
    "factors": factors,
    "widths": widths,
    "quickstart": quickstart,
}
