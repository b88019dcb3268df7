"""The list of checks in their order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from dist_dcgan.config import Config, Invocation
from dist_dcgan.preflight import distributed_checks, machine, storage
from dist_dcgan.preflight.results import Check, Finding, Subject, examine_all


def examine(config: Config, invocation: Invocation, tell: Callable[[str, Finding], None]) -> dict[str, Finding]:
    """Run every check and return the combined results by name; rank 0 calls `tell` with each result at once.

    Leaves nothing on disk.
    """
    with ExitStack() as stack:
        world, lost = distributed_checks.join(config.distributed.timeout_seconds, stack)
        subject = Subject(config, invocation, world, lost)
        return examine_all(checks(stack), subject, tell if world.is_main else lambda thing, finding: None)


def checks(stack: ExitStack) -> list[Check]:
    """Return the checks; `stack` closes what a check opens for later ones."""
    step = "training step"
    return [
        Check("versions", machine.versions),
        Check("requirements", machine.requirements),
        Check("eval extra", machine.eval_extra),
        Check("devices", machine.devices),
        Check("threads", machine.threads),
        Check("shared memory", machine.shared_memory),
        Check("process group", distributed_checks.process_group_found),
        Check("all-reduce", distributed_checks.all_reduce, ("process group",)),
        Check("data set", partial(storage.data_set, stack=stack)),
        Check("first shard", storage.first_shard, ("data set",), ranks="one per node"),
        Check("plan", storage.plan, ("data set",)),
        Check("shuffling", storage.shuffling, ("plan",)),
        Check("cache", storage.cache, ("plan",), ranks="one per node"),
        Check("run directory", storage.run_directory, ranks="rank 0"),
        Check("writing", storage.writing, ranks="rank 0"),
        Check("room", storage.room, ("plan",), ranks="rank 0"),
        Check("W&B", machine.wandb, ranks="rank 0"),
        Check("gradients' sum", distributed_checks.all_reduce_gradients, ("all-reduce", "data set")),
        Check(step, distributed_checks.training_step, ("all-reduce", "plan")),
        Check("gradients", distributed_checks.gradients, (step,)),
        Check("parameters", distributed_checks.parameters, (step,)),
        Check("scores", distributed_checks.scores, (step,)),
    ]
