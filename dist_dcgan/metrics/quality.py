"""Scores of generated images against a data set, under names that identify the extractor."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_dcgan.metrics.distances import CPU, all_cpus, frechet_distance, kernel_distance, precision_recall
from dist_dcgan.metrics.extractors import Extractor

Quality = dict[str, float]
MOST_COVERED = 50_000
"""Images of each kind that precision and recall are computed of: millions would take days."""


def quality(real: Tensor, fake: Tensor, extractor: Extractor, device: torch.device = CPU) -> Quality:
    """Return Frechet distance and kernel distance of two sets of features; NaN if a feature is not finite.

    They are computed on `device`; on the CPU with all CPUs available to this process.
    """
    frechet, mean, std, subset_size = float("nan"), float("nan"), float("nan"), 0
    if _finite(real, fake):
        with all_cpus():
            frechet = frechet_distance(real, fake, device)
            mean, std, subset_size = kernel_distance(real, fake, device)
    return {
        frechet_name(extractor, len(fake)): frechet,
        kid_name(extractor): mean,
        f"{kid_name(extractor)}_std": std,
        "subset_size": subset_size,
        "fakes": len(fake),
        "reals": len(real),
    }


def coverage(real: Tensor, fake: Tensor, most: int = MOST_COVERED) -> Quality:
    """Return precision and recall of at most `most` evenly spaced rows of each, and how many these are.

    They are computed on all CPUs available to this process; the cost grows with the square of the number.
    """
    real, fake = (features[:: -(-len(features) // most)] for features in (real, fake))
    precision, recall = float("nan"), float("nan")
    if _finite(real, fake):
        with all_cpus():
            precision, recall = precision_recall(real, fake)
    return {"precision": precision, "recall": recall, "manifold_fakes": len(fake), "manifold_reals": len(real)}


def _finite(*features: Tensor) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in features)


def kid_name(extractor: Extractor) -> str:
    """Return the name of the kernel distance."""
    return "kid" if extractor.is_fid_network else f"kid_{extractor.name}"


def frechet_name(extractor: Extractor, fakes: int) -> str:
    """Return the name of the Frechet distance: FID with the number of images, if the network is that of FID."""
    if not extractor.is_fid_network:
        return f"fd_{extractor.name}"
    return f"fid{fakes // 1000}k" if fakes % 1000 == 0 else f"fid{fakes}"
