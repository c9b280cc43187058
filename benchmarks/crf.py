"""Our CRFs beside pydensecrf on the same unaries of real images, 27 clusters, one thread each.

Fast is what `--crf` runs. Exact is the same mean field without its shortcuts: all clusters told
apart, every message computed; it is slow and runs on fewer of the images. A few images of one size
are also refined as one batch.

The model's codes of the images are clustered into 27 by spherical k-means, whatever the model's
own number, and made into unaries as `segment_bucket.py` makes them, at 320² pixels of area. With
`--data`, label maps of its `val` split are also scored (Hungarian matching of 27 clusters).
Needs the extra `crf`.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from stego_core.inference.mean_field import refine_mean_field
from stego_core.metrics.confusion import confusion_matrix
from stego_core.metrics.scores import score_clusters, scored_classes
from stego_core.model.kmeans import spherical_kmeans
from stego_core.model.segmenter import Segmenter, load_segmenter
from stego_core.storage.manifest import list_images

CLUSTERS, RESOLUTION, TIMED, SCORED, EXACTLY = 27, 320, 8, 60, 20
EXACT = "exact"
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


@dataclass(slots=True)
class _Compared:
    """What was counted of a method and pydensecrf on the same images.

    Attributes:
        equal: share of equal pixels of each image.
        confusions: of the method and of pydensecrf, over the images with labels.
    """

    equal: list[float] = field(default_factory=list)
    confusions: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, method: str, found: np.ndarray, dense: np.ndarray, truth: object) -> None:
        """Count an image; `truth` is its label map, or anything else where there is none."""
        self.equal.append(float((found == dense).mean()))
        if not isinstance(truth, np.ndarray):
            return
        for name, label_map in ((method, found), (DENSE, dense)):
            sized = resize_labels(label_map, *truth.shape)
            counts = confusion_matrix(truth, sized, num_classes=256, num_clusters=CLUSTERS)
            self.confusions[name] = self.confusions.get(name, 0) + counts

    def rows(self, method: str) -> list[Row]:
        """Return the rows of equal pixels and, where there are labels, of the change of mIoU."""
        facts = {"images": len(self.equal), "least": min(self.equal)}
        quartile = np.quantile(self.equal, 0.25)
        pixels = Row(
            what=f"pixels of the {method} CRF equal to pydensecrf's",
            against="all pixels",
            bar=0.995,
            values=[float(np.mean(self.equal))],
            unit="%",
            facts={**facts, "quartile": quartile},
            note=f"{len(self.equal)} images, one value",
        )
        if not self.confusions:
            return [pixels]
        classes = scored_classes(DataConfig(ignore_classes=(255,)), self.confusions[DENSE])
        scores = {m: score_clusters(c, classes=classes).miou for m, c in self.confusions.items()}
        miou = Row(
            what=f"mIoU of the {method} CRF, difference",
            against="mIoU of pydensecrf",
            bar=0.1,
            values=[abs(scores[method] - scores[DENSE])],
            direction="at most",
            unit="points",
            facts={"images": len(self.equal), **scores},
            note=f"{len(self.equal)} images, one value",
            needs_data=True,
        )
        return [pixels, miou]


def refine_exactly(pixels: np.ndarray, log_probs: Tensor) -> np.ndarray:
    """Return the labels of the mean field in torch without shortcuts."""
    image = torch.from_numpy(np.array(pixels))
    found = refine_mean_field(image[None], log_probs[None], tolerance=torch.inf, is_exact=True)[0]
    labels: np.ndarray = found.numpy().astype(np.uint8)
    return labels


def agreement(unaries: Unaries, labels: dict[str, str]) -> list[Row]:
    """Return the rows of both methods, the exact one's of a part of the images."""
    compared = {FAST: _Compared(), EXACT: _Compared()}
    exactly = set(spread(range(len(unaries)), EXACTLY))
    for index, path in enumerate(unaries.paths):
        pixels, log_probs = unaries[index]
        truth = None
        if path in labels and Path(labels[path]).exists():
            truth = decode_label(Path(labels[path]).read_bytes(), ImageLimits())
        dense = refine(pixels, log_probs, DENSE)
        compared[FAST].add(FAST, refine(pixels, log_probs, FAST), dense, truth)
        if index in exactly:
            compared[EXACT].add(EXACT, refine_exactly(pixels, log_probs), dense, truth)
    return [row for method, one in compared.items() for row in one.rows(method)]


def batched(unaries: Unaries, repeats: int) -> Row:
    """Return the row of images of one size that are refined as a batch."""
    sizes: dict[tuple[int, ...], list[int]] = {}
    for index in range(len(unaries)):
        sizes.setdefault(unaries[index][0].shape, []).append(index)
    inputs = [unaries[index] for index in max(sizes.values(), key=len)[:TIMED]]
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image, _ in inputs])
    log_probs = torch.stack([scores for _, scores in inputs])
    found = refine_mean_field(pixels, log_probs).numpy()
    equal = [
        float((labels == refine(*pair, DENSE)).mean())
        for labels, pair in zip(found, inputs, strict=True)
    ]
    ratios = []
    for _ in range(repeats):
        alone_s = seconds(lambda: [refine(*pair, FAST) for pair in inputs])
        ratios.append(alone_s / seconds(lambda: refine_mean_field(pixels, log_probs)))
    return Row(
        what="pixels of the fast CRF, as one batch, equal to pydensecrf's",
        against="all pixels",
        bar=0.995,
        values=[float(np.mean(equal))],
        unit="%",
        facts={"images": len(inputs), "least": min(equal), "times_one_by_one": ratios},
        note=f"{len(inputs)} images of one size; {statistics.median(ratios):.2g} times as fast as "
        "one after the other, on a CPU",
    )


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
    return [
        *times(unaries, options.repeats),
        *agreement(unaries, labels),
        batched(unaries, options.repeats),
    ]


if __name__ == "__main__":
    run("crf", __doc__, measure)
