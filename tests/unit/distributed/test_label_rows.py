"""Labels that are there and can't be used are told apart from those that are missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from factories import picture, png_bytes, write_tree

from stego_core.config.limits import ImageLimits
from stego_core.datasets.directory import open_dataset
from stego_core.distributed import evaluate_stages
from stego_core.distributed.evaluate_stages import fetch_labelled, label_rows
from stego_core.distributed.fetch import WholeImage
from stego_core.errors import ImageProblem
from stego_core.images.decode import ImageFailure
from stego_core.storage.manifest import list_images, write_manifest


def test_a_label_that_cant_be_read_or_decoded_has_a_row_and_one_that_is_missing_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["fine", "missing", "unread", "broken"]
    tree = {f"imgs/val/{name}.png": png_bytes(picture()) for name in names}
    tree |= {"imgs/val/text.png": b"no picture", "labels/val/text.png": b""}
    root = write_tree(
        tmp_path, tree | {f"labels/val/{n}.png": png_bytes(picture()) for n in names if n[0] != "m"}
    )
    dataset = open_dataset(str(root), "val")
    manifest = write_manifest(
        str(tmp_path / "m.parquet"), list_images(dataset.images_uri), unit_images=9
    )
    read = evaluate_stages.read_or_reason

    def stumble(uri: str, *, is_listed: bool) -> bytes | ImageFailure:
        if "unread" in uri:
            return ImageFailure(ImageProblem.READ_FAILED, "the store is away")
        return read(uri, is_listed=is_listed)

    monkeypatch.setattr(evaluate_stages, "read_or_reason", stumble)
    prepare = WholeImage(resolution=64, patch=16)
    table = fetch_labelled(
        0, manifest=manifest, prepare=prepare, limits=ImageLimits(), dataset=dataset
    )
    stems = [Path(uri).stem for uri in table["image_uri"].to_pylist()]
    assert [label is None for label in table["label"].to_pylist()] == [
        stem in ("missing", "unread") for stem in stems
    ]
    broken = {stems.index("broken"): ImageFailure(ImageProblem.NOT_AN_IMAGE, "no signature")}
    rows = {Path(row["image_uri"]).stem: row for row in label_rows(table, broken)}
    assert {stem: row["reason"] for stem, row in rows.items()} == {
        "unread": "read_failed",
        "broken": "not_an_image",
    }
    assert rows["unread"]["detail"] == "the store is away"
    assert {row["stage"] for row in rows.values()} == {"label"}
