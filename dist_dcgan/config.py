"""Typed configuration: a YAML preset, overridden by the command line, as one frozen object.

All defaults are defined here and equal the `paper` preset. `Config` describes what a run computes and is stored with
it; `Invocation` describes how this process was started: it is not stored, and no file can set it. So consent to run
commands is in `Invocation`: a file may come from others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, Field, PlainSerializer, model_validator

from shards.common.command_line import Options, UserPath, build, expand_home, nearest, not_empty, parse_flags
from shards.common.errors import UserError
from shards.common.plain_yaml import parse_yaml, read_yaml
from shards.common.redaction import public_address

# Not by importlib.resources: it takes a folder `dist_dcgan` in the working directory for the package.
_PRESETS = Path(__file__).parent / "presets"
_MOST = 10_000_000
"""Of sizes and seconds: nobody means more, and far beyond it torch's numbers overflow."""


def _changeable(default: Any, **constraints: Any) -> Any:
    """Field that may change when a run is continued: it alters the last bits of trained values at most."""
    return Field(default, json_schema_extra={"changeable": True}, **constraints)


def _location(value: Any) -> Any:
    """Keep an address as a string: a Path would drop one of its slashes."""
    if not isinstance(not_empty(value), str | Path):
        raise ValueError("a folder or an address is needed")
    if isinstance(value, str) and not re.match(r"(pipe:|(?i:[a-z0-9]+://))", value):
        return expand_home(Path(value))
    return value


def _public(location: Path | str) -> str:
    return public_address(str(location))


Location = Annotated[Path | str, BeforeValidator(_location), PlainSerializer(_public, when_used="json")]
"""A folder or an address. Stored configurations lack its query, in which a signature may stand, and a command."""


class LocationOptions(Options):
    """Location of a data set."""

    path: Location = _changeable(Path("data/bedroom_train"))
    """Folder or address (http, https) of shards that `python -m shards convert` wrote."""
    cache_dir: UserPath | None = _changeable(None)
    """Folder on a local disk of each machine to which shards are copied: for an address, or a slow file system."""
    cache_gb: float = _changeable(50.0, gt=0)
    """Maximum size of cache_dir in gigabytes; least recently used shards are evicted."""

    @model_validator(mode="before")
    @classmethod
    def _without_consent(cls, values: Any) -> Any:
        """Drop `allow_commands`, which older versions stored: only the command line can allow commands."""
        if isinstance(values, Mapping):
            return {name: value for name, value in values.items() if name != "allow_commands"}
        return values

    @property
    def name(self) -> str:
        """The location as it may be printed and stored: an address without its query."""
        return _public(self.path)


class DataOptions(LocationOptions):
    """Source and order of the images."""

    window_shards: int = Field(16, ge=1)
    """Consecutive shards whose samples are shuffled together: more shuffle better, fewer give sequential disk reads."""
    random_flip: bool = False
    """Mirror each image with probability 1/2. The paper does not."""
    prefetch: int = _changeable(4, ge=1)
    """Batches read ahead."""


def _number(word: Any) -> Any:
    """Return the number that a word of the command line is; pydantic compares a Literal with the word itself."""
    return int(word) if isinstance(word, str) and word.isdecimal() else word


class ModelOptions(Options):
    """Architecture of the networks, apart from `width`; the image size is the data set's."""

    latent_dim: int = Field(100, ge=1, le=_MOST)
    """Dimensions of z."""
    latent: Literal["uniform", "normal"] = "uniform"
    """Distribution of z: uniform in [-1, 1] as in the paper, or standard normal."""
    kernel_size: Annotated[Literal[4, 5], BeforeValidator(_number)] = 4
    """Side of the strided convolutions: 4 as in most ports, 5 as in the paper's own code."""


class NoiseOptions(Options):
    """Instance noise: Gaussian noise on the discriminator's inputs, real and fake (Sonderby et al. 2017)."""

    sigma: float = Field(0.0, ge=0)
    """Standard deviation, for images in [-1, 1]; 0 turns it off. It helped on small JPEGs (tests/stability)."""


class OptimizerOptions(Options):
    """Adam for both networks (paper, section 4)."""

    lr_g: float = Field(2e-4, gt=0)
    """Learning rate of the generator."""
    lr_d: float = Field(2e-4, gt=0)
    """Learning rate of the discriminator."""
    beta1: float = Field(0.5, ge=0, lt=1)
    """Decay of the mean of gradients."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the mean of squared gradients."""


class EmaOptions(Options):
    """Moving average of the generator's weights; it is sampled, scored and exported."""

    half_life_images: float = Field(10_000, gt=0)
    """Half-life of the average in training images."""
    ramp_up: float = Field(0.05, gt=0)
    """Maximum half-life as a share of the images seen, so that a short run forgets its first weights."""
    statistics_images: int = Field(512, ge=1)
    """Images from fixed z over which batch-norm statistics are recomputed for the averaged weights."""


class LogOptions(Options):
    """Logging of rank 0."""

    every_steps: int = _changeable(10, ge=1, le=10)
    """Steps between rows of metrics.jsonl."""
    samples_every_images: int = _changeable(100_000, ge=1)
    """Training images between grids of samples."""
    samples: int = _changeable(64, ge=1)
    """Images in a grid."""


ExtractorName = Literal["efficientnet-lite0", "inception"]
"""A network of `metrics/extractors.py`."""


class QualityOptions(Options):
    """Image quality, scored during training; `dist_dcgan.evaluate` scores a finished run."""

    extractor: Literal["auto", ExtractorName, "none"] = _changeable("auto")
    """Feature network; auto: efficientnet-lite0 if the `eval` extra is installed, else none."""
    weights: UserPath | None = _changeable(None)
    """File of Inception's weights (see `dist_dcgan.evaluate`)."""
    every_images: int = _changeable(1_000_000, ge=1)
    """Training images between scores."""
    time_share: float | None = _changeable(None, gt=0, le=1)
    """Maximum share of the time for scores; a score that would exceed it is skipped. none: 0.03 on GPUs, 1 on CPUs."""
    fakes: int = _changeable(10_000, ge=4)
    """Generated images of a score."""
    reals: int = _changeable(10_000, ge=4)
    """Real images of a score, from the training data."""


class WandbOptions(Options):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = _changeable("auto")
    """auto: what WANDB_MODE says; without it online if a key is configured, else disabled (`--wandb` for short)."""
    project: str | None = _changeable(None)
    """Project of the run; none: WANDB_PROJECT, else dist_dcgan."""
    name: str | None = _changeable(None)
    """Name of the run; none: WANDB_NAME, else the run directory's name."""


class CheckpointOptions(Options):
    """Checkpoints, from which a run can be continued."""

    every_minutes: float | None = _changeable(None, gt=0)
    """Minutes between checkpoints. If this and every_steps are none: 10 on GPUs, and every 1,000 steps on CPUs."""
    every_steps: int | None = _changeable(None, ge=1)
    """Steps between checkpoints, instead of minutes or in addition; one is always written at the end and on a stop."""
    keep: int = _changeable(3, ge=1)
    """Number of newest checkpoints to keep."""
    keep_every_steps: int | None = _changeable(None, ge=1)
    """Checkpoints at multiples of this many steps are written as well, and never removed."""


class DistributedOptions(Options):
    """Communication between ranks."""

    timeout_seconds: float = _changeable(60.0, gt=0, le=_MOST)
    """Timeout of a collective, which ends the run; it also limits the wait for rank 0's grids and metrics."""
    batchnorm: Literal["auto", "native", "direct", "portable"] = _changeable("auto")
    """Cross-rank batch norm. native: torch's SyncBatchNorm (CUDA only); direct: its CUDA kernels without its host
    synchronisations; portable: plain torch, any device; auto: direct on CUDA, else portable."""


class Config(Options):
    """Configuration of a run. The defaults are the `paper` preset."""

    data: DataOptions = DataOptions()
    """Source and order of the images."""
    run_dir: UserPath = _changeable(Path("runs/default"))
    """Folder of the run: configuration, metrics, samples, checkpoints, exported generator."""
    width: int = Field(128, ge=1, le=_MOST)
    """Channels of the last hidden layer: 128 is the paper's 1024-512-256-128, 64 the reduced 512-64."""
    global_batch: int = Field(128, ge=2, le=_MOST)
    """Images per step over all ranks, independent of their number."""
    batch_per_rank: int | None = Field(None, ge=1, le=_MOST)
    """Images per step and rank, instead of global_batch; the global batch then grows with the number of ranks."""
    epochs: float = _changeable(5.0, gt=0, le=_MOST)
    """Length of the run in passes over the data; the paper shows results of 5 on LSUN bedroom."""
    max_steps: int | None = _changeable(None, ge=1, le=10**15)
    """Length of the run in steps from its start, instead of epochs."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of all random numbers: weights, order, z, noise, flips."""
    precision: Literal["auto", "fp64", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs that support it, fp16 with loss scaling on older ones, fp32 on CPU. fp32: without TF32."""
    loss: Literal["logits", "sigmoid_bce"] = "logits"
    """Cross-entropy on logits, or sigmoid followed by cross-entropy (whose gradient vanishes at paper width)."""
    compile: bool = _changeable(False)
    """Compile both networks with torch.compile; of use on one GPU, as batch norm across ranks breaks the graph."""
    cuda_graph: bool | None = _changeable(None)
    """Launch a step as one CUDA graph, which saves host time; none: on if there is one GPU."""
    model: ModelOptions = ModelOptions()
    """Architecture of the networks."""
    noise: NoiseOptions = NoiseOptions()
    """Noise on the inputs of the discriminator."""
    optimizer: OptimizerOptions = OptimizerOptions()
    """Adam, for both networks."""
    ema: EmaOptions = EmaOptions()
    """The averaged generator, which is sampled, scored and exported."""
    log: LogOptions = LogOptions()
    """What is logged, and how often."""
    quality: QualityOptions = QualityOptions()
    """Scores during training."""
    on_collapse: Literal["warn", "stop"] = _changeable("warn")
    """Action if the watchdog detects that training went wrong."""
    wandb: WandbOptions = WandbOptions()
    """Weights & Biases."""
    checkpoint: CheckpointOptions = CheckpointOptions()
    """Checkpoints: when, and how many are kept."""
    distributed: DistributedOptions = DistributedOptions()
    """Communication between ranks."""

    def architecture(self, image_size: int) -> dict[str, Any]:
        """Return the arguments of the generator for images of `image_size` pixels a side."""
        model = self.model
        sizes = {"latent_dim": model.latent_dim, "kernel_size": model.kernel_size}
        return {"width": self.width, "image_size": image_size, **sizes}

    @model_validator(mode="after")
    def _one_batch(self) -> Config:
        if self.batch_per_rank is not None and "global_batch" in self.model_fields_set:
            raise ValueError("global_batch and batch_per_rank exclude each other: give one of them")
        return self


class Invocation(Options):
    """How this process was started."""

    preset: str | None = None
    """Packaged configuration: paper (the default), paper_literal, narrow, few_images, quickstart or debug."""
    config: UserPath | None = None
    """Configuration from a YAML file, instead of a preset."""
    world_size: int | None = Field(None, ge=1)
    """Number of ranks expected: 1 without torchrun; with --dry-run any number, to check a plan."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue the run in run_dir, if any; never: fail if run_dir holds a run."""
    dry_run: bool = False
    """Print the resolved configuration and plan, and exit; nothing is created."""
    allow_commands: bool = False
    """Allow `pipe:COMMAND` as --data: the shell command prints the file whose name replaces `{}` in it."""


class _CommandLine(Config, Invocation):
    """All flags of training, which the doctor takes as well."""


CONSENT = {"--data.allow-commands": "--allow-commands", "--no-data.allow-commands": "--no-allow-commands"}
"""Another name of the flag, beside those of the data set."""
_EITHER = (("global_batch", "batch_per_rank"), ("epochs", "max_steps"))
"""Options of which one replaces the other."""
SHORT_FLAGS = {"--data": "--data.path", "--wandb": "--wandb.mode", **CONSENT}


def from_command_line(
    argv: Sequence[str], prog: str = "python -m dist_dcgan.train", about: str | None = None
) -> tuple[Config, Invocation]:
    """Resolve the preset or file and the flags of `argv`; raises UserError if any of them is wrong.

    `about` is the description of the command in `--help`.
    """
    flags = parse_flags(_CommandLine, argv, prog, SHORT_FLAGS, about)
    invocation = build(Invocation, {name: flags.pop(name) for name in Invocation.model_fields if name in flags})
    if invocation.preset is not None and invocation.config is not None:
        raise UserError(f"--preset {invocation.preset} and --config {invocation.config} exclude each other: give one")
    if invocation.config is not None:
        base, where = read_yaml(invocation.config), str(invocation.config)
    else:
        base, where = read_preset(invocation.preset or "paper"), f"preset {invocation.preset or 'paper'}"
    build(Config, base, where)  # so that the message says whether the file or a flag is wrong
    for one, other in _EITHER:
        if one in flags and other in flags:
            raise UserError(f"{one} and {other} exclude each other: give one of them")
        if one in flags or other in flags:
            base.pop(other if one in flags else one, None)  # the command line's choice replaces the file's
    return build(Config, _merge(base, flags)), invocation


def preset_names() -> list[str]:
    """Return the names of the presets in the package."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """Return the keys that preset `name` sets; raises UserError with the nearest name if it is unknown."""
    if name not in preset_names():
        known = preset_names()
        raise UserError(f"unknown preset {name!r}{nearest(name, known)} (there are: {', '.join(known)})")
    return parse_yaml((_PRESETS / f"{name}.yaml").read_text(), f"preset {name}")


def to_values(config: Config) -> dict[str, Any]:
    """Return the whole configuration as JSON types, from which the same object can be built."""
    values = config.model_dump(mode="json")
    if config.batch_per_rank is not None:
        del values["global_batch"]
    return values


def to_yaml(config: Config) -> str:
    """Return the whole configuration as YAML that `--config` reads back, to the same object but for a signature."""
    return yaml.safe_dump(to_values(config), sort_keys=False)


def differences(stored: Config, current: Config) -> list[str]:
    """Return `key: stored -> current` for every differing key that may not change when a run is continued."""
    before, after = dict(_flatten(stored)), dict(_flatten(current))
    return [f"{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key]]


@dataclass(frozen=True)
class Plan:
    """Sizes of a run that follow from the configuration, the number of ranks and the data set."""

    world_size: int
    global_batch: int
    steps_per_epoch: int
    total_steps: int

    @property
    def batch_per_rank(self) -> int:
        """Images per step and rank."""
        return self.global_batch // self.world_size


def make_plan(config: Config, world_size: int, samples: int) -> Plan:
    """Return the plan for a data set of `samples` images; raises UserError if the sizes do not fit."""
    global_batch = config.batch_per_rank * world_size if config.batch_per_rank else config.global_batch
    if global_batch % world_size:
        fitting = [batch for batch in (global_batch - global_batch % world_size,) if batch]
        fitting.append(fitting[0] + world_size if fitting else world_size)
        raise UserError(
            f"global_batch {global_batch} is not divisible by {world_size} ranks: "
            f"use --global-batch {' or '.join(map(str, fitting))}"
        )
    if global_batch < 2:
        raise UserError(f"global batch {global_batch} is too small for batch norm: use at least 2")
    if global_batch > samples:
        raise UserError(f"global batch {global_batch} is larger than the data set of {samples} images: use less")
    steps_per_epoch = samples // global_batch
    total_steps = config.max_steps or max(1, round(config.epochs * steps_per_epoch))
    return Plan(world_size, global_batch, steps_per_epoch, total_steps)


def _merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _flatten(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _flatten(value, f"{prefix}{name}.")
        elif not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("changeable")):
            yield prefix + name, value
