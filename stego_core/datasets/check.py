"""What can be told of a data set before a run: counts, pairs by stem, and a sample of its labels.

Everything found is told at once. Labels are optional everywhere, so none of it ends a run that can
do without them.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from stego_core.datasets.decoders import Decoders
from stego_core.datasets.directory import Dataset, label_path
from stego_core.datasets.official import IGNORE
from stego_core.errors import InputError
from stego_core.storage import fs
from stego_core.storage.manifest import image_id

SAMPLED_LABELS = 200  # label files read, so that a check of any data set takes seconds
_SHOWN, _KEPT = 3, 100  # examples of a finding: in its line, and in the event
_THREADS = 8
_ASPECT_TOLERANCE = 0.02  # sizes rounded to whole pixels differ by less


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of thing that is odd, however often it is found.

    Attributes:
        kind: short name, as the event file has it.
        count: how often.
        text: one line with the count and the first examples.
        examples: the first hundred.
    """

    kind: str
    count: int
    text: str
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LabelValues:
    """Which values the label files of a sample hold, 255 (not labelled) left out.

    Attributes:
        minimum: None if they hold nothing but 255, as the next.
        maximum: the largest.
        distinct: how many there are.
    """

    minimum: int | None
    maximum: int | None
    distinct: int


@dataclass(frozen=True, slots=True)
class DataCheck:
    """What a check found.

    Attributes:
        images: number of images.
        labels: number of label files in the labels folder; 0 where there is no such folder.
        pairs: images with a label file.
        sampled: pairs that were looked into.
        findings: at most one of each kind.
        values: what their labels hold; None where a `classes.txt` says what they may hold, or none
            could be read.
    """

    images: int
    labels: int
    pairs: int
    sampled: int
    findings: tuple[Finding, ...]
    values: LabelValues | None = None

    @property
    def values_text(self) -> str | None:
        """Return a line on `values`: without class names, nobody else can judge them."""
        if self.values is None:
            return None
        found = f"{self.values.minimum} to {self.values.maximum}, {self.values.distinct} different"
        sample = f"a sample of {self.sampled} of " if self.sampled < self.pairs else ""
        return (
            f"label values beside {IGNORE}: {found if self.values.distinct else 'none'}, in "
            f"{sample}{self.pairs} label files; no classes.txt to compare them with"
        )


def check_dataset(
    dataset: Dataset, files: Sequence[fs.ListedFile], decoders: Decoders, *, is_subset: bool
) -> DataCheck:
    """Compare images and labels, by name and, in a sample, by content.

    The sample is the same in every run. A data set without a labels folder costs nothing.

    Args:
        dataset: where images and labels are.
        files: the images of the run.
        decoders: of label files.
        is_subset: `files` leaves images out on purpose: their labels are no surprise.

    Raises:
        InputError: if the labels folder can't be listed.
    """
    if dataset.labels_uri is None:
        return DataCheck(len(files), 0, 0, 0, ())
    labels = {f.path: f.uri for f in fs.list_files(dataset.labels_uri) if f.path.endswith(".png")}
    owners: dict[str, str] = {}
    without: list[str] = []
    sharing: list[str] = []
    pairs: list[tuple[fs.ListedFile, str]] = []
    for file in files:
        path = label_path(file.path)
        if path in owners:
            sharing.append(f"{owners[path]} and {file.path}")
        owners.setdefault(path, file.path)
        if path in labels:
            pairs.append((file, labels[path]))
        else:
            without.append(file.path)
    lost = [] if is_subset else [path for path in labels if path not in owners]
    of = f"of {len(files)} images"
    findings = [
        _finding("images_without_label", without, f"{{}} {of} have no label file"),
        _finding("labels_without_image", lost, f"{{}} of {len(labels)} label files have no image"),
        _finding("shared_label", sharing, f"{{}} {of} share a label file with another image"),
    ]
    sample = heapq.nsmallest(SAMPLED_LABELS, pairs, key=lambda pair: image_id(pair[0].path))
    more, values = _look_into(dataset, sample, decoders)
    found = tuple(finding for finding in [*findings, *more] if finding is not None)
    return DataCheck(len(files), len(labels), len(pairs), len(sample), found, values)


def _finding(kind: str, examples: list[str], text: str) -> Finding | None:
    if not examples:
        return None
    shown = ", ".join(examples[:_SHOWN]) + (", ..." if len(examples) > _SHOWN else "")
    line = f"{text.format(len(examples))}: {shown}"
    return Finding(kind, len(examples), line, tuple(examples[:_KEPT]))


def _look_into(
    dataset: Dataset, sample: list[tuple[fs.ListedFile, str]], decoders: Decoders
) -> tuple[list[Finding | None], LabelValues | None]:
    num_classes = len(dataset.class_names) or IGNORE
    with ThreadPoolExecutor(_THREADS) as pool:
        looked = list(pool.map(lambda pair: _look(pair[0], pair[1], decoders, num_classes), sample))
    odds = [odd for odd, _ in looked]
    of = f"of {len(sample)} label files looked into"
    names = f" (classes.txt names {num_classes})" if dataset.class_names else ""
    texts = {
        "unreadable_label": f"{{}} {of} can't be read and count as missing",
        "unknown_class": f"{{}} {of} hold values that are no class{names}",
        "other_shape": f"{{}} {of} have another shape than their image",
    }
    findings = [
        _finding(kind, [odd[kind] for odd in odds if kind in odd], text)
        for kind, text in texts.items()
    ]
    read = [values for _, values in looked if values is not None]
    return findings, None if dataset.class_names or not read else _label_values(read)


def _label_values(read: list[set[int]]) -> LabelValues:
    values = set().union(*read) - {IGNORE}
    return LabelValues(min(values, default=None), max(values, default=None), len(values))


def _look(
    file: fs.ListedFile, label_uri: str, decoders: Decoders, num_classes: int
) -> tuple[dict[str, str], set[int] | None]:
    """Return what is odd about one pair, by kind, and the values of its labels if they are read."""
    try:
        labels = decoders.read_label(fs.read_bytes(label_uri))
    except (InputError, OSError) as error:
        return {"unreadable_label": f"{label_uri} ({' '.join(str(error).split())})"}, None
    odd = {}
    wrong = labels[(labels != IGNORE) & (labels >= num_classes)]
    if wrong.size:
        odd["unknown_class"] = f"{label_uri} ({int(wrong.max())})"
    size = _image_size(file, decoders)
    if size is not None:
        height, width = labels.shape
        aspect = (width / height) / (size[1] / size[0])
        pixels = max(1 / min(height, width), 1 / min(size))  # what rounding a side can do
        if abs(aspect - 1) > max(_ASPECT_TOLERANCE, pixels):
            odd["other_shape"] = f"{label_uri} ({width} x {height} for {size[1]} x {size[0]})"
    return odd, {*np.unique(labels).tolist()}


def _image_size(file: fs.ListedFile, decoders: Decoders) -> tuple[int, int] | None:
    """Return height and width of the upright image from its header, None if it has none."""
    if file.num_bytes > decoders.limits.max_bytes:
        return None
    try:
        size = decoders.size(fs.read_bytes(file.uri))
    except OSError:  # reading the pixels will tell what is wrong with it
        return None
    return size if isinstance(size, tuple) else None
