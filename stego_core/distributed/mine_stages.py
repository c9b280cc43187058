"""The stages that run the backbone on actors: of mining, with its receipt, and of streaming."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from stego_core.config.schema import BackboneConfig, MineJob
from stego_core.distributed.units import map_threads, receipt_table
from stego_core.errors import ImageProblem
from stego_core.model.backbone import load_backbone
from stego_core.model.head import dropout_masks
from stego_core.storage import feature_store

_BATCH = 8  # views of one forward pass
_DROPOUT = 0.1  # share of channels that the original drops, also while it mines
_DROPOUT_STREAM = 4


class EmbedWorker:
    """The actor's part: pixels of views to patch features and embeddings, written at once.

    Args:
        job: the settings.
        device: of torch.
        threads: batches computed at a time.
        store_uri: folder of the feature store.
        is_stored: whether patch features are kept, or embeddings only.
        weights_sha256: of the driver's weights; None does not compare.
    """

    def __init__(
        self,
        *,
        job: MineJob,
        device: str,
        threads: int,
        store_uri: str,
        is_stored: bool,
        weights_sha256: str | None = None,
    ) -> None:
        self._backbone = load_backbone(job.backbone, device=device, sha256=weights_sha256)
        self._threads, self._store_uri, self._is_stored = threads, store_uri, is_stored
        self._seed = job.seed if job.compat.mining_dropout else None

    def __call__(self, unit: int, table: pa.Table) -> pa.Table:
        """Write the unit's features and views; return the status of each image."""
        usable = [row for row, data in enumerate(table["pixels"].to_pylist()) if data is not None]
        ids: list[int] = []
        crops: list[int] = []
        views: list[np.ndarray] = []
        image_ids = table["image_id"].to_pylist()
        for row in usable:
            shape = (-1, table["pixel_height"][row].as_py(), table["pixel_width"][row].as_py(), 3)
            pixels = np.frombuffer(table["pixels"][row].as_buffer(), np.uint8).reshape(shape)
            views.extend(pixels)
            ids += [image_ids[row]] * len(pixels)
            crops += list(range(len(pixels)))
        batches = [np.stack(views[i : i + _BATCH]) for i in range(0, len(views), _BATCH)]
        features = map_threads(self._features, batches, self._threads)
        self._write(unit, table, features, ids, crops)
        return table.select(["image_id", "status"])

    def _features(self, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        images = self._backbone.prepare(torch.from_numpy(pixels))
        maps, token = self._backbone.with_class_token(images)
        return maps.cpu(), None if token is None else token.cpu()

    def _write(
        self,
        unit: int,
        table: pa.Table,
        features: list[tuple[torch.Tensor, torch.Tensor | None]],
        ids: list[int],
        crops: list[int],
    ) -> None:
        rows: list[dict[str, Any]] = []
        stored = None
        if features:
            maps = torch.cat([maps for maps, _ in features])
            tokens = [row.numpy() for _, token in features if token is not None for row in token]
            means = maps.mean((2, 3))
            if self._seed is not None:
                means = dropped_channels(means, self._seed, unit)
            embeddings = F.normalize(means, dim=1).numpy()
            ok = ImageProblem.OK.value
            rows = [
                {"image_id": i, "crop": crop, "status": ok, "embedding": row, "class_token": token}
                for i, crop, row, token in zip(
                    ids, crops, embeddings, tokens or [None] * len(ids), strict=True
                )
            ]
            if self._is_stored:
                stored = maps.permute(0, 2, 3, 1).numpy()
        for row in table.select(["image_id", "status", "detail"]).to_pylist():
            if row["status"] != ImageProblem.OK:
                rows.append(row | {"crop": 0})
        table = pa.Table.from_pylist(rows, feature_store.SCHEMA)
        feature_store.write_unit(self._store_uri, unit, table, stored)


class EmbedProbe(EmbedWorker):
    """The same computation, of which nothing is kept."""

    def _write(self, *_: object) -> None:
        pass


def dropped_channels(means_VC: torch.Tensor, seed: int, unit: int) -> torch.Tensor:
    """Return the means of features with a tenth of each view's channels dropped at random.

    Dropping a channel of a map and then averaging is the same as dropping its mean. The draw
    depends on seed and unit alone. The stored features keep all channels: training drops its own.

    Source: the original mines with its network in training mode.
    """
    state = np.random.SeedSequence([seed, _DROPOUT_STREAM, unit]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state) >> 1)
    views, channels = means_VC.shape
    return means_VC * dropout_masks(views, channels, _DROPOUT, generator)[:, :, 0, 0]


def count_unit(unit: int, table: pa.Table) -> pa.Table:
    """Return the receipt of a unit: how many images have which status."""
    return receipt_table(unit=unit, statuses=Counter(table["status"].to_pylist()))


class FeatureWorker:
    """The actor's part of streaming: pixels of views to patch features, as mining stores them.

    Args:
        config: of the backbone.
        device: of torch.
        threads: batches computed at a time.
        side: of a view, pixels.
        weights_sha256: of the weights that mining had; None does not compare.
    """

    def __init__(
        self,
        *,
        config: BackboneConfig,
        device: str,
        threads: int,
        side: int,
        weights_sha256: str | None = None,
    ) -> None:
        self._backbone = load_backbone(config, device=device, sha256=weights_sha256)
        self._threads, self._shape = threads, (-1, side, side, 3)

    def __call__(self, number: int, table: pa.Table) -> pa.Table:
        """Return the columns `view` and `features`, raw float16 (h, w, C) of each."""
        pixels = [
            np.frombuffer(cell.as_buffer(), np.uint8).reshape(self._shape)[0]
            for cell in table["pixels"]
        ]
        batches = [np.stack(pixels[i : i + _BATCH]) for i in range(0, len(pixels), _BATCH)]
        maps = map_threads(self._features, batches, self._threads)
        rows = [view.tobytes() for batch in maps for view in batch]
        return pa.table({"view": table["view"], "features": pa.array(rows, pa.large_binary())})

    def _features(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        maps = self._backbone(self._backbone.prepare(torch.from_numpy(pixels_BHWC)))
        stored: np.ndarray = maps.cpu().permute(0, 2, 3, 1).numpy().astype(np.float16)
        return stored
