"""torchrun whose ranks are forked from it, and so need not import torch: python -m tests.support.torchrun WORDS."""

from __future__ import annotations

import argparse
import atexit
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing import resource_tracker
from subprocess import TimeoutExpired
from typing import Any, ClassVar, NoReturn
from unittest import mock

from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler
from torch.distributed.run import main

from tests.support.forks import run_command


class ForkedRank:
    """What torchrun uses of `subprocess.Popen`."""

    _waiting: ClassVar[list[tuple[int, int]]] = []
    """Processes that wait for what to run, and the pipes to tell them."""

    @classmethod
    def prepare(cls, count: int) -> None:
        """Fork this many processes now: later this one has threads, whose locks a child would inherit as they are."""
        for _ in range(count):
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                for other in (writer, *(pipe for _, pipe in cls._waiting)):
                    os.close(other)
                _wait_and_run(reader)
            os.close(reader)
            cls._waiting.append((pid, writer))

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self.args = words
        self.returncode: int | None = None
        self.pid, pipe = self._waiting.pop(0)
        with open(pipe, "w") as told:
            json.dump([list(words), dict(environment)], told)

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status at its end; raises TimeoutExpired."""
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > end:
                assert timeout is not None
                raise TimeoutExpired(self.args, timeout)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode


def fork_ranks(words: Sequence[str]) -> None:
    """Have torchrun fork its ranks, which run `python -u WORDS`, from now on; `words` are its arguments."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--nproc_per_node", "--nproc-per-node", type=int, default=1)
    parser.add_argument("--max_restarts", "--max-restarts", type=int, default=0)
    options, _ = parser.parse_known_args(words)
    ForkedRank.prepare(options.nproc_per_node * (options.max_restarts + 1))
    mock.patch.object(SubprocessHandler, "_popen", _start).start()


def _start(_: SubprocessHandler, words: tuple[str, ...], environment: dict[str, str]) -> ForkedRank:
    assert words[:2] == (sys.executable, "-u"), words
    return ForkedRank(words[2:], environment)


def _wait_and_run(pipe: int) -> NoReturn:
    with open(pipe) as told:
        text = told.read()
    if not text:  # torchrun has ended
        os._exit(0)
    _run_and_exit(*json.loads(text))


def _run_and_exit(words: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Become what a new process would be, without torchrun's handlers and open files, and end as one."""
    status = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
        atexit._clear()
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        tracker: Any = resource_tracker._resource_tracker
        tracker._fd = tracker._pid = None  # or it would close a file of ours that has got its number
        os.environ.clear()
        os.environ.update(environment)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        run_command(words)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    fork_ranks(sys.argv[1:])
    main(sys.argv[1:])
