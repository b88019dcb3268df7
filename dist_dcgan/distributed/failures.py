"""Whose an error is: a rank's own, a mistake that all ranks meet alike, or that of a peer which broke a collective."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from dist_dcgan.distributed.peers import Peers
from shards.common.errors import OneRankError, UserError

_OWN_NCCL_ERRORS = ("ncclUnhandledCudaError", "ncclInternalError", "ncclInvalidArgument", "ncclInvalidUsage")
_CONNECTION_LOST = re.compile(r"closed by|reset by peer|refused|timed out|broken pipe|remote peer", re.IGNORECASE)


@contextmanager
def explained(peers: Peers) -> Iterator[None]:
    """Tell the peers of an error of this rank; raise OneRankError with the cause if they broke a collective."""
    try:
        yield
    except BaseException as error:
        if peers.world_size == 1 or is_alike(error):
            raise
        if not broke(error):
            peers.report(first_sentence(error))
            raise
        raise OneRankError(cannot_go_on(peers, f"{peers.explain()} ({first_sentence(error)})")) from error


def is_alike(error: BaseException) -> bool:
    """Return whether an error is a mistake of the user, which all ranks meet."""
    return isinstance(error, UserError) and not isinstance(error, OneRankError)


def cannot_go_on(peers: Peers, cause: str) -> str:
    """Return the line in which a rank says why it ends."""
    return f"rank {peers.rank} of {peers.world_size} cannot go on: {cause}"


def broke(error: BaseException) -> bool:
    """Return whether an error is that of a collective that a peer broke, rather than this rank's own.

    Over NCCL this rank's own are those that its CUDA, its driver or its use of NCCL caused: torch names NCCL's result
    (torch/csrc/distributed/c10d/NCCLUtils.cpp). A system error is, too, unless NCCL's last error tells of a lost
    connection. A remote error, a timeout, or a communicator that was aborted is that of others.
    """
    text = str(error)
    if any(name in text for name in _OWN_NCCL_ERRORS):
        return False
    if "ncclSystemError" in text:
        return bool(_CONNECTION_LOST.search(text.partition("Last error:")[2]))
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text.lower() or "nccl" in text.lower())
    )


def first_sentence(error: BaseException) -> str:
    """Return what an error says, without the place in the source that torch puts before it and the advice after it.

    If NCCL tells its last error, that follows.
    """
    text = re.sub(r"^\[[^]]*\] ", "", str(error).partition("\n")[0])
    last = str(error).partition("Last error:\n")[2].partition("\n")[0]
    return f"{type(error).__name__}: {text.partition('. ')[0]}{f' ({last})' if last else ''}"
