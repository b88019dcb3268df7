"""A run in words: what it was trained on, how far it came, how good it is, what happened, and how to repeat it."""

from __future__ import annotations

import math
import shlex
import statistics
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from dist_dcgan.config import Config, preset_names, read_preset, to_values, to_yaml
from dist_dcgan.config import differences as config_differences
from dist_dcgan.run.directory import RunDirectory
from dist_dcgan.run.history import Alert, Log, Row, State, is_kid, read_log, reported_reading, state
from dist_dcgan.run.starts import Start, read_starts
from shards.common.command_line import build
from shards.common.errors import UserError
from shards.common.plain_yaml import read_yaml

NOT_RECORDED = "not recorded"
_MOST_COLUMNS = 50
"""Of the table of scores; training writes some ten."""
MOST_ALERTS = 200
"""That are told; each is also a mark on every curve."""


@dataclass(frozen=True)
class Run:
    """All that the files of a run say."""

    directory: RunDirectory
    name: str
    """Short, and different from those of others on the page."""
    config: Config
    log: Log
    starts: list[Start]
    state: State
    total_steps: int | None
    """Steps to train in all, if that is known."""

    @property
    def last(self) -> Row:
        """The last row of the log."""
        return self.log.rows[-1]

    @cached_property
    def scored(self) -> list[Row]:
        """The rows with a score."""
        return [row for row in self.log.rows if row.score is not None and math.isfinite(row.score)]

    @property
    def best(self) -> Row:
        """The row with the best score, of those by the extractor of the last one; there must be one."""
        return min(
            (row for row in self.scored if extractors(row) == extractors(self.scored[-1])),
            key=lambda row: row.score or 0.0,
        )


class Event(NamedTuple):
    """Something that happened in training."""

    images: int
    seconds: float
    kind: str
    text: str
    more: list[str]
    """What it means."""


class NothingYetError(UserError):
    """A run is in training that has not logged a step."""


def read_run(path: Path, name: str) -> Run:
    """Return a run; raises UserError if there is nothing to report, NothingYetError if it is yet to come."""
    directory = RunDirectory(path)
    with reported_reading(path):
        if not directory.config.is_file():
            raise UserError(
                f"no run in {path}: it holds no config.yaml; name the folder that --run-dir named in training"
            )
        config = build(Config, read_yaml(directory.config), where=str(directory.config))
        starts = read_starts(directory)
        total_steps = starts[-1].total_steps if starts else config.max_steps
        found = state(directory, total_steps)  # before the log: what is written after it only makes that newer
        log = read_log(directory)
    if not log.rows:
        kind = NothingYetError if found == "running" else UserError
        raise kind(f"the run in {path} has not logged a step yet: nothing to report")
    return Run(directory, name, config, log, starts, found, total_steps)


def head(run: Run) -> dict[str, str]:
    """Return the five lines that say what a run is."""
    preset, departures = departures_from_preset(run.config)
    start = run.starts[-1] if run.starts else None
    data = run.config.data.name
    if start is not None and start.data:
        samples, size = start.data.get("samples"), start.data.get("image_size")
        data += f": {samples:,} images of {size} pixels" if isinstance(samples, int) else ""
    devices = "" if start is None else devices_of(start)
    on = f", on {devices}" if devices else ""
    of_all = f" of {run.total_steps:,}" if run.total_steps else ""
    epochs = run.last.values.get("epoch")
    passes = "" if epochs is None else f", {epochs:.3g} passes over the data"
    return {
        "Data": data,
        "Recipe": f"preset {preset}, seed {run.config.seed}; " + (", ".join(departures) or "unchanged"),
        "Trained": f"{run.last.images:,} images: step {run.last.step:,}{of_all}{passes}; "
        f"{duration(run.last.seconds)}{on}",
        "Quality": quality_line(run),
        "State": state_line(run),
    }


def departures_from_preset(config: Config) -> tuple[str, list[str]]:
    """Return the nearest preset, and by `key: old -> new` what of it this run computes otherwise."""
    found: dict[str, list[str]] = {}
    widths: dict[str, int] = {}
    for name in sorted(preset_names(), key=lambda name: name != "paper"):  # the first of equally near ones
        preset = build(Config, read_preset(name), f"preset {name}")
        widths[name] = preset.width
        changed = [line for line in config_differences(preset, config) if not line.startswith("seed:")]
        lengths = [(field, getattr(preset, field), getattr(config, field)) for field in ("epochs", "max_steps")]
        found[name] = changed + [f"{field}: {old} -> {new}" for field, old, new in lengths if old != new]
    # Presets differ by their width first: half the width with a small batch is no large `debug`.
    nearest = min(found, key=lambda name: (widths[name] != config.width, len(found[name])))
    return nearest, found[nearest]


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings in which runs differ, with the value of each run."""
    values = [flat(to_values(run.config)) for run in runs]
    keys = sorted({key for each in values for key in each} - {"run_dir"})
    rows = {key: [str(each.get(key)) for each in values] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def quality_line(run: Run) -> str:
    """Return the best and the last score, and what they compare."""
    if not run.scored:
        return "no score was taken in training: `python -m dist_dcgan.evaluate` takes one"
    best, last = run.best, run.scored[-1]
    text = f"1000 KID {thousand(last)} after {last.images:,} images"
    if best is not last:
        text += f"; best {thousand(best)} after {best.images:,}"
    counts = " against ".join(
        f"{last.values[name]:,.0f} {word}" for name, word in _COUNTS.items() if name in last.values
    )
    return f"{text} ({', '.join([counts] * bool(counts) + extractors(last))})"


_COUNTS = {"quality/fakes": "generated", "quality/reals": "real images"}


def extractors(row: Row) -> list[str]:
    """Return the feature networks by which a row is scored."""
    names = [name.removeprefix("quality/kid").removeprefix("_") for name in row.values if is_kid(name)]
    return [f"by {name or 'inception'}" for name in names]  # only that of the FID network bears no name


def thousand(row: Row) -> str:
    """Return a score with its deviation over subsets, times 1000."""
    score = 1000 * (row.score or 0.0)
    deviation = next((value for name, value in row.values.items() if name.endswith("_std") and "kid" in name), None)
    return f"{score:.0f}" + ("" if deviation is None else f" ± {1000 * deviation:.0f}")


def state_line(run: Run) -> str:
    """Return how the run stands."""
    words = {
        "running": f"running, at step {run.last.step:,}",
        "finished": "finished",
        "stopped": f"stopped by a signal after step {run.last.step:,}",
        "died": f"ended without a word after step {run.last.step:,}",
        "unknown": f"running, or ended without a word, at step {run.last.step:,}: its lock is another user's",
    }
    return words[run.state]


def going_on(run: Run) -> str | None:
    """Return the command that goes on with a run that has not come to its end; None if there is nothing to do.

    It is made here: the recorded one may be of somebody who wants others to paste it.
    """
    if run.state in ("running", "finished", "unknown"):
        return None
    return command(run, run.directory.path)


def repeating(run: Run) -> list[str]:
    """Return the commands that repeat a run from its beginning."""
    path = run.directory.path
    path = path if path.name not in ("", "..") else path.resolve()  # `.` has no name
    new = path.with_name(f"{path.name}-again")
    lines = [f"python -m shards verify {shlex.quote(run.config.data.name)}"] if _is_folder(run) else []
    return [*lines, command(run, new)]


def command(run: Run, run_dir: Path) -> str:
    """Return the command that trains with the configuration of a run in a folder."""
    ranks, nodes = (run.starts[-1].ranks, len(run.starts[-1].hosts)) if run.starts else (1, 1)
    start = "python -m dist_dcgan.train --world-size 1"
    if ranks > 1:
        start = f"torchrun --nproc_per_node={ranks} -m dist_dcgan.train"
    if nodes > 1:  # on each of them
        start = f"NODES={nodes} HEAD=HOST:PORT RANKS={ranks // nodes} bash launch/torchrun.sh"
    return f"{start} --config {shlex.quote(str(run.directory.config))} --run-dir {shlex.quote(str(run_dir))}"


def _is_folder(run: Run) -> bool:
    return isinstance(run.config.data.path, Path)


def events(run: Run) -> list[Event]:
    """Return restarts and alerts, in their order."""
    found = [_restart(run, start) for start in run.starts if start.last or start.step]
    alerts = run.log.alerts
    found += [_alert(run, alert) for alert in alerts[:MOST_ALERTS]]
    if len(alerts) > MOST_ALERTS:
        place = _place(_row_at(run.log.rows, alerts[MOST_ALERTS].step))
        found.append(Event(*place, "alert", f"{len(alerts) - MOST_ALERTS:,} more alerts from here on", []))
    return sorted(found)


def _restart(run: Run, start: Start) -> Event:
    at = _row_at(run.log.rows, start.step)
    where = f"{start.ranks} rank{'s' * (start.ranks != 1)} on {len(start.hosts)} machine{'s' * (len(start.hosts) != 1)}"
    text = f"started again from step {start.step:,}, with {where}"
    return Event(*_place(at), "restart", text, [f"the start before it {start.last}"] if start.last else [])


def _alert(run: Run, alert: Alert) -> Event:
    first, *more = alert.text.splitlines() or [""]
    return Event(*_place(_row_at(run.log.rows, alert.step)), "alert", first, [line.strip() for line in more][:10])


def _row_at(rows: Sequence[Row], step: int) -> Row | None:
    position = bisect_right(rows, step, key=lambda row: row.step)
    return rows[position - 1] if position else None


def _place(row: Row | None) -> tuple[int, float]:
    return (0, 0.0) if row is None else (row.images, row.seconds)


def score_table(run: Run) -> list[dict[str, str]]:
    """Return a row per score: images, step, and all numbers of it, the same columns in each row."""
    names = sorted({name for row in run.scored for name in row.values if name.startswith("quality/")})[:_MOST_COLUMNS]
    return [
        {"images": f"{row.images:,}", "step": f"{row.step:,}"}
        | {name.removeprefix("quality/"): _number(row.values.get(name, math.nan)) for name in names}
        for row in run.scored
    ]


def scorer(run: Run) -> dict[str, str]:
    """Return what is needed to compare the scores with others."""
    recorded = run.starts[-1].scores if run.starts else {}
    data = str(run.starts[-1].data.get("digest", NOT_RECORDED)) if run.starts else NOT_RECORDED
    names = {"extractor": "feature network", "sha256": "SHA-256 of its weights", "resize": "images are resized"}
    return {words: recorded.get(key, NOT_RECORDED) for key, words in names.items()} | {"digest of the data": data}


def start_facts(start: Start) -> dict[str, str]:
    """Return what was recorded of a start."""
    return {
        "time": start.time,
        "from step": f"{start.step:,}" + (f"; the start before it {start.last}" if start.last else ""),
        "command": start.command,
        "machines": ", ".join(f"{host} ({ranks} ranks)" for host, ranks in start.hosts.items()),
        "devices": devices_of(start),
        "precision": start.precision,
        "versions": ", ".join(f"{name} {version}" for name, version in start.versions.items()),
        "commit": start.commit or "not known",
    }


def devices_of(start: Start) -> str:
    """Return the devices of a start in words."""
    return ", ".join(f"{count} x {device}" for device, count in start.devices.items())


def summary(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Return a row per run; if only their seeds differ, also mean and deviation of their last scores."""
    rows = [
        {
            "run": run.name,
            "state": run.state,
            "images": f"{run.last.images:,}",
            "time": duration(run.last.seconds),
            "images/s": _number(run.last.values.get("throughput/images_per_second", math.nan)),
            "1000 KID, last": thousand(run.scored[-1]) if run.scored else "-",
            "1000 KID, best": thousand(run.best) if run.scored else "-",
        }
        for run in runs
    ]
    last = [run.scored[-1] for run in runs if run.scored]
    comparable = len(last) > 1 and len({(row.images, *extractors(row)) for row in last}) == 1
    different = differences(runs)
    if comparable and different.keys() == {"seed"} and len(set(different["seed"])) == len(runs):
        found = [1000 * (row.score or 0.0) for row in last]
        mean = f"{statistics.mean(found):.0f} ± {statistics.stdev(found):.0f} (of {len(found)} seeds)"
        rows.append(dict.fromkeys(rows[0], "") | {"run": "mean and standard deviation", "1000 KID, last": mean})
    return rows


def configuration(run: Run) -> str:
    """Return the whole configuration as YAML."""
    return to_yaml(run.config)


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return short names of folders that differ: their last parts, as many as it takes."""
    parts = [path.absolute().parts for path in paths]
    real = [path.resolve() for path in paths]  # a link and the folder that it leads to are one run
    double = next((path for place, path in enumerate(paths) if real[place] in real[:place]), None)
    if double is not None:
        raise UserError(f"{double} is named twice: name each run once")
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError(f"{paths}: different folders have different paths")


def duration(seconds: float) -> str:
    """Return a time in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _number(value: float) -> str:
    return "-" if not math.isfinite(value) else f"{value:,.0f}" if value == int(value) else f"{value:.4g}"
