"""Small files of every accepted format to start from, and, where a folder is given, real ones."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
SIZE = (24, 16)
_REAL_FILES, _REAL_PHOTOGRAPHS = 20, 3


def _drawing() -> Image.Image:
    width, height = SIZE
    ramp = np.linspace(0, 255, width)[None, :, None] + np.zeros((height, 1, 3))
    noise = np.random.default_rng(0).normal(0, 20, (height, width, 3))
    return Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8))


def _variants(image_format: str, colour: Image.Image) -> list[tuple[Image.Image, dict]]:
    grey, palette = colour.convert("L"), colour.convert("P")
    deep = Image.fromarray(np.arange(16 * 24, dtype=np.uint16).reshape(16, 24) * 170)
    alpha = colour.copy()
    alpha.putalpha(grey)
    exif = Image.Exif()
    exif[0x0112] = 6
    plain: list[tuple[Image.Image, dict]] = [(colour, {}), (grey, {})]
    if image_format == "JPEG":
        noted = {"exif": exif, "comment": b"a note", "dpi": (72, 72)}
        cmyk = colour.convert("CMYK")
        return [*plain, (colour, {"progressive": True}), (colour, noted), (cmyk, {})]
    if image_format == "PNG":
        clear = {"transparency": 3}
        more = [(palette, clear), (alpha, {}), (deep, {}), (grey.convert("1"), {})]
        return [*plain, *more, (colour, {"exif": exif}), (grey.convert("LA"), {})]
    if image_format == "WEBP":
        moving = {"save_all": True, "append_images": [colour.rotate(180)]}
        return [*plain, (colour, {"lossless": True}), (alpha, {}), (colour, moving)]
    if image_format == "TIFF":
        kinds = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
        packed: list[tuple[Image.Image, dict]] = [(colour, {"compression": k}) for k in kinds]
        bilevel = (grey.convert("1"), {"compression": "group4"})
        tiled = (colour, {"compression": "tiff_lzw", "tiffinfo": {322: 16, 323: 16}})
        return [*plain, *packed, bilevel, tiled, (palette, {}), (alpha, {}), (deep, {})]
    return [*plain, (palette, {}), (grey.convert("1"), {}), (alpha, {})]


def make_seeds(image_format: str, picture: Image.Image | None = None) -> list[bytes]:
    """Return files of a few hundred bytes: each pixel mode and compression of the format."""
    files = []
    for image, options in _variants(image_format, picture or _drawing()):
        buffer = io.BytesIO()
        image.save(buffer, image_format, **options)
        files.append(buffer.getvalue())
    return files


def real_seeds(folder: Path, image_format: str, max_bytes: int) -> list[bytes]:
    """Return real files of a folder, and its photographs made small and saved in this format.

    The same ones each time, none longer than `max_bytes`.
    """
    suffixes = {"JPEG": (".jpg", ".jpeg"), "TIFF": (".tif", ".tiff")}
    wanted = suffixes.get(image_format, (f".{image_format.lower()}",))
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    small = [p for p in paths if p.suffix.lower() in wanted and p.stat().st_size <= max_bytes]
    files = [path.read_bytes() for path in _spread(small, _REAL_FILES)]
    photographs = [path for path in paths if path.suffix.lower() in suffixes["JPEG"]]
    for path in _spread(photographs, _REAL_PHOTOGRAPHS):
        with Image.open(path) as photograph:
            files += make_seeds(image_format, photograph.convert("RGB").resize(SIZE))
    return files


def _spread(paths: list[Path], count: int) -> list[Path]:
    return paths[:: max(1, len(paths) // count)][:count]
