"""How this process was started: alone, as a rank by torchrun, or as one of several tasks that torchrun must replace.

Torchrun sets RANK and WORLD_SIZE on every rank. One of them without the other was left over by something else.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from shards.common.errors import UserError

_SIZES_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE", "FLUX_JOB_SIZE")
"""Number of processes, as Open MPI, MPICH and Intel MPI, MVAPICH, IBM's jsrun and Flux set it."""
_LARGEST = 1_000_000


class Launch(NamedTuple):
    """Place of this process among all that train together; by default it is alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    ranks_of_node: int = 1
    node: int = 0
    nodes: int = 1
    by_torchrun: bool = False


def launched() -> Launch:
    """Return how this process was started.

    Raises UserError if torchrun's variables are malformed or incomplete, and if this is one of several tasks of srun,
    mpirun or the like that would each train alone.
    """
    by_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    world_size = _number("WORLD_SIZE", 1, least=1)
    # Without torchrun, a user's script may set RANK and WORLD_SIZE for each task: then it is not alone.
    if not by_torchrun or _number("GROUP_WORLD_SIZE", world_size, least=1) == 1:
        _require_one_task()
    if world_size > 1:
        _require_complete(world_size)
    if not by_torchrun:
        return Launch()
    return Launch(
        rank=_number("RANK", 0, most=world_size - 1),
        world_size=world_size,
        local_rank=_number("LOCAL_RANK", 0, most=world_size - 1),
        ranks_of_node=_number("LOCAL_WORLD_SIZE", 1, least=1),
        node=_number("GROUP_RANK", 0),
        nodes=_number("GROUP_WORLD_SIZE", 1, least=1),
        by_torchrun=True,
    )


def _require_one_task() -> None:
    name, tasks = _tasks()
    if tasks == 1:
        return
    remedy = "`sbatch --nodes=N launch/train.sbatch FLAGS`, or on one machine " if name.startswith("SLURM") else ""
    raise UserError(
        f"{name}={tasks}: {tasks} processes were started that do not know each other, and each would train alone: "
        f"let torchrun start the ranks: {remedy}`torchrun --nproc_per_node={tasks} -m dist_dcgan.train FLAGS`"
    )


def _tasks() -> tuple[str, int]:
    """Return the number of processes that srun or an MPI launcher has started with this one, and its variable."""
    if _is_task_of_srun():
        name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
        return name, _number(name, 1, least=1)
    name = next((name for name in _SIZES_OF_MPI if name in os.environ), "")
    return name, _number(name, 1, least=1)


def _is_task_of_srun() -> bool:
    """Return whether srun started this process, and not a batch script, salloc's shell or an interactive one.

    They have SLURM_NTASKS, too, which is what the job may start. A batch script also has SLURM_PROCID=0, but no step.
    In `srun --pty`, only the first task has the terminal.
    """
    if "SLURM_PROCID" not in os.environ or "SLURM_PTY_PORT" in os.environ:
        return False
    is_batch_script = "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ
    return not is_batch_script or os.environ["SLURM_PROCID"] != "0"


def _require_complete(world_size: int) -> None:
    lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if lacking:
        raise UserError(
            f"WORLD_SIZE={world_size}, but {lacking[0]} is not set: torchrun sets both: "
            f"`torchrun --nproc_per_node={world_size} -m dist_dcgan.train FLAGS`, or `unset WORLD_SIZE` to train alone"
        )


def _number(name: str, default: int, least: int = 0, most: int = _LARGEST) -> int:
    """Return the number in an environment variable; raises UserError if it is not one from `least` to `most`."""
    text = os.environ.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise UserError(
            f"{name}={text}, but a number from {least} to {most} is needed: `unset {name}` if torchrun did not set it"
        )
    return int(text)
