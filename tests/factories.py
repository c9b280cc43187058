"""Small stand-ins that tests of several folders share: jobs, features, views, images, contexts."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stego_core.config.compat import MineCompat
from stego_core.config.method import ClustersConfig, HeadConfig, LossConfig, TrainConfig
from stego_core.config.neighbors import NeighborsConfig
from stego_core.config.schema import TrainJob
from stego_core.distributed.search_stages import ShardSearcher, view_groups, write
from stego_core.storage.feature_store import Views
from stego_core.training.loop import TrainData


class Killed(Exception):
    """What a `FolderContext` raises where a worker would have died."""


class FakeFeatures:
    """A feature source over an array (V, C, h, w); remembers which views were read.

    Reads have to be those that it was told to expect.
    """

    def __init__(self, maps: np.ndarray | torch.Tensor) -> None:
        self.maps = torch.as_tensor(maps, dtype=torch.float32)
        self.reads: list[list[int]] = []
        self._expected: list[list[int]] = []

    def expect(self, reads) -> None:
        self._expected = [[int(v) for v in reads[number]] for number in range(len(reads))]

    def read(self, views: np.ndarray) -> torch.Tensor:
        self.reads.append([int(view) for view in views])
        if self._expected:
            assert self.reads[-1] == self._expected.pop(0), "another read was expected"
        return self.maps[torch.from_numpy(np.asarray(views))].contiguous(
            memory_format=torch.channels_last
        )


class FakeLabels:
    """A label source: the class of a pixel is the half of the view that it lies in."""

    def read(self, views: np.ndarray, pixels: torch.Tensor, side: int):
        labels = (pixels[..., 0] > 0.5).long()
        labels[torch.from_numpy(np.asarray(views) % 3 == 0)] = 255
        return labels, pixels * 2 - 1


class FolderContext:
    """One worker whose checkpoints are folders of a directory, and that may die at a step."""

    def __init__(self, folder: Path, *, rank=0, num_workers=1, dies_at: int | None = None) -> None:
        self.folder, self.rank, self.num_workers = Path(folder), rank, num_workers
        self._dies_at = dies_at
        self.events: list[dict] = []

    def resume_folder(self) -> str | None:
        found = sorted(self.folder.glob("step-*"))
        return str(found[-1]) if found else None

    def checkpoint(self, step: int, save) -> None:
        if self.rank == 0:
            save(str(self.folder / f"step-{step:08d}"))

    def event(self, name: str, **values) -> None:
        self.events.append({"event": name, **values})
        if name == "train/step" and values["step"] == self._dies_at:
            raise Killed


def train_job(*, seed=0, head=None, loss=None, train=None, clusters=None, **settings) -> TrainJob:
    """A configuration whose steps take milliseconds; sections are given as dictionaries."""
    return TrainJob(
        seed=seed,
        head=HeadConfig(**{"dim": 6, "dropout": 0.1, **(head or {})}),
        loss=LossConfig(**{"samples": 3, "negatives": 2, "pointwise": True, **(loss or {})}),
        train=TrainConfig(
            **{
                "steps": 6,
                "batch": 4,
                "checkpoint_every": 2,
                "log_every": 1,
                "linear_pixels": 5,
                "linear_refit": False,  # so that steps train the linear probe, too
                **(train or {}),
            }
        ),
        clusters=ClustersConfig(**{"count": 3, "restarts": 2, "sample": 200, **(clusters or {})}),
        **settings,
    )


def random_maps(num_views: int, channels=8, height=5, width=4, *, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_views, channels, height, width))


def block_field(num_views=12, noise=0.1):
    """Maps in blocks of three planted directions: (V, C, h, w), and the direction of each cell."""
    generator = np.random.default_rng(0)
    directions = np.linalg.qr(generator.normal(size=(8, 8)))[0][:3]
    owner = generator.integers(0, 3, (num_views, 2, 2)).repeat(3, 1).repeat(3, 2)
    maps = directions[owner] + noise * generator.normal(size=(*owner.shape, 8))
    return maps.transpose(0, 3, 1, 2), owner


def ring_neighbors(num_views: int, count=2) -> np.ndarray:
    """Views whose neighbours are the next ones: (V, count) int64."""
    return (np.arange(num_views)[:, None] + np.arange(1, count + 1)) % num_views


def train_data(num_views=9, *, labels=False, seed=0, **changes) -> TrainData:
    values = {
        "features": FakeFeatures(random_maps(num_views, seed=seed)),
        "neighbors": ring_neighbors(num_views),
        "channels": 8,
        "labels": FakeLabels() if labels else None,
        "num_classes": 2 if labels else 0,
        "side": 40,
        "shifts": {},
    }
    return TrainData(**{**values, **changes})


def unit_rows(count: int, dim: int, *, seed=0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def make_views(num_images: int, *, crops=1, dim=4, seed=0) -> Views:
    """Views of images whose ids do not count upwards, as real ids don't."""
    ids = np.random.default_rng(seed).permutation(10 * num_images)[:num_images] + 2**40
    return Views(
        image_ids=np.repeat(ids.astype(np.int64), crops),
        crops=np.tile(np.arange(crops, dtype=np.int8), num_images),
        embeddings=unit_rows(num_images * crops, dim, seed=seed),
        failures=[],
    )


def picture(height=32, width=48, *, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png_bytes(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return Path(root)


def states_equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two modules hold the same tensors, bit for bit."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def write_neighbors(folder: Path, views: Views, config: NeighborsConfig, **compat: bool) -> None:
    """Write the neighbours table (key `k`) as the search stages do, without Ray."""
    groups = view_groups(views, exclude_own=config.exclude_own)
    rows = slice(0, len(groups))
    shard = ShardSearcher(views.embeddings, groups, 0, config, device="cpu", trained=None)
    found = shard.top_k(views.embeddings, groups, rows)
    vectors = views.embeddings if MineCompat(**compat).skip_first_neighbor else None
    uri = str(folder / "part-00000.parquet")
    write(found, views, vectors, rows, start=0, k=config.stored, uri=uri, key="k")
