"""The training state, and the one registry of the contents of a checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam

from dist_dcgan.config import Config, Plan
from dist_dcgan.data.order import rank_slots
from dist_dcgan.distributed.world import World
from dist_dcgan.models.batchnorm import make_norm
from dist_dcgan.models.networks import Discriminator, Generator, init_weights
from dist_dcgan.random_streams import set_key, stream_seed
from dist_dcgan.training.compile_cache import use_own_cache
from dist_dcgan.training.ema import ema_decay
from dist_dcgan.training.watchdog import Watchdog
from shards.common.errors import UserError

# torch renamed the argument and warns about the old name.
_DDP_ARGUMENTS = inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_ARGUMENTS else "broadcast_buffers": False
}

_NOISE_STREAMS = ("noise on real", "noise on fake", "noise under G")


class StepInputs:
    """Inputs of a step other than images: scalars on the device, filled before the step.

    They are keys of the random streams that `config` uses, int64, and the weight of new parameters in the EMA, float32.
    A captured CUDA graph repeats each kernel with the arguments that it had at capture. A Python number would therefore
    be the same in every replay; a tensor is read again.
    """

    def __init__(self, config: Config, global_batch: int, device: torch.device) -> None:
        self._config, self._global_batch = config, global_batch
        streams = ["z"]
        streams += ["flip"] if config.data.random_flip else []
        streams += _NOISE_STREAMS if config.noise.sigma > 0 else []
        self.keys = {stream: torch.zeros((), dtype=torch.int64, device=device) for stream in streams}
        self.ema_weight: Tensor = torch.zeros((), dtype=torch.float32, device=device)

    def fill(self, step: int) -> None:
        """Set the inputs of `step`, counted from 0, without host copies or synchronisation."""
        for stream, key in self.keys.items():
            set_key(key, stream_seed(self._config.seed, stream, step))
        images_seen = (step + 1) * self._global_batch
        self.ema_weight.fill_(1 - ema_decay(self._config, images_seen, self._global_batch))


class Undistributed(nn.Module):
    """Stands for DDP on the only rank, whose gradients are reduced with no others; DDP needs a process group."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, values: Tensor) -> Tensor:
        """Call the network."""
        output: Tensor = self.network(values)
        return output

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context without effect."""
        return nullcontext()


class TrainState:
    """Networks, their DDP wrappers, optimizers, loss scalers, averaged generator and the step reached."""

    def __init__(self, config: Config, plan: Plan, world: World, image_size: int) -> None:
        self.config, self.plan, self.world = config, plan, world
        self.slots = rank_slots(plan.global_batch, world.rank, world.world_size)
        self.precision = resolve_precision(config.precision, world.device)
        self.dtype = torch.float64 if self.precision == "fp64" else torch.float32
        self.step = 0
        self.inputs = StepInputs(config, plan.global_batch, world.device)
        self.skipped_steps = 0
        self.wandb_run_id: str | None = None
        self.best_kid: float | None = None
        self.best_kid_extractor: str | None = None
        self.watchdog = Watchdog()

        norm = make_norm(config.distributed.batchnorm, world.device)
        architecture = config.architecture(image_size)
        generator = Generator(**architecture, norm=norm)
        discriminator = Discriminator(config.width, image_size, config.model.kernel_size, norm)
        init_weights(generator, _weight_stream(config, "weights of G"))
        init_weights(discriminator, _weight_stream(config, "weights of D"))
        # The averaged generator has local batch norms, so that one rank can run it alone.
        averaged = Generator(**architecture)
        averaged.load_state_dict(generator.state_dict())
        self.generator, self.discriminator = self._place(generator), self._place(discriminator)
        self.generator_ema = self._place(averaged).eval().requires_grad_(False)
        if config.compile:
            use_own_cache()
            self.generator.compile()
            self.discriminator.compile()

        wrap = self._wrap if dist.is_initialized() else Undistributed
        self.ddp_generator = wrap(self.generator)
        self.ddp_discriminator = wrap(self.discriminator)
        self.optimizer_g = _adam(self.generator, config, config.optimizer.lr_g)
        self.optimizer_d = _adam(self.discriminator, config, config.optimizer.lr_d)
        # With a scale of 1 they still make Adam skip a step with non-finite gradients, on the device.
        first_scale = 2.0**16 if self.precision == "fp16" else 1.0
        self.scaler_g = torch.amp.GradScaler(world.device.type, first_scale)
        self.scaler_d = torch.amp.GradScaler(world.device.type, first_scale)

    @property
    def images_seen(self) -> int:
        """Number of training images used by the steps so far."""
        return self.step * self.plan.global_batch

    def passed(self, every_images: int) -> bool:
        """Return whether the last step reached or passed a multiple of `every_images`."""
        before = self.images_seen - self.plan.global_batch
        return self.images_seen // every_images > before // every_images

    def autocast(self, enabled: bool = True) -> AbstractContextManager[None]:
        """Return the context in which the networks run: autocast for bf16 and fp16, else without effect.

        Losses and backward passes run outside, or within one with `enabled=False`.
        """
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.world.device.type, dtype=half, enabled=enabled and half is not None)

    def tensors(self) -> dict[str, Tensor]:
        """Return the live tensors of a checkpoint by name; `load_tensors` writes them in place."""
        tensors: dict[str, Tensor] = {}
        networks = self._trained() | {"generator_ema": self.generator_ema}
        for prefix, network in networks.items():
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in network.state_dict().items()}
        for prefix, network, optimizer in self._optimizers():
            for name, parameter in network.named_parameters():
                moments = optimizer.state[parameter]
                tensors |= {f"{prefix}.{name}.{moment}": tensor for moment, tensor in moments.items()}
        return tensors

    def gradients(self) -> dict[str, Tensor | None]:
        """Return the gradients of the last step by the name of their parameter, None if it has none."""
        return {
            f"{prefix}.{name}": parameter.grad
            for prefix, network in self._trained().items()
            for name, parameter in network.named_parameters()
        }

    def values(self) -> dict[str, Any]:
        """Return the contents of a checkpoint other than tensors, as JSON types."""
        return {
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "global_batch": self.plan.global_batch,
            "wandb_run_id": self.wandb_run_id,
            "best_kid": self.best_kid,
            "best_kid_extractor": self.best_kid_extractor,
            "precision": self.precision,
            "watchdog": self.watchdog.values(),
            "scaler_g": self.scaler_g.state_dict(),
            "scaler_d": self.scaler_d.state_dict(),
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a checkpoint into the live ones, which keep their memory formats.

        The formats must not change: fused Adam silently updates wrong elements if the strides of a parameter and its
        moments differ. Raises ValueError, and changes nothing, if names or shapes differ.
        """
        live = self.tensors()
        different = [
            name
            for name in live.keys() | tensors.keys()
            if name not in live or name not in tensors or live[name].shape != tensors[name].shape
        ]
        if different:
            raise ValueError(f"it has other tensors than this configuration: {', '.join(sorted(different)[:4])}")
        with torch.no_grad():
            for name, tensor in live.items():
                tensor.copy_(tensors[name])

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Set the values of a checkpoint."""
        self.step, self.skipped_steps = values["step"], values["skipped_steps"]
        self.wandb_run_id, self.best_kid = values["wandb_run_id"], values["best_kid"]
        self.best_kid_extractor = values.get("best_kid_extractor")
        self.watchdog.load_values(values["watchdog"])
        if self.precision == values.get("precision") == "fp16":  # other precisions have no scale to go on from
            self.scaler_g.load_state_dict(values["scaler_g"])
            self.scaler_d.load_state_dict(values["scaler_d"])

    def assert_equal_strides(self) -> None:
        """Assert that parameters, their gradients and both moments have equal strides (see `load_tensors`)."""
        for prefix, network, optimizer in self._optimizers():
            for name, parameter in network.named_parameters():
                state = optimizer.state[parameter]
                alike = [state["exp_avg"], state["exp_avg_sq"]]
                alike += [] if parameter.grad is None else [parameter.grad]
                strides = {tensor.stride() for tensor in (parameter, *alike)}
                assert len(strides) == 1, f"{prefix}.{name}: strides differ: {strides}"

    def _trained(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "discriminator": self.discriminator}

    def _optimizers(self) -> Iterator[tuple[str, nn.Module, Adam]]:
        yield "optimizer_g", self.generator, self.optimizer_g
        yield "optimizer_d", self.discriminator, self.optimizer_d

    def _place(self, network: nn.Module) -> nn.Module:
        network = network.to(self.world.device, self.dtype)
        return network.to(memory_format=torch.channels_last)

    def _wrap(self, network: nn.Module) -> DistributedDataParallel:
        # DDP would broadcast rank 0's batch-norm buffers before each forward. They are equal on all ranks already, and
        # writing them between two forwards and one backward breaks autograd (pytorch#22095).
        if self.world.device.type == "cpu" and dist.get_debug_level() == dist.DebugLevel.DETAIL:  # type: ignore[attr-defined]
            raise UserError(
                "TORCH_DISTRIBUTED_DEBUG=DETAIL: torch's DDP crashes with it on CPUs (pytorch#75011): use INFO"
            )
        devices = [self.world.device] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True, **_NO_BUFFER_SYNC)


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return the precision that `auto` selects on `device`, other names unchanged."""
    if precision != "auto":
        return precision
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _weight_stream(config: Config, stream: str) -> torch.Generator:
    """Return the random generator of initial weights, on the CPU so that they are the same for every device."""
    return torch.Generator().manual_seed(stream_seed(config.seed, stream, 0))


def _adam(network: nn.Module, config: Config, lr: float) -> Adam:
    """Return a fused Adam whose moments exist from the start, so that a checkpoint can be copied into them.

    It is `capturable` for CUDA graphs; with `fused`, this changes nothing else.
    """
    betas = (config.optimizer.beta1, config.optimizer.beta2)
    optimizer = Adam(network.parameters(), lr=lr, betas=betas, fused=True, capturable=True)
    state = {
        index: {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
        for index, parameter in enumerate(network.parameters())
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return optimizer
