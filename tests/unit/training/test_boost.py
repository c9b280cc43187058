"""The boosting stage in a fit: what it changes, and that it is nothing when off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import FakeFeatures, block_field, ring_neighbors, train_data, train_job

from stego_core.model.head import Head
from stego_core.training.boost import ViewMaps, boost_clusters
from stego_core.training.fit import fit
from stego_core.training.step import Trainable


def fitted(**clusters):
    maps, owner = block_field()
    job = train_job(head={"kind": "none", "smooth": 0.0}, clusters={"restarts": 6, **clusters})
    model = Trainable(job, channels=8, num_classes=0, shifts={}).eval()
    data = train_data(len(maps), features=FakeFeatures(maps), neighbors=ring_neighbors(len(maps)))
    tensors = fit(job, model, data)
    head = Head(8, job.head)
    head.load_state_dict({k[5:]: v for k, v in tensors.items() if k.startswith("head.")})
    with torch.no_grad():
        code = F.normalize(head(torch.from_numpy(maps).float()), dim=1)
    return tensors, code, owner


def test_planted_clusters_stay_found_and_nothing_else_of_the_model_changes():
    plain, boosted = fitted()[0], fitted(boost="primaps")
    tensors, code, owner = boosted
    found = torch.einsum("bkhw,nk->bnhw", code, tensors["clusters"]).argmax(1).numpy()
    table = np.zeros((3, 3), int)
    np.add.at(table, (found, owner), 1)
    assert table.max(1).sum() >= 0.97 * owner.size
    assert len({*table.argmax(1)}) == 3
    assert plain.keys() == tensors.keys()
    changed = [name for name in plain if not torch.equal(plain[name], tensors[name])]
    assert changed == ["clusters"]


@pytest.mark.parametrize(
    "clusters", [{"refit": "modularity"}, {"over": 2}, {"refit": "none"}, {"extra": 1}]
)
def test_every_refit_can_be_boosted(clusters):
    plain = fitted(**clusters)[0]
    tensors = fitted(boost="primaps", **clusters)[0]
    assert tensors["clusters"].shape == plain["clusters"].shape
    assert not torch.equal(tensors["clusters"], plain["clusters"])
    assert torch.equal(tensors.get("merge", torch.zeros(0)), plain.get("merge", torch.zeros(0)))
    torch.testing.assert_close(tensors["clusters"].norm(dim=1), torch.ones(len(plain["clusters"])))


def test_fitting_twice_gives_the_same_clusters():
    first, second = (fitted(boost="primaps")[0]["clusters"] for _ in range(2))
    assert torch.equal(first, second)


def test_at_most_512_views_are_read_each_once_in_order():
    features = torch.from_numpy(block_field(700)[0]).float()
    views: list[int] = []

    def read(block):
        views.extend(block.tolist())
        part = features[torch.from_numpy(block)]
        return ViewMaps(seen=part, codes=part)

    start = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    expected: list[np.ndarray] = []
    found = boost_clusters(read, start, num_views=700, seed=3, expect=expected.extend)
    assert len(views) == 512
    assert views == sorted(set(views)) == np.concatenate(expected).tolist()
    other = boost_clusters(read, start, num_views=700, seed=4, expect=expected.extend)
    assert not torch.equal(found, other)
