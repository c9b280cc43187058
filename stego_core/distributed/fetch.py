"""Reading and decoding the images of a work unit: the CPU stage before every model."""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from stego_core.config.compat import MineCompat
from stego_core.config.schema import ImageLimits, ViewConfig
from stego_core.distributed.isolate import ChildDecoder, Decode, TimeLimit
from stego_core.errors import ImageProblem, InputError
from stego_core.images.decode import ImageFailure, decode_image
from stego_core.images.geometry import fit_grid, resize_image
from stego_core.images.views import cut_view, view_count
from stego_core.storage import fs
from stego_core.storage.manifest import Manifest
from stego_core.storage.walk import is_readable_name

_NOT_THERE = {ImageProblem.VANISHED.value, ImageProblem.BAD_NAME.value}
_SECOND_LOOK_S = 1.0  # after which a listed image that is not there is asked for once more
_THREADS = 8  # reads wait for the network; decoding releases the interpreter lock

_COLUMNS = [
    ("status", pa.string()),
    ("detail", pa.string()),
    ("image_height", pa.int32()),
    ("image_width", pa.int32()),
    ("pixels", pa.large_binary()),
    ("pixel_height", pa.int32()),
    ("pixel_width", pa.int32()),
]

Prepare = Callable[[np.ndarray, int], np.ndarray]
Decoder = Callable[[bytes, ImageLimits], np.ndarray | ImageFailure]


def fetch_unit(
    unit: int,
    *,
    manifest: Manifest,
    prepare: Prepare,
    limits: ImageLimits,
    root: str | None = None,
    decoder: Decoder = decode_image,
    deaths: int = 0,
) -> pa.Table:
    """Return the manifest rows of a unit with their pixels, ready for the model.

    Args:
        unit: of the manifest.
        manifest: what to read.
        prepare: decoded image (H, W, 3) and image id → uint8 (..., h, w, 3) for the model.
        limits: of the decoder.
        root: folder of the images; None does not ask whether it is there.
        decoder: bytes and limits → RGB uint8 (H, W, 3) or a failure.
        deaths: how often a process died or was ended at this unit; from the first on, each image
            is decoded in a child process, so that one that kills it is found.

    Returns:
        The manifest's columns and `status`, `detail`, `image_height`, `image_width` (after EXIF
        orientation), `pixels` (raw bytes, null unless ok), `pixel_height`, `pixel_width`.

    Raises:
        InputError: if no image is there, because this machine does not see their folder.
    """
    rows = manifest.read_unit(unit)
    images = rows.select(["image_uri", "image_id", "image_bytes"]).to_pylist()
    decode = _Decode(decoder, prepare, limits)
    if deaths:
        child = ChildDecoder(decode, limits, share=1 / (1 + deaths))
        try:
            fetched = [_fetch_image(row, limits, child) for row in images]
        finally:
            child.close()
    else:
        limit = TimeLimit(limits.max_seconds)

        def in_time(data: bytes, image_id: int) -> dict[str, Any]:
            with limit.running():
                return decode(data, image_id)

        with ThreadPoolExecutor(_THREADS) as pool:
            fetched = list(pool.map(lambda row: _fetch_image(row, limits, in_time), images))
    if {found["status"] for found in fetched} <= _NOT_THERE:
        _require_folder(root)
    for name, kind in _COLUMNS:
        rows = rows.append_column(name, pa.array([f.get(name) for f in fetched], kind))
    return rows


def _require_folder(root: str | None) -> None:
    if root is not None and fs.is_local(root) and not fs.local_path(root).is_dir():
        raise InputError(
            f"{root} is not there on {platform.node()}: put the images where all nodes see them, "
            "or into a bucket"
        )


def _fetch_image(image: dict[str, Any], limits: ImageLimits, decode: Decode) -> dict[str, Any]:
    size = image["image_bytes"]
    if size > limits.max_bytes:  # known from the listing: not even read
        detail = f"{size} bytes; the limit is {limits.max_bytes}"
        return {"status": ImageProblem.TOO_MANY_BYTES.value, "detail": detail}
    data = read_or_reason(image["image_uri"])
    return _failed(data) if isinstance(data, ImageFailure) else decode(data, image["image_id"])


def _failed(failure: ImageFailure) -> dict[str, Any]:
    return {"status": failure.problem.value, "detail": failure.detail}


class _Decode:
    """Bytes and image id → columns; a class because it travels to child processes."""

    def __init__(self, decoder: Decoder, prepare: Prepare, limits: ImageLimits) -> None:
        self._decoder, self._prepare, self._limits = decoder, prepare, limits

    def __call__(self, data: bytes, image_id: int) -> dict[str, Any]:
        image = self._decoder(data, self._limits)
        if isinstance(image, ImageFailure):
            return _failed(image)
        pixels = self._prepare(image, image_id)
        return {
            "status": ImageProblem.OK.value,
            "image_height": image.shape[0],
            "image_width": image.shape[1],
            "pixels": pixels.tobytes(),
            "pixel_height": pixels.shape[-3],
            "pixel_width": pixels.shape[-2],
        }


def read_or_reason(uri: str, *, is_listed: bool = True) -> bytes | ImageFailure:
    """Return a file's bytes, or why they can't be read after passing faults were tried again.

    Args:
        uri: the file.
        is_listed: it was seen, so that a store which does not have it may show it in a moment.
    """
    try:
        try:
            return fs.read_bytes(uri)
        except FileNotFoundError:
            if fs.is_local(uri) or not is_listed:
                raise
            time.sleep(random.uniform(_SECOND_LOOK_S / 2, _SECOND_LOOK_S))
            return fs.read_bytes(uri)
    except FileNotFoundError:
        if not is_readable_name(uri):
            return ImageFailure(ImageProblem.BAD_NAME, "its name is not UTF-8: rename it")
        return ImageFailure(ImageProblem.VANISHED, "listed, but gone when it was read")
    except PermissionError:
        return ImageFailure(ImageProblem.READ_DENIED, "no permission to read it")
    except (OSError, pa.ArrowInvalid) as error:  # the latter where Arrow can't name the object
        return ImageFailure(ImageProblem.READ_FAILED, (str(error).splitlines() or [""])[0][:200])


class WholeImage:
    """Prepare for prediction: the whole image at model resolution, aspect ratio kept."""

    def __init__(self, *, resolution: int, patch: int, nearest: bool = False) -> None:
        self._resolution, self._patch, self._nearest = resolution, patch, nearest

    def __call__(self, image: np.ndarray, image_id: int = 0) -> np.ndarray:
        """Return (h, w, 3) uint8 with h and w multiples of the patch size."""
        h, w = fit_grid(
            image.shape[0], image.shape[1], resolution=self._resolution, patch=self._patch
        )
        return resize_image(image, h * self._patch, w * self._patch, nearest=self._nearest)


class SquareViews:
    """Prepare for training: the square views of an image."""

    def __init__(self, config: ViewConfig, *, side: int, compat: MineCompat) -> None:
        self._config, self._side, self._compat = config, side, compat

    def __call__(self, image: np.ndarray, image_id: int) -> np.ndarray:
        """Return (V, side, side, 3) uint8."""
        options = self._config, self._compat
        crops = range(view_count(self._config))
        views = [cut_view(image, image_id, crop, self._side, *options) for crop in crops]
        return np.stack(views)


def pixel_groups(table: pa.Table, batch: int) -> list[tuple[list[int], np.ndarray]]:
    """Group the usable images of a unit into batches of one shape.

    The groups depend on the unit alone, so each image is always computed in the same company.

    Args:
        table: of `fetch_unit`, single views.
        batch: most images of a group.

    Returns:
        Row numbers and pixels (B, h, w, 3) uint8 of each group.
    """
    shapes: dict[tuple[int, int], list[int]] = {}
    for row, (h, w) in enumerate(
        zip(table["pixel_height"].to_pylist(), table["pixel_width"].to_pylist(), strict=True)
    ):
        if h is not None:
            shapes.setdefault((h, w), []).append(row)
    groups = []
    for (h, w), rows in shapes.items():
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            pixels = [np.frombuffer(table["pixels"][r].as_buffer(), np.uint8) for r in part]
            groups.append((part, np.stack(pixels).reshape(len(part), h, w, 3)))
    return groups
