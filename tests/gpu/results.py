"""Writes what the items told: one JSON, one page of tables, one log and the pictures, named by the device."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shards.common.files import publish
from tests.benchmarks.tables import markdown
from tests.gpu.items import Machine, Outcome

Entry = dict[str, Any]
PICTURES = ("grid-paper.png", "grid-narrow.png", "kid.png")


class Results:
    """The files of one device in a folder; what another call has told of other items stays."""

    def __init__(self, out: Path, machine: Machine, names: Iterable[str]) -> None:
        """Begin, or go on with the device's files; `names` gives the order of all items."""
        self._machine, self._names = machine, list(names)
        slug = re.sub(r"[^a-z0-9]+", "-", machine.name.lower()).strip("-")
        self._path = out / slug
        out.mkdir(parents=True, exist_ok=True)
        before = self._file("results.json")
        self._entries: dict[str, Entry] = json.loads(before.read_text())["items"] if before.exists() else {}

    def add(self, outcome: Outcome) -> None:
        """Take an outcome and write all files anew."""
        entry = asdict(outcome)
        self._entries[entry.pop("name")] = entry
        self._entries = {name: self._entries[name] for name in self._names if name in self._entries}
        content = {"device": asdict(self._machine), "items": self._entries}
        publish(self._file("results.json"), (json.dumps(content, indent=1) + "\n").encode())
        publish(self._file("results.md"), self._page().encode())
        failures = [f"== {name}\n{entry['details']}" for name, entry in self._entries.items() if entry["details"]]
        publish(self._file("failures.log"), "\n".join(failures).encode())

    def keep_pictures(self, folder: Path) -> None:
        """Copy the pictures that the items have drawn."""
        for name in PICTURES:
            if (folder / name).exists():
                shutil.copyfile(folder / name, self._file(name))

    def _file(self, name: str) -> Path:
        return self._path.with_name(f"{self._path.name}-{name}")

    def _page(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self._machine.versions.items())
        parts = [
            f"# {self._machine.name}",
            f"{self._machine.gpus} GPUs, {self._machine.cores} CPU cores, {versions}.",
            markdown([_row(name, entry) for name, entry in self._entries.items()]),
        ]
        if speeds := self._speeds():
            parts += ["## Speed", markdown(speeds)]
        for name, entry in self._entries.items():
            if name.startswith("speed/profile/") and "longest" in entry["figures"]:
                uses = entry["figures"]["ms_and_kernels_by_use"]
                rows = [{"use": use, "ms": ms, "kernels": kernels} for use, (ms, kernels) in sorted(uses.items())]
                parts += [f"## Kernels by use: {name.rpartition('/')[2]}", markdown(rows)]
                longest = [{"kernel": kernel, "share": share} for kernel, share in entry["figures"]["longest"].items()]
                parts += [f"## Longest kernels: {name.rpartition('/')[2]}", markdown(longest)]
        return "\n\n".join(parts) + "\n"

    def _speeds(self) -> list[Mapping[str, object]]:
        """Return a row for each timed step: its speed, against the tuned loop, and its share of the best product."""
        timed = {name: entry["figures"] for name, entry in self._entries.items() if "step_ms" in entry["figures"]}
        best = self._entries.get("speed/products", {}).get("figures", {}).get("tflops")
        rows: list[Mapping[str, object]] = []
        for name, figures in timed.items():
            _, shape, variant = name.split("/")
            tuned = timed.get(f"speed/{shape}/tuned", {}).get("images_per_second")
            speed = figures["images_per_second"]
            rows.append(
                {
                    "step": f"{shape}: {variant}",
                    "images/s": speed,
                    "over tuned": speed / tuned if tuned else "",
                    "of the product": speed * figures["gflop_per_image"] / 1e3 / best if best else "",
                    "ms": figures["step_ms"],
                    "host ms": figures["host_ms"],
                    "GiB": figures.get("peak_gib", ""),
                }
            )
        return rows


def _row(name: str, entry: Entry) -> dict[str, object]:
    reason = entry["reason"].replace("|", "/")
    return {"item": name, "outcome": entry["status"], "seconds": float(entry["seconds"]), "": reason}
