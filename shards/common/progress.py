"""How far a command is, on stderr."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts images: a live bar on a terminal; elsewhere a plain line every ten seconds and at the end.

    With the unit `B` it counts bytes, and says kB, MB or GB. What is done already at the start does not count
    into the rate; a `total` of None is one that is not known. What is not `shown` counts in silence.
    """

    def __init__(self, total: int | None, label: str, unit: str = "img", start: int = 0, shown: bool = True) -> None:
        self._label, self._done, self._note = label, start, ""
        self._start = self._last_line = time.monotonic()
        self._live, self._shown = shown and sys.stderr.isatty(), shown
        self._format = {"total": total, "initial": start, "unit": unit, "unit_scale": unit == "B"}
        # nrows: tqdm would hide the bar on a terminal that does not tell its height, as in some containers
        self._bar = tqdm(desc=label, nrows=20, disable=not self._live, **self._format)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if not self._live and self._shown:
            self._print_line()

    def advance(self, count: int) -> None:
        """Count `count` more."""
        self.reach(self._done + count)

    def reach(self, done: int) -> None:
        """Take note that `done` are done in all."""
        self._bar.update(done - self._done)
        self._done = done
        if not self._live and self._shown and time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._print_line()

    def note(self, text: str) -> None:
        """Show `text` beside the count from now on."""
        self._note = text
        self._bar.set_postfix_str(text, refresh=False)

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        elapsed, note = self._last_line - self._start, self._note or None
        meter = tqdm.format_meter(
            self._done, elapsed=elapsed, ncols=0, prefix=self._label, postfix=note, **self._format
        )
        print(meter, file=sys.stderr, flush=True)
