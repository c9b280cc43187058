"""Scores of single images beside counting their pixels one by one."""

from __future__ import annotations

import numpy as np
import pytest

from stego_core.metrics.confusion import confusion_matrix
from stego_core.metrics.images import count_pairs, image_scores
from stego_core.metrics.scores import score_clusters

CLASSES, MATCHING = [0, 2, 3], {4: 0, 1: 2, 0: 3}  # clusters 2 and 3 have no class


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 2, 3, 255], (9, 7)).astype(np.uint8)
    return labels, rng.integers(0, 5, (9, 7))


def pairs_of(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return count_pairs(confusion_matrix(labels, predicted, num_classes=255, num_clusters=5))


def test_accuracy_and_the_largest_error_are_those_of_counting_pixel_by_pixel():
    images = {f"{seed}.png": drawn(seed) for seed in range(8)}
    table = image_scores(
        {uri: pairs_of(*image) for uri, image in images.items()}, classes=CLASSES, matching=MATCHING
    )
    assert table.num_rows == 8
    for row in table.to_pylist():
        labels, predicted = images[row["image_uri"]]
        scored = right = 0
        wrong: dict[tuple[int, int], int] = {}
        for true, cluster in zip(labels.ravel().tolist(), predicted.ravel().tolist(), strict=True):
            if true not in CLASSES:
                continue
            scored += 1
            if MATCHING.get(cluster) == true:
                right += 1
            else:
                wrong[true, cluster] = wrong.get((true, cluster), 0) + 1
        assert row["pixels"] == scored
        assert row["accuracy"] == pytest.approx(100 * right / scored)
        assert row["wrong_pixels"] == max(wrong.values())
        assert wrong[row["true_class"], row["predicted"]] == row["wrong_pixels"]
        assert row["predicted_class"] == MATCHING.get(row["predicted"])


def test_the_worst_image_comes_first_and_those_that_are_alike_by_name():
    right, wrong = np.full((2, 2), 4), np.full((2, 2), 2)
    labels = np.zeros((2, 2), np.uint8)
    images = {"b": right, "a": right, "z": wrong, "m": np.array([[4, 2], [2, 4]])}
    table = image_scores(
        {uri: pairs_of(labels, predicted) for uri, predicted in images.items()},
        classes=CLASSES,
        matching=MATCHING,
    )
    assert table["image_uri"].to_pylist() == ["z", "m", "a", "b"]
    assert table["accuracy"].to_pylist() == [0, 50, 100, 100]
    assert table["wrong_pixels"].to_pylist() == [4, 2, None, None]
    assert table["predicted_class"].null_count == 4  # cluster 2 has none


def test_an_image_without_scored_pixels_has_no_row():
    ignored = np.full((3, 3), 1, np.uint8)
    pairs = {"a": pairs_of(ignored, np.zeros((3, 3), int)), "b": np.zeros((0, 3), np.int64)}
    table = image_scores(pairs, classes=CLASSES, matching=MATCHING)
    assert (table.num_rows, table.num_columns) == (0, 7)


def test_extra_clusters_are_dropped_where_the_score_drops_them():
    confusion = np.array([[8, 0, 2], [0, 6, 4]])
    scores = score_clusters(confusion, dropped_extra=True)
    (row,) = image_scores(
        {"a": count_pairs(confusion)},
        classes=[0, 1],
        matching=scores.matching,
        dropped_extra=True,
    ).to_pylist()
    assert (row["pixels"], row["accuracy"]) == (14, scores.accuracy)
