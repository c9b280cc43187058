"""The stage of bulk segmentation that runs the model; `segment_finish` is what follows it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from stego_core.config.schema import SegmentJob
from stego_core.distributed.fetch import pixel_groups
from stego_core.distributed.units import map_threads
from stego_core.inference.crf import refine_batch
from stego_core.inference.encode import encode_code
from stego_core.inference.predict import grid_confidence
from stego_core.model.segmenter import CLUSTER, load_segmenter

_RESULT = pa.schema(
    [
        ("confidence", pa.large_binary()),
        ("entropy", pa.float32()),
        ("grid_height", pa.int32()),
        ("grid_width", pa.int32()),
        ("products", pa.large_binary()),
        ("norm_code", pa.large_binary()),
        ("refined", pa.large_binary()),
        ("refined_bits", pa.int32()),
    ]
)


class SegmentWorker:
    """The actor's part: pixels to scores on the token grid, which are smaller than label maps.

    Where the CRF computes on the model's device, the label maps it made take their place.

    Args:
        model: folder of the model.
        precision: `fp32` or `bf16`.
        device: of torch.
        threads: batches computed at a time.
        job: the settings.
    """

    def __init__(
        self, *, model: str, precision: str, device: str, threads: int, job: SegmentJob
    ) -> None:
        self._segmenter = load_segmenter(
            model, weights=job.weights, precision=precision, device=device
        )
        self._device, self._threads, self._job = device, threads, job
        self._refines_here = job.crf and job.predict.crf_device == "model"
        self._refines_later = job.crf and not self._refines_here

    def __call__(self, unit: int, table: pa.Table) -> pa.Table:
        """Return the unit's rows with scores; pixels stay only where a CRF needs them."""
        results: list[dict[str, Any]] = [{}] * table.num_rows

        def segment(group: tuple[list[int], np.ndarray]) -> None:
            rows, pixels = group
            batch = torch.from_numpy(pixels).to(self._device)
            code = encode_code(self._segmenter, batch, self._job.predict, flip=self._job.flip)
            products = self._segmenter.products(code, CLUSTER)
            refined: list[np.ndarray | None] = [None] * len(rows)
            if self._refines_here:
                refined = [*refine_batch(batch, products, code, alpha=self._job.predict.alpha)]
            for row, *found in zip(rows, products, code, refined, strict=True):
                results[row] = self._result(*found)

        map_threads(segment, pixel_groups(table, self._job.predict.batch), self._threads)
        if not self._refines_later:
            table = table.drop_columns(["pixels"])
        for field in _RESULT:
            column = pa.array([r.get(field.name) for r in results], field.type)
            table = table.append_column(field, column)
        return table

    def _result(self, products: Tensor, code: Tensor, refined: np.ndarray | None) -> dict[str, Any]:
        confidence, entropy = grid_confidence(products, code, alpha=self._job.predict.alpha)
        result: dict[str, Any] = {
            "confidence": confidence.tobytes(),
            "entropy": entropy,
            "grid_height": confidence.shape[0],
            "grid_width": confidence.shape[1],
        }
        if refined is not None:
            return result | {"refined": refined.tobytes(), "refined_bits": 8 * refined.itemsize}
        result["products"] = products.cpu().numpy().tobytes()
        if self._refines_later:
            result["norm_code"] = code.cpu().numpy().tobytes()
        return result
