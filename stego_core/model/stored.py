"""A backbone that remembers: what it made of pixels once is read, not computed again.

Legend: B images, H W pixels, C feature channels, h w grid.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stego_core.config.load import fingerprint
from stego_core.model.backbone import Backbone
from stego_core.storage import fs


class StoredBackbone(nn.Module):
    """Stands where a backbone does, and keeps its features in a folder or bucket.

    Each pass is a file of its own, named by a hash of the pixels of the whole batch: in bf16 the
    features of an image depend on its company in the last digits, and a result must not depend on
    whether a store was there. So they are kept in float32, as the backbone gives them. Flipped,
    rescaled and cut images are other pixels, and need no name of their own.

    Args:
        backbone: that computes what is not there.
        uri: of the store; backbones of other weights, settings, precision or kind of device have
            folders of their own in it.
        settings: of the backbone, as a model's card has them.
    """

    def __init__(self, backbone: Backbone, uri: str, settings: dict[str, Any]) -> None:
        super().__init__()
        self._backbone = backbone
        self.patch_size, self.width = backbone.patch_size, backbone.width
        self._lock, self._passes = Lock(), Counter[str]()
        device = next(backbone.parameters()).device.type
        what = {name: settings[name] for name in ("name", "feature", "blocks")}
        self._uri = fs.join(
            uri, fingerprint(what, backbone.weights.sha256, backbone.precision, device)
        )

    def prepare(self, pixels_BHWC: Tensor) -> Tensor:
        """Normalise pixels, as `Backbone.prepare`."""
        return self._backbone.prepare(pixels_BHWC)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the features of a batch, as `Backbone.forward`."""
        grid = (side // self.patch_size for side in images_BCHW.shape[2:])
        shape = (len(images_BCHW), self.width, *grid)
        uri = fs.join(self._uri, f"{_digest(images_BCHW)}.npy")
        found = _read(uri, shape)
        self._count("computed" if found is None else "read")
        if found is not None:
            return found.to(images_BCHW.device)
        features: Tensor = self._backbone(images_BCHW)
        buffer = io.BytesIO()
        np.save(buffer, features.cpu().contiguous().numpy(), allow_pickle=False)
        fs.write_bytes(uri, buffer.getvalue())
        return features

    def _count(self, what: str) -> None:
        with self._lock:
            self._passes[what] += 1

    def take_counts(self) -> dict[str, int]:
        """Return how many passes were `read` and `computed` since the last call."""
        with self._lock:
            taken, self._passes = self._passes, Counter()
        return dict(taken)


def _digest(images_BCHW: Tensor) -> str:
    pixels = images_BCHW.cpu().contiguous().numpy()
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def _read(uri: str, shape: tuple[int, ...]) -> Tensor | None:
    """Return what a file holds; None where there is none, or one that can't be used."""
    data = fs.read_if_exists(uri)
    if data is None:
        return None
    try:
        features = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError):
        return None  # cut off or of another kind: computed again, and written anew
    fits = features.shape == shape and features.dtype == np.float32
    return torch.from_numpy(features) if fits else None
