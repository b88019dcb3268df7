"""Distances between two sets of features, float (N, D) each, by the library that the field compares with.

torch-fidelity computes them in the precision that it is given: float64 here. It belongs to the `eval` extra, whose
presence `load_extractor` has checked; so it is imported where it is used.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
_NEIGHBOURHOOD = 3
_ROWS = 2000  # of the matrix of distances at a time: 0.8 GB against 50,000 images


class KernelDistance(NamedTuple):
    """Squared maximum mean discrepancy: its mean over random subsets, and the standard deviation over them."""

    mean: float
    std: float
    subset_size: int


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Return the Frechet distance of the Gaussians with the moments of both sets (Heusel et al. 2017)."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(features.double().cpu()) for features in (fake, real)]
    distance: float = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    return distance


def kernel_distance(real: Tensor, fake: Tensor) -> KernelDistance:
    """Return the unbiased estimate with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018).

    Over 100 subsets of 1,000, or of half the smaller set where that is less, so that subsets differ.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(KID_SUBSET_SIZE, len(real) // 2, len(fake) // 2)
    found = kid_features_to_metric(
        fake.double().cpu(), real.double().cpu(), kid_subsets=KID_SUBSETS, kid_subset_size=size, verbose=False
    )
    mean, std = found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]
    return KernelDistance(mean, std, size)


def precision_recall(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """Return the share of fakes among the reals and of reals among the fakes (Kynkaanniemi et al. 2019).

    Among means: no farther from one of them than its own third neighbour.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    found = prc_features_to_metric(
        fake.double().cpu(),
        real.double().cpu(),
        prc_neighborhood=_NEIGHBOURHOOD,
        prc_batch_size=_ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    return found["precision"], found["recall"]
