"""Bytes of an image file to pixels, under explicit limits; every failure is a value.

The checks run in this order and the first that fails is the answer: no bytes, too many bytes,
format (by signature, so that no other decoder ever sees the data), header, number of pixels,
longest side, shortest side, tiles of a TIFF, pixel mode. Pixels are decoded only after all of them.

- One frame: the first of an animated or multi-page file. MPO, which many phones write, is JPEG
  with further frames behind the first, and is read as that JPEG.
- Transparency is composited on white. ICC profiles are ignored: pixels are taken as sRGB.
- 16-bit grey is scaled to 8 bit over its full range; 16-bit colour keeps its high bytes.
- Pillow's process-wide `MAX_IMAGE_PIXELS` is neither used nor changed; only WebP of more than
  twice that number (179 million pixels) is out of reach, and is reported as `too_many_pixels`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    ExifTags,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from stego_core.config.schema import ImageLimits
from stego_core.errors import ImageProblem
from stego_core.images.modes import GREY_16_MODES, IMAGE_MODES, LABEL_MODES, to_rgb
from stego_core.images.tiff import Source, Tiff, is_short, tile_size
from stego_core.images.webp import webp_size

LabelMap: TypeAlias = NDArray[np.uint8] | NDArray[np.uint16]
"""Class ids, (H, W)."""

NO_MEMORY: Final = "not enough memory"
"""How the detail of an image begins that a machine with more memory may decode."""

_Decoded = TypeVar("_Decoded")

ACCEPTED_FORMATS: Final = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
"""Formats of images, by Pillow's names. MPO counts as JPEG, BigTIFF as TIFF."""

_SIGNATURES: Final = (
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WEBP"),
    (re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"), "TIFF"),
    (re.compile(rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL), "BMP"),
    # Known, so that the user hears which format it is, and refused.
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), "AVIF"),
    (re.compile(rb"....ftyp(?:he[iv]|mi|ms)", re.DOTALL), "HEIF"),
    (re.compile(rb"....ftyp", re.DOTALL), "MP4 video"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "JPEG 2000"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "JPEG XL"),
    (re.compile(rb"8BPS"), "PSD"),
    (re.compile(rb"\0\0[\1\2]\0[^\0]"), "ICO"),
    (re.compile(rb"P[1-7fF]\s"), "PPM"),
    (re.compile(rb"%PDF-"), "PDF"),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "EPS"),
    (re.compile(rb"SIMPLE  ="), "FITS"),
    (re.compile(rb"\s*(?:<\?xml[^>]*>\s*)?<svg"), "SVG"),
)

# Words of Pillow's header errors that mean "an image, but of a kind it can't decode".
_UNSUPPORTED: Final = re.compile(
    "unsupported|not yet supported|unknown pixel mode|unknown data organi|cannot handle",
    re.IGNORECASE,
)
_T = Image.Transpose
_TURNS: Final = {2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE}
_TURNS.update({6: _T.ROTATE_270, 7: _T.TRANSVERSE, 8: _T.ROTATE_90})
_LYING: Final = frozenset(_TURNS[orientation] for orientation in (5, 6, 7, 8))


@dataclass(frozen=True, slots=True)
class ImageFailure:
    """Why one image can't be used.

    Args:
        problem: the reason, as it is stored in the masks table.
        detail: one line for a person, without the image's name.
    """

    problem: ImageProblem
    detail: str


class _RejectedError(Exception):
    def __init__(self, problem: ImageProblem, detail: object) -> None:
        self.failure = ImageFailure(problem, " ".join(str(detail).split())[:200])
        super().__init__(self.failure.detail)


# The plugins are called directly, because `Image.open` applies Pillow's process-wide limit.
_PLUGINS: Final[dict[str, Callable[[Source], ImageFile.ImageFile]]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "TIFF": Tiff,
    "BMP": BmpImagePlugin.BmpImageFile,
}


def decode_image(data: bytes, limits: ImageLimits) -> NDArray[np.uint8] | ImageFailure:
    """Decode an image to upright RGB, or say why it can't be.

    Never raises: whatever a decoder throws becomes an `ImageFailure`. Damage after which nothing
    can be decoded is `truncated` where bytes are missing, else `not_an_image`.

    Args:
        data: The whole file.
        limits: What is decoded at all; checked against the header before any pixel is decoded.

    Returns:
        RGB, uint8 (H, W, 3), contiguous and writable, with the EXIF orientation applied; or the
        failure.

    Examples:
        >>> decode_image(b"hello", ImageLimits()).problem.value
        'not_an_image'
    """

    def decode() -> NDArray[np.uint8]:
        opened = _open(data, limits, ACCEPTED_FORMATS)
        if opened.mode not in IMAGE_MODES:
            raise _RejectedError(ImageProblem.UNSUPPORTED_MODE, f"pixel mode {opened.mode}")
        _load(opened)
        return np.array(_upright(to_rgb(opened), opened))

    return _caught(decode)


def decode_label(data: bytes, limits: ImageLimits) -> LabelMap | ImageFailure:
    """Decode a PNG of class ids, or say why it can't be.

    The stored numbers are the ids: the index of a palette image rather than its colour, and
    0 to 3 or 0 to 15 of 2-bit or 4-bit grey. The EXIF orientation is applied as for images.

    Args:
        data: The whole file: a single-channel PNG of up to 8 or of 16 bits.
        limits: As for `decode_image`.

    Returns:
        Class ids, uint8 or (16-bit files) uint16, (H, W), contiguous; or the failure.

    Examples:
        >>> decode_label(b"GIF89a", ImageLimits()).detail
        'the format is GIF; accepted: PNG'
    """

    def decode() -> LabelMap:
        opened = _open(data, limits, ("PNG",))  # a lossy format would invent ids
        if opened.mode not in LABEL_MODES:
            detail = f"the label has {opened.mode} pixels, not one channel of class ids"
            raise _RejectedError(ImageProblem.UNSUPPORTED_MODE, detail)
        _load(opened)
        upright = np.array(_upright(opened, opened))
        if opened.mode in GREY_16_MODES:
            return upright.astype(np.uint16)
        # Byte 24 of a PNG is its bit depth. Pillow spreads 2-bit and 4-bit grey over 0 to 255.
        spread = {2: 85, 4: 17}.get(data[24], 1) if opened.mode == "L" else 1
        return upright.astype(np.uint8) // np.uint8(spread)

    return _caught(decode)


def upright_size(data: bytes, limits: ImageLimits) -> tuple[int, int] | ImageFailure:
    """Return height and width of an upright image, from its header.

    A PNG that says nothing of its orientation before its pixels is decoded: it may behind them.

    Args:
        data: The whole file.
        limits: As for `decode_image`.

    Examples:
        >>> upright_size(b"", ImageLimits()).problem.value
        'empty'
    """

    def read() -> tuple[int, int]:
        opened = _open(data, limits, ACCEPTED_FORMATS)
        # Pillow states a TIFF's size as it will be when it is upright.
        is_lying = not isinstance(opened, Tiff) and _turn(opened) in _LYING
        return opened.size if is_lying else (opened.height, opened.width)

    return _caught(read)


def _caught(decode: Callable[[], _Decoded]) -> _Decoded | ImageFailure:
    try:
        return decode()
    except _RejectedError as rejected:
        return rejected.failure
    except MemoryError:
        detail = f"{NO_MEMORY} to decode it"
        return _RejectedError(ImageProblem.TOO_MANY_PIXELS, detail).failure
    except Image.DecompressionBombError as error:
        return _RejectedError(ImageProblem.TOO_MANY_PIXELS, str(error)).failure
    except Exception as error:  # decoders raise nearly anything when a file is damaged
        return _RejectedError(ImageProblem.NOT_AN_IMAGE, str(error) or repr(error)).failure


def _open(data: bytes, limits: ImageLimits, accepted: tuple[str, ...]) -> ImageFile.ImageFile:
    """Read the header and check everything that can be known before decoding."""
    if not data:
        raise _RejectedError(ImageProblem.EMPTY, "the file has no bytes")
    if len(data) > limits.max_bytes:
        size = f"{len(data)} bytes"
        raise _RejectedError(ImageProblem.TOO_MANY_BYTES, f"{size}; limit {limits.max_bytes}")
    image_format = _sniff(data, accepted)
    if image_format == "WEBP" and (stated := webp_size(data)):
        _check_pixels(*stated, limits)
    opened = _read_header(data, image_format)
    width, height = opened.size
    _check_pixels(width, height, limits)
    size = f"{width} x {height} pixels"
    if max(width, height) > limits.max_side:
        raise _RejectedError(ImageProblem.TOO_LONG_SIDE, f"{size}; limit {limits.max_side}")
    if min(width, height) < limits.min_side:
        raise _RejectedError(ImageProblem.TOO_SMALL, f"{size}; at least {limits.min_side}")
    across, down = tile_size(opened)
    if across * down > limits.max_pixels:
        detail = f"tiles of {across} x {down} pixels; limit {limits.max_pixels}"
        raise _RejectedError(ImageProblem.TOO_MANY_PIXELS, detail)
    return opened


def _check_pixels(width: int, height: int, limits: ImageLimits) -> None:
    if width * height > limits.max_pixels:
        detail = f"{width} x {height} pixels; limit {limits.max_pixels}"
        raise _RejectedError(ImageProblem.TOO_MANY_PIXELS, detail)


def _sniff(data: bytes, accepted: tuple[str, ...]) -> str:
    for signature, name in _SIGNATURES:
        if signature.match(data[:512]):
            if name in accepted:
                return name
            detail = f"the format is {name}; accepted: {', '.join(accepted)}"
            raise _RejectedError(ImageProblem.UNSUPPORTED_FORMAT, detail)
    raise _RejectedError(ImageProblem.NOT_AN_IMAGE, f"no image format starts with {data[:12]!r}")


def _read_header(data: bytes, image_format: str) -> ImageFile.ImageFile:
    source = Source(data)
    # libwebp doesn't say why it refuses a file, but the file says how long it should be.
    is_short_webp = image_format == "WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data)
    try:
        return _PLUGINS[image_format](source)
    except Exception as error:
        if source.ran_out or is_short_webp:
            raise _RejectedError(ImageProblem.TRUNCATED, f"header: {error}") from error
        if _UNSUPPORTED.search(str(error)):
            raise _RejectedError(ImageProblem.UNSUPPORTED_MODE, error) from error
        raise


def _load(opened: ImageFile.ImageFile) -> None:
    """Decode the pixels; bytes that are missing are told apart from bytes that are wrong."""
    source = opened.fp
    has_short_header = isinstance(source, Source) and source.ran_out
    try:
        opened.load()
    except Exception as error:
        if has_short_header or "truncated" in str(error) or is_short(opened, source):
            raise _RejectedError(ImageProblem.TRUNCATED, error) from error
        raise


def _upright(image: Image.Image, opened: ImageFile.ImageFile) -> Image.Image:
    turn = _turn(opened)
    return image if turn is None else image.transpose(turn)


def _turn(opened: ImageFile.ImageFile) -> Image.Transpose | None:
    """Return the turn that the file's EXIF data ask for; what can't be read is upright."""
    try:
        # Pillow turns TIFF upright while it loads them and drops the tag.
        return _TURNS.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return None
