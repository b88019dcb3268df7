"""Classifies errors: this rank's own, a user's mistake on all ranks, or a collective that a peer broke."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from dist_dcgan.distributed.peers import Peers
from shards.common.errors import OneRankError, UserError
from shards.common.redaction import one_line

_OWN_NCCL_ERRORS = ("ncclUnhandledCudaError", "ncclInternalError", "ncclInvalidArgument", "ncclInvalidUsage")
_CONNECTION_LOST = re.compile(r"closed by|reset by peer|refused|timed out|broken pipe|remote peer", re.IGNORECASE)


@contextmanager
def explained(peers: Peers) -> Iterator[None]:
    """Report an error of this rank to its peers; raise OneRankError with the cause if a peer broke a collective."""
    try:
        yield
    except BaseException as error:
        if peers.world_size == 1 or is_alike(error):
            raise
        if not broke(error):
            peers.report(first_sentence(error))
            raise
        # Torchrun sends SIGTERM as soon as one rank has ended, before this one has reported why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise OneRankError(cannot_go_on(peers, f"{peers.cause()} ({first_sentence(error)})")) from error


def is_alike(error: BaseException) -> bool:
    """Return whether an error is a user's mistake, raised on all ranks."""
    return isinstance(error, UserError) and not isinstance(error, OneRankError)


def cannot_go_on(peers: Peers, cause: str) -> str:
    """Return the error message of a rank that ends because of `cause`."""
    return f"rank {peers.rank} of {peers.world_size} cannot go on: {cause}"


def broke(error: BaseException) -> bool:
    """Return whether an error comes from a collective that a peer broke, not from this rank.

    With NCCL, an error is this rank's own if CUDA, the driver or the use of NCCL caused it: torch names NCCL's result
    (torch/csrc/distributed/c10d/NCCLUtils.cpp). So is a system error, unless NCCL's last error reports a lost
    connection. A remote error, a timeout and an aborted communicator are caused by peers.
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
    """Return an error's first sentence, without torch's source location before it and the advice after it.

    NCCL's last error, if any, is appended.
    """
    text = re.sub(r"^\[[^]]*\] ", "", str(error).partition("\n")[0])
    last = str(error).partition("Last error:\n")[2].partition("\n")[0]
    return one_line(f"{type(error).__name__}: {text.partition('. ')[0]}{f' ({last})' if last else ''}")
