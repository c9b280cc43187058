"""Over-clustering: many small clusters, merged into the wanted number of groups.

A group keeps all its centroids: a thing that looks in two ways has no single direction.

Letters in names: M centroids, D dimensions, N groups, B images, h w grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def merge_centroids(centroids_MD: Tensor, count: int) -> Tensor:
    """Merge centroids by average linkage of their cosines.

    Args:
        centroids_MD: directions, (M, D).
        count: N, groups to make, from 1 to M.

    Returns:
        The group of each centroid, (M,) int64 in [0, N), numbered by first appearance.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage

    if count >= len(centroids_MD):
        return torch.arange(len(centroids_MD))
    unit = F.normalize(centroids_MD.double(), dim=1).cpu()
    rows, columns = torch.triu_indices(len(unit), len(unit), 1)
    distances = (1 - (unit[rows] * unit[columns]).sum(1)).clamp(min=0)
    groups = cut_tree(linkage(distances.numpy(), "average"), n_clusters=count)[:, 0]
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(int(group), len(numbers)) for group in groups])


def strongest_products(products_BMhw: Tensor, merge_M: Tensor) -> Tensor:
    """Return the largest product of each group, (B, N, h, w).

    Args:
        products_BMhw: inner products of codes with centroids.
        merge_M: the group of each centroid, see `merge_centroids`.
    """
    count = int(merge_M.max()) + 1
    index = merge_M.view(1, -1, 1, 1).expand_as(products_BMhw)
    batch, _, h, w = products_BMhw.shape
    lowest = products_BMhw.new_full((batch, count, h, w), -torch.inf)
    return lowest.scatter_reduce(1, index, products_BMhw, "amax")
