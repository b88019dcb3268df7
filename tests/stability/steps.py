"""One training step with every factor of the study, in one process, and what the study looks at in it.

With the factors that the product has, it computes what `dist_dcgan.training.steps.train_step` computes (held by
`tests/stability/test_study.py`), so that what the study finds holds for the product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_dcgan.data.loader import flip
from dist_dcgan.models.losses import LOSSES
from dist_dcgan.models.networks import Discriminator
from dist_dcgan.random_streams import normal, stream_seed, uniform
from dist_dcgan.training.ema import draw_latents, ema_decay, update_ema
from dist_dcgan.training.steps import diversity
from dist_dcgan.training.train_state import TrainState
from tests.stability.recipes import Recipe

Row = dict[str, float]


def study_step(state: TrainState, recipe: Recipe, real: Tensor, per_layer: bool) -> Row:
    """Take one step on `real` and return what happened in it; `per_layer` adds norms and ratios of each layer."""
    if recipe.flip:
        real = flip(real, stream_seed(state.config.seed, "flip", state.step), state.slots)
    fade_rates(state, recipe)
    key = stream_seed(state.config.seed, "z", state.step)
    z = draw_latents(state.config, key, state.slots, state.world.device).to(state.dtype)
    with state.autocast():
        fake = state.generator(z)
    row: Row = {"diversity/real": float(diversity(real)), "diversity/fake": float(diversity(fake))}
    if not recipe.alternate or state.step % 2 == 0:
        row |= discriminator_turn(state, recipe, real, fake.detach(), per_layer)
    if not recipe.alternate or state.step % 2 == 1:
        row |= generator_turn(state, recipe, real, fake, per_layer)
    state.step += 1
    decay = ema_decay(state.config, state.images_seen, state.plan.global_batch)
    update_ema(state.generator_ema, state.generator, torch.tensor(1 - decay), torch.tensor(True))
    return row


def discriminator_turn(state: TrainState, recipe: Recipe, real: Tensor, fake: Tensor, per_layer: bool) -> Row:
    """Update D."""
    state.optimizer_d.zero_grad(set_to_none=True)
    seen_real = _as_seen(state, recipe, real, "real")
    seen_fake = _as_seen(state, recipe, fake, "fake")
    with state.autocast():
        logits_real = state.discriminator(seen_real)
    loss_real = torch.zeros(())
    if recipe.loss != "paired":
        loss_real = _loss(recipe, logits_real, 1.0)
        (loss_real + _gradient_penalty(state, recipe.r1, seen_real)).backward()
    with state.autocast():
        logits_fake = state.discriminator(seen_fake)
    if recipe.loss == "paired":
        loss_fake = F.softplus(logits_fake.float() - logits_real.float()).mean()
        penalty = _gradient_penalty(state, recipe.r1, seen_real) + _gradient_penalty(state, recipe.r2, seen_fake)
        (loss_fake + penalty).backward()
    else:
        loss_fake = _loss(recipe, logits_fake, 0.0)
        loss_fake.backward()
    row = {
        "loss/d": float((loss_real + loss_fake).detach()),
        "score/real": float(logits_real.detach().sigmoid().mean()),
        "score/fake": float(logits_fake.detach().sigmoid().mean()),
        "logit/real": float(logits_real.detach().mean()),
        "logit/fake": float(logits_fake.detach().mean()),
        "logit_std/fake": float(logits_fake.detach().std()),
    }
    return row | _update(state.optimizer_d, state.discriminator, "d", per_layer)


def generator_turn(state: TrainState, recipe: Recipe, real: Tensor, fake: Tensor, per_layer: bool) -> Row:
    """Update G."""
    state.optimizer_g.zero_grad(set_to_none=True)
    state.discriminator.requires_grad_(False)
    with state.autocast():
        logits_fake = state.discriminator(_as_seen(state, recipe, fake, "under G"))
        if recipe.loss == "paired":
            logits_real = state.discriminator(_as_seen(state, recipe, real, "real under G"))
    state.discriminator.requires_grad_(True)
    if recipe.loss == "paired":
        loss = F.softplus(logits_real.float() - logits_fake.float()).mean()
    else:
        loss = -logits_fake.mean() if recipe.loss == "hinge" else _loss(recipe, logits_fake, 1.0)
    loss.backward()
    row = {
        "loss/g": float(loss.detach()),
        "logit/fake_updated": float(logits_fake.detach().mean()),
        "score/fake_updated": float(logits_fake.detach().sigmoid().mean()),
    }
    return row | _update(state.optimizer_g, state.generator, "g", per_layer)


def fade_rates(state: TrainState, recipe: Recipe) -> None:
    """Give both optimizers the rates of this step."""
    if not recipe.fade:
        return
    done = state.step / state.plan.total_steps
    share = 1 - done if recipe.fade == "linear" else (1 + math.cos(math.pi * done)) / 2
    for optimizer in (state.optimizer_d, state.optimizer_g):
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * share


def use_spectral_norm(state: TrainState) -> None:
    """Divide the weights of D's convolutions by their largest singular values, by one power iteration a forward."""
    for layer in state.discriminator.modules():
        if isinstance(layer, nn.Conv2d):
            nn.utils.parametrizations.spectral_norm(layer)


def scale_rates(state: TrainState, recipe: Recipe) -> None:
    """Give every layer the rate, and the optimizers the weight decay, that the recipe asks for."""
    for optimizer, network in ((state.optimizer_d, state.discriminator), (state.optimizer_g, state.generator)):
        factors: dict[float, list[nn.Parameter]] = {}
        for name, parameter in network.named_parameters():
            factors.setdefault(rate_factor(recipe, network, name, parameter), []).append(parameter)
        (group,) = optimizer.param_groups
        common = {key: value for key, value in group.items() if key != "params"} | {"weight_decay": recipe.l2}
        optimizer.param_groups = [
            common | {"params": parameters, "lr": group["lr"] * factor} for factor, parameters in factors.items()
        ]


def rate_factor(recipe: Recipe, network: nn.Module, name: str, parameter: nn.Parameter) -> float:
    """Return the factor of the rate of one parameter."""
    names = [other for other, value in network.named_parameters() if value.dim() == 4]
    is_logit_layer = name == names[-1] and parameter.shape[0] == 1
    is_image_layer = name == names[-1] and parameter.shape[1] == 3
    grows = parameter.dim() == 4 and name != names[0]  # the first layers see z and the three colours
    scaled = ("d" if isinstance(network, Discriminator) else "g") in recipe.lr_by_fan_in
    factor = 64 / recipe.width if scaled and grows else 1.0
    return factor * (recipe.lr_logit if is_logit_layer else recipe.lr_image if is_image_layer else 1.0)


def use_differentiable_batchnorm(state: TrainState) -> None:
    """Give D torch's own batch norm, around the same parameters: a gradient penalty needs second derivatives."""
    layers = state.discriminator.get_submodule("layers")
    assert isinstance(layers, nn.Sequential)
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.BatchNorm2d):
            norm = nn.BatchNorm2d(layer.num_features)
            norm.weight, norm.bias = layer.weight, layer.bias
            layers[index] = norm


def _gradient_penalty(state: TrainState, weight: float, images: Tensor) -> Tensor | float:
    if weight == 0:
        return 0.0
    images = images.detach().requires_grad_()
    with state.autocast():
        logits = state.discriminator(images)
    (gradient,) = torch.autograd.grad(logits.float().sum(), images, create_graph=True)
    return weight / 2 * gradient.float().square().sum([1, 2, 3]).mean()


def _as_seen(state: TrainState, recipe: Recipe, images: Tensor, where: str) -> Tensor:
    """Return images as D is shown them."""
    preposition = "" if where == "under G" else "on "
    images = _with_noise(state, recipe, images, f"noise {preposition}{where}")
    if recipe.augment:
        key = stream_seed(state.config.seed, f"augment {where}", state.step)
        images = augment(images, uniform(key, state.slots, 7).to(state.dtype))
    return halve_colour(images) if recipe.half_colour else images


def halve_colour(images: Tensor) -> Tensor:
    """Return images whose colours have half of their resolution, as in most JPEGs (4:2:0)."""
    grey = images.mean(1, keepdim=True)
    return grey + F.interpolate(F.avg_pool2d(images - grey, 2), scale_factor=2, mode="bilinear")


def augment(images: Tensor, chance: Tensor) -> Tensor:
    """Change brightness, saturation and contrast, move by up to an eighth, blank a square of half the side.

    `chance` holds seven uniform numbers per image. What leaves the image is lost, and what enters is 0.
    """
    brightness, saturation, contrast = chance[:, :3, None, None, None].unbind(1)
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    level = images.mean([1, 2, 3], keepdim=True)
    images = (images - level) * (contrast + 0.5) + level
    count, _, size, _ = images.shape
    index = torch.arange(size)
    reach = size // 8
    by = (chance[:, 3:5] * (2 * reach + 1)).floor().long() - reach
    rows, columns = (index + by[:, axis, None] + reach for axis in (0, 1))
    padded = F.pad(images, [reach] * 4).permute(0, 2, 3, 1)
    moved = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    centre = (chance[:, 5:7] * (size + 1)).floor().long()
    blank = [
        (index >= centre[:, axis, None] - size // 4) & (index < centre[:, axis, None] + size // 4) for axis in (0, 1)
    ]
    return moved * ~(blank[0][:, None, :, None] & blank[1][:, None, None, :])


def _with_noise(state: TrainState, recipe: Recipe, images: Tensor, stream: str) -> Tensor:
    sigma = recipe.sigma
    if recipe.sigma_zero_at is not None:
        sigma *= max(0.0, 1 - state.step / recipe.sigma_zero_at)
    if sigma == 0:
        return images
    count, channels, height, width = images.shape
    key = stream_seed(state.config.seed, stream, state.step)
    noise = normal(key, state.slots, channels * height * width).view(count, height, width, channels)
    if recipe.sigma_on_colour:
        noise = noise - noise.mean(3, keepdim=True)
    return images + noise.permute(0, 3, 1, 2).to(state.dtype) * sigma


def _update(optimizer: torch.optim.Adam, network: nn.Module, suffix: str, per_layer: bool) -> Row:
    weights = dict(network.named_parameters())
    gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    row = {f"grad_norm/{suffix}": float(nn.utils.get_total_norm(gradients.values()))}
    before = {name: weights[name].detach().clone() for name in gradients} if per_layer else {}
    optimizer.step()
    for name, old in before.items():
        change = (weights[name].detach() - old).norm() / old.norm().clamp_min(1e-12)
        row[f"grad_norm/{suffix}/{name}"] = float(gradients[name].norm())
        row[f"update_to_weight/{suffix}/{name}"] = float(change)
    return row


def _loss(recipe: Recipe, logits: Tensor, target: float) -> Tensor:
    """Return the loss of logits that should say real (`target` 1) or generated (0)."""
    if recipe.loss == "hinge":
        return F.relu(1 - logits if target else 1 + logits).mean()
    if recipe.loss == "lsgan":
        return (logits - target).square().mean()
    return LOSSES[recipe.loss](logits, target)
