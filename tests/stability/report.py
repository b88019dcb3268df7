"""Writes the tables of README.md and its plots from the results: python -m tests.stability report."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot

from dist_dcgan.config import Config
from tests.benchmarks import tables
from tests.benchmarks.figures import figure
from tests.stability import long
from tests.stability.evidence import TURNS
from tests.stability.jump import BATCH
from tests.stability.recipes import DOUBLED, FACTORS, FASTER, HIDING, JPEGS, PHASES, SCORED_IMAGES, WIDTHS, Trial
from tests.stability.results import FOLDER, SUMMED_UP, Result, read
from tests.support.rows import read_rows

README = Path(__file__).parent / "README.md"
PLOTS = Path(__file__).parent / "plots"
TRIAL_PHASES = [phase for phase in PHASES if phase not in SUMMED_UP]
LAST = 50
"""Steps at the end of a trial that medians are taken over."""


def main() -> None:
    """Write the tables and those plots that the page shows."""
    PLOTS.mkdir(exist_ok=True)
    plots: dict[str, Callable[[Path], None]] = {
        "jump.png": plot_jumps,
        "evidence.png": plot_evidence,
        "long_kid.png": partial(plot_curves, long_runs(), "images"),
        "widths_kid.png": partial(plot_curves, width_runs(), "images"),
        "updates_kid.png": partial(plot_curves, update_runs(), "updates"),
    }
    for phase in TRIAL_PHASES:
        plots[f"{phase}_kid.png"] = partial(plot_kid, read(phase))
        plots[f"{phase}_logits.png"] = partial(plot_verdicts, read(phase))
    text = README.read_text()
    for name, plot in plots.items():
        if f"({PLOTS.name}/{name})" in text:
            plot(PLOTS / name)
    README.write_text(with_tables(text))


def with_tables(text: str) -> str:
    """Return the page with the tables that belong to the results."""
    contents = {phase: trial_table(read(phase)) for phase in TRIAL_PHASES}
    contents |= {phase: factor_table(phase) for phase in ("factors", "quickstart")}
    contents |= {"long": curve_table(long_runs(), 100_000), "widths": curve_table(width_runs(), SCORED_IMAGES)}
    contents |= {"updates": curve_table(update_runs(), SCORED_IMAGES // FACTORS[FASTER].batch)}
    contents |= {
        "jump": jump_table(),
        "clue": clue_table(),
        "stored": stored_table(),
        "mended": mended_table(),
        "evidence": evidence_table(),
    }
    for name, content in contents.items():
        text = tables.put(text, f"<!-- {name} -->\n", f"<!-- end of {name} -->", content)
    return text


def trial_table(results: Sequence[Result]) -> str:
    """Return a row per trial, nothing where there is none."""
    if not results:
        return ""
    head = ["recipe", "data", "seed", "batch", "watchdog", "1000 KID at steps", "jump", "G's gradient", "diversity"]
    rows = []
    for result in results:
        trial = result.trial
        named = "; ".join(f"**{c.rule.mode}** since {c.since}" for c in result.collapses()) or "-"
        kid = ", ".join(f"{step}: {1000 * value:.0f}" for step, value in result.points("kid"))
        medians = (
            f"{median(result, lambda row: abs(row['logit/fake_updated'] - row['logit/fake'])):.1f}",
            f"{median(result, lambda row: row['grad_norm/g']):.2g}",
            f"{median(result, lambda row: row['diversity/fake'] / row['diversity/real']):.2f}",
        )
        rows.append([trial.recipe, trial.data, str(trial.seed), str(trial.batch), named, kid, *medians])
    return tables.table(head, rows)


def factor_table(phase: str) -> str:
    """Return a row per factor and data set: what was expected, and 1000 KID by images at each width."""
    found: dict[tuple[str, str, int], dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in read_rows(FOLDER / f"{phase}.jsonl"):
        trial = line["trial"]
        name, _, width = trial["recipe"].rpartition(" at ")
        found[trial["data"], name, trial["seed"]][int(width)] = line
    if not found:
        return ""
    widths = sorted({width for lines in found.values() for width in lines}, reverse=True)
    rows = []
    for (data, name, seed), lines in found.items():
        named = "; ".join(f"{width}: {word}" for width, line in lines.items() for word in line["named"]) or "-"
        cells = [_scores(lines[width]) if width in lines else "" for width in widths]
        rows.append([name, FACTORS[name].expected, data, str(seed), *cells, named])
    return tables.table(
        ["factor", "expected", "data", "seed", *(f"width {width}" for width in widths), "watchdog"], rows
    )


def _scores(line: dict[str, Any]) -> str:
    return ", ".join(f"{1000 * kid:.0f}" for images, kid in line["kid"] if images)


def median(result: Result, value: Callable[[dict[str, float]], float]) -> float:
    """Return the median of a number over the last steps."""
    return statistics.median(value(row) for row in list(result.rows())[-LAST:])


def plot_kid(results: Sequence[Result], path: Path) -> None:
    """Plot KID over steps, a line per trial, a panel per data set."""
    sets = sorted({result.trial.data for result in results})
    recipes = list(dict.fromkeys(result.trial.recipe for result in results))
    with figure(path, 1, len(sets), figsize=(11, 6)) as panels:
        for panel, data in zip(panels, sets, strict=True):
            for result in (result for result in results if result.trial.data == data):
                index = recipes.index(result.trial.recipe)
                label = result.trial.recipe if result.trial.seed == 0 else None
                color, line = pyplot.get_cmap("tab10")(index % 10), "-o" if index < 10 else "--o"
                panel.plot(*zip(*result.points("kid"), strict=True), line, ms=3, lw=1, color=color, label=label)
            panel.set(title=data, xlabel="step", ylabel="KID (EfficientNet-Lite0)")
        handles, labels = panels[0].get_legend_handles_labels()
        pyplot.gcf().legend(handles, labels, fontsize=7, loc="outside right upper")


def plot_verdicts(results: Sequence[Result], path: Path) -> None:
    """Plot D's mean logits of real and generated images, a panel per recipe (its first seed)."""
    shown = [result for result in results if result.trial.seed == 0]
    lines = -(-len(shown) // 4)
    with figure(path, lines, 4, sharey=True, figsize=(12, 1.9 * lines)) as panels:
        for panel in panels[len(shown) :]:
            panel.axis("off")
        for panel, result in zip(panels, shown, strict=False):
            for key in ("logit/real", "logit/fake", "logit/fake_updated"):
                panel.plot(*zip(*result.points(key), strict=True), lw=0.7, label=key)
            panel.set_title(f"{result.trial.recipe} ({result.trial.data}, {result.trial.batch})", fontsize=8)
        panels[0].legend(fontsize=6)


def jumps() -> dict[str, dict[int, float]]:
    """Return medians over seeds of `jump.jsonl`, by what was changed and by width."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(FOLDER / "jump.jsonl"):
        name = f"rate {row['rate']:.0e}"
        name += f", batch {row['batch']}" if row["batch"] != BATCH else ""
        name += ", by fan-in" if row["by_fan_in"] else ", last layer fixed" if row["last_layer_fixed"] else ""
        found[name][row["width"]].append(row["jump"])
    return {
        name: {width: statistics.median(values) for width, values in sorted(found[name].items())}
        for name in sorted(found)
    }


def jump_table() -> str:
    """Return a row per change, a column per width."""
    medians = jumps()
    widths = list(next(iter(medians.values())))
    rows = (
        [name, *(f"{values[width]:.2g}" if width in values else "" for width in widths)]
        for name, values in medians.items()
    )
    return tables.table(["first update of D", *(f"width {width}" for width in widths)], rows)


def plot_jumps(path: Path) -> None:
    """Plot the same."""
    with figure(path, figsize=(6, 4)) as (panel,):
        for name, values in jumps().items():
            panel.loglog(list(values), list(values.values()), "-o", ms=3, label=name)
            panel.set(xlabel="width", ylabel="change of D's logit", xticks=DOUBLED, xticklabels=DOUBLED)
        panel.legend(fontsize=7)


def clue_table() -> str:
    """Return D's mean logit by what was changed in the images and by trial."""
    rows = [row for row in read_rows(FOLDER / "clue.jsonl") if "change" in row]
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        trial = f"width {row['width']}, {row['steps']:,} updates: real, generated"
        cells[row["change"]][trial] = f"{row['real']:.1f}, {row['fake']:.1f}"
    head = ["change", *next(iter(cells.values()))]
    return tables.table(head, [[change, *of_trials.values()] for change, of_trials in cells.items()])


def mended_table() -> str:
    """Return what became of a training that faded."""
    rows = [row for row in read_rows(FOLDER / "clue.jsonl") if "then" in row]
    cells = [[row["then"], f"{row['grad_norm/g']:.0f}", f"{row['diversity/fake']:.2f}"] for row in rows]
    return tables.table(["from there on", "G's gradient", "diversity"], cells)


def stored_table() -> str:
    """Return G's gradient and diversity at the end of a recipe, by its data and by what is hidden from D."""
    stores = ("photos32", *JPEGS, "cifar")
    rows: list[list[str]] = []
    for line in read_rows(FOLDER / "widths.jsonl"):
        trial, medians = Trial(**line["trial"]), line["medians"]
        name, _, width = trial.recipe.rpartition(" at ")
        if name in (FASTER, *HIDING) and int(width) in WIDTHS and trial.data in stores and trial.seed == 0:
            relative = medians["diversity/fake"] / medians["diversity/real"]
            updates = line["kid"][-1][0] // trial.batch
            named = "; ".join(f"**{mode}**" for mode in line["named"]) or "-"
            cells = [f"{updates:,}", f"{medians['grad_norm/g']:.0f}", f"{relative:.2f}", named, _scores(line)]
            rows.append([trial.data, width, name.removeprefix(FASTER).removeprefix(", ") or "-", *cells])
    rows.sort(key=lambda row: (-int(row[1]), stores.index(row[0]), row[2]))
    head = ["data", "width", "hidden from D", "updates", "G's gradient", "diversity", "watchdog", "1000 KID"]
    return tables.table(head, rows)


def evidence() -> dict[str, list[dict[str, float]]]:
    """Return the rows of `evidence.jsonl` by what was trained."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for row in read_rows(FOLDER / "evidence.jsonl"):
        found[row.pop("name")].append(row)
    return found


def evidence_table() -> str:
    """Return a row per contender: what it had learned in equal time, and from equal images (read off its line)."""
    contenders = evidence()
    if not contenders:
        return ""
    minutes = max(rows[-1]["seconds"] for rows in contenders.values()) / 60
    whole = [rows for rows in contenders.values() if rows[-1]["seconds"] >= 60 * min(minutes, max(TURNS))]
    images = min(rows[-1]["images"] for rows in whole)
    times, counts = (minutes / 4, minutes / 2, minutes), (images / 4, images / 2, images)
    heads = [f"{time:.0f} minutes" for time in times] + [f"{count:,.0f} images" for count in counts]
    lines = []
    for name, rows in contenders.items():
        found = [at(rows, "seconds", 60 * time) for time in times] + [at(rows, "images", count) for count in counts]
        cells = [f"{1000 * kid:.0f}" if kid is not None else "" for kid in found]
        lines.append([name, *cells, f"{rows[-1]['images']:,}"])
    return tables.table(["1000 KID after", *heads, "images in all"], lines)


def at(rows: Sequence[dict[str, float]], key: str, value: float) -> float | None:
    """Return KID where `key` reached `value`, on the line between the scores around it; None behind the last one."""
    if rows[-1][key] < 0.99 * value:
        return None
    return float(np.interp(value, [row[key] for row in rows], [row["kid"] for row in rows]))


def plot_evidence(path: Path) -> None:
    """Plot KID over images and over minutes of training."""
    with figure(path, 1, 2, figsize=(11, 4), sharey=True) as panels:
        for name, rows in evidence().items():
            kid = [row["kid"] for row in rows]
            panels[0].plot([row["images"] for row in rows], kid, "-o", ms=3, label=name)
            panels[1].plot([row["seconds"] / 60 for row in rows], kid, "-o", ms=3, label=name)
        panels[0].set(xlabel="images", ylabel="KID (EfficientNet-Lite0)")
        panels[1].set(xlabel="minutes of training")
        panels[0].legend(fontsize=8)


Curves = dict[str, dict[str, list[dict[int, float]]]]
"""1000 KID by images or updates of each run, by the data and by what was trained; neighbours are compared."""


def long_runs() -> Curves:
    """Return the runs of each preset."""
    found: Curves = {}
    for row in read_rows(FOLDER / "long.jsonl"):
        data = f"{row['data']}, batch {row['batch']}, {row['precision']}"
        data += f", rates {row['rate']:.0e}" if row["rate"] != Config().optimizer.lr_g else ""
        presets = found.setdefault(data, {f"`{preset}`": [] for preset in long.PRESETS})
        presets[f"`{row['preset']}`"].append({round(images, -4): 1000 * value for images, value in row["kid"]})
    return with_runs(found)


def width_runs() -> Curves:
    """Return the runs of each width, the widest first."""
    found: Curves = {}
    for trial, name, width, kid in _width_trials():
        widths = found.setdefault(f"{trial.data}, {name}", {f"width {width}": [] for width in reversed(DOUBLED)})
        widths[f"width {width}"].append({images: 1000 * value for images, value in kid})
    return with_runs(found)


def update_runs() -> Curves:
    """Return those that hide nothing from D by the number of updates, where there are several of a width."""
    found: Curves = {}
    for trial, name, width, kid in _width_trials():
        if name in HIDING:
            continue
        recipes = found.setdefault(f"{trial.data}, width {width}", {})
        recipes.setdefault(name, []).append({images // trial.batch: 1000 * value for images, value in kid})
    return {data: recipes for data, recipes in found.items() if len(recipes) > 1}


def _width_trials() -> Iterator[tuple[Trial, str, int, list[tuple[int, float]]]]:
    """Yield the trials of the phase `widths`, each with its factor, its width and KID by images."""
    for line in read_rows(FOLDER / "widths.jsonl"):
        trial = Trial(**line["trial"])
        name, _, width = trial.recipe.rpartition(" at ")
        yield trial, name, int(width), line["kid"]


def with_runs(found: Curves) -> Curves:
    """Return what has been trained at all."""
    return {data: {kind: runs for kind, runs in kinds.items() if runs} for data, kinds in found.items()}


def curve_table(found: Curves, every: int) -> str:
    """Return 1000 KID at multiples of `every`: means and standard deviations over seeds, differences of neighbours."""
    runs = [run for kinds in found.values() for runs in kinds.values() for run in runs]
    columns = sorted({number for run in runs for number in run if number and number % every == 0})
    rows = []
    for data, kinds in found.items():
        values = {kind: [[run[n] for run in runs if n in run] for n in columns] for kind, runs in kinds.items()}
        for kind, by_number in values.items():
            rows.append([f"{data}, {kind}", str(len(kinds[kind])), *map(_mean_and_deviation, by_number)])
        for first, second in pairwise(values):
            pairs = zip(values[first], values[second], strict=True)
            differences = [_difference(a, b) if a and b else "" for a, b in pairs]
            rows.append([f"{data}, {first} less {second}", "", *differences])
    return tables.table(["run", "seeds", *(f"{number / 1000:.3g}k" for number in columns)], rows) if rows else ""


def _mean_and_deviation(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.0f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.0f}{deviation}" if values else ""


def _difference(a: Sequence[float], b: Sequence[float]) -> str:
    middle = f"{statistics.mean(a) - statistics.mean(b):+.0f}"
    if min(len(a), len(b)) < 2:
        return middle
    low, high = long.welch(a, b)
    return f"{middle} ({low:+.0f} to {high:+.0f})"


def plot_curves(found: Curves, unit: str, path: Path) -> None:
    """Plot KID against thousands of a unit, a line per run."""
    names = dict.fromkeys(kind for kinds in found.values() for kind in kinds)
    colours = {kind: f"C{index}" for index, kind in enumerate(names)}
    columns = min(4, len(found))
    lines = -(-len(found) // columns)
    with figure(path, lines, columns, sharey=True, figsize=(5 * columns, 4 * lines)) as panels:
        for panel in panels[len(found) :]:
            panel.axis("off")
        for panel, (data, kinds) in zip(panels, found.items(), strict=False):
            for kind, runs in kinds.items():
                for seed, run in enumerate(runs):
                    points = [(number / 1000, kid) for number, kid in run.items() if number]
                    label = kind.strip("`") if seed == 0 else None
                    panel.plot(*zip(*points, strict=True), ".-", color=colours[kind], label=label)
            panel.set(title=data, xlabel=f"thousand {unit}")
            panel.legend()
        panels[0].set_ylabel("1000 KID")


def show_grids(grids: Mapping[str, Path], path: Path) -> None:
    """Put grids of generated images side by side, each under its name."""
    columns = min(4, len(grids))
    lines = -(-len(grids) // columns)
    path.parent.mkdir(exist_ok=True)
    with figure(path, lines, columns, dpi=130, figsize=(3 * columns, 3.2 * lines)) as panels:
        for panel in panels:
            panel.axis("off")
        for panel, (name, grid) in zip(panels, grids.items(), strict=False):
            panel.imshow(pyplot.imread(grid))
            panel.set_title(name, fontsize=8)
