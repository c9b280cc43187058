"""Dense CRF refinement of images, by pydensecrf or by our own mean-field inference.

The kernels and their constants are those of the paper's evaluation, the code is written from
pydensecrf's own documentation.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stego_core.config.predict import LabelMapConfig
from stego_core.errors import ConfigError
from stego_core.inference.mean_field import (
    BILATERAL_COMPAT,
    BILATERAL_SRGB,
    BILATERAL_SXY,
    GAUSSIAN_COMPAT,
    GAUSSIAN_SXY,
    ITERATIONS,
    refine_mean_field,
)
from stego_core.inference.predict import interpolation_matrix

FAST, DENSE = "fast", "dense"
_BATCH_PIXELS = 2**20  # refined at once, which bounds the memory: 400 to 700 bytes of each


def describe_crf(config: LabelMapConfig, *, is_on: bool) -> str:
    """Return what a plan says of the CRF."""
    if not is_on:
        return "crf: off"
    return f"crf: {config.crf}" + (" on the model's device" if config.crf_device == "model" else "")


def require_crf(method: str) -> None:
    """Check that what a CRF needs is there, before any work is done.

    Args:
        method: `fast` or `dense`.

    Raises:
        ConfigError: if the library is not installed.
    """
    if method == FAST:
        return
    try:
        import pydensecrf.densecrf  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--predict.crf dense needs the extra `crf`: pip install 'stego-ray[crf]' (a C++ "
            "compiler is needed); --predict.crf fast needs none"
        ) from error


def upsampled_log_probs(
    products_Nhw: Tensor,
    code_Khw: Tensor,
    *,
    height: int,
    width: int,
    alpha: float,
    is_cosine: bool = True,
) -> Tensor:
    """Return log softmax(alpha * cosine) of the upsampled code: (N, height, width) float32.

    The code's length at a pixel is that of the upsampled code, so K channels are upsampled here.
    With `is_cosine` off the products are logits, as a linear probe's are: log softmax of them.
    Either may be of a batch: (B, N, h, w) and (B, K, h, w) give (B, N, height, width).
    """
    device = products_Nhw.device
    down = interpolation_matrix(height, products_Nhw.shape[-2]).to(device)
    across = interpolation_matrix(width, products_Nhw.shape[-1]).to(device)
    products = torch.einsum("ph,...nhw,qw->...npq", down, products_Nhw.float(), across)
    if not is_cosine:
        return torch.log_softmax(products, -3)
    norm = products.new_zeros(*products.shape[:-3], height, width)
    for channel in code_Khw.float().unbind(-3):
        norm += (down @ channel @ across.T).square()
    return torch.log_softmax(alpha * products / norm.sqrt().clamp_min(1e-10).unsqueeze(-3), -3)


def refine(pixels_HWC: np.ndarray, log_probs_NHW: Tensor, method: str) -> np.ndarray:
    """Return the label map after mean-field inference.

    Args:
        pixels_HWC: uint8 RGB of the same height and width.
        log_probs_NHW: log probabilities, float32.
        method: `dense`, pydensecrf; or `fast`, which agrees with it in 99.5 % of the pixels
            (`refine_mean_field`).

    Returns:
        (H, W) uint8, or uint16 for more than 255 clusters.
    """
    dtype = _label_dtype(len(log_probs_NHW))
    if method == DENSE:
        return _refine_dense(pixels_HWC, log_probs_NHW).astype(dtype)
    pixels = torch.from_numpy(np.array(pixels_HWC))  # a copy: torch warns of read-only buffers
    refined = refine_mean_field(pixels[None], log_probs_NHW[None])[0]
    labels: np.ndarray = refined.numpy().astype(dtype)
    return labels


def refine_batch(
    pixels_BHWC: Tensor,
    products_BNhw: Tensor,
    code_BKhw: Tensor,
    *,
    alpha: float,
    is_cosine: bool = True,
) -> np.ndarray:
    """Return the label maps of the fast CRF of a batch, computed where its tensors are.

    Args:
        pixels_BHWC: uint8 RGB, its height and width those of the label maps.
        products_BNhw: scores on the token grid.
        code_BKhw: code on the token grid.
        alpha: see `upsampled_log_probs`.
        is_cosine: see `upsampled_log_probs`.

    Returns:
        (B, H, W) uint8, or uint16 for more than 255 clusters; up to rounding what `refine` gives
        each of the images alone.
    """
    height, width = pixels_BHWC.shape[1:3]
    at_once = max(1, _BATCH_PIXELS // (height * width))
    refined = [
        refine_mean_field(
            pixels,
            upsampled_log_probs(
                products, code, height=height, width=width, alpha=alpha, is_cosine=is_cosine
            ),
        )
        for pixels, products, code in zip(
            *(torch.split(whole, at_once) for whole in (pixels_BHWC, products_BNhw, code_BKhw)),
            strict=True,
        )
    ]
    labels: np.ndarray = torch.cat(refined).cpu().numpy()
    return labels.astype(_label_dtype(products_BNhw.shape[1]))


def _label_dtype(clusters: int) -> type[np.uint8 | np.uint16]:
    return np.uint8 if clusters <= 255 else np.uint16


def _refine_dense(pixels_HWC: np.ndarray, log_probs_NHW: Tensor) -> np.ndarray:
    import pydensecrf.densecrf as dcrf

    count, height, width = log_probs_NHW.shape
    unary = np.ascontiguousarray(-log_probs_NHW.numpy().reshape(count, -1))
    crf = dcrf.DenseCRF2D(width, height, count)
    crf.setUnaryEnergy(unary)
    crf.addPairwiseGaussian(sxy=GAUSSIAN_SXY, compat=GAUSSIAN_COMPAT)
    crf.addPairwiseBilateral(
        sxy=BILATERAL_SXY,
        srgb=BILATERAL_SRGB,
        rgbim=np.array(pixels_HWC, order="C"),  # a copy: pydensecrf refuses read-only buffers
        compat=BILATERAL_COMPAT,
    )
    posterior = np.asarray(crf.inference(ITERATIONS))
    labels: np.ndarray = posterior.argmax(0).reshape(height, width)
    return labels
