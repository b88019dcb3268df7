"""Do the tests hold what they promise? Break the code in one place at a time, and see which tests fail.

    python -m tests.mutations                             # each with the tests that should catch it: an hour
    python -m tests.mutations --only 7                    # those of one promise
    python -m tests.mutations --whole                     # with the default tests whole: hours

A breakage that is not caught is listed at the end, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Breakage(NamedTuple):
    """One place that is broken."""

    promise: int
    """Number of the promise in dist_dcgan/README.md that it breaks."""
    file: str
    before: str
    """Text that stands in the file once."""
    after: str
    tests: str
    """Tests that should catch it."""


BREAKAGES = (
    Breakage(1, "shards/manifest.py", "TAR_END = 2 * TAR_BLOCK", "TAR_END = TAR_BLOCK", "tests/shards"),
    Breakage(
        1,
        "shards/manifest.py",
        "self.pixel_offset = TAR_BLOCK + len(self.ppm_header)",
        "self.pixel_offset = TAR_BLOCK",
        "tests/shards",
    ),
    Breakage(1, "shards/manifest.py", "if manifest.digest() != digest or ", "if ", "tests/shards"),
    Breakage(
        2,
        "dist_dcgan/data/order.py",
        "return range(rank * per_rank, (rank + 1) * per_rank)",
        "return range(0, per_rank)",
        "tests/data",
    ),
    Breakage(2, "dist_dcgan/data/order.py", '"order of shards", epoch)', '"order of shards", 0)', "tests/data"),
    Breakage(
        2,
        "dist_dcgan/data/order.py",
        '_window_ends(epoch), position, "right"',
        '_window_ends(epoch), position, "left"',
        "tests/data",
    ),
    Breakage(
        3,
        "dist_dcgan/random_streams.py",
        'f"{seed}/{stream}/{step}".encode()',
        'f"{seed}/{stream}".encode()',
        "tests/training/test_random_streams.py",
    ),
    Breakage(
        3,
        "dist_dcgan/random_streams.py",
        "torch.arange(slots.start, slots.stop,",
        "torch.arange(0, len(slots),",
        "tests/training/test_random_streams.py",
    ),
    Breakage(
        4,
        "dist_dcgan/distributed/collectives.py",
        "        packed /= dist.get_world_size()\n",
        "",
        "tests/distributed tests/training",
    ),
    Breakage(
        4,
        "dist_dcgan/training/train_state.py",
        "self.ddp_discriminator = wrap(self.discriminator)",
        "self.ddp_discriminator = wrap(Discriminator(config.width, image_size).to(self.dtype))",
        "tests/training/test_equivalence.py",
    ),
    Breakage(
        5,
        "dist_dcgan/training/steps.py",
        "with _frozen(state.discriminator), state.autocast():",
        "with state.autocast():",
        "tests/training/test_step_on_meta.py",
    ),
    Breakage(
        5,
        "dist_dcgan/models/losses.py",
        "return LOSSES[form](logits_fake, 0.0)",
        "return LOSSES[form](logits_fake, 0.1)",
        "tests/models tests/training",
    ),
    Breakage(
        5,
        "dist_dcgan/models/losses.py",
        "return logits if logits.dtype == torch.float64 else logits.float()",
        "return logits",
        "tests/models tests/training",
    ),
    Breakage(6, "dist_dcgan/training/ema.py", "weight = (finite * weight)", "weight = weight", "tests/training"),
    Breakage(
        6,
        "dist_dcgan/training/ema.py",
        "    update_bn((draw_latents(config, key, batch, device).to(dtype) for batch in batches), generator)\n",
        "",
        "tests/training",
    ),
    Breakage(
        7,
        "dist_dcgan/run/checkpoint.py",
        "if content_sha256(file) != sha256:",
        "if False:",
        "tests/run tests/faults",
    ),
    Breakage(
        7, "dist_dcgan/run/checkpoint.py", "    for path in reversed(found):", "    for path in found:", "tests/run"
    ),
    Breakage(
        7,
        "dist_dcgan/training/train_state.py",
        'yield "optimizer_d", self.discriminator, self.optimizer_d',
        "pass",
        "tests/training tests/run tests/faults",
    ),
    Breakage(
        8,
        "dist_dcgan/training/stopping.py",
        "op=dist.ReduceOp.MAX",
        "op=dist.ReduceOp.MIN",
        "tests/training/test_stopping.py",
    ),
    Breakage(
        8,
        "dist_dcgan/training/stopping.py",
        "(signal.SIGTERM, signal.SIGUSR1, ",
        "(signal.SIGTERM, ",
        "tests/training/test_stopping.py tests/commands/test_train.py",
    ),
    Breakage(
        9,
        "dist_dcgan/loggers/composite.py",
        "            except Exception as error:",
        "            except ValueError as error:",
        "tests/loggers tests/training tests/run",
    ),
    Breakage(
        9,
        "dist_dcgan/distributed/peers.py",
        "signal.pidfd_send_signal(same, signal.SIGKILL)",
        "pass",
        "tests/distributed",
    ),
    Breakage(
        10,
        "dist_dcgan/data/storage/location.py",
        "            if found != entry.sha256:",
        "            if False:",
        "tests/data/test_integrity.py",
    ),
    Breakage(
        10,
        "dist_dcgan/data/reader.py",
        "            if state_of(source.file) != source.found.state:",
        "            if False:",
        "tests/data",
    ),
    Breakage(
        11, "shards/common/command_line.py", "        sys.exit(2)", "        sys.exit(1)", "tests/commands tests/shards"
    ),
    Breakage(
        11,
        "shards/common/command_line.py",
        'return f"unknown option {unknown[1]}{nearest(unknown[1], flags)} (--help lists them all)"',
        'return f"unknown option {unknown[1]}"',
        "tests/commands tests/shards",
    ),
)


def main() -> None:
    """Try each and print what became of it."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=int, help="the promise whose breakages are tried")
    parser.add_argument("--whole", action="store_true", help="with the default tests whole")
    options = parser.parse_args()
    missed = []
    for breakage in BREAKAGES:
        if options.only in (None, breakage.promise):
            found = first_failure(breakage, ["tests"] if options.whole else breakage.tests.split())
            print(f"{breakage.promise:3} {breakage.file}: {breakage.before.strip()}: {found}", flush=True)
            missed += [breakage] if found is None else []
    sys.exit(f"{len(missed)} not caught: {[breakage.before for breakage in missed]}" if missed else 0)


def first_failure(breakage: Breakage, tests: list[str]) -> str | None:
    """Return the first test that fails on a copy with this breakage, None if none does."""
    with tempfile.TemporaryDirectory() as folder:
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        copy = ["tar", "--create", "--directory", str(ROOT), "--null", "--files-from=-"]
        content = subprocess.run(copy, input=tracked, capture_output=True, check=True).stdout
        subprocess.run(["tar", "--extract", "--directory", folder], input=content, check=True)
        path = Path(folder, breakage.file)
        path.write_text(broken(path.read_text(), breakage))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        env = os.environ | {"PYTHONPATH": folder}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stdout + done.stderr
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return failed[0].split(" - ")[0] if failed else None


def broken(text: str, breakage: Breakage) -> str:
    """Return the text of the file with the breakage."""
    assert text.count(breakage.before) == 1, (breakage.file, breakage.before, text.count(breakage.before))
    return text.replace(breakage.before, breakage.after)


if __name__ == "__main__":
    main()
