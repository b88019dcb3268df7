"""Distances between two sets of features, float (N, D) each, in float64, equal to those of torch-fidelity.

That library computes the Frechet and the kernel distance with numpy on the CPU, with the number of threads at the start
of the process (one under torchrun). So both are written in torch here, to run on a GPU or on all CPUs (`all_cpus`).
Precision and recall are the library's; it belongs to the `eval` extra, which `load_extractor` has checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shards.common.workers import available_cores

CPU = torch.device("cpu")
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
_KID_SEED = 2020  # torch-fidelity's, so that the subsets are the same
_NEIGHBOURHOOD = 3
_ROWS = 2000  # of features at a time: a matrix of distances takes 0.8 GB against 50,000 images


class KernelDistance(NamedTuple):
    """Squared maximum mean discrepancy: mean and standard deviation over random subsets."""

    mean: float
    std: float
    subset_size: int


@contextmanager
def all_cpus() -> Iterator[None]:
    """Use one thread for each CPU available to this process, and restore the number of threads at the end.

    Under torchrun a rank has one thread, but ranks that wait for this one leave their CPUs idle.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, available_cores()))
    try:
        yield
    finally:
        torch.set_num_threads(before)  # another number would change the order of training's sums


def frechet_distance(real: Tensor, fake: Tensor, device: torch.device = CPU) -> float:
    """Return the Frechet distance of the Gaussians with the moments of both sets (Heusel et al. 2017).

    With covariances A A^T and B B^T, the trace of the root of their product is the sum of the singular values of A^T B.
    The eigenvalues of C1^(1/2) C2 C1^(1/2) are their squares; with fewer samples than dimensions, the roots of
    eigenvalues that should be 0 would cost seven digits.
    """
    (mean_1, a), (mean_2, b) = (_moments(features, device) for features in (fake, real))
    traces = a.square().sum() + b.square().sum()
    return float((mean_1 - mean_2).square().sum() + traces - 2 * torch.linalg.svdvals(a.T @ b).sum())


def _moments(features: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and a factor A (D, min(N, D)) of the covariance A A^T, in float64.

    Computed from some rows at a time: millions may not fit into the device's memory.
    """
    count, dimensions = features.shape
    mean = torch.stack([rows.to(device).double().sum(0) for rows in features.split(_ROWS)]).sum(0) / count
    centred = (rows.to(device).double() - mean for rows in features.split(_ROWS))
    if count <= dimensions:
        return mean, torch.cat(list(centred)).T / (count - 1) ** 0.5
    covariance = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)
    for rows in centred:
        covariance.addmm_(rows.T, rows, alpha=1 / (count - 1))
    values, vectors = torch.linalg.eigh(covariance)
    return mean, vectors * values.clamp(min=0).sqrt()  # negative values are rounding errors


def kernel_distance(real: Tensor, fake: Tensor, device: torch.device = CPU) -> KernelDistance:
    """Return the unbiased estimate with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018).

    Over 100 subsets of 1,000, or of half the smaller set if that is less, so that subsets differ.
    """
    size = min(KID_SUBSET_SIZE, len(real) // 2, len(fake) // 2)
    random = np.random.RandomState(_KID_SEED)

    def subset(features: Tensor) -> Tensor:
        return features[torch.from_numpy(random.choice(len(features), size, replace=False))].to(device).double()

    estimates = torch.stack([_squared_discrepancy(subset(fake), subset(real)) for _ in range(KID_SUBSETS)])
    return KernelDistance(float(estimates.mean()), float(estimates.std(correction=0)), size)


def _squared_discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """Return the unbiased estimate of the squared maximum mean discrepancy of two sets (N, D), a scalar."""
    kernels = [_kernel(points, points) for points in (x, y)]
    within = torch.stack([kernel.sum() - kernel.trace() for kernel in kernels]).sum() / (len(x) * (len(x) - 1))
    return within - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1).pow(3)


def precision_recall(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """Return precision (share of fakes in the reals' manifold) and recall (the converse) (Kynkaanniemi et al. 2019).

    A manifold is the union of spheres around the samples; the radius is the distance to the third nearest neighbour.
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
