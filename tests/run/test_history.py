"""A run's log, read by others: what is taken from it, and what it costs."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

from dist_dcgan.run.directory import RunDirectory
from dist_dcgan.run.history import Row, read_log


def test_logs_that_others_wrote_are_bounded(tmp_path: Path) -> None:
    names = {"x" * 200: 1.0, "a/b/c": 1.0, "OK": 1.0, "fine/name": 1e400, "also/fine": True}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 3, "images_seen": 96, "time/step": 2.0} | names))
    (row,) = read_log(RunDirectory(tmp_path)).rows
    assert isinstance(row, Row) and row.seconds == 6.0
    assert row.values.keys() == {"step", "images_seen", "time/step", "fine/name"} and math.isnan(
        row.values["fine/name"]
    )


def test_a_log_takes_memory_by_its_rows_and_not_by_its_text(tmp_path: Path) -> None:
    names = [f"group/metric_{number}" for number in range(30)]
    row = dict.fromkeys(names, 0.123456789) | {"images_seen": 32}
    content = "".join(json.dumps({"step": step} | row) + "\n" for step in range(1, 2001))
    (tmp_path / "metrics.jsonl").write_text(content)
    tracemalloc.start()
    try:
        log = read_log(RunDirectory(tmp_path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(log.rows) == 2000 and peak < 3 * len(content)
