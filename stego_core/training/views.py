"""Random access to what a step needs of a view: its features and, where there are any, labels."""

from __future__ import annotations

import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stego_core.config.compat import MineCompat
from stego_core.config.schema import ImageLimits, ViewConfig
from stego_core.datasets.directory import Dataset
from stego_core.images.apart import ApartDecoder
from stego_core.images.decode import ImageFailure
from stego_core.images.geometry import resize_labels, view_boxes
from stego_core.images.views import ViewCutter
from stego_core.model.backbone import Backbone
from stego_core.model.whitening import Whitening
from stego_core.storage import fs
from stego_core.storage.feature_store import StoredFeatures, Views
from stego_core.storage.retry import is_passing

IGNORE_INDEX = 255
_LABEL_CACHE_BYTES = 256 * 2**20
_READERS = min(8, os.cpu_count() or 1)  # of all labels, before the first step


class Reads(Protocol):
    """The views of one read after the other."""

    def __len__(self) -> int:
        """Return the number of reads."""

    def __getitem__(self, index: int, /) -> np.ndarray:
        """Return the views of one, (B,)."""


class FeatureSource(Protocol):
    """Features of views by index."""

    def expect(self, reads: Reads) -> None:
        """Be told which reads follow, in which order: a source may compute them ahead.

        Whatever was expected before and has not been read is not expected any more.
        """

    def read(self, views: np.ndarray) -> Tensor:
        """Return (B, C, h, w) float32, channels last in memory."""


class FromStore:
    """Features that mining stored: the backbone is not needed any more."""

    def __init__(self, store: StoredFeatures) -> None:
        self._store = store

    def expect(self, reads: Reads) -> None:
        """Do nothing: what is stored needs no time."""

    def read(self, views: np.ndarray) -> Tensor:
        """Return (B, C, h, w) float32."""
        return torch.from_numpy(self._store.read(views)).permute(0, 3, 1, 2)


class Whitened:
    """Features of another source as teacher and head see them."""

    def __init__(self, source: FeatureSource, whitening: Whitening) -> None:
        self._source, self._whitening = source, whitening

    def expect(self, reads: Reads) -> None:
        """Tell the source that is whitened."""
        self._source.expect(reads)

    def read(self, views: np.ndarray) -> Tensor:
        """Return (B, D, h, w) float32 unit vectors."""
        with torch.no_grad():
            whitened: Tensor = self._whitening(self._source.read(views))
        return whitened


class FromBackbone:
    """Features and pixels computed on demand, in this process.

    Args:
        backbone: the frozen network.
        views: all views.
        uris: image URI by image id.
        config: how views are cut.
        limits: of the decoder.
        compat: what the original does when it cuts them.
    """

    def __init__(
        self,
        backbone: Backbone,
        views: Views,
        uris: dict[int, str],
        *,
        config: ViewConfig,
        limits: ImageLimits,
        compat: MineCompat,
    ) -> None:
        self._backbone, self._views, self._uris = backbone, views, uris
        side = view_side(config, backbone.patch_size)
        self._cutter = ViewCutter(side, config, limits, compat)

    def expect(self, reads: Reads) -> None:
        """Do nothing: each read is computed when it is made."""

    def read(self, views: np.ndarray) -> Tensor:
        """Return (B, C, h, w) float32.

        Raises:
            InputError: if an image that mining could read can't be read any more.
        """
        return self.embed(self.pixels(views))

    def embed(self, pixels_BHWC: np.ndarray) -> Tensor:
        """Return the features of images, (B, C, h, w) float32.

        They are rounded like stored ones, so that a run is the same with and without store.
        """
        features: Tensor = self._backbone(self.images(pixels_BHWC))
        return features.cpu().half().float()

    def images(self, pixels_BHWC: np.ndarray) -> Tensor:
        """Return uint8 pixels normalised as the backbone sees them: (B, 3, H, W) float32."""
        return self._backbone.prepare(torch.from_numpy(pixels_BHWC))

    def pixels(self, views: np.ndarray) -> np.ndarray:
        """Return the pixels of views: uint8 RGB (B, H, W, 3).

        Raises:
            InputError: if an image that mining could read can't be read any more.
        """
        return np.stack([self._view_pixels(int(view)) for view in views])

    def _view_pixels(self, view: int) -> np.ndarray:
        image_id = int(self._views.image_ids[view])
        crop = int(self._views.crops[view])
        return self._cutter.cut(self._uris[image_id], image_id, [crop])[0]


class LabelSource:
    """Label pixels of views, for the linear probe only.

    Args:
        dataset: with labels.
        views: all views.
        paths: image path below the images folder, by image id.
        config: how views are cut.
        limits: of the decoder.
    """

    def __init__(
        self,
        dataset: Dataset,
        views: Views,
        paths: dict[int, str],
        *,
        config: ViewConfig,
        limits: ImageLimits,
    ) -> None:
        self._dataset, self._views, self._paths = dataset, views, paths
        self._config, self._limits, self._decoder = config, limits, ApartDecoder(limits)
        self._cache: OrderedDict[int, np.ndarray | None] = OrderedDict()
        self._cached_bytes = 0

    def read(self, views: np.ndarray, pixels: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Return labels at drawn pixels of views.

        Args:
            views: (B,) views.
            pixels: (B, P, 2) relative (x, y) in [0, 1).
            side: pixels along a view.

        Returns:
            Labels (B, P) int64, `IGNORE_INDEX` where an image has none, and the pixel centres
            (B, P, 2) as (x, y) in [-1, 1].
        """
        index = (pixels * side).long().clamp(max=side - 1)
        labels = torch.full(index.shape[:2], IGNORE_INDEX)
        for row, view in enumerate(views):
            label_map = self._view_labels(int(view), side)
            if label_map is not None:
                picked = label_map[index[row, :, 1].numpy(), index[row, :, 0].numpy()]
                labels[row] = torch.from_numpy(picked.astype(np.int64))
        return labels, (index + 0.5) / side * 2 - 1

    def read_maps(self, views: np.ndarray, side: int) -> Tensor:
        """Return the label maps of views: (B, side, side) int64, `IGNORE_INDEX` without labels."""
        maps = torch.full((len(views), side, side), IGNORE_INDEX)
        for row, view in enumerate(views):
            label_map = self._view_labels(int(view), side)
            if label_map is not None:
                maps[row] = torch.from_numpy(label_map.astype(np.int64))
        return maps

    def num_classes(self) -> int:
        """Return the largest label of any image plus one; 0 if there are no labels at all."""
        decoder = ApartDecoder(self._limits, at_once=_READERS)

        def largest(image_id: int) -> int:
            labels = self._read_labels(image_id, decoder)
            if not isinstance(labels, np.ndarray) or not (labels != IGNORE_INDEX).any():
                return -1
            return int(labels[labels != IGNORE_INDEX].max())

        with ThreadPoolExecutor(_READERS) as pool:
            return max(pool.map(largest, self._paths), default=-1) + 1

    def _view_labels(self, view: int, side: int) -> np.ndarray | None:
        image_id = int(self._views.image_ids[view])
        labels = self._image_labels(image_id)
        if labels is None:
            return None
        boxes = view_boxes(
            *labels.shape,
            crops=self._config.crops,
            ratio=self._config.crop_ratio,
            image_id=image_id,
        )
        return resize_labels(labels, side, side, box=boxes[self._views.crops[view]])

    def _image_labels(self, image_id: int) -> np.ndarray | None:
        if image_id in self._cache:
            self._cache.move_to_end(image_id)
            return self._cache[image_id]
        labels = self._read_labels(image_id, self._decoder)
        if isinstance(labels, OSError):
            return None  # and is asked for again
        self._cache[image_id] = labels
        self._cached_bytes += 0 if labels is None else labels.nbytes
        while self._cached_bytes > _LABEL_CACHE_BYTES:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= 0 if dropped is None else dropped.nbytes
        return labels

    def _read_labels(self, image_id: int, decoder: ApartDecoder) -> np.ndarray | OSError | None:
        """Return an image's labels, None without usable ones, or a fault that may pass."""
        uri = self._dataset.label_uri(self._paths[image_id])
        try:
            data = fs.read_if_exists(uri)
        except OSError as error:  # labels may be missing in any way: training needs none
            return error if not fs.is_local(uri) and is_passing(error) else None
        labels = None if data is None else decoder.label(data)
        if labels is None or isinstance(labels, ImageFailure):
            return None
        # Of 16 bits: what is no class of 8 bits is ignored, as when scored.
        return np.minimum(labels, IGNORE_INDEX).astype(np.uint8)


def view_side(config: ViewConfig, patch_size: int) -> int:
    """Return the side of a view in pixels: the resolution, rounded up to whole patches."""
    return -(-config.resolution // patch_size) * patch_size
