"""Train DCGAN on a data set of shards. To resume an interrupted run, run the same command again.

python -m dist_dcgan.train --world-size 1 --data data/bedroom_train
RANKS=8 bash launch/torchrun.sh --data data/bedroom_train --run-dir runs/bedrooms --batch-per-rank 128
python -m dist_dcgan.train --world-size 1 --preset narrow --max-steps 10000 --dry-run
"""

from __future__ import annotations

from collections.abc import Sequence

from dist_dcgan.config import Config, Plan, from_command_line, make_plan, to_yaml
from dist_dcgan.data.storage.location import DatasetLocation
from dist_dcgan.data.storage.opening import open_location
from dist_dcgan.distributed.launch import launched
from dist_dcgan.distributed.world import run_rank, world_size_of_launch
from dist_dcgan.models.networks import count_parameters, require_image_size
from dist_dcgan.preflight.storage import networks_on_meta, opened_for_a_look
from dist_dcgan.training.loop import train
from dist_dcgan.training.steps import is_out_of_memory, memory_remedy
from shards.common.errors import OneRankError
from shards.common.messages import say
from shards.common.streams import output_is_optional
from shards.manifest import Manifest


def main(argv: Sequence[str]) -> None:
    """Train; with --dry-run only print the configuration and plan."""
    config, invocation = from_command_line(argv, about=__doc__)
    if invocation.dry_run:
        with opened_for_a_look(config.data, invocation.allow_commands) as location:
            describe(config, invocation.world_size or world_size_of_launch(None), location.manifest)
        return
    location = open_location(config.data, invocation.allow_commands)
    require_image_size(location.manifest.image_size, config.data.name)
    output_is_optional()
    plan = make_plan(config, world_size_of_launch(invocation.world_size), location.manifest.samples)
    train_or_explain(config, plan, location, invocation.resume, argv)


def describe(config: Config, world_size: int, manifest: Manifest) -> None:
    """Print the resolved configuration and the sizes that follow from it; nothing is created."""
    require_image_size(manifest.image_size, config.data.name)
    plan = make_plan(config, world_size, manifest.samples)
    if launched().rank != 0:
        return
    generator, discriminator = networks_on_meta(config, manifest.image_size)
    for line in to_yaml(config).splitlines():
        say(line)
    say("")
    say(f"data set:          {config.data.name}, {manifest.samples:,} images of {manifest.image_size} pixels")
    say(f"generator:         {count_parameters(generator):,} parameters")
    say(f"discriminator:     {count_parameters(discriminator):,} parameters")
    say(f"ranks:             {plan.world_size}")
    say(f"global batch:      {plan.global_batch}, {plan.batch_per_rank} per rank")
    say(f"steps per epoch:   {plan.steps_per_epoch:,}")
    say(f"steps in all:      {plan.total_steps:,} ({plan.total_steps / plan.steps_per_epoch:.2f} epochs)")
    say("will it run here:  `python -m dist_dcgan.doctor` with the same flags tries it, under torchrun on all ranks")


def train_or_explain(config: Config, plan: Plan, location: DatasetLocation, resume: str, words: Sequence[str]) -> None:
    """Train; raises OneRankError with the batch size and a remedy if memory runs out."""
    try:
        train(config, plan, location, resume, words)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OneRankError(f"out of memory on rank {launched().rank} {memory_remedy(error, config, plan)}") from None


def command() -> None:
    """Run it as an installed command."""
    run_rank(main)


if __name__ == "__main__":
    command()
