"""What the checks of the doctor look at: a configuration, and the data set with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from dist_dcgan.config import Config, Invocation, make_plan
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.world import World
from dist_dcgan.preflight.results import Check, Subject, attempt

ALONE = World(0, 0, 1, torch.device("cpu"))
EMPTY: Mapping[str, Any] = MappingProxyType({})


def config(**options: Any) -> Config:
    return Config(width=4, global_batch=12, max_steps=20, wandb={"mode": "disabled"}, **options)


def subject(world: World = ALONE, **options: Any) -> Subject:
    return Subject(config(**options), Invocation(), world)


def with_data(path: Path, world: World = ALONE, data: Mapping[str, Any] = EMPTY, **options: Any) -> Subject:
    made = subject(world, data={"path": path, **data}, **options)
    made.location = Folder(path)
    made.plan = make_plan(made.config, world.world_size, made.location.manifest.samples)
    return made


def failure(check: Any, of: Subject) -> str:
    found = attempt(Check("thing", check), of)
    assert found is not None and found.level == "FAILED", found
    return found.text
