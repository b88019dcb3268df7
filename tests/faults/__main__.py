"""The fault bench: python -m tests.faults [--all] [--only WORDS] [--work DIR]

Runs the scenarios of the short part, or all of them, each in a folder of its own; those that have passed are left, so
that a bench that was killed goes on. Writes the table of README.md. Then `python -m tests.faults soak` lets 64 faults
happen to one run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shards.conversion.convert import Settings, convert
from shards.conversion.sources.lmdb_source import LmdbSource
from shards.demo.dataset import write_demo
from tests.benchmarks.tables import put, table
from tests.faults.scenario import Bench, Scenario
from tests.faults.scenarios import scenarios
from tests.faults.soak import soak
from tests.support.rows import read_rows

README = Path(__file__).parent / "README.md"


def main() -> None:
    """Run what is left, and write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=["run", "soak", "report"], default="run")
    parser.add_argument("--all", action="store_true", help="all scenarios, not the short part alone")
    parser.add_argument("--only", default="", help="those whose name or row holds these words")
    parser.add_argument("--work", type=Path, default=Path("runs/faults"), help="folder of the runs")
    options = parser.parse_args()
    bench = make_bench(options.work.resolve())
    if options.command == "soak":
        note(bench, "soak", "64 random faults in one run", lambda: soak(bench, bench.work / "soak"))
    elif options.command == "run":
        for scenario in scenarios():
            if (scenario.always or options.all) and options.only in f"{scenario.row} {scenario.name}":
                attempt(bench, scenario)
    failed = write_table(bench)
    sys.exit(1 if failed else 0)


def make_bench(work: Path) -> Bench:
    """Return the bench in a folder, with its data sets."""
    work.mkdir(parents=True, exist_ok=True)
    for name, images, per_shard in (("data", 96, 10), ("other", 95, 100)):
        if not (work / name / "manifest.json").exists():
            lmdb = write_demo(work / f"{name}_source", images=images, seed=images, workers=1)
            convert([LmdbSource(lmdb)], work / name, Settings(samples_per_shard=per_shard), workers=1)
    return Bench(work, work / "data", work / "other")


def attempt(bench: Bench, scenario: Scenario) -> None:
    """Run a scenario in a fresh folder."""
    folder = bench.work / "".join(letter if letter.isalnum() else "-" for letter in scenario.name)

    def check() -> str:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        found = scenario.check(bench, folder)
        shutil.rmtree(folder)
        return found

    note(bench, scenario.row, scenario.name, check)


def note(bench: Bench, row: str, name: str, check: Callable[[], str]) -> None:
    """Run a check that has not passed yet, and note what became of it."""
    if results(bench).get(name, {}).get("passed"):
        return
    started = time.time()
    try:
        passed, found = True, check()
    except Exception as error:  # whatever it is, the scenario has failed, and the others go on
        traceback.print_exc()
        passed, found = False, f"{type(error).__name__}: {str(error)[:200]}"
    result = {"row": row, "name": name, "passed": passed, "found": found, "seconds": round(time.time() - started, 1)}
    with (bench.work / "results.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(f"{'passed' if passed else 'FAILED':7} {result['seconds']:6} s  {name}: {found}", flush=True)


def results(bench: Bench) -> dict[str, dict[str, Any]]:
    """Return the last result of each scenario by its name."""
    return {result["name"]: result for result in read_rows(bench.work / "results.jsonl")}


def write_table(bench: Bench) -> int:
    """Write the table of README.md; return how many scenarios have failed."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results(bench).values():
        rows[result["row"]].append(result)
    lines = []
    for row, found in rows.items():
        passed = sum(result["passed"] for result in found)
        details = "; ".join(f"{result['name']}: {result['found']}" for result in found[:MOST_DETAILS])
        more = f"; and {len(found) - MOST_DETAILS} more" if len(found) > MOST_DETAILS else ""
        lines.append([row, f"{passed} of {len(found)}", details + more])
    content = table(["what happens", "passed", "what was found"], lines)
    README.write_text(put(README.read_text(), START, END, content))
    return sum(not result["passed"] for found in rows.values() for result in found)


MOST_DETAILS = 6
START, END = "<!-- table: written by `python -m tests.faults` -->\n", "<!-- end of table -->"


if __name__ == "__main__":
    main()
