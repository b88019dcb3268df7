"""Choice of a rank's device: GPU or CPU, the same kind on all ranks of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dist_dcgan.distributed.peers import RankProcess
from shards.common.errors import UserError, joined


def agreed_device(processes: Mapping[int, RankProcess], rank: int, lenient: bool = False) -> torch.device:
    """Return the device of `rank`: its GPU if every rank has one, the CPU if no rank has.

    All ranks call it with the same `processes`, so that all decide alike: if only one took the CPU, the others would
    hang in NCCL's initialisation. Raises UserError, on all ranks, with the hosts whose ranks lack a GPU, or if no rank
    has one and CUDA_VISIBLE_DEVICES names some: a job that holds GPUs would train on the CPU for days. If `lenient`,
    all take the CPU instead.
    """
    lacking = [other for other, process in processes.items() if process.local_rank >= process.gpus]
    if not lacking:
        return torch.device("cuda", processes[rank].local_rank)
    if lenient:
        return torch.device("cpu")
    if any(process.gpus for process in processes.values()):
        raise UserError(_lacking(processes, sorted(lacking)))
    for process in processes.values():
        if process.promised:
            raise UserError(
                f"CUDA_VISIBLE_DEVICES={process.promised} on host {process.host}, but torch sees no GPU: does "
                "nvidia-smi show them there, has a container got them (apptainer exec --nv), is torch built for them? "
                "With an empty CUDA_VISIBLE_DEVICES= CPUs are used"
            )
    return torch.device("cpu")


def set_up(device: torch.device) -> None:
    """Make a GPU the main thread's current device, and turn off TF32, cuDNN's default for float32 convolutions."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False


def _lacking(processes: Mapping[int, RankProcess], lacking: Sequence[int]) -> str:
    """Return one line that names the ranks without a GPU, by host, and the remedy."""
    by_host: dict[str, list[int]] = {}
    for rank in lacking:
        by_host.setdefault(processes[rank].host, []).append(rank)
    found = []
    for host, ranks in by_host.items():
        gpus, size = processes[ranks[0]].gpus, sum(process.host == host for process in processes.values())
        shown = f"{gpus} GPU{'s' if gpus > 1 else ''} for {size} ranks" if gpus else "no GPU"
        found.append(f"host {host} shows {shown} ({_span(ranks)})")
    fewest = min(processes[rank].gpus for rank in lacking)
    remedy = (
        f"use --nproc_per_node={fewest}"
        if fewest
        else "mend the driver there (does nvidia-smi show the GPUs?), take the host out, or set CUDA_VISIBLE_DEVICES= "
        "on all hosts to use CPUs"
    )
    others = "" if len(lacking) == len(processes) else ", the other ranks have one each"
    return f"{joined(found)}{others}: {remedy}"


def _span(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"
