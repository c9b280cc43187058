"""The optional losses of STEGO as loops over numpy arrays, to test fast code against."""

from __future__ import annotations

import itertools
import math

import numpy as np
from reference.stego_reference import cosine


def reconstruction_loss(decoded: np.ndarray, features: np.ndarray) -> float:
    """Minus the mean cosine of two maps (B, C, h, w), cell by cell."""
    batch, _, h, w = decoded.shape
    cosines = [
        cosine(decoded[n, :, i, j], features[n, :, i, j]) for n, i, j in np.ndindex(batch, h, w)
    ]
    return -sum(cosines) / len(cosines)


def value_at(image_Chw: np.ndarray, x: float, y: float) -> np.ndarray:
    """Bilinear value at (x, y), where -1 and 1 are the outer edges of the image."""
    _, h, w = image_Chw.shape
    column = min(max((x + 1) / 2 * w - 0.5, 0), w - 1)
    row = min(max((y + 1) / 2 * h - 0.5, 0), h - 1)
    left, top = math.floor(column), math.floor(row)
    right, bottom = min(left + 1, w - 1), min(top + 1, h - 1)
    across, down = column - left, row - top
    upper = (1 - across) * image_Chw[:, top, left] + across * image_Chw[:, top, right]
    lower = (1 - across) * image_Chw[:, bottom, left] + across * image_Chw[:, bottom, right]
    return (1 - down) * upper + down * lower


def alignment_loss(augmented: np.ndarray, code: np.ndarray, coords: np.ndarray) -> float:
    """Minus the mean cosine of the augmented code with the code at the place that it shows."""
    batch, _, h, w = augmented.shape
    cosines = [
        cosine(augmented[n, :, i, j], value_at(code[n], *coords[n, i, j]))
        for n, i, j in np.ndindex(batch, h, w)
    ]
    return -sum(cosines) / len(cosines)


def resize(image_Chw: np.ndarray, side: int) -> np.ndarray:
    """Bilinear resize to a square, pixel centre on pixel centre, without antialiasing."""
    out = np.zeros((len(image_Chw), side, side))
    for i, j in np.ndindex(side, side):
        out[:, i, j] = value_at(image_Chw, (2 * j + 1) / side - 1, (2 * i + 1) / side - 1)
    return out


def crf_loss(images: np.ndarray, code: np.ndarray, pixels: np.ndarray) -> float:
    """Minus the mean of kernel times cosine over all pairs of pixels; the original's constants."""
    total = 0.0
    for n in range(len(images)):
        colors, codes = resize(images[n], 56), resize(code[n], 56)
        for r1, c1 in pixels:
            for r2, c2 in pixels:
                d2 = (r1 - r2) ** 2 + (c1 - c2) ** 2
                g2 = float(((colors[:, r1, c1] - colors[:, r2, c2]) ** 2).sum())
                kernel = 10 * math.exp(-d2 / (2 * 0.5) - g2 / (2 * 0.15))
                kernel += 3 * math.exp(-d2 / (2 * 0.05))
                total -= kernel * cosine(codes[:, r1, c1], codes[:, r2, c2])
    return total / (len(images) * len(pixels) ** 2)


def original_scores(stats: np.ndarray) -> tuple[float, float]:
    """MIoU and accuracy in percent as the original counts them with extra clusters.

    `stats` is (clusters, classes), [pred, label], with more clusters than classes. All assignments
    of a cluster to each class are tried, so give few of both.
    """
    num_clusters, num_classes = stats.shape
    counted = stats.astype(float)
    counted[num_classes:] = 0  # its mask of valid pixels asks for pred < n_classes
    best = max(
        itertools.permutations(range(num_clusters), num_classes),
        key=lambda chosen: sum(counted[cluster, k] for k, cluster in enumerate(chosen)),
    )
    rest = [cluster for cluster in range(num_clusters) if cluster not in best]
    rows = [*(counted[cluster] for cluster in best), counted[rest].sum(0)]
    histogram = np.column_stack([np.array(rows), np.zeros(num_classes + 1)])
    right = np.diag(histogram)
    with np.errstate(invalid="ignore"):
        iou = right / (histogram.sum(0) + histogram.sum(1) - right)
    return 100 * float(np.nanmean(iou)), 100 * float(right.sum() / histogram.sum())
