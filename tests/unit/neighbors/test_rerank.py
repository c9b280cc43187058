from __future__ import annotations

import numpy as np
import pytest

from stego_core.errors import ShapeError
from stego_core.neighbors.rerank import rerank_neighbors
from stego_core.neighbors.search import NONE


def test_candidates_come_in_the_order_of_the_new_cosines():
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(20, 5))
    candidates = np.stack([rng.permutation(20)[:6] for _ in range(20)])
    found = rerank_neighbors(candidates, embeddings, 3)
    for view in range(20):

        def cosine(other: int, view: int = view) -> float:
            lengths = np.linalg.norm(embeddings[[view, other]], axis=1)
            return float(embeddings[view] @ embeddings[other] / lengths.prod())

        assert found[view].tolist() == sorted(candidates[view], key=cosine, reverse=True)[:3]


def test_views_with_few_candidates_keep_them_all():
    embeddings = np.eye(3)
    candidates = np.array([[2, 1, NONE], [NONE, NONE, NONE], [0, NONE, NONE]])
    found = rerank_neighbors(candidates, embeddings, 4)
    # Equal cosines keep the order of the candidates.
    expected = [[2, 1, NONE, NONE], [NONE] * 4, [0, NONE, NONE, NONE]]
    assert found.tolist() == expected


def test_an_embedding_without_direction_is_alike_to_nothing():
    embeddings = np.array([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    found = rerank_neighbors(np.array([[2, 1], [0, 2], [0, 1]]), embeddings, 2)
    assert found.tolist() == [[1, 2], [0, 2], [1, 0]]


def test_rows_have_to_belong_together():
    with pytest.raises(ShapeError, match="3 rows of candidates, 2 of embeddings"):
        rerank_neighbors(np.zeros((3, 1), np.int64), np.eye(2), 1)
