"""Model folders that are truncated, garbled or made to do harm: one clear error each."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from stego_core.config.method import HeadConfig
from stego_core.config.schema import BackboneConfig
from stego_core.errors import StegoError
from stego_core.model.backbone import load_backbone
from stego_core.model.head import Head
from stego_core.model.segmenter import load_segmenter, model_card, save_segmenter

TINY = BackboneConfig(name="test_vit", weights="random", precision="fp32")
HEAD = HeadConfig(dim=6, whiten=0)


@pytest.fixture(scope="module")
def parts():
    backbone = load_backbone(TINY)
    torch.manual_seed(0)
    head = Head(backbone.width, HEAD)
    tensors = {f"head.{key}": value for key, value in head.state_dict().items()}
    tensors |= {"clusters": torch.randn(4, 6), "baseline": torch.randn(4, backbone.width)}
    return tensors, model_card(weights=backbone.weights, config=TINY, head=HEAD)


@pytest.fixture
def folder(parts, tmp_path) -> Path:
    save_segmenter(str(tmp_path), *parts)
    load_segmenter(str(tmp_path))  # it is a model before it is damaged
    return tmp_path


def refused(folder: Path) -> str:
    with pytest.raises(StegoError) as caught:
        load_segmenter(str(folder))
    assert caught.value.exit_code in (2, 3)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


TENSORS = "model.safetensors"


def header(text: bytes, claimed: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_truncated_file_of_tensors_is_refused(folder, kept):
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[:kept])
    assert str(folder) in refused(folder)


@pytest.mark.parametrize(
    "data",
    [
        header(b"{}", 2**62),
        header(b" " * 1000, 10**9),
        header(
            b'{"clusters":{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,4]}}'
        ),
        header(b'{"clusters":{"dtype":"F32","shape":[1],"data_offsets":[0,400000000000]}}'),
        header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}'),
        header(b"[" * 100_000),
        header(b"\xff\xfe"),
        b"\x80\x04cposix\nsystem\n",
    ],
    ids=["2^62", "10^9", "overflow", "beyond", "negative", "nested", "no text", "pickle"],
)
def test_a_header_that_lies_about_sizes_is_refused_without_taking_memory(folder, data):
    (folder / TENSORS).write_bytes(data)
    assert str(folder) in refused(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "[" * 100_000, '{"version": ' + "9" * 10_000 + "}", "\0"],
    ids=["empty", "cut", "list", "null", "nested", "digits", "NUL"],
)
def test_a_card_that_is_no_card_is_refused(folder, text):
    (folder / "model.json").write_text(text)
    refused(folder)


CHANGES = {
    "no backbone": {"backbone": None},
    "a text for a backbone": {"backbone": "x"},
    "another backbone": {"backbone": {"name": "../../etc/passwd"}},
    "unknown settings": {"backbone": {"run": "rm"}},
    "blocks of text": {"backbone": {"blocks": 7}},
    "weights that are a list": {"backbone": {"weights": [1]}},
    "weights elsewhere": {"backbone": {"weights": "../../stolen.safetensors"}},
    "weights of a format that runs": {"backbone": {"weights": "x.pkl"}},
    "weights behind a NUL": {"backbone": {"weights": "a\0.safetensors"}},
    "no digest": {"backbone_weights": {}},
    "another digest": {"backbone_weights": {"sha256": "0" * 64}},
    "a digest that is none": {"backbone_weights": {"sha256": 5}},
    "no head": {"head": None},
    "a head of text": {"head": {"dim": "many"}},
    "a head of nobody": {"head": {"kind": "code", "extra": 1}},
    "a head of billions": {"head": {"dim": 2**28}},
    "a version of text": {"version": "x" * 10_000},
    "a list for a version": {"version": [[]]},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_card_with_other_content_is_one_line(folder, name):
    card = json.loads((folder / "model.json").read_text())
    for key, change in CHANGES[name].items():
        is_part = isinstance(change, dict) and change and isinstance(card[key], dict)
        card[key] = card[key] | change if is_part else change
    (folder / "model.json").write_text(json.dumps(card))
    refused(folder)


def test_weights_beside_the_model_may_not_be_named_out_of_its_folder(folder):
    card = json.loads((folder / "model.json").read_text())
    card["backbone"]["weights"] = "../../stolen.safetensors"
    (folder / "model.json").write_text(json.dumps(card))
    assert "leads out of its folder" in refused(folder)


SHAPES = {
    "clusters of another width": {"clusters": torch.zeros(4, 7)},
    "clusters in one row": {"clusters": torch.zeros(6)},
    "no clusters": {"clusters": torch.zeros(0, 6)},
    "clusters of whole numbers": {"clusters": torch.zeros(4, 6, dtype=torch.int64)},
    "a baseline of another width": {"baseline": torch.zeros(4, 3)},
    "merged clusters that are not there": {"merge": torch.zeros(9, dtype=torch.int64)},
    "a head of another width": {"head.linear.weight": torch.zeros(2, 2, 1, 1)},
    "a linear probe of another width": {
        "linear.weight": torch.zeros(3, 5),
        "linear.bias": torch.zeros(3),
    },
    "a whitening without its matrix": {"whitening.mean": torch.zeros(5)},
}


@pytest.mark.parametrize("name", SHAPES)
def test_tensors_of_another_shape_are_one_line(folder, parts, name):
    tensors = parts[0] | SHAPES[name]
    (folder / TENSORS).write_bytes(safetensors.torch.save(tensors))
    assert str(folder) in refused(folder)


@pytest.mark.parametrize("missing", ["clusters", "head.linear.weight"])
def test_missing_tensors_are_one_line(folder, parts, missing):
    tensors = {key: value for key, value in parts[0].items() if key != missing}
    (folder / TENSORS).write_bytes(safetensors.torch.save(tensors))
    refused(folder)


def test_names_of_tensors_are_never_paths(folder, parts):
    tensors = parts[0] | {"../../out": torch.zeros(1), "/etc/passwd": torch.zeros(1)}
    (folder / TENSORS).write_bytes(safetensors.torch.save(tensors))
    before = sorted(folder.parent.rglob("*"))
    load_segmenter(str(folder))
    assert sorted(folder.parent.rglob("*")) == before
