"""Disks that are full or cannot be written, checkpoints that are damaged or foreign: what must be true afterwards."""

from __future__ import annotations

import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from dist_dcgan.run.checkpoint import load_newest
from tests.faults import harness
from tests.faults.harness import Outcome, golden, launch, require_golden, run
from tests.faults.rank import Fault, cut_short
from tests.faults.scenario import Bench, Scenario

NOT_TRIED = "not tried: no disk can be mounted here"


def disks() -> Iterator[Scenario]:
    """Yield disks that are full, or cannot be written."""
    row = "disk full, read-only, little shared memory"
    yield Scenario(row, "a disk that fills up", disk_full)
    yield Scenario(row, "output that is read-only", read_only)
    yield Scenario(row, "1 MiB of /dev/shm", little_shared_memory)


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[bool]:
    """Mount a small disk at `folder`; yield whether that is allowed here."""
    folder.mkdir(parents=True, exist_ok=True)
    allowed = mount(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    try:
        yield allowed
    finally:
        if allowed:
            subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def mount(folder: Path, *options: str) -> bool:
    """Return whether `mount` succeeds."""
    return subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode == 0


def disk_full(bench: Bench, folder: Path) -> str:
    """The checkpoint before stays, nothing else does; with room the same command goes on."""
    disk = folder / "run"
    with mounted(disk, "2m") as allowed:  # there is room for one checkpoint, not for a second
        if not allowed:
            return NOT_TRIED
        outcome = Outcome(folder)
        outcome.starts += run(folder, bench.data, most_starts=1).starts
        first = outcome.starts[0]
        assert first.code != 0
        assert f"checkpoint {disk}/checkpoints/step-" in first.output and "No space left on device" in first.output
        assert load_newest(disk / "checkpoints") is not None
        assert not list((disk / "checkpoints").glob("*.tmp"))
        assert mount(disk, "-o", "remount,size=16m")
        outcome.starts += run(folder, bench.data).starts
        require_golden(outcome, golden(bench.work, bench.data))
    return "the one before stays, no litter"


def read_only(bench: Bench, folder: Path) -> str:
    """One line that names the path."""
    disk = folder / "disk"
    with mounted(disk, "1m") as allowed:
        if not allowed:
            return NOT_TRIED
        assert mount(disk, "-o", "remount,ro")
        words = harness.command(bench.data, disk / "run")
        started = launch(folder, words, [], ranks=2)
        assert started.code != 0
        assert started.output.count(f"error: run directory {disk}/run cannot be used: ") == 1
        assert "Read-only file system" in started.output
    return "one line that names the path"


def little_shared_memory(bench: Bench, folder: Path) -> str:
    """Training needs none of it."""
    words = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*words, "true"], capture_output=True).returncode:
        return NOT_TRIED
    outcome = Outcome(folder)
    folder.mkdir(parents=True, exist_ok=True)
    outcome.starts.append(launch(folder, harness.command(bench.data, folder / "run"), [], ranks=2, within=words))
    require_golden(outcome, golden(bench.work, bench.data))
    return "trains"


def damages() -> Iterator[Scenario]:
    """Yield what may have become of the newest checkpoint."""
    row = "checkpoint damaged or foreign"
    for name, damage in DAMAGES.items():
        check = partial(passed_over, damage=damage)
        yield Scenario(row, name, check, always=damage in (_flip, _pickle))
    yield Scenario(row, "of another configuration", of_another_configuration)
    yield Scenario(row, "all of them damaged", none_sound)


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.path,))


def _cut(newest: Path) -> None:
    cut_short(newest / "tensors.safetensors")


def _flip(newest: Path) -> None:
    content = bytearray((newest / "tensors.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "tensors.safetensors").write_bytes(content)


def _flip_values(newest: Path) -> None:
    content = (newest / "values.json").read_text()
    (newest / "values.json").write_text(content.replace('"step": 8', '"step": 9'))


def _pickle(newest: Path) -> None:
    payload = pickle.dumps(_Payload(newest.parent.parent.parent / "pwned"))
    for name in ("tensors.safetensors", "values.json"):
        (newest / name).write_bytes(payload)


def _empty(newest: Path) -> None:
    for path in newest.iterdir():
        path.unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut short": _cut,
    "a bit flipped in the tensors": _flip,
    "a number changed in the values": _flip_values,
    "a pickle in its place": _pickle,
    "an empty folder": _empty,
}


def interrupted(bench: Bench, folder: Path) -> Outcome:
    """Return a run that was killed at step 10, with checkpoints of steps 4 and 8; it is made once and copied."""
    original = bench.work / "interrupted"
    if not (original / "done").exists():
        shutil.rmtree(original, ignore_errors=True)
        run(original, bench.data, [Fault("kill -9 of all", "D step", 10, 0)], most_starts=1)
        found = sorted(path.name for path in (original / "run" / "checkpoints").iterdir())
        assert found == ["step-00000004", "step-00000008"]
        (original / "done").touch()
    shutil.copytree(original, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("bin"))
    return Outcome(folder)


def passed_over(bench: Bench, folder: Path, damage: Callable[[Path], None]) -> str:
    """The one before it is taken, and nothing in it is run."""
    outcome = interrupted(bench, folder)
    damage(folder / "run" / "checkpoints" / "step-00000008")
    outcome.starts += run(folder, bench.data, most_starts=1).starts
    assert "step-00000008 is passed over: " in outcome.output
    require_golden(outcome, golden(bench.work, bench.data))
    assert not (folder / "pwned").exists()
    return "the older one is taken"


def of_another_configuration(bench: Bench, folder: Path) -> str:
    """It is refused with what differs, and stays."""
    outcome = interrupted(bench, folder)
    flags = ("--seed", 1, "--max-steps", 11)
    other = golden(bench.work, bench.data, flags=flags)
    shutil.copytree(other.run_dir / "checkpoints" / "step-00000011", folder / "run" / "checkpoints" / "step-00000011")
    outcome.starts += run(folder, bench.data, most_starts=1).starts
    assert outcome.starts[-1].code != 0
    assert outcome.starts[-1].output.count("is of another configuration (seed: 1 -> 0)") == 1
    assert (folder / "run" / "checkpoints" / "step-00000011").is_dir()
    return "refused, with what differs"


def none_sound(bench: Bench, folder: Path) -> str:
    """The run does not begin again from nothing."""
    outcome = interrupted(bench, folder)
    for name in ("step-00000004", "step-00000008"):
        _cut(folder / "run" / "checkpoints" / name)
    outcome.starts += run(folder, bench.data, most_starts=1).starts
    assert outcome.starts[-1].code != 0
    assert "none of the 2 checkpoints" in outcome.starts[-1].output
    return "refused"
