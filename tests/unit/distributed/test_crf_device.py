"""Where the CRF computes changes no label but by rounding: after the model, or on its device."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from factories import picture, png_bytes
from PIL import Image

from stego_core.config.load import load_job
from stego_core.config.predict import LabelMapConfig
from stego_core.config.schema import BackboneConfig, EvaluateJob, HeadConfig, SegmentJob
from stego_core.distributed import evaluate_stages, segment
from stego_core.distributed.evaluate_stages import EvaluateWorker
from stego_core.distributed.segment_finish import masks_rows
from stego_core.distributed.segment_stages import SegmentWorker
from stego_core.errors import ConfigError
from stego_core.model.backbone import load_backbone
from stego_core.model.head import Head
from stego_core.model.segmenter import model_card, save_segmenter

CPU = LabelMapConfig()
BESIDE = LabelMapConfig(crf_device="model")
SIZES = [(48, 64), (32, 32), (48, 64)]  # two batches
COMMON = {"precision": "fp32", "device": "cpu", "threads": 1}


@pytest.fixture(params=[5, 300], ids=["uint8", "uint16"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    config = BackboneConfig(name="test_vit", weights="random", precision="fp32")
    backbone, settings = load_backbone(config), HeadConfig(dim=6, whiten=0)
    torch.manual_seed(0)
    head = Head(backbone.width, settings)
    tensors = {f"head.{key}": value for key, value in head.state_dict().items()}
    tensors |= {
        "clusters": torch.randn(request.param, 6),
        "baseline": torch.randn(4, backbone.width),
        "linear.weight": torch.randn(3, 6),
        "linear.bias": torch.randn(3),
    }
    card = model_card(weights=backbone.weights, config=config, head=settings)
    save_segmenter(str(tmp_path), tensors, card)
    return str(tmp_path)


def unit() -> pa.Table:
    """Three pictures, a picture that can't be used, and labels of their own size."""
    pictures = [picture(*size, seed=seed) // 4 for seed, size in enumerate(SIZES)]
    for pixels in pictures:
        pixels[:, pixels.shape[1] // 2 :] += 150  # with an edge that a CRF finds
    labels = [np.random.default_rng(0).integers(0, 3, (40, 50), dtype=np.uint8) for _ in SIZES]
    return pa.table(
        {
            "image_id": range(4),
            "image_uri": [f"{name}.png" for name in range(4)],
            "status": ["ok", "ok", "ok", "corrupt"],
            "detail": pa.nulls(4, pa.string()),
            "image_height": [40, 40, 40, None],
            "image_width": [50, 50, 50, None],
            "pixels": pa.array([*(p.tobytes() for p in pictures), None], pa.large_binary()),
            "pixel_height": [*(p.shape[0] for p in pictures), None],
            "pixel_width": [*(p.shape[1] for p in pictures), None],
            "label": pa.array([None, *map(png_bytes, labels[1:]), None], pa.large_binary()),
            "label_failure": pa.nulls(4),
        }
    )


def label_maps(rows: list[dict[str, Any]]) -> np.ndarray:
    """Return the pixels of all masks in a row."""
    masks = [Image.open(io.BytesIO(row["mask"]["bytes"])) for row in rows if row["mask"]]
    return np.concatenate([np.asarray(mask).flatten() for mask in masks])


@pytest.mark.parametrize("mask_size", ["model", "original"])
def test_masks_are_the_same(model: str, mask_size: str) -> None:
    rows = {}
    for name, crf, predict in (
        ("none", False, CPU),
        ("cpu", True, CPU),
        ("beside", True, BESIDE),
    ):
        job = SegmentJob(crf=crf, predict=predict, mask_size=mask_size)
        table = SegmentWorker(model=model, job=job, **COMMON)(0, unit())
        assert ("pixels" in table.column_names) == (name == "cpu")
        assert (table["products"].null_count == 4) == (name == "beside")
        rows[name] = masks_rows(0, table, folder="", job=job)
    assert [row["mask"] is None for row in rows["cpu"]] == [False, False, False, True]
    assert [row["mask"] is None for row in rows["beside"]] == [False, False, False, True]
    none, cpu, beside = (label_maps(rows[name]) for name in ("none", "cpu", "beside"))
    assert (none != cpu).mean() > 0.005
    assert (beside == cpu).mean() > 0.999
    for name in ("mean_confidence", "entropy"):
        assert [row[name] for row in rows["beside"]] == [row[name] for row in rows["cpu"]]


def test_scores_are_the_same(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, refine = {}, evaluate_stages.refine
    for name, crf, predict in (
        ("none", False, CPU),
        ("cpu", True, CPU),
        ("beside", True, BESIDE),
    ):
        job = EvaluateJob(crf=crf, predict=predict)
        later = pytest.fail if name == "beside" else refine
        monkeypatch.setattr(evaluate_stages, "refine", later)
        receipt = EvaluateWorker(model=model, job=job, **COMMON)(0, unit())["receipt"][0].as_py()
        counts[name] = json.loads(receipt)["confusion"]
    assert set(counts["cpu"]) == {"cluster", "baseline_kmeans", "linear"}
    for head in counts["cpu"]:
        none, cpu, beside = (np.array(counts[name][head]) for name in ("none", "cpu", "beside"))
        assert cpu.sum() == beside.sum() == 2 * 40 * 50  # a label map is missing
        assert abs(beside - cpu).sum() <= 0.001 * cpu.sum()
        assert abs(none - cpu).sum() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_masks_of_a_gpu_are_those_of_cpus_but_for_single_pixels(model: str) -> None:
    masks = []
    for device in ("cpu", "cuda"):
        job = SegmentJob(crf=True, predict=BESIDE)
        worker = SegmentWorker(model=model, job=job, **COMMON | {"device": device})
        table = worker(0, unit())
        masks.append(label_maps(masks_rows(0, table, folder="", job=job)))
    assert (masks[0] == masks[1]).mean() > 0.99


def test_pydensecrf_on_the_models_device_is_refused() -> None:
    flags = ["--input", "a", "--predict.crf", "dense", "--predict.crf-device", "model"]
    with pytest.raises(ConfigError, match="pydensecrf runs on CPUs only"):
        load_job(SegmentJob, flags, prog="test")


def test_an_output_of_before_the_setting_is_the_same(model: str) -> None:
    def record(**settings: Any) -> dict[str, Any]:
        return segment._record(SegmentJob(**settings), model, source="photos")["predict"]

    assert "crf_device" not in record()
    assert "crf_device" not in record(crf=True)
    assert "crf_device" not in record(predict=BESIDE)
    assert record(crf=True, predict=BESIDE)["crf_device"] == "model"
