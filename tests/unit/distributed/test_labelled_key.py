"""What a study is scored on is stored anew when weights or labels change, and only then."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.numpy
from factories import picture, png_bytes, write_tree

from stego_core.config.schema import TrainJob, TuneJob
from stego_core.datasets.directory import open_dataset
from stego_core.distributed import labelled
from stego_core.storage.manifest import list_images


@pytest.fixture
def root(tmp_path: Path) -> Path:
    names = [f"{number}.png" for number in range(2)]
    tree = {f"imgs/val/{name}": png_bytes(picture()) for name in names}
    return write_tree(tmp_path, tree | {f"labels/val/{n}": png_bytes(picture()) for n in names})


def key(root: Path, monkeypatch: pytest.MonkeyPatch, *, weights="abc") -> str:
    monkeypatch.setattr(labelled, "_run", lambda *args: iter(()))
    dataset = open_dataset(str(root), "val")
    source = (dataset, list_images(dataset.images_uri))
    job = TuneJob(out=str(root / "study"))
    return labelled.store_labelled(job, TrainJob(), source, weights_sha256=weights).key


def test_other_weights_or_labels_have_a_store_of_their_own(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = key(root, monkeypatch)
    assert key(root, monkeypatch) == first
    assert key(root, monkeypatch, weights="def") != first
    (root / "labels" / "val" / "1.png").write_bytes(png_bytes(picture(seed=5)))
    assert key(root, monkeypatch) != first


def test_a_store_of_images_without_labels_counts_nothing(tmp_path: Path) -> None:
    store = labelled.LabelledStore(str(tmp_path), 1)
    (tmp_path / "unit-00000000.safetensors").write_bytes(safetensors.numpy.save({}))
    counts = store.confusion(SimpleNamespace(num_clusters=7))
    assert (counts.shape, counts.any()) == ((255, 7), False)
