"""The options' formulas as slow, obvious loops over numpy arrays, to test fast code against."""

from __future__ import annotations

import itertools
import math

import numpy as np
from reference.stego_reference import cosine


def adaptive_shift(kind: str, features_a, features_b, codes_a, codes_b) -> float:
    """EAGLE's shift of pairs of maps (B, C, h, w), by the mean over all pairs of positions."""

    def mean(first, second):
        values = [
            cosine(a[:, i, j], b[:, k, m])
            for a, b in zip(first, second, strict=True)
            for i, j in np.ndindex(*a.shape[1:])
            for k, m in np.ndindex(*b.shape[1:])
        ]
        return sum(values) / len(values)

    features, codes = mean(features_a, features_b), mean(codes_a, codes_b)
    return 3.5 * (features + codes) if kind == "random" else abs(features - codes)


def soft_assignment(code: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    """Softmax of the cosines over 0.1."""
    powers = np.array([math.exp(cosine(code, prototype) / 0.1) for prototype in prototypes])
    return powers / powers.sum()


def mixed_code(code: np.ndarray, features: np.ndarray, row: int, column: int) -> np.ndarray:
    """The mixed code of one cell of (K, h, w)."""
    h, w = code.shape[1:]
    cells = [
        (row + i, column + j)
        for i, j in itertools.product((-1, 0, 1), repeat=2)
        if 0 <= row + i < h and 0 <= column + j < w
    ]
    cosines = [cosine(features[:, row, column], features[:, i, j]) for i, j in cells]
    mean = sum(cosines) / len(cosines)
    weights = [max(value, 0) if value >= mean else 0 for value in cosines]
    total = np.zeros(len(code))
    for weight, (i, j) in zip(weights, cells, strict=True):
        total += weight / sum(weights) * code[:, i, j]
    return total


def modularity(points: np.ndarray, prototypes: np.ndarray) -> float:
    """trace(W / e · delta) of the graph of points, by loops over pairs."""
    count = len(points)
    graph = np.zeros((count, count))
    for p, q in itertools.product(range(count), repeat=2):
        graph[p, q] = 0 if p == q else max(cosine(points[p], points[q]), 0)
    degrees, total = graph.sum(1), graph.sum()
    near = [[max(cosine(point, one), 0) for one in prototypes] for point in points]
    value = 0.0
    for p, q in itertools.product(range(count), repeat=2):
        same = max(math.tanh(a * b / 0.1) for a, b in zip(near[p], near[q], strict=True))
        value += (graph[p, q] - degrees[p] * degrees[q] / total) / total * same
    return value


def silhouette(points: np.ndarray, centroids: np.ndarray) -> float:
    """Mean simplified silhouette by cosine distance."""
    values = []
    for point in points:
        own, other = sorted(1 - cosine(point, centroid) for centroid in centroids)[:2]
        values.append((other - own) / other if other > 0 else 0.0)
    return sum(values) / len(values)


def mask_proposals(features: np.ndarray, threshold: float, coverage: float) -> np.ndarray:
    """PriMaPs of the tokens of one image, (T, D): the number of each token's mask, -1 for none."""
    masks = np.full(len(features), -1)
    while (masks == -1).mean() > 1 - coverage:
        free = np.flatnonzero(masks == -1)
        centred = features[free] - features[free].mean(0)
        direction = np.linalg.svd(centred)[2][0]
        seed = max(free, key=lambda token: abs(cosine(features[token], direction)))
        alike = [token for token in free if cosine(features[token], features[seed]) >= threshold]
        masks[alike] = masks.max() + 1
    return masks


def focal_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Cross-entropy times (1 - mean probability of the label)², by loops; -1 doesn't count."""
    powers = np.exp(logits)
    probabilities = powers / powers.sum(1, keepdims=True)
    total = 0.0
    for token, label in enumerate(labels):
        if label >= 0:
            share = probabilities[:, label].mean()
            total -= (1 - share) ** 2 * math.log(probabilities[token, label])
    return total / len(labels)


def decoder_layer(tokens: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """A one-headed transformer decoder layer of unit tokens brought to variance 1, (T, C)."""
    channels = tokens.shape[1]

    def attend(name, queries, keys):
        split = weights[f"{name}.in_proj_weight"].reshape(3, channels, channels)
        q, k, v = (
            rows @ weight.T + bias
            for rows, weight, bias in zip(
                (queries, keys, keys),
                split,
                weights[f"{name}.in_proj_bias"].reshape(3, channels),
                strict=True,
            )
        )
        out = []
        for query in q:
            powers = np.exp(k @ query / math.sqrt(channels))
            out.append((powers / powers.sum()) @ v)
        return (
            np.array(out) @ weights[f"{name}.out_proj.weight"].T
            + (weights[f"{name}.out_proj.bias"])
        )

    def normalise(name, rows):
        centred = rows - rows.mean(1, keepdims=True)
        scaled = centred / np.sqrt(centred.var(1, keepdims=True) + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    start = tokens / np.linalg.norm(tokens, axis=1, keepdims=True) * math.sqrt(channels)
    rows = normalise("norm1", start + attend("self_attn", start, start))
    rows = normalise("norm2", rows + attend("multihead_attn", rows, start))
    hidden = np.maximum(rows @ weights["linear1.weight"].T + weights["linear1.bias"], 0)
    return normalise("norm3", rows + hidden @ weights["linear2.weight"].T + weights["linear2.bias"])


def contrast(codes: np.ndarray, keys: np.ndarray, likeness: np.ndarray) -> float:
    """CAUSE's InfoNCE of the codes (P, K) of one image: the mean over positive pairs."""
    values = []
    for code, row in zip(codes, likeness, strict=True):
        scores = [cosine(code, key) / 0.07 for key in keys]
        counted = [s for s, near in zip(scores, row, strict=True) if near > 0.3 or near < 0.1]
        for score, near in zip(scores, row, strict=True):
            if near > 0.3:
                values.append(math.log(sum(math.exp(one) for one in counted)) - score)
    return sum(values) / len(values)
