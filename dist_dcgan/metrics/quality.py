"""Scores of generated images against a data set, under names that identify the extractor."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_dcgan.metrics.distances import CPU, all_cpus, frechet_distance, kernel_distance, precision_recall
from dist_dcgan.metrics.extractors import Extractor

Quality = dict[str, float]


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


def coverage(real: Tensor, fake: Tensor) -> Quality:
    """Return precision and recall; the cost grows with the square of the number of images."""
    precision, recall = precision_recall(real, fake) if _finite(real, fake) else (float("nan"), float("nan"))
    return {"precision": precision, "recall": recall}


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
