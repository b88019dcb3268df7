"""Processes forked from a server that has imported torch and run no operation: a start takes 0.1 s instead of 5.

They are processes like others, with a memory, signals, a working directory and an environment of their own.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.reduction import DupFd
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any
from unittest import mock

PRELOADED = [
    "torch._dynamo",  # the first network or optimizer would import it
    "torch.distributed.run",
    "dist_dcgan.metrics.extractors",
    "dist_dcgan.metrics.quality",
    "dist_dcgan.preflight.run_checks",
    "dist_dcgan.training.loop",
    "matplotlib.figure",
    "pytest",
    "shards.conversion.convert",
    "shards.demo.dataset",
    "tests.faults.processes",
    "tests.support.ranks",
    "tests.support.shards_fixtures",
    "torch_fidelity",
    "torchvision.utils",
    "tests.support.frozen",
]
"""What most processes would import; pytest as well, as the functions that they call stand in test files.

No module that is run as a command: it would be there before it is run.
"""

THREADS = {"OMP_NUM_THREADS": "1"}
"""What torch reads when it is imported, and so the same for all."""


def context() -> ForkServerContext:
    """Return the way to start processes, after starting the server."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, THREADS):
        forkserver.ensure_running()
    return found


def may_fork(command: Sequence[object], options: Mapping[str, Any]) -> bool:
    """Return whether a command finds in the server what it would import, and asks for nothing else of its process."""
    environment = options["env"]
    same = all(environment.get(name) == os.environ.get(name) for name in ("PYTHONPATH", "PYTHONHOME"))
    plain = command[:2] == [sys.executable, "-m"] and options.keys() <= {"env", "cwd"}
    return plain and same and THREADS.items() <= environment.items()


class Forked:
    """`python -m MODULE ARGUMENTS`, with what tests use of `subprocess.Popen`; its output goes to files."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        cwd: Path | None = None,
        *,
        joined: bool = True,
        streams: tuple[int, int] | None = None,
    ) -> None:
        """`joined`: standard error goes to where the output goes. `streams`: descriptors that both go to instead."""
        self._files = [tempfile.TemporaryFile() for _ in range(1 if joined else 2)]  # noqa: SIM115
        streams = streams or (self._files[0].fileno(), self._files[-1].fileno())
        place = (dict(env), str(cwd or Path.cwd()), _Streams(streams))
        started = context().Process(target=_run_module, args=(place, list(command[1:])), daemon=True)
        started.start()
        assert started.pid is not None
        self._process, self.pid, self.args = started, started.pid, command

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status at its end; raises TimeoutExpired."""
        self._process.join(timeout)
        if self.returncode is None:
            assert timeout is not None
            raise TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return output and errors at its end; raises TimeoutExpired."""
        self.wait(timeout)
        contents = []
        for file in self._files:
            file.seek(0)
            contents.append(file.read().decode())
        return contents[0], contents[1] if len(contents) > 1 else ""

    def send_signal(self, number: int) -> None:
        """Send a signal if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()


class _Streams:
    """Standard output and errors, which a process gets as it starts."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        self.descriptors: Sequence[Any] = descriptors

    def __reduce__(self) -> tuple[Any, ...]:
        return _Streams, ([DupFd(each) for each in self.descriptors],)

    def take(self) -> None:
        """Have this process write there."""
        for number, each in enumerate(self.descriptors, start=1):
            descriptor = each.detach()
            os.dup2(descriptor, number)
            os.close(descriptor)


def here() -> tuple[dict[str, str], str, _Streams]:
    """Return what a process gets from this one: arguments of `become`."""
    return dict(os.environ), os.getcwd(), _Streams([1, 2])


def status_of(function: Callable[..., object], *arguments: object) -> int:
    """Call a function in a process of its own and return its exit status, negative for a signal."""
    process = context().Process(target=_call, args=(here(), function, arguments), daemon=True)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _call(place: Any, function: Callable[..., object], arguments: Sequence[object]) -> None:
    become(*place)
    function(*arguments)


def become(environment: Mapping[str, str], directory: str, streams: _Streams) -> None:
    """Take over what a process has from its parent: environment, working directory, standard streams."""
    streams.take()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)


def _run_module(place: Any, words: Sequence[str]) -> None:
    become(*place)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it may have children
    try:
        run_command(words)
    finally:
        atexit._run_exitfuncs()


def run_command(words: Sequence[str]) -> None:
    """Run `python WORDS`, a script or -m and a module, in this process."""
    is_module = words[0] == "-m"
    name, *arguments = words[1:] if is_module else words
    sys.argv = [name, *arguments]
    sys.path[0] = os.getcwd() if is_module else os.path.dirname(os.path.abspath(name))
    if name == "torch.distributed.run":
        name = "tests.support.torchrun"  # whose ranks are forked, too
    warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)  # it may be preloaded
    if is_module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(name, run_name="__main__")
