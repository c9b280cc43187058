from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from stego_core.model.kmeans import spherical_kmeans
from stego_core.model.merging import merge_centroids, strongest_products


def average_linkage(centroids, count):
    """Merge the two groups of the highest mean cosine until `count` are left."""
    unit = F.normalize(centroids.double(), dim=1)
    groups = [{number} for number in range(len(unit))]
    while len(groups) > count:
        first, second = max(
            itertools.combinations(groups, 2),
            key=lambda pair: (
                sum(float(unit[a] @ unit[b]) for a in pair[0] for b in pair[1])
                / (len(pair[0]) * len(pair[1]))
            ),
        )
        groups = [group for group in groups if group not in (first, second)] + [first | second]
    return {frozenset(group) for group in groups}


def groups_of(merge):
    return {
        frozenset((merge == group).nonzero()[:, 0].tolist()) for group in merge.unique().tolist()
    }


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_the_groups_are_those_of_average_linkage(count):
    centroids = torch.randn(9, 4, generator=torch.Generator().manual_seed(count))
    merge = merge_centroids(centroids, count)
    assert groups_of(merge) == average_linkage(centroids, count)
    assert merge.dtype == torch.int64
    # Numbered by first appearance.
    assert list(dict.fromkeys(merge.tolist())) == list(range(count))


def test_equal_centroids_still_make_the_wanted_number_of_groups():
    assert len(merge_centroids(torch.ones(6, 3), 4).unique()) == 4


def test_the_products_of_a_group_are_the_largest_of_its_members():
    merge = torch.tensor([0, 1, 0, 2, 1])
    products = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0)) - 5
    found = strongest_products(products, merge)
    for group in range(3):
        assert torch.equal(found[:, group], products[:, merge == group].amax(1))
    owner = merge[products.argmax(1)]
    assert torch.equal(found.argmax(1), owner)


def curved(*, num=1500, seed=0):
    """Two bands, each bent over a wide angle: no single direction stands for either."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.arange(2).repeat_interleave(num // 2)
    angle = torch.rand(num, generator=generator) * 2.4
    height = torch.where(owner == 0, 0.75, -0.75)
    points = torch.stack([angle.cos(), angle.sin(), height], 1)
    points[owner == 1, :2] = points[owner == 1, :2].flip(1) * torch.tensor([1.0, -1.0])
    return F.normalize(points + 0.03 * torch.randn(num, 3, generator=generator), dim=1), owner


def test_merged_clusters_find_bent_groups():
    points, owner = curved()
    fine = spherical_kmeans(points, 16, seed=0).centroids
    merge = merge_centroids(fine, 2)
    found = merge[(points @ fine.T).argmax(1)]
    agreement = (found == owner).float().mean().item()
    assert max(agreement, 1 - agreement) >= 0.95
