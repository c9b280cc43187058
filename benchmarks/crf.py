"""The fast CRF beside pydensecrf on the same unaries of real images, 27 clusters, one thread each.

The model's codes of the images are clustered into 27 by spherical k-means, whatever the model's
own number, and made into unaries as `segment_bucket.py` makes them, at 320² pixels of area. With
`--data`, label maps of its `val` split are also scored (Hungarian matching of 27 clusters).
Needs the extra `crf`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import Options, Row, run, seconds
from stego_core.config.schema import DataConfig, ImageLimits
from stego_core.datasets.directory import open_dataset
from stego_core.distributed.fetch import WholeImage
from stego_core.images.decode import ImageFailure, decode_image, decode_label
from stego_core.images.geometry import resize_labels
from stego_core.inference.crf import DENSE, FAST, refine, upsampled_log_probs
from stego_core.metrics.confusion import confusion_matrix
from stego_core.metrics.scores import score_clusters, scored_classes
from stego_core.model.kmeans import spherical_kmeans
from stego_core.model.segmenter import Segmenter, load_segmenter
from stego_core.storage.manifest import list_images

CLUSTERS, RESOLUTION, TIMED, SCORED = 27, 320, 8, 120
_Item = TypeVar("_Item")
_PER_IMAGE = 200  # tokens that k-means sees


def spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """Return at most `count` of the items, evenly spread."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]


class Unaries:
    """Pixels and log probabilities of images, from a model's codes and 27 clusters of them."""

    def __init__(self, model: Segmenter, paths: list[str]) -> None:
        patch = model.backbone.patch_size
        self._prepare = WholeImage(resolution=RESOLUTION, patch=patch)
        self._model = model
        self.paths, self._pixels, self._codes, tokens = [], [], [], []
        generator = torch.Generator().manual_seed(0)
        for path in paths:
            image = decode_image(Path(path).read_bytes(), ImageLimits())
            if isinstance(image, ImageFailure):
                continue
            pixels = self._prepare(image)
            code = model.encode(torch.from_numpy(pixels)[None])[1][0].clone()
            flat = code.flatten(1).T
            tokens.append(flat[torch.randperm(len(flat), generator=generator)[:_PER_IMAGE]])
            self.paths.append(path)
            self._pixels.append(pixels)
            self._codes.append(code)
        found = spherical_kmeans(torch.cat(tokens), CLUSTERS, seed=0, restarts=2)
        self._centroids = found.centroids

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Tensor]:
        pixels, code = self._pixels[index], self._codes[index]
        products = torch.einsum("khw,nk->nhw", code, self._centroids)
        height, width = pixels.shape[:2]
        return pixels, upsampled_log_probs(products, code, height=height, width=width, alpha=2.0)


def times(unaries: Unaries, repeats: int) -> list[Row]:
    """Return the row of the ratio of times, of a few of the images."""
    inputs = [unaries[index] for index in spread(range(len(unaries)), TIMED)]

    def all_by(method: str) -> None:
        for pixels, log_probs in inputs:
            refine(pixels, log_probs, method)

    for method in (DENSE, FAST):
        refine(*inputs[0], method)
    found = [
        (seconds(lambda: all_by(DENSE)), seconds(lambda: all_by(FAST))) for _ in range(repeats)
    ]
    told_apart = [len(np.unique(log_probs.argmax(0))) for _, log_probs in inputs]
    return [
        Row(
            what="fast CRF, 27 clusters, 320²",
            against="pydensecrf, same unaries, one thread each",
            bar=5,
            values=[dense_s / fast_s for dense_s, fast_s in found],
            facts={
                "clusters": CLUSTERS,
                "images": len(inputs),
                "dense_s_per_image": min(dense for dense, _ in found) / len(inputs),
                "fast_s_per_image": min(fast for _, fast in found) / len(inputs),
                "clusters_told_apart": told_apart,
            },
            note="slower where more clusters are best somewhere in an image (docs/adr/0020)",
        )
    ]


def agreement(unaries: Unaries, labels: dict[str, str]) -> list[Row]:
    """Return the rows of equal pixels and, where there are labels, of the change of mIoU."""
    equal = []
    confusions = {method: np.zeros((256, CLUSTERS), np.int64) for method in (DENSE, FAST)}
    for index, path in enumerate(unaries.paths):
        pixels, log_probs = unaries[index]
        maps = {method: refine(pixels, log_probs, method) for method in (DENSE, FAST)}
        equal.append(float((maps[DENSE] == maps[FAST]).mean()))
        if path not in labels or not Path(labels[path]).exists():
            continue
        truth = decode_label(Path(labels[path]).read_bytes(), ImageLimits())
        if isinstance(truth, ImageFailure):
            continue
        for method, label_map in maps.items():
            sized = resize_labels(label_map, *truth.shape)
            confusions[method] += confusion_matrix(
                truth, sized, num_classes=256, num_clusters=CLUSTERS
            )
    rows = [
        Row(
            what="pixels of the fast CRF equal to pydensecrf's",
            against="all pixels",
            bar=0.995,
            values=[float(np.mean(equal))],
            unit="%",
            facts={"images": len(equal), "least": min(equal), "quartile": np.quantile(equal, 0.25)},
        )
    ]
    if confusions[DENSE].any():
        classes = scored_classes(DataConfig(ignore_classes=(255,)), confusions[DENSE])
        scores = {m: score_clusters(c, classes=classes).miou for m, c in confusions.items()}
        rows.append(
            Row(
                what="mIoU of the fast CRF, difference",
                against="mIoU of pydensecrf",
                bar=0.1,
                values=[abs(scores[FAST] - scores[DENSE])],
                direction="at most",
                unit="points",
                facts={"images": len(equal), **scores},
            )
        )
    return rows


def measure(options: Options) -> list[Row]:
    """Return the rows of the table."""
    torch.set_num_threads(1)
    model = load_segmenter(options.model)
    folder, labels = options.images, {}
    if options.data:
        dataset = open_dataset(options.data, "val")
        folder = dataset.images_uri
    files = list_images(folder)
    if options.data:
        labels = {file.uri: dataset.label_uri(file.path) for file in files}
    paths = [file.uri for file in files]
    unaries = Unaries(model, spread(paths, SCORED if options.data else 3 * TIMED))
    return [*times(unaries, options.repeats), *agreement(unaries, labels)]


if __name__ == "__main__":
    run("crf", __doc__, measure)
