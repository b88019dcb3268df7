"""A real SLURM cluster of some nodes on one machine: its daemons, with a folder for everything that they keep.

Each node is a slurmd in a UTS and mount namespace of its own, so that there `hostname` and /etc/hosts are those of a
node; its processors and GPUs are pretended. Nothing of the machine's own SLURM or network is read or written. Needs
root, slurm-wlm and munge.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from string import Template
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "unshare")
PROBE = ("unshare", "--mount", "--uts", "true")
"""Namespaces that are needed, made and left."""
CONFIGURATION = Template((Path(__file__).parent / "slurm.conf").read_text())
SECONDS = 60
REQUEUE_SECONDS = 5
"""How long a job that queues itself again is held back; the least that SLURM allows."""

# Node names stand in the file because `scontrol show hostnames` and torchrun resolve them.
_ENTER = 'mount --bind "$1" /etc/hosts && hostname "$2" && exec slurmd -N "$2" -f "$3"'


class Cluster:
    """A cluster with a controller and nodes n1, n2, …; used as a context manager."""

    def __init__(self, folder: Path, nodes: int = 2, processors: int = 4) -> None:
        """`folder` must have a short name, as sockets do."""
        self.folder = folder
        self.nodes = [f"n{number + 1}" for number in range(nodes)]
        self._processors = processors
        self.configuration = folder / "slurm.conf"
        self.environment = self.in_job(os.environ)

    def __enter__(self) -> Cluster:
        for name in ("state", "spool", "munge", "log", "run"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)  # munged refuses what others may write to
        (self.folder / "munge").chmod(0o711)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self.configuration.write_text(self._configuration())
        lines = [f"127.0.1.{number + 1} {name}" for number, name in enumerate(self.nodes)]
        hosts = "\n".join([f"127.0.0.1 localhost {socket.gethostname()}", *lines])
        (self.folder / "etc_hosts").write_text(hosts + "\n")
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(subprocess.SubprocessError):
            self.run("scancel", "--user=root", check=False)
            self.wait_until(lambda: not self.run("squeue", "--noheader"), 20)
        for node in self.nodes:
            self.crash(node)
        for name in ("slurmctld", "munged"):
            self._end(name)

    def _start(self) -> None:
        munge = [f"--{name}={self.folder}/munge/{name}" for name in ("socket", "key-file", "seed-file")]
        munge[1] = f"--key-file={self.folder}/munge/key"
        logs = [f"--pid-file={self.folder}/run/munged.pid", f"--log-file={self.folder}/log/munged"]
        self.run("munged", "--force", *munge, *logs)
        self.run("slurmctld", "-c", "-f", str(self.configuration))
        for node in self.nodes:
            self.start(node)
        self.wait_until(self.is_idle)

    def start(self, node: str) -> None:
        """Start the daemon of a node."""
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        enter = ["unshare", "--mount", "--uts", "--propagation", "private", "bash", "-c", _ENTER, "_"]
        self.run(*enter, str(self.folder / "etc_hosts"), node, str(self.configuration))

    def crash(self, node: str) -> None:
        """Have everything on a node die at once, as without power."""
        for pid in self.processes(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, node: str) -> list[int]:
        """The processes of a node, its daemon included."""
        space = self._space(self._pid(f"slurmd-{node}"))
        everything = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        mine = self._space(os.getpid())
        return [] if space in (None, mine) else [pid for pid in everything if self._space(pid) == space]

    def leftovers(self) -> list[str]:
        """The command lines of processes on nodes that belong to no daemon of SLURM."""
        found = []
        for node in self.nodes:
            for pid in self.processes(node):
                with suppress(OSError):
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                    if words[0] and os.path.basename(words[0]) != b"slurmd":
                        found.append(f"{node}: {b' '.join(words).decode(errors='replace')}")
        return found

    def in_job(self, variables: Mapping[str, str]) -> dict[str, str]:
        """Return an environment to submit jobs to this cluster from."""
        return {**variables, "SLURM_CONF": str(self.configuration)}

    def run(self, *words: str, check: bool = True, **options: Any) -> str:
        """Run a command of SLURM and return what it prints."""
        options = {"env": self.environment} | options
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, **options)
        assert done.returncode == 0 or not check, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *words: str, **options: Any) -> str:
        """Submit a job and return its number."""
        return self.run("sbatch", "--parsable", *words, **options)

    def show(self, job: str) -> dict[str, str]:
        """What SLURM says of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, seconds: float = 300) -> str:
        """Wait for a job to end for good, and return its last state."""
        self.wait_until(
            lambda: self.show(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"), seconds
        )
        return self.show(job)["JobState"]

    def wait_until(self, condition: Callable[[], bool], seconds: float = SECONDS) -> None:
        """Wait for a condition; asserts that it comes in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.run("scontrol", "show", "job", check=False) + self._log(
                "slurmctld"
            )
            time.sleep(0.2)

    def is_idle(self) -> bool:
        """Return whether all nodes wait for work."""
        states = self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()
        return states == ["idle"] * len(self.nodes)

    def _pid(self, name: str) -> int:
        with suppress(OSError, ValueError):
            return int((self.folder / "run" / f"{name}.pid").read_text())
        return 0

    def _end(self, name: str) -> None:
        pid = self._pid(name)
        with suppress(OSError):
            if name not in Path(f"/proc/{pid}/comm").read_text():
                return
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + 10
            while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
                time.sleep(0.05)

    def _log(self, name: str) -> str:
        return "\n".join((self.folder / "log" / name).read_text().splitlines()[-20:])

    @staticmethod
    def _space(pid: int) -> str | None:
        with suppress(OSError):
            return os.readlink(f"/proc/{pid}/ns/uts")
        return None

    def _configuration(self) -> str:
        host, folder = socket.gethostname().split(".")[0], self.folder
        ports = _free_ports(1 + len(self.nodes))
        nodes = [
            f"NodeName={name} NodeHostname={name} NodeAddr=127.0.1.{number + 1} Port={ports[1 + number]} "
            f"CPUs={self._processors} Boards=1 SocketsPerBoard=1 CoresPerSocket={self._processors} ThreadsPerCore=1 "
            "RealMemory=8000 Gres=gpu:2 State=UNKNOWN"
            for number, name in enumerate(self.nodes)
        ]
        # Any device may stand for a GPU, as nothing opens it.
        gpus = [
            f"NodeName={name} Name=gpu File={device}\n" for name in self.nodes for device in ("/dev/null", "/dev/zero")
        ]
        (folder / "gres.conf").write_text("".join(gpus))
        values = {"host": host, "port": ports[0], "folder": folder, "requeue_seconds": REQUEUE_SECONDS}
        return CONFIGURATION.substitute(values, nodes="\n".join(nodes))


def _free_ports(count: int) -> Sequence[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports
