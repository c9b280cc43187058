from __future__ import annotations

import math

import numpy as np
import pytest
from reference import stego_reference as reference

from stego_core.errors import ShapeError
from stego_core.metrics.confusion import confusion_matrix
from stego_core.metrics.matching import many_to_one, match_clusters
from stego_core.metrics.scores import score_classes, score_clusters

# Printed as [pred, label] in the specification; ours is [true, pred].
GOLDEN = np.array([[5, 40, 0, 0], [30, 10, 5, 0], [2, 3, 0, 0], [0, 0, 5, 0]]).T


def test_the_golden_confusion_has_the_golden_matching_and_scores():
    scores = score_clusters(GOLDEN)
    assert scores.matching == {0: 1, 1: 0, 2: 3, 3: 2}
    expected = {0: 100 * 30 / 52, 1: 100 * 40 / 58, 2: 50.0, 3: 0.0}
    assert scores.iou == pytest.approx(expected, abs=1e-9)
    assert scores.miou == pytest.approx(sum(expected.values()) / 4, abs=1e-9)
    assert scores.miou == pytest.approx(44.1645, abs=5e-5)
    assert scores.accuracy == pytest.approx(75.0, abs=1e-9)


def test_a_matching_with_extra_clusters_names_the_right_clusters():
    # The original's list was off by one here: clusters 0, 2, 3 belong to classes 1, 0, 2.
    confusion = np.array([[0, 1, 9, 0], [9, 1, 0, 0], [0, 1, 0, 9]])
    assert match_clusters(confusion, [0, 1, 2]) == {0: 1, 2: 0, 3: 2}


def test_fewer_clusters_than_classes_leave_classes_without_a_cluster():
    confusion = np.array([[5, 0], [1, 2], [0, 6]])
    scores = score_clusters(confusion)
    assert scores.matching == {0: 0, 1: 2}
    assert scores.iou == pytest.approx({0: 100 * 5 / 6, 1: 0, 2: 75})
    assert scores.accuracy == pytest.approx(100 * 11 / 14)


def test_a_pixel_in_an_unmatched_cluster_lowers_accuracy():
    perfect = np.array([[10, 0, 0], [0, 10, 0]])
    worse = np.array([[10, 0, 1], [0, 10, 0]])
    assert score_clusters(perfect).accuracy == 100
    assert score_clusters(worse).accuracy == pytest.approx(100 * 20 / 21)
    assert score_clusters(worse).iou == pytest.approx({0: 100 * 10 / 11, 1: 100})


def test_a_third_of_the_pixels_in_extra_clusters_is_a_third_of_errors():
    confusion = np.array([[10, 0, 5, 0], [0, 10, 0, 5]])
    scores = score_clusters(confusion)
    assert scores.accuracy == pytest.approx(100 * 2 / 3)
    assert scores.miou == pytest.approx(100 * 2 / 3)
    assert set(scores.iou) == {0, 1}


def test_many_to_one_gives_every_cluster_its_commonest_class():
    confusion = np.array([[10, 0, 5, 0, 0], [0, 10, 0, 5, 0]])
    assert many_to_one(confusion, [0, 1]) == {0: 0, 1: 1, 2: 0, 3: 1}
    assert score_clusters(confusion, matching="many_to_one").accuracy == 100


def test_pixels_of_classes_that_are_not_scored_do_not_count():
    confusion = np.array([[8, 2, 0], [1, 9, 0], [50, 50, 50]])
    scores = score_clusters(confusion, classes=[0, 1])
    assert scores.matching == {0: 0, 1: 1}
    assert scores.accuracy == pytest.approx(85)
    assert scores.iou == pytest.approx({0: 100 * 8 / 11, 1: 75})


def test_a_class_that_is_neither_labelled_nor_predicted_is_left_out_of_the_mean():
    scores = score_classes(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
    assert math.isnan(scores.iou[2])
    assert scores.miou == pytest.approx(100 * (3 / 4 + 4 / 5) / 2)


def test_a_class_that_is_labelled_but_never_predicted_counts_as_zero():
    scores = score_classes(np.array([[4, 0], [4, 0]]))
    assert scores.iou == pytest.approx({0: 50, 1: 0})
    assert scores.miou == pytest.approx(25)


def test_predicting_a_class_that_is_not_scored_is_an_error_of_the_true_class():
    scores = score_classes(np.array([[6, 0, 4], [0, 10, 0], [9, 9, 9]]), classes=[0, 1])
    assert scores.accuracy == pytest.approx(80)
    assert scores.iou == pytest.approx({0: 60, 1: 100})
    assert scores.matching == {0: 0, 1: 1}


@pytest.mark.parametrize("classes", [None, []])
def test_nothing_to_score_is_nan_and_no_warning(classes):
    with np.errstate(all="raise"):
        scores = score_clusters(np.zeros((3, 4), dtype=np.int64), classes=classes)
    assert math.isnan(scores.miou)
    assert math.isnan(scores.accuracy)


def test_scores_equal_the_loops_over_pixels():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 6, size=(20, 20)).astype(np.uint8)
    true[rng.random(true.shape) < 0.1] = 255
    pred = np.where(rng.random(true.shape) < 0.5, (true + 1) % 7, rng.integers(0, 7, true.shape))
    scored = [0, 2, 3, 5]
    confusion = confusion_matrix(true, pred, num_classes=6, num_clusters=7)
    scores = score_clusters(confusion, classes=scored)
    renamed = np.vectorize(lambda cluster: scores.matching.get(int(cluster), -1))(pred)
    iou, accuracy = reference.iou_and_accuracy(true, renamed, scored)
    assert scores.iou == pytest.approx(iou, abs=1e-9)
    assert scores.accuracy == pytest.approx(accuracy, abs=1e-9)


def test_the_confusion_is_oriented_true_then_predicted():
    confusion = confusion_matrix(
        np.array([[0, 0], [1, 1]]), np.array([[2, 2], [0, 1]]), num_classes=2, num_clusters=3
    )
    assert confusion.tolist() == [[0, 0, 2], [1, 1, 0]]
    assert confusion.dtype == np.int64


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_unlabelled_pixels_and_unknown_classes_are_left_out(dtype):
    true = np.array([0, 1, 2, 100, 127, 0]).astype(dtype)
    ignored = np.where(true == 100, 255, true).astype(np.uint8)
    pred = np.array([0, 1, 1, 0, 1, 1])
    for labels in (true, ignored):
        confusion = confusion_matrix(labels, pred, num_classes=2, num_clusters=2)
        assert confusion.tolist() == [[1, 1], [0, 1]]


def test_255_is_ignored_even_if_there_are_more_classes():
    confusion = confusion_matrix(
        np.array([255, 256]), np.array([0, 0]), num_classes=300, num_clusters=1
    )
    assert confusion.sum() == 1
    assert confusion[256, 0] == 1


def test_negative_labels_are_left_out():
    true, pred = np.array([-1, 0]), np.array([0, 0])
    assert confusion_matrix(true, pred, num_classes=1, num_clusters=1).tolist() == [[1]]


@pytest.mark.parametrize("cluster", [-1, 3, 255])
def test_a_prediction_that_is_no_cluster_is_an_error(cluster):
    with pytest.raises(ShapeError, match=r"\[0, 3\)"):
        confusion_matrix(np.array([0, 1]), np.array([0, cluster]), num_classes=2, num_clusters=3)


def test_a_prediction_at_an_unlabelled_pixel_is_not_looked_at():
    confusion = confusion_matrix(
        np.array([0, 255]), np.array([1, 255]), num_classes=1, num_clusters=2
    )
    assert confusion.tolist() == [[0, 1]]


def test_maps_of_different_shape_and_maps_of_fractions_are_refused():
    with pytest.raises(ShapeError, match="equal shapes"):
        confusion_matrix(
            np.zeros((2, 3), int), np.zeros((3, 2), int), num_classes=1, num_clusters=1
        )
    with pytest.raises(ShapeError, match="integer"):
        confusion_matrix(np.zeros(2), np.zeros(2, int), num_classes=1, num_clusters=1)


def test_maps_larger_than_a_block_are_counted_whole():
    true = np.tile(np.arange(4, dtype=np.uint8), 2**19)
    confusion = confusion_matrix(true, true, num_classes=4, num_clusters=4)
    assert confusion.tolist() == (2**19 * np.eye(4, dtype=int)).tolist()


@pytest.mark.parametrize("classes", [[0, 0], [2], [-1]])
def test_classes_that_are_not_different_rows_are_refused(classes):
    for match in (match_clusters, many_to_one):
        with pytest.raises(ShapeError, match="different ids"):
            match(np.ones((2, 2), dtype=np.int64), classes)


def test_a_confusion_of_fractions_and_one_that_is_not_square_are_refused():
    with pytest.raises(ShapeError, match="integer counts"):
        score_clusters(np.ones((2, 2)))
    with pytest.raises(ShapeError, match="square"):
        score_classes(np.ones((2, 3), dtype=np.int64))


def test_matchings_hold_plain_integers():
    scores = score_clusters(GOLDEN, classes=np.array([0, 1]))
    ids = [*scores.matching, *scores.matching.values(), *scores.iou]
    assert {type(value) for value in ids} == {int}
