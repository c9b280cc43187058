from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stego_core.metrics.confusion import confusion_matrix
from stego_core.metrics.matching import match_clusters
from stego_core.metrics.scores import score_clusters

# Small counts make ties, in which more than one matching is best.
confusions = st.tuples(st.integers(1, 4), st.integers(1, 5)).flatmap(
    lambda shape: arrays(np.int64, shape, elements=st.integers(0, 3))
)
label_maps = arrays(np.uint8, st.just((6,)), elements=st.sampled_from([0, 1, 2, 3, 255]))
cluster_maps = arrays(np.uint8, st.just((6,)), elements=st.integers(0, 3))


@settings(deadline=None)
@given(confusions, st.randoms(use_true_random=False), st.sampled_from(["hungarian", "many_to_one"]))
def test_numbering_clusters_otherwise_changes_no_score(confusion, random, matching):
    order = list(range(confusion.shape[1]))
    random.shuffle(order)
    before = score_clusters(confusion, matching=matching)
    after = score_clusters(confusion[:, order], matching=matching)
    assert after.iou == pytest.approx(before.iou, nan_ok=True)
    assert after.miou == pytest.approx(before.miou, nan_ok=True)
    assert after.accuracy == pytest.approx(before.accuracy, nan_ok=True)


@settings(deadline=None)
@given(confusions)
def test_no_other_one_to_one_matching_has_more_right_pixels(confusion):
    num_classes, num_clusters = confusion.shape
    matching = match_clusters(confusion, range(num_classes))
    assert len(matching) == len(set(matching.values())) == min(num_classes, num_clusters)
    right = sum(confusion[class_id, cluster] for cluster, class_id in matching.items())
    # Classes without a cluster take one of the empty columns.
    padded = np.hstack([confusion, np.zeros((num_classes, num_classes), dtype=np.int64)])
    best = max(
        sum(padded[row, column] for row, column in enumerate(columns))
        for columns in itertools.permutations(range(padded.shape[1]), num_classes)
    )
    assert right == best


@settings(deadline=None)
@given(confusions)
def test_many_to_one_is_never_less_accurate_than_one_to_one(confusion):
    one = score_clusters(confusion)
    many = score_clusters(confusion, matching="many_to_one")
    if confusion.sum():
        assert 0 <= one.accuracy <= many.accuracy <= 100
        assert 0 <= one.miou <= 100


@settings(deadline=None)
@given(confusions, st.integers(1, 5), st.data())
def test_pixels_in_an_extra_cluster_that_stays_unmatched_lower_accuracy(confusion, pixels, data):
    row = data.draw(st.integers(0, len(confusion) - 1))
    extra = np.zeros((len(confusion), 1), dtype=np.int64)
    extra[row] = pixels
    before, after = score_clusters(confusion), score_clusters(np.hstack([confusion, extra]))
    if confusion.shape[1] not in after.matching and before.accuracy > 0:
        assert after.accuracy < before.accuracy


@settings(deadline=None)
@given(st.lists(st.tuples(label_maps, cluster_maps), min_size=3, max_size=3))
def test_merging_confusions_is_associative_and_equals_counting_all_at_once(parts):
    def count(true, pred):
        return confusion_matrix(true, pred, num_classes=3, num_clusters=4)

    a, b, c = (count(true, pred) for true, pred in parts)
    together = count(*(np.concatenate(maps) for maps in zip(*parts, strict=True)))
    assert ((a + b) + c == a + (b + c)).all()
    assert (a + b + c == together).all()
    assert together.sum() == sum((true < 3).sum() for true, _ in parts)
