"""The log file metrics.jsonl, from which all other logs can be made again."""

from __future__ import annotations

import json
import math
from pathlib import Path

from dist_dcgan.loggers.base import Logger, Row
from shards.common.files import publish


class JsonlLogger(Logger):
    """Appends a line per row to metrics.jsonl, after removing rows after `step`."""

    def __init__(self, path: Path, step: int) -> None:
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            publish(path, "".join(line + "\n" for line in kept).encode())
        self._file = path.open("a", buffering=1)

    def metrics(self, row: Row) -> None:
        """Append the row; values that are not finite become null, as JSON has no infinity."""
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._file.write(json.dumps(finite) + "\n")

    def alert(self, step: int, text: str) -> None:
        """Append a row with the step and the message."""
        self._file.write(json.dumps({"step": step, "alert": text}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the incomplete last line of a killed process
