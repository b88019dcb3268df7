"""Progress of a command on stderr."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from shards.common.messages import tell
from shards.common.redaction import one_line

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Progress display: a live bar on a terminal, otherwise one line every ten seconds and at the end.

    The unit `B` counts bytes, printed as kB, MB or GB. `start` is done already and not part of the rate;
    `total` is None if unknown. Nothing is printed if not `shown`.
    """

    def __init__(self, total: int | None, label: str, unit: str = "img", start: int = 0, shown: bool = True) -> None:
        self._label, self._done, self._note = one_line(label), start, ""
        self._start = self._last_line = time.monotonic()
        self._live, self._shown = shown and sys.stderr.isatty(), shown
        self._format = {"total": total, "initial": start, "unit": unit, "unit_scale": unit == "B"}
        # nrows: tqdm hides the bar if the terminal reports no height, as in some containers
        self._bar = tqdm(desc=self._label, nrows=20, disable=not self._live, **self._format)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if not self._live and self._shown:
            self._print_line()

    def advance(self, count: int) -> None:
        """Add `count` to the number done."""
        self._bar.update(count)
        self._done += count
        if not self._live and self._shown and time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._print_line()

    def note(self, text: str) -> None:
        """Show `text` next to the count from now on."""
        self._note = one_line(text)
        self._bar.set_postfix_str(self._note, refresh=False)

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        elapsed, note = self._last_line - self._start, self._note or None
        meter = tqdm.format_meter(
            self._done, elapsed=elapsed, ncols=0, prefix=self._label, postfix=note, **self._format
        )
        tell(meter)
