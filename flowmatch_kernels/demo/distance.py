"""The sliced Wasserstein distance between two sets of trajectories."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def sliced_wasserstein(first: Tensor, second: Tensor, projections: int = 1024, seed: int = 0) -> float:
    r"""The sliced 2-Wasserstein distance, estimated with fixed random projections.

    .. math::  SW_2(X, Y) = \Big( \frac{1}{K} \sum_{k=1}^{K} W_2^2(\theta_k^T X, \theta_k^T Y) \Big)^{1/2}

    with K directions theta_k drawn evenly from the unit sphere in D dimensions, where each sample is one
    point: all its entries in a row. In one dimension W_2 has a closed form, the root mean square
    difference of the two quantile functions; for sets of equal size that is the difference of the sorted
    projections. For unequal sizes both quantile functions, steps as they are, are read at the middles
    of as many equal intervals as the larger set has points.

    Nothing is scaled: the unit is that of the entries. A shift of every point by s reads |s| / sqrt(D)
    (its root mean square over the directions), so trajectories of (x, y) that all move by d km read
    d / sqrt(2) km.

    Args:
        first: [N, ...], floating point; its entries past the batch are flattened to D.
        second: [M, ...], the same D.
        projections: K.
        seed: Of the directions; the same seed gives the same directions for the same D.

    Returns:
        The distance, in the unit of the entries; 0 for equal sets (but for rounding, in another order).

    Raises:
        ValueError: a set is empty, or the two differ in D.

    Example:
        >>> import torch
        >>> from flowmatch_kernels.demo.distance import sliced_wasserstein
        >>> x = torch.zeros(5, 1)
        >>> sliced_wasserstein(x, x + 3)
        3.0

    Sources:
        Rabin, Peyre, Delon, Bernot, Wasserstein Barycenter and its Application to Texture Mixing, SSVM 2011.
        Bonneel, Rabin, Peyre, Pfister, Sliced and Radon Wasserstein Barycenters of Measures, JMIV 2015.
    """
    first, second = (points.detach().cpu().double().flatten(1) for points in (first, second))
    if 0 in (len(first), len(second)) or first.shape[1] != second.shape[1]:
        raise ValueError(f"wanted two sets of points with as many entries, got {[*first.shape]}, {[*second.shape]}")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(first.shape[1], projections, generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=0)
    points = max(len(first), len(second))
    difference = _quantiles(first @ directions, points) - _quantiles(second @ directions, points)
    return float(difference.square().mean().sqrt())


def _quantiles(values: Tensor, points: int) -> Tensor:
    """The quantile functions of the columns of [N, K] at (i + 1/2) / points: [points, K]."""
    ordered = torch.from_numpy(np.sort(values.numpy(), axis=0))  # in a tenth of the time of torch's sort, or less
    levels = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    return ordered[(levels * len(values)).long()]
