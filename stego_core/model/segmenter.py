"""The whole model: backbone, head and clusters as one module, with its file format.

Legend: B images, H W pixels, C feature channels, K code channels, E details, N clusters, h w grid.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stego_core.config.method import HeadConfig
from stego_core.config.schema import BackboneConfig
from stego_core.errors import CheckpointError, InputError
from stego_core.model.backbone import Backbone, load_backbone
from stego_core.model.checkpoint import MODEL_VERSION, find_model, load_tensors, save_tensors
from stego_core.model.head import Head
from stego_core.model.merging import strongest_products
from stego_core.model.smoothing import smooth_code
from stego_core.model.weights import RANDOM, ResolvedWeights
from stego_core.model.whitening import Whitening
from stego_core.storage import fs
from stego_core.storage.names import below

CLUSTER, LINEAR = "cluster", "linear"
BASELINE, BASELINE_LINEAR = "baseline_kmeans", "baseline_linear"
# What predicts class ids, by the prefix of its tensors; the others predict clusters.
CLASSIFIERS = (LINEAR, BASELINE_LINEAR)
ON_FEATURES = (BASELINE, BASELINE_LINEAR)  # these take features, the others codes


class Segmenter(nn.Module):
    """Images to code, and code to scores of clusters or classes.

    Args:
        backbone: frozen features.
        tensors: `head.*`, `clusters` (N, K); where clusters were merged `merge`, the cluster of
            each row of `clusters`; where it was fitted `baseline` (N, C); with labels
            `linear.weight` (classes, K or K + E) and `linear.bias`, and where it was fitted
            `baseline_linear.weight` (classes, C) and `.bias`; with whitening `whitening.mean`
            (C,) and `whitening.projection` (D, C), with details `whitening.detail` (E, C).
        card: what was read from `model.json`.

    Raises:
        CheckpointError: if the tensors don't fit each other.
    """

    def __init__(
        self, backbone: Backbone, tensors: dict[str, Tensor], card: dict[str, Any]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.card = card
        self.whitening: Whitening | None = None
        if "whitening.mean" in tensors:
            self.whitening = Whitening(
                tensors["whitening.mean"],
                tensors["whitening.projection"],
                tensors.get("whitening.detail"),
            )
        config = HeadConfig(**card["head"])
        self._smooth = config.smooth
        if config.kind != "none" and len(tensors["head.linear.weight"]) != config.dim:
            # Looked at before a head is built: its size would be only what a file claims.
            raise CheckpointError("the head's weights don't fit the settings of the head")
        self.head = Head(self.whitening.width if self.whitening else backbone.width, config)
        prefix = "head."
        weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        try:
            self.head.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError("the head's weights don't fit the backbone's width") from error
        self.register_buffer("clusters", F.normalize(tensors["clusters"], dim=1))
        self.register_buffer("merge", tensors.get("merge"))
        self.num_clusters = len(tensors["clusters"])  # N
        if "merge" in tensors:
            self.num_clusters = int(tensors["merge"].max()) + 1
        self.has_baseline = "baseline" in tensors  # an imported model has none
        if self.has_baseline:
            self.register_buffer("baseline", F.normalize(tensors["baseline"], dim=1))
        self.classifiers = {
            name: (tensors[f"{name}.weight"], tensors[f"{name}.bias"])
            for name in CLASSIFIERS
            if f"{name}.weight" in tensors
        }
        self._check_shapes()
        self.requires_grad_(False).eval()

    def _check_shapes(self) -> None:
        """Refuse what would fail at the first image, or count clusters that are not there.

        Raises:
            CheckpointError: if the shapes of the tensors don't go with each other.
        """
        buffers = dict(self.named_buffers(recurse=False))
        width = self.head.dim
        details = self.whitening.num_details if self.whitening else 0
        wanted = {"clusters": (width,), "baseline": (self.backbone.width, self.head.width)}
        wrong = [
            name
            for name, widths in wanted.items()
            if name in buffers and tuple(buffers[name].shape[1:]) not in [(k,) for k in widths]
        ]
        merge = buffers.get("merge")
        if merge is not None and merge.shape != buffers["clusters"].shape[:1]:
            wrong.append("merge")
        for name, (weight, bias) in self.classifiers.items():
            channels = {width, width + details}
            if name in ON_FEATURES:
                channels = {self.backbone.width}
            if weight.shape[:1] != bias.shape or weight.shape[1] not in channels:
                wrong.append(name)
        if wrong or not self.num_clusters:
            names = ", ".join(wrong) or "clusters"
            raise CheckpointError(f"tensors of another shape than the head's: {names}")

    def encode(self, pixels_BHWC: Tensor, *, flip: bool = False) -> tuple[Tensor, Tensor]:
        """Return features and code of a batch.

        Args:
            pixels_BHWC: uint8 RGB; H and W multiples of the patch size.
            flip: average with the mirrored image's, as the paper's evaluation does.

        Returns:
            Features (B, C, h, w) and code (B, K, h, w), float32.
        """
        images = self.backbone.prepare(pixels_BHWC)
        with torch.inference_mode():
            features = self.backbone(images)
            whitened = self._whiten(features)
            code = self.head(whitened)
            if flip:
                mirrored = self.backbone(images.flip(3))
                features = (features + mirrored.flip(3)) / 2
                code = (code + self.head(self._whiten(mirrored)).flip(3)) / 2
                whitened = self._whiten(features)
            code = smooth_code(code, whitened, temperature=self._smooth)
        return features, code

    def _linear_width(self) -> int:
        return self.classifiers[LINEAR][0].shape[1] if LINEAR in self.classifiers else 0

    def seen_by(self, kind: str, features_BChw: Tensor, code_BKhw: Tensor) -> Tensor:
        """Return what `products` of a kind takes: features, code, or code and details."""
        if kind in ON_FEATURES:
            return features_BChw
        # The probe that SGD trained knows no details.
        if kind == LINEAR and self.whitening is not None and self._linear_width() > self.head.dim:
            return torch.cat([code_BKhw, self.whitening.details(features_BChw)], 1)
        return code_BKhw

    def _whiten(self, features: Tensor) -> Tensor:
        return features if self.whitening is None else self.whitening(features)

    def products(self, maps_BChw: Tensor, kind: str) -> Tensor:
        """Return what upsampling and argmax turn into a label map: (B, N, h, w).

        For clusters these are inner products with unit centroids. Because interpolation is linear
        and a pixel's code length is common to all clusters, argmax of the upsampled products is
        that of the cosines of the upsampled code, without ever upsampling K channels.

        Args:
            maps_BChw: what `seen_by` gives for the kind.
            kind: which of the four.
        """
        if kind in CLASSIFIERS:
            if kind not in self.classifiers:
                raise CheckpointError(f"the model has no {kind}: it was trained unlabelled")
            weight, bias = self.classifiers[kind]
            return torch.einsum("bkhw,nk->bnhw", maps_BChw, weight.to(maps_BChw)) + bias.to(
                maps_BChw
            ).view(1, -1, 1, 1)
        if kind == BASELINE and not self.has_baseline:
            raise CheckpointError("the model has no baseline: it was imported, not trained here")
        centroids = self.get_buffer("clusters" if kind == CLUSTER else "baseline")
        products = torch.einsum("bkhw,nk->bnhw", maps_BChw, centroids)
        if kind == CLUSTER and self.merge is not None:
            return strongest_products(products, self.get_buffer("merge"))
        return products


def save_segmenter(folder_uri: str, tensors: dict[str, Tensor], card: dict[str, Any]) -> None:
    """Write a model folder: `model.safetensors` and `model.json`."""
    save_tensors(folder_uri, "model", tensors, {"version": MODEL_VERSION, **card})


def model_card(
    *, weights: ResolvedWeights, config: BackboneConfig, head: HeadConfig, **facts: Any
) -> dict[str, Any]:
    """Return what has to stand in `model.json` for the model to be loaded again."""
    return {
        "backbone": asdict(config),
        "backbone_weights": {"source": weights.source, "sha256": weights.sha256},
        "head": asdict(head),
        **facts,
    }


def load_segmenter(
    uri: str, *, weights: str | None = None, precision: str = "auto", device: str = "cpu"
) -> Segmenter:
    """Load a model from a run directory or checkpoint folder, local or URI.

    Args:
        uri: of the model.
        weights: file or URI of the backbone's weights; None looks where the training found them.
        precision: `auto`, `fp32` or `bf16`.
        device: of torch.

    Raises:
        CheckpointError: if it is not a model, or its backbone weights are not those it was
            trained with.
    """
    folder = find_model(uri)
    tensors, card = load_tensors(folder, "model")
    if card.get("version") != MODEL_VERSION:
        raise CheckpointError(f"{uri}: model version {card.get('version')!a:.40} is not known here")
    try:
        settings = _backbone_settings(card, folder, precision, weights)
        return _build(uri, tensors, card, settings, device)
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        # Whatever is missing, of another type or of another shape in a file that somebody changed.
        reason = " ".join(str(error).split())[:200]
        detail = f"{type(error).__name__}: {reason}"
        raise CheckpointError(f"{uri}: model.json and its tensors don't fit ({detail})") from error


def _backbone_settings(
    card: dict[str, Any], folder: str, precision: str, weights: str | None
) -> BackboneConfig:
    settings = {**card["backbone"], "precision": precision}
    settings["blocks"] = tuple(settings["blocks"])
    settings["weights"] = weights or _weights_uri(settings["weights"], folder)
    return BackboneConfig(**settings)


def _build(
    uri: str,
    tensors: dict[str, Tensor],
    card: dict[str, Any],
    settings: BackboneConfig,
    device: str,
) -> Segmenter:
    trained_with = card["backbone_weights"]["sha256"]
    try:
        backbone = load_backbone(settings, device=device, sha256=trained_with)
        return Segmenter(backbone, tensors, card).to(device)
    except CheckpointError as error:
        raise CheckpointError(f"{uri}: {error}") from error
    except InputError as error:
        raise InputError(f"{uri}: {error}; --weights takes another place of that file") from error


def _weights_uri(weights: str | None, folder_uri: str) -> str | None:
    """Return where the backbone's weights are: a relative path starts at the model's folder."""
    if weights is None or weights == RANDOM or not fs.is_local(weights):
        return weights
    is_whole = fs.local_path(weights).is_absolute()
    return weights if is_whole else below(folder_uri, weights)
