"""Whose an error is, by what torch says."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dist_dcgan.distributed.failures import broke, first_sentence

PLACE = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:94"


def nccl(short: str, name: str, last: str = "") -> dist.DistBackendError:
    """An error as torch/csrc/distributed/c10d/NCCLUtils.hpp words it."""
    return dist.DistBackendError(f"{PLACE}, {short}, NCCL version 2.28.9\n{name}: Some words.\nLast error:\n{last}")


OWN = [
    nccl("unhandled cuda error (run with NCCL_DEBUG=INFO for details)", "ncclUnhandledCudaError", "Cuda failure 2"),
    nccl("unhandled system error", "ncclSystemError", "Error: /dev/shm: No space left on device"),
    nccl("internal error - please report this issue to the NCCL developers", "ncclInternalError"),
    nccl("invalid usage", "ncclInvalidUsage", "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 4000"),
    nccl("invalid argument", "ncclInvalidArgument"),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    ValueError("gloo is a word"),
]
OTHERS = [
    nccl("remote process exited or there was a network error", "ncclRemoteError", "socketProgress: Connection closed"),
    nccl("unhandled system error", "ncclSystemError", "socketProgress: Connection closed by remote peer n2<4711>"),
    nccl("unhandled system error", "ncclSystemError", "Call to recv from n2 failed : Connection reset by peer"),
    dist.DistBackendError("NCCL communicator was aborted on rank 3. "),
    dist.DistBackendError("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)"),
    dist.DistStoreError("wait timeout after 60000ms, keys: /default_pg/0//cuda//0"),
    RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"),
]


@pytest.mark.parametrize("error", OWN, ids=str)
def test_an_error_of_this_rank_is_its_own(error: BaseException) -> None:
    assert not broke(error)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_an_error_that_a_peer_caused_is_others(error: BaseException) -> None:
    assert broke(error)


def test_nccls_last_error_is_told() -> None:
    assert first_sentence(OWN[0]) == (
        f"DistBackendError: {PLACE}, unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9 "
        "(Cuda failure 2)"
    )
