"""Exported generators as others, and older versions, write them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save


def embed(path: Path, description: str) -> None:
    """Replace the description in the header of an export."""
    path.write_bytes(save(load_file(path), {"dist_dcgan": description}))


def describe(path: Path, **changes: Any) -> None:
    """Change the description in the header of an export."""
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["dist_dcgan"])
    embed(path, json.dumps(description | changes))


def as_older_version(path: Path) -> None:
    """Write an export as before its description was in the header: two files with one checksum."""
    weights = save(load_file(path))
    path.write_bytes(weights)
    description = json.loads(path.with_suffix(".json").read_bytes())
    description["sha256"] = hashlib.sha256(weights).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(description))
