"""The demo's pictures: crops of the photographs that scikit-image and scikit-learn ship.

They are free to use (see the README files in the two packages' data folders) and installed with
the extra `demo`, so the demo needs neither a download nor a data set.
"""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from stego_core.errors import ConfigError
from stego_core.storage import fs

DEMO = "demo"  # the value of --data.root and --input that stands for these pictures
DEMO_FOLDER = "runs/demo-images"

_PHOTOGRAPHS = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/motorcycle_right.png"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/ihc.png"),
    ("skimage", "data/retina.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)
_CROPS = 8
_SCALES = (0.45, 0.75)  # shortest and longest side of a crop, as a share of the photograph's
_MAX_SIDE = 480


def write_demo_images(folder: str) -> str:
    """Write each photograph and some crops of it as JPEG files; return the folder.

    Files that are there already stay as they are, so that a second run finds the same data.

    Raises:
        ConfigError: if scikit-image or scikit-learn is not installed.
    """
    for package, name in _PHOTOGRAPHS:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"the demo pictures need {package}: pip install 'stego-ray[demo]', "
                "or give your own folder"
            )
        source = Path(spec.origin).parent / name
        if not source.exists():  # the set of files varies between releases of the packages
            continue
        with Image.open(source) as image:
            photograph = image.convert("RGB")
        stem = source.stem
        for number, box in enumerate(_crop_boxes(photograph.width, photograph.height, stem)):
            uri = fs.join(folder, f"{stem}-{number}.jpg")
            if not fs.exists(uri):
                fs.write_bytes(uri, _jpeg(photograph.crop(box)))
    return folder


def _crop_boxes(width: int, height: int, name: str) -> list[tuple[int, int, int, int]]:
    generator = np.random.default_rng(list(name.encode()))
    boxes = [(0, 0, width, height)]
    for _ in range(_CROPS):
        scale = generator.uniform(*_SCALES)
        w, h = int(width * scale), int(height * scale)
        left, top = generator.integers(0, width - w + 1), generator.integers(0, height - h + 1)
        boxes.append((int(left), int(top), int(left) + w, int(top) + h))
    return boxes


def _jpeg(image: Image.Image) -> bytes:
    image.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def resolve_demo(root: str, *, write: bool) -> str | None:
    """Return the folder that `root` names; the word `demo` names the demo pictures.

    Args:
        root: value of --data.root or --input.
        write: make the demo pictures where they are missing; otherwise return None then.
    """
    if root != DEMO:
        return root
    folder = str(Path(DEMO_FOLDER).absolute())
    if write:
        return write_demo_images(folder)
    return folder if fs.exists(folder) else None
