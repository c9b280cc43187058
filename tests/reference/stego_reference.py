"""The equations of STEGO as slow, obvious loops over numpy arrays, to test fast code against."""

from __future__ import annotations

import math

import numpy as np


def wave(shape: tuple[int, ...], k: float, phase: float) -> np.ndarray:
    """sin(k * index + phase) in C order: the fixed input of the golden values."""
    return np.sin(k * np.arange(math.prod(shape)) + phase).reshape(shape)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two vectors; 0 if one of them is zero."""
    lengths = max(math.sqrt(sum(a * a)), 1e-10) * max(math.sqrt(sum(b * b)), 1e-10)
    return float(sum(a * b)) / lengths


def sample(image_Chw: np.ndarray, x: float, y: float) -> np.ndarray:
    """Bilinear value at (x, y), where -1 and 1 are the centres of the first and last cell."""
    _, h, w = image_Chw.shape
    column = min(max((x + 1) / 2 * (w - 1), 0), w - 1)
    row = min(max((y + 1) / 2 * (h - 1), 0), h - 1)
    left, top = min(int(column), max(w - 2, 0)), min(int(row), max(h - 2, 0))
    right, bottom = min(left + 1, w - 1), min(top + 1, h - 1)
    across, down = column - left, row - top
    upper = (1 - across) * image_Chw[:, top, left] + across * image_Chw[:, top, right]
    lower = (1 - across) * image_Chw[:, bottom, left] + across * image_Chw[:, bottom, right]
    return (1 - down) * upper + down * lower


def sample_points(maps: np.ndarray, coords: np.ndarray) -> np.ndarray:
    """Sampled values (B, C, S, S); position (i, j) of the result is point (j, i)."""
    batch, channels = maps.shape[:2]
    points = coords.shape[1]
    result = np.zeros((batch, channels, points, points))
    for n in range(batch):
        for i in range(points):
            for j in range(points):
                x, y = coords[n, j, i]
                result[n, :, i, j] = sample(maps[n], x, y)
    return result


def correspondence(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines (B, h, w, i, j)."""
    result = np.zeros((len(a), *a.shape[2:], *b.shape[2:]))
    for n, h, w, i, j in np.ndindex(*result.shape):
        result[n, h, w, i, j] = cosine(a[n, :, h, w], b[n, :, i, j])
    return result


def centre(cosines: np.ndarray) -> np.ndarray:
    """The original's three steps, not the shortened formula."""
    batch_mean = cosines.mean()
    centred = cosines.copy()
    for n, h, w in np.ndindex(*cosines.shape[:3]):
        centred[n, h, w] -= cosines[n, h, w].mean()
    return centred - centred.mean() + batch_mean


def correspondence_loss(
    features_a: np.ndarray,
    features_b: np.ndarray,
    code_a: np.ndarray,
    code_b: np.ndarray,
    *,
    shift: float,
    pointwise: bool,
    zero_clamp: bool,
    stabilize: bool,
) -> np.ndarray:
    """Loss of every pair of points (B, S, S, S, S)."""
    target = correspondence(features_a, features_b)
    if pointwise:
        target = centre(target)
    similarity = correspondence(code_a, code_b)
    lower = 0.0 if zero_clamp else -9999.0
    upper = 0.8 if stabilize else math.inf
    loss = np.zeros_like(target)
    for index in np.ndindex(*target.shape):
        clamped = min(max(similarity[index], lower), upper)
        loss[index] = -clamped * (target[index] - shift)
    return loss


def head(features: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """W1 f + b1 + W3 relu(W2 f + b2) + b3 at every cell; without W2 only the first part."""
    batch, _, h, w = features.shape
    code = np.zeros((batch, len(weights["w1"]), h, w))
    for n, y, x in np.ndindex(batch, h, w):
        cell = features[n, :, y, x]
        code[n, :, y, x] = weights["w1"] @ cell + weights["b1"]
        if "w2" in weights:
            hidden = np.maximum(weights["w2"] @ cell + weights["b2"], 0)
            code[n, :, y, x] += weights["w3"] @ hidden + weights["b3"]
    return code


def cluster_scores(code: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Cosines (B, N, h, w) of the code with each cluster."""
    batch, _, h, w = code.shape
    result = np.zeros((batch, len(clusters), h, w))
    for n, k, y, x in np.ndindex(*result.shape):
        result[n, k, y, x] = cosine(code[n, :, y, x], clusters[k])
    return result


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities of one vector of scores."""
    return scores - math.log(sum(math.exp(score) for score in scores))


def cluster_loss(code: np.ndarray, clusters: np.ndarray, alpha: float | None) -> float:
    """Mean negative cosine, with the best cluster alone or weighted by softmax(alpha * cosine)."""
    scores = cluster_scores(code, clusters)
    total, pixels = 0.0, 0
    for n, y, x in np.ndindex(len(code), *code.shape[2:]):
        cell = scores[n, :, y, x]
        weights = np.eye(len(cell))[cell.argmax()]
        if alpha is not None:
            weights = np.exp(log_softmax(alpha * cell))
        total -= float(sum(weights * cell))
        pixels += 1
    return total / pixels


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy of logits (P, N) at the labels (P,) inside [0, N)."""
    terms = [
        -log_softmax(row)[label]
        for row, label in zip(logits, labels, strict=True)
        if 0 <= label < len(row)
    ]
    return sum(terms) / len(terms)


def kmeans_step(points: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, float]:
    """One Lloyd iteration: the moved centroids, and the mean cosine before the move."""
    sums = np.zeros_like(centroids)
    total = 0.0
    for point in points:
        cosines = [cosine(point, centroid) for centroid in centroids]
        nearest = int(np.argmax(cosines))
        total += cosines[nearest]
        sums[nearest] += point / math.sqrt(sum(point * point))
    moved = [row / math.sqrt(sum(row * row)) for row in sums]
    return np.array(moved), total / len(points)


def iou_and_accuracy(
    true: np.ndarray, pred: np.ndarray, classes: list[int]
) -> tuple[dict[int, float], float]:
    """IoU of each class and accuracy, percent, pixel by pixel; -1 in `pred` is never right."""
    pixels = [(t, p) for t, p in zip(true.ravel(), pred.ravel(), strict=True) if t in classes]
    iou = {}
    for class_id in classes:
        both = sum(t == class_id and p == class_id for t, p in pixels)
        either = sum(t == class_id or p == class_id for t, p in pixels)
        iou[class_id] = 100 * both / either if either else math.nan
    right = sum(t == p for t, p in pixels)
    return iou, 100 * right / len(pixels) if pixels else math.nan
