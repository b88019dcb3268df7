"""Check whether a run will train here, before it is started. Takes the flags of training; leaves nothing on disk.

python -m dist_dcgan.doctor --data data/bedroom_train
COMMAND=doctor RANKS=8 bash launch/torchrun.sh --data data/bedroom_train --run-dir runs/bedrooms
COMMAND=doctor sbatch --nodes=2 launch/train.sbatch --data data/bedroom_train
"""

from __future__ import annotations

from collections.abc import Sequence

from dist_dcgan.config import from_command_line
from dist_dcgan.distributed.world import run_rank
from dist_dcgan.preflight.results import Finding
from dist_dcgan.preflight.run_checks import examine
from shards.common.errors import UserError
from shards.common.messages import say
from shards.common.streams import output_is_optional


def main(argv: Sequence[str]) -> None:
    """Run the checks and print the results; raises UserError if a check failed."""
    config, invocation = from_command_line(argv, "python -m dist_dcgan.doctor", __doc__)
    output_is_optional()  # the status tells the result, too
    found = examine(config, invocation, show)
    failed = [thing for thing, finding in found.items() if finding.level == "FAILED"]
    if failed:
        raise UserError(f"{len(failed)} of {len(found)} checks failed: {', '.join(failed)}")


def show(thing: str, finding: Finding) -> None:
    """Print one line of the table."""
    say(f"{finding.level:8} {thing:15} {finding.text}")


def command() -> None:
    """Run it as an installed command."""
    run_rank(main)


if __name__ == "__main__":
    command()
