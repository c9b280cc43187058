"""The report of a run: one HTML page and its image files, to be opened from disk or a bucket.

The page loads nothing from elsewhere and holds no script. Names of images, clusters and reasons
come from outside: they are shown as text and never become part of a path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stego_core.errors import ConfigError, ShapeError
from stego_core.masks.palette import color_hex
from stego_core.storage import fs
from stego_core.viz.calibration import CalibrationFacts, correspondences_svg
from stego_core.viz.confusion import ConfusionFacts, confusion_svg
from stego_core.viz.curve import CURVE_SIZE, scale_curve
from stego_core.viz.numbers import number, percent
from stego_core.viz.overlay import (
    NO_CLUSTER_COLOR,
    check_pixels,
    crop_around,
    encode_jpeg,
    encode_png,
    fit_pixels,
    mask_image,
    overlay,
    resize_labels,
)

if TYPE_CHECKING:
    import jinja2

_THUMB_BOX = (320, 480)  # width and height in pixels; the page shows them no wider
_CROP_SOURCE_BOX = (640, 640)  # crops are cut from a larger copy, so that they stay sharp
_CROP_SIDE = 144
_CROPS_PER_CLUSTER = 16
_MAX_QUARANTINE_ROWS = 500
_OWN_FILE = re.compile(r"\d{6,}-(image|overlay)\.jpg|\d{6,}-mask\.png|cluster-\d{5}-\d{1,2}\.jpg")


@dataclass(frozen=True, slots=True)
class Failure:
    """An image that was scored, and badly.

    Args:
        accuracy: percent of its scored pixels that are right.
        error: its largest group of wrong pixels, as text.
    """

    accuracy: float
    error: str


@dataclass(frozen=True, slots=True)
class ReportImage:
    """One image of the report.

    Args:
        name: shown as text; any characters.
        pixels: uint8 RGB, (H, W, 3), H W pixels.
        labels: cluster ids, integers (h, w); may be smaller than the image.
        shares: cluster id → share of the image's pixels, [0, 1].
        failure: shown among the failures, if there is one.
        is_sampled: part of the even sample that clusters are described by.
        confidence: mean of its pixels, (0, 1], where it is known.
    """

    name: str
    pixels: np.ndarray
    labels: np.ndarray
    shares: dict[int, float]
    failure: Failure | None = None
    is_sampled: bool = True
    confidence: float | None = None


@dataclass(frozen=True, slots=True)
class ReportFacts:
    """What the report says besides its images.

    Args:
        title: the heading.
        rows: facts of the run, (what, value).
        metrics: metric name → value; may be empty.
        quarantine: images that could not be used, (name, reason, detail).
        curves: name → (step, value) pairs, for example of `loss/total`; may be empty.
        calibration: the training's record of it, if there is one.
        confusion: of the clusters, where they were scored.
        query: a DuckDB line that reads the masks; not shown if empty.
    """

    title: str
    rows: list[tuple[str, str]]
    metrics: dict[str, float]
    quarantine: list[tuple[str, str, str]]
    curves: dict[str, list[tuple[int, float]]]
    query: str
    calibration: CalibrationFacts | None = None
    confusion: ConfusionFacts | None = None


@dataclass(frozen=True, slots=True)
class _LegendRow:
    cluster: int
    name: str
    color: str
    share: float  # [0, 1]


@dataclass(frozen=True, slots=True)
class _Entry:
    """An image as the page shows it; its files are `images/<stem>-<kind>`."""

    order: int  # from 1
    name: str
    width: int  # of the thumbnail, pixels
    height: int
    legend: list[_LegendRow]  # largest share first
    failure: Failure | None
    confidence: float | None

    @property
    def stem(self) -> str:
        return f"{self.order:06d}"


@dataclass(frozen=True, slots=True)
class _Crop:
    share: float
    order: int
    image_name: str
    jpeg: bytes


class _Clusters:
    """What is known of each cluster over the images seen so far; keeps only small JPEG crops."""

    def __init__(self, names: Sequence[str], colors: np.ndarray) -> None:
        if colors.ndim != 2 or colors.shape[1] != 3 or len(names) != len(colors):
            raise ShapeError(f"{len(names)} cluster names do not go with colors {colors.shape}")
        self.names = list(names)
        self.colors = colors
        self.hex = [color_hex(color) for color in colors]
        self.share_sums = [0.0] * len(colors)
        self.num_images = [0] * len(colors)
        self.num_sampled = 0
        self.crops: dict[int, list[_Crop]] = {}

    def legend(self, image: ReportImage) -> list[_LegendRow]:
        """Return the image's clusters, largest share first."""
        unknown = sorted(set(image.shares) - set(range(len(self.colors))))
        if unknown:
            raise ShapeError(
                f"{image.name!r} has a share for cluster {unknown[0]}, "
                f"but there are {len(self.colors)} clusters"
            )
        ordered = sorted(image.shares.items(), key=lambda item: (-item[1], item[0]))
        return [self._row(cluster, share) for cluster, share in ordered if share > 0]

    def add(self, image: ReportImage, entry: _Entry) -> None:
        """Count the image's shares and keep its crop for each cluster where it leads."""
        self.num_sampled += 1
        pixels = fit_pixels(image.pixels, _CROP_SOURCE_BOX)
        labels = resize_labels(image.labels, pixels.shape[0], pixels.shape[1])
        for row in entry.legend:
            self.share_sums[row.cluster] += row.share
            self.num_images[row.cluster] += 1
            kept = self.crops.setdefault(row.cluster, [])
            is_full = len(kept) == _CROPS_PER_CLUSTER
            # A cluster of a few pixels can be lost in the smaller label map.
            if (is_full and row.share <= kept[-1].share) or not (labels == row.cluster).any():
                continue
            color = self.colors[row.cluster]
            crop = crop_around(pixels, labels, row.cluster, color, _CROP_SIDE)
            kept.append(_Crop(row.share, entry.order, entry.name, encode_jpeg(crop)))
            kept.sort(key=lambda each: (-each.share, each.order))
            del kept[_CROPS_PER_CLUSTER:]

    def overall(self) -> list[_LegendRow]:
        """Return the clusters that occur, by mean share over the images, largest first."""
        used = [cluster for cluster, count in enumerate(self.num_images) if count > 0]
        rows = [self._row(cluster, self.share_sums[cluster] / self.num_sampled) for cluster in used]
        return sorted(rows, key=lambda row: (-row.share, row.cluster))

    def unused(self) -> list[str]:
        """Return the names of the clusters that occur in no image."""
        return [name for name, count in zip(self.names, self.num_images, strict=True) if not count]

    def _row(self, cluster: int, share: float) -> _LegendRow:
        return _LegendRow(cluster, self.names[cluster], self.hex[cluster], share)


def write_report(
    folder_uri: str,
    images: Iterable[ReportImage],
    facts: ReportFacts,
    cluster_names: Sequence[str],
    colors: np.ndarray,
) -> str:
    """Write `index.html` and `images/` and return the URI of the page.

    The images are read one at a time, in order. The same input gives the same bytes; image files
    of an earlier report in the same folder are replaced or removed.

    Args:
        folder_uri: where to write; made if it is missing.
        images: any number, none included.
        facts: the heading, tables and curves.
        cluster_names: a name for each cluster.
        colors: uint8 (N, 3), one row for each cluster.

    Raises:
        ConfigError: jinja2 is not installed.
        ShapeError: an image, its labels or shares, or the names do not fit together.
    """
    template = _load_template()
    clusters = _Clusters(cluster_names, colors)
    images_uri = fs.join(folder_uri, "images")
    for name in fs.list_names(images_uri):
        if _OWN_FILE.fullmatch(name):
            fs.delete(fs.join(images_uri, name))
    entries = []
    for order, image in enumerate(images, start=1):
        entry = _write_image(images_uri, order, image, clusters)
        entries.append(entry)
        if image.is_sampled:
            clusters.add(image, entry)
    for cluster, crops in clusters.crops.items():
        for rank, crop in enumerate(crops):
            fs.write_bytes(fs.join(images_uri, f"cluster-{cluster:05d}-{rank}.jpg"), crop.jpeg)
    page = template.render(
        facts=facts,
        entries=sorted(entries, key=lambda entry: entry.confidence or math.inf),
        failures=_worst_first(entries),
        clusters=clusters,
        overall=clusters.overall(),
        unused=clusters.unused(),
        no_cluster=color_hex(NO_CLUSTER_COLOR),
        curves=[scale_curve(name, points) for name, points in facts.curves.items()],
        curve_size=CURVE_SIZE,
        calibration_svg=None
        if facts.calibration is None
        else correspondences_svg(facts.calibration),
        confusion_chart=None if facts.confusion is None else confusion_svg(facts.confusion),
        crop_side=_CROP_SIDE,
        max_quarantine_rows=_MAX_QUARANTINE_ROWS,
    )
    index_uri = fs.join(folder_uri, "index.html")
    # A file name that is no valid UTF-8 holds lone surrogates, which can't be encoded.
    fs.write_bytes(index_uri, page.encode("utf-8", "backslashreplace"))
    return index_uri


def _worst_first(entries: Sequence[_Entry]) -> list[_Entry]:
    failed = [(entry.failure.accuracy, entry.order, entry) for entry in entries if entry.failure]
    return [entry for _, _, entry in sorted(failed, key=lambda each: each[:2])]


def _load_template() -> jinja2.Template:
    try:
        import jinja2
    except ImportError:
        raise ConfigError(
            "the report needs jinja2, which is not installed: pip install 'stego-ray[report]'"
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # for any name; the default looks at the template's suffix
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = percent
    environment.filters["number"] = number
    return environment.get_template("report.html.jinja")


def _write_image(images_uri: str, order: int, image: ReportImage, clusters: _Clusters) -> _Entry:
    check_pixels(image.pixels)
    pixels = fit_pixels(image.pixels, _THUMB_BOX)
    height, width = pixels.shape[:2]
    labels = resize_labels(image.labels, height, width)
    facts = clusters.legend(image), image.failure, image.confidence
    entry = _Entry(order, image.name, width, height, *facts)
    files = {
        "image.jpg": encode_jpeg(pixels),
        "overlay.jpg": encode_jpeg(overlay(pixels, labels, clusters.colors)),
        "mask.png": encode_png(mask_image(labels, clusters.colors)),
    }
    for name, content in files.items():
        fs.write_bytes(fs.join(images_uri, f"{entry.stem}-{name}"), content)
    return entry
