"""A backbone that remembers: what it made of pixels once is read, not computed again.

Legend: B images, H W pixels, C feature channels, h w grid.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from stego_core.config.load import fingerprint
from stego_core.model.backbone import Backbone
from stego_core.storage import fs

logger = logging.getLogger(__name__)

_VERSION = 1  # of what a file holds
_NAME = "features"


class StoredBackbone(nn.Module):
    """Stands where a backbone does, and keeps its features in a folder or bucket.

    Each pass is a file of its own, named by a hash of the whole batch: in bf16 the features of an
    image depend on its company in the last digits, and a result must not depend on whether a store
    was there. So they are kept in float32, as the backbone gives them. Flipped, rescaled and cut
    images are other pixels, and need no name of their own.

    A store is a convenience: one that can't be read or written is left alone from then on.

    Args:
        backbone: that computes what is not there.
        uri: of the store. Backbones of other weights, settings or precision, on another kind of
            processor or computed by another torch or timm, have folders of their own in it.
        settings: of the backbone, as a model's card has them.
    """

    def __init__(self, backbone: Backbone, uri: str, settings: dict[str, Any]) -> None:
        super().__init__()
        self._backbone = backbone
        self.patch_size, self.width = backbone.patch_size, backbone.width
        self._lock, self._passes = Lock(), Counter[str]()
        self._is_usable = True
        feature = settings["feature"]
        what = [settings["name"], feature, settings["blocks"] if feature == "blocks" else []]
        what += [settings["positions"]] if settings.get("positions", "exact") != "exact" else []
        versions = [_VERSION, torch.__version__, timm.__version__]
        processor = _processor(next(backbone.parameters()).device)
        key = fingerprint(what, backbone.weights.sha256, backbone.precision, versions, processor)
        self._uri = fs.join(uri, key)

    def prepare(self, pixels_BHWC: Tensor) -> Tensor:
        """Normalise pixels, as `Backbone.prepare`."""
        return self._backbone.prepare(pixels_BHWC)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the features of a batch, as `Backbone.forward`."""
        grid = (side // self.patch_size for side in images_BCHW.shape[2:])
        shape = (len(images_BCHW), self.width, *grid)
        uri = fs.join(self._uri, f"{_digest(images_BCHW)}.safetensors")
        found = self._read(uri, shape)
        if found is not None:
            self._count("read")
            return found.to(images_BCHW.device)
        features: Tensor = self._backbone(images_BCHW)
        self._count("kept" if self._write(uri, features) else "computed")
        return features

    def _read(self, uri: str, shape: tuple[int, ...]) -> Tensor | None:
        """Return what a file holds; None where there is none, or one that can't be used."""
        data = None
        if self._is_usable:
            with self._spared():
                data = fs.read_if_exists(uri)
        if data is None:
            return None
        try:
            features = safetensors.torch.load(data).get(_NAME)
        except safetensors.SafetensorError:
            return None  # cut off or of another kind: computed again, and written anew
        fits = features is not None and features.shape == shape and features.dtype == torch.float32
        return features if fits else None

    def _write(self, uri: str, features: Tensor) -> bool:
        if not self._is_usable:
            return False
        with self._spared():
            fs.write_bytes(uri, safetensors.torch.save({_NAME: features.cpu().contiguous()}))
            return True
        return False

    @contextmanager
    def _spared(self) -> Iterator[None]:
        """Leave the store alone from the first fault on."""
        try:
            yield
        except OSError as error:
            self._is_usable = False
            logger.warning("%s is left alone: %s", self._uri, error)

    def _count(self, what: str) -> None:
        with self._lock:
            self._passes[what] += 1

    def take_counts(self) -> dict[str, int]:
        """Return how many passes were `read`, `kept`, or only `computed` since the last call."""
        with self._lock:
            taken, self._passes = self._passes, Counter()
        return dict(taken)


def _digest(images_BCHW: Tensor) -> str:
    pixels = images_BCHW.cpu().contiguous().numpy()
    hasher = hashlib.sha256(repr(pixels.shape).encode())
    hasher.update(pixels.data)
    return hasher.hexdigest()


def _processor(device: torch.device) -> str:
    """Return what decides the last digits of a product, as far as torch tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
