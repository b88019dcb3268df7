"""The project's commands, as people type them."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_dcgan.metrics.extractors import missing_packages
from dist_dcgan.run.checkpoint import list_checkpoints
from tests.gpu.items import Context, Figures, Skipped
from tests.support.commands import module as command
from tests.support.rows import read_rows

ROOT = Path(__file__).parents[2]
KILLED_AT = 20
"""The first training is killed once a checkpoint of this step is there."""
_SECONDS_BETWEEN_LOOKS = 0.05
_SHOWN = 6000


class Failed(Exception):  # noqa: N818  # the cause of an error
    """The last that a command said before it failed."""


def environment(context: Context) -> dict[str, str]:
    """Return a user's environment without torchrun's variables; features are cached in the scratch space."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"XDG_CACHE_HOME": str(context.folder / "cache")}


def succeed(context: Context, *words: str) -> str:
    """Run a command to its end and return what it printed; raises AssertionError with its last line if it fails."""
    done = subprocess.run(words, cwd=ROOT, env=environment(context), text=True, stdout=-1, stderr=-2)
    print(done.stdout, flush=True)
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["it said nothing"])[-1]
        reason = f"{' '.join(words[2:4])} ended with status {done.returncode}: {last}"
        raise AssertionError(reason) from Failed(done.stdout[-_SHOWN:])
    return done.stdout


def train(context: Context, name: str, *arguments: object) -> list[str]:
    """Return the command that trains in a folder of the scratch space."""
    places = ("--data", context.data, "--run-dir", context.folder / name, "--wandb", "disabled")
    return command("dist_dcgan.train", "--world-size", 1, *places, *arguments)


def run_until(context: Context, words: list[str], enough: Callable[[], bool], signal_: signal.Signals) -> int:
    """Run a command until it ends or it is enough, then send it the signal; returns its exit status."""
    process = subprocess.Popen(words, cwd=ROOT, env=environment(context))
    while process.poll() is None and not enough():
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    process.send_signal(signal_)
    return process.wait()


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return the whole rows of metrics.jsonl so far."""
    return read_rows(run_dir / "metrics.jsonl")


def check_training(context: Context) -> Figures:
    """Train, kill -9 after step 20, and go on with the same command."""
    run_dir = context.folder / "run"
    flags = ("--preset", "debug", "--quality.extractor", "none", "--max-steps")

    def reached() -> int:
        found = list_checkpoints(run_dir / "checkpoints")
        return int(found[-1].name.rpartition("-")[2]) if found else 0

    endless = train(context, "run", *flags, 1_000_000)
    status = run_until(context, endless, lambda: reached() >= KILLED_AT, signal.SIGKILL)
    assert status == -signal.SIGKILL, f"training ended with status {status} before it was killed"
    saved = reached()
    last = saved + KILLED_AT
    said = succeed(context, *train(context, "run", *flags, last))
    assert f"going on after step {saved} " in said, f"it did not go on after step {saved}"
    steps = [row["step"] for row in rows(run_dir) if "loss/d" in row]
    assert steps[-1] == last and steps == sorted(set(steps)), (
        f"the log ends at {steps[-1]}, not {last}, or repeats steps"
    )
    return {"killed_after": saved, "went_on_to": last}


def check_sample(context: Context) -> Figures:
    """Draw a grid from the run."""
    out = context.folder / "sample.png"
    out.unlink(missing_ok=True)
    succeed(context, *command("dist_dcgan.sample", finished_run(context), "--out", out, "--seeds", "0-15"))
    return {"bytes": out.stat().st_size}


def check_evaluate(context: Context) -> Figures:
    """Score the run."""
    need_scores()
    images = context.sized(512, 16)
    words = command("dist_dcgan.evaluate", finished_run(context), "--data", context.data, "--json")
    said = succeed(context, *words, "--fakes", str(images), "--reals", str(images))
    scores = json.loads(said.strip().splitlines()[-1])
    return {name: value for name, value in scores.items() if name.startswith(("kid", "fd", "precision", "recall"))}


def check_doctor(context: Context) -> Figures:
    """Ask whether training will run here."""
    flags = context.sized((), ("--preset", "debug"))
    places = ("--data", context.data, "--run-dir", context.folder / "examined", "--wandb", "disabled")
    said = succeed(context, *command("dist_dcgan.doctor", *places, *flags))
    lines = said.splitlines()
    return {
        "ok": sum(line.startswith("ok") for line in lines),
        "warnings": sum(line.startswith("warning") for line in lines),
    }


def check_pytest(context: Context) -> Figures:
    """Run the tests that need CUDA; without CUDA they are skipped."""
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    options = ("-q", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu", "-k", "not items_of_the_check")
    said = succeed(context, *command("pytest", *options, "tests/gpu"))
    return {"tests": said.strip().splitlines()[-1].strip("= ")}


def finished_run(context: Context) -> Path:
    """Return a run that has ended, training it first if need be."""
    run_dir = context.folder / "run"
    if not (run_dir / "generator_ema.safetensors").exists():
        flags = ("--preset", "debug", "--quality.extractor", "none", "--max-steps", KILLED_AT)
        succeed(context, *train(context, "run", *flags))
    return run_dir


def need_scores() -> None:
    """Raise Skipped if the packages are missing that scores need."""
    if missing := missing_packages():
        raise Skipped(f"packages are missing: {', '.join(missing)}")
