"""The figure of the worst masks, from rows made by hand."""

from __future__ import annotations

import base64
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from factories import picture, png_bytes

sys.path.insert(0, str(Path(__file__).parents[3]))

from benchmarks.failures import figure

SVG = "{http://www.w3.org/2000/svg}"


def row(uri: str, wrong: int, predicted: int | None = 1) -> dict[str, Any]:
    return {
        "image_uri": uri,
        "pixels": 200,
        "accuracy": 100 - wrong / 2,
        "true_class": 0,
        "predicted_class": predicted,
        "wrong_pixels": wrong,
    }


def test_the_worst_masks_are_shown_with_what_was_taken_for_what() -> None:
    masks = {name: png_bytes(picture(seed=ord(name))) for name in "abcdefghij"}
    rows = [row("a", 150), row("gone", 140), row("b", 120, None)]
    rows += [row(name, 10) for name in "cdefghij"] + [row("z", 0)]
    root = ET.fromstring(figure(rows, masks, {0: "sheep & goat", 1: "cow"}))
    found = [element.get("href", "") for element in root.iter(SVG + "image")]
    assert [base64.b64decode(href.partition(",")[2]) for href in found] == [
        masks[name] for name in "abcdefgh"
    ]
    words = ["".join(element.itertext()) for element in root.iter(SVG + "text")]
    assert words[:2] == ["25 % right", "sheep & goat in cow: 75 %"]
    assert "60 %" in " ".join(words[2:5])
    assert "without class" in " ".join(words[2:5])
