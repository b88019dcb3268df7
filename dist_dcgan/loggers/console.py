"""Progress on the terminal, or as lines in a job's log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from dist_dcgan.config import Plan
from dist_dcgan.loggers.base import Logger, Row
from shards.common.messages import tell, warn


class ConsoleLogger(Logger):
    """One line of progress: live on a terminal; elsewhere plain lines, at most one a second."""

    def __init__(self, plan: Plan, step: int) -> None:
        self._plan, self._first_step, self._step, self._seconds = plan, step, step, 0.0
        self._last_line = float("-inf")
        self._bar = tqdm(total=plan.total_steps, initial=step, unit="step") if sys.stderr.isatty() else None

    def metrics(self, row: Row) -> None:
        """Show the row."""
        step = int(row["step"])
        self._seconds += row["time/step"] * (step - self._step)
        self._step = step
        text = (
            f"{row['images_seen'] / 1000:.1f} kimg  {row['throughput/images_per_second']:.1f} images/s  "
            f"loss D {row['loss/d']:.3f} G {row['loss/g']:.3f}  "
            f"D(x) {row['score/real']:.2f} D(G(z)) {row['score/fake']:.2f}  "
            f"{_kid(row)}"
            f"data wait {100 * row['time/data_wait']:.0f}%"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.perf_counter()
        if step < self._plan.total_steps and now - self._last_line < 1:
            return
        self._last_line = now
        per_step = self._seconds / (step - self._first_step)
        left = tqdm.format_interval((self._plan.total_steps - step) * per_step)
        share = 100 * step / self._plan.total_steps
        tell(f"{share:5.1f}%  step {step}/{self._plan.total_steps}  {text}  ETA {left}")

    def alert(self, step: int, text: str) -> None:
        """Show its lines."""
        first, *others = text.splitlines()
        warn(first)
        for line in others:
            tell(line)

    def close(self) -> None:
        """Leave the last line."""
        if self._bar is not None:
            self._bar.close()


def _kid(row: Row) -> str:
    """Return the kernel distance of a row that has one."""
    found = [key for key in row if key.startswith("quality/kid") and not key.endswith("_std")]
    return "".join(f"{key.removeprefix('quality/')} {row[key]:.4f}  " for key in found)
