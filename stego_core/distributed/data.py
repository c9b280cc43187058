"""The start of every job on a data set: which images, and what is odd about them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict

from stego_core.config.schema import DataConfig, ImageLimits
from stego_core.datasets.check import DataCheck, check_dataset
from stego_core.datasets.decoders import Decoders
from stego_core.datasets.directory import Dataset
from stego_core.images.apart import ApartDecoder
from stego_core.storage.fs import ListedFile
from stego_core.storage.manifest import list_images
from stego_core.storage.run import RunDirectory

logger = logging.getLogger(__name__)


def decoders(limits: ImageLimits, *, at_once: int = 1) -> Decoders:
    """Return the decoders of drivers, under these limits: a file that ends one ends no job.

    Args:
        limits: what is decoded at all.
        at_once: files that are decoded at a time.
    """
    apart = ApartDecoder(limits, at_once=at_once)
    return Decoders(image=apart.image, label=apart.label, size=apart.size, limits=limits)


def select_images(data: DataConfig, dataset: Dataset) -> Sequence[ListedFile]:
    """Return the images that the settings choose, in stable order.

    Raises:
        InputError: if there is none.
    """
    return list_images(dataset.images_uri, limit=data.limit, fraction=data.fraction)


def plan_check(
    data: DataConfig, dataset: Dataset, files: Sequence[ListedFile], limits: ImageLimits
) -> list[str]:
    """Return the counts of a check and what it finds odd, one line each (see `check_data`)."""
    if dataset.labels_uri is None:
        return []
    check = _check(data, dataset, files, limits)
    return [
        f"label files: {check.labels}, images with one: {check.pairs} of {check.images}",
        *([check.values_text] if check.values_text else []),
        *(f"data: {finding.text}" for finding in check.findings),
    ]


def check_data(
    run: RunDirectory,
    data: DataConfig,
    dataset: Dataset,
    files: Sequence[ListedFile],
    limits: ImageLimits,
) -> DataCheck:
    """Check a data set, and say what is odd: all in one warning, and in one event.

    Which values labels hold without a `classes.txt` is told besides: it may be right.

    Raises:
        InputError: if the labels folder can't be listed.
    """
    check = _check(data, dataset, files, limits)
    if check.values_text:
        logger.info("%s", check.values_text)
    if check.findings:
        logger.warning("%s", "\n".join(f"data: {finding.text}" for finding in check.findings))
    run.event("data/check", images_uri=dataset.images_uri, **asdict(check))
    return check


def _check(
    data: DataConfig, dataset: Dataset, files: Sequence[ListedFile], limits: ImageLimits
) -> DataCheck:
    is_subset = data.limit is not None or data.fraction < 1
    return check_dataset(dataset, files, decoders(limits), is_subset=is_subset)
