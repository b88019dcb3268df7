"""One training step with every factor of the study, in one process, and what the study looks at in it.

With the factors that the product has, it computes what `dist_dcgan.training.steps.train_step` computes (held by
`tests/stability/test_study.py`), so that what the study finds holds for the product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_dcgan.models.losses import LOSSES
from dist_dcgan.models.networks import Discriminator
from dist_dcgan.random_streams import normal, stream_seed
from dist_dcgan.training.ema import draw_latents, ema_decay, update_ema
from dist_dcgan.training.steps import diversity
from dist_dcgan.training.train_state import TrainState
from tests.stability.recipes import Recipe

Row = dict[str, float]


def study_step(state: TrainState, recipe: Recipe, real: Tensor, per_layer: bool) -> Row:
    """Take one step on `real` and return what happened in it; `per_layer` adds norms and ratios of each layer."""
    key = stream_seed(state.config.seed, "z", state.step)
    z = draw_latents(state.config, key, state.slots, state.world.device).to(state.dtype)
    with state.autocast():
        fake = state.generator(z)
    row: Row = {"diversity/real": float(diversity(real)), "diversity/fake": float(diversity(fake))}
    if not recipe.alternate or state.step % 2 == 0:
        row |= discriminator_turn(state, recipe, real, fake.detach(), per_layer)
    if not recipe.alternate or state.step % 2 == 1:
        row |= generator_turn(state, recipe, fake, per_layer)
    state.step += 1
    decay = ema_decay(state.config, state.images_seen, state.plan.global_batch)
    update_ema(state.generator_ema, state.generator, torch.tensor(1 - decay), torch.tensor(True))
    return row


def discriminator_turn(state: TrainState, recipe: Recipe, real: Tensor, fake: Tensor, per_layer: bool) -> Row:
    """Update D."""
    state.optimizer_d.zero_grad(set_to_none=True)
    with state.autocast():
        logits_real = state.discriminator(_with_noise(state, recipe, real, "noise on real"))
    loss_real = _loss(recipe, logits_real, 1.0)
    (loss_real + _gradient_penalty(state, recipe, real)).backward()
    with state.autocast():
        logits_fake = state.discriminator(_with_noise(state, recipe, fake, "noise on fake"))
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


def generator_turn(state: TrainState, recipe: Recipe, fake: Tensor, per_layer: bool) -> Row:
    """Update G."""
    state.optimizer_g.zero_grad(set_to_none=True)
    state.discriminator.requires_grad_(False)
    with state.autocast():
        logits_fake = state.discriminator(_with_noise(state, recipe, fake, "noise under G"))
    state.discriminator.requires_grad_(True)
    loss = -logits_fake.mean() if recipe.loss == "hinge" else _loss(recipe, logits_fake, 1.0)
    loss.backward()
    row = {
        "loss/g": float(loss.detach()),
        "logit/fake_updated": float(logits_fake.detach().mean()),
        "score/fake_updated": float(logits_fake.detach().sigmoid().mean()),
    }
    return row | _update(state.optimizer_g, state.generator, "g", per_layer)


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
    grows = parameter.dim() == 4 and name != names[0]  # the first layers see z and the three colours
    scaled = ("d" if isinstance(network, Discriminator) else "g") in recipe.lr_by_fan_in
    factor = 64 / recipe.width if scaled and grows else 1.0
    return factor * (recipe.lr_logit if is_logit_layer else 1.0)


def use_differentiable_batchnorm(state: TrainState) -> None:
    """Give D torch's own batch norm, around the same parameters: a gradient penalty needs second derivatives."""
    layers = state.discriminator.get_submodule("layers")
    assert isinstance(layers, nn.Sequential)
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.BatchNorm2d):
            norm = nn.BatchNorm2d(layer.num_features)
            norm.weight, norm.bias = layer.weight, layer.bias
            layers[index] = norm


def _gradient_penalty(state: TrainState, recipe: Recipe, real: Tensor) -> Tensor | float:
    if recipe.r1 == 0:
        return 0.0
    real = real.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(state.discriminator(real).sum(), real, create_graph=True)
    return recipe.r1 / 2 * gradient.square().sum([1, 2, 3]).mean()


def _with_noise(state: TrainState, recipe: Recipe, images: Tensor, stream: str) -> Tensor:
    sigma = recipe.sigma
    if recipe.sigma_zero_at is not None:
        sigma *= max(0.0, 1 - state.step / recipe.sigma_zero_at)
    if sigma == 0:
        return images
    count, channels, height, width = images.shape
    key = stream_seed(state.config.seed, stream, state.step)
    noise = normal(key, state.slots, channels * height * width)
    return images + noise.view(count, height, width, channels).permute(0, 3, 1, 2).to(state.dtype) * sigma


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
