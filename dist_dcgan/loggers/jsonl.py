"""The log file metrics.jsonl, from which everything else can be drawn again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from dist_dcgan.loggers.base import Row
from shards.common.files import publish


class JsonlLogger:
    """Appends a line to metrics.jsonl per row, after cutting off what lies behind `step`."""

    def __init__(self, path: Path, step: int) -> None:
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            publish(path, "".join(line + "\n" for line in kept).encode())
        self._file = path.open("a", buffering=1)

    def metrics(self, row: Row) -> None:
        """Append the row; what is not finite becomes null, as JSON knows no infinity."""
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._file.write(json.dumps(finite) + "\n")

    def samples(self, step: int, draw: Callable[[], Tensor]) -> None:
        """Do nothing."""

    def alert(self, step: int, text: str) -> None:
        """Append a row of its own."""
        self._file.write(json.dumps({"step": step, "alert": text}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the torn last line of a killed process
