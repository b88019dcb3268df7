"""Prints scores with all that is needed to compare them with others."""

from __future__ import annotations

import json
import math
from typing import Any

from dist_dcgan.metrics.extractors import Extractor
from dist_dcgan.metrics.quality import Quality
from shards.manifest import Manifest


def circumstances(
    run: str, description: dict[str, Any], data: str, manifest: Manifest, extractor: Extractor
) -> dict[str, str]:
    """Return the generator, data set and extractor of a score; `description` is the exported generator's JSON."""
    return {
        "generator": f"{run}, step {description['step']}",
        "generator_sha256": description["sha256"],
        "data": data,
        "data_digest": manifest.digest(),
        "extractor": extractor.name,
        "extractor_sha256": extractor.weights_sha256,
        "resize": extractor.resize,
    }


def show(scores: Quality, context: dict[str, str], as_json: bool) -> None:
    """Print scores and their context, as a table or as one line of JSON."""
    if as_json:
        finite = {name: value if math.isfinite(value) else None for name, value in scores.items()}
        print(json.dumps(finite | context))
        return
    for name, value in (scores | context).items():
        print(f"{name:32} {value:.6g}" if isinstance(value, float) else f"{name:32} {value}")
