"""The first stage of streaming: which views are read when, and their pixels.

Nothing here imports torch: the tasks that read do without its memory.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from stego_core.distributed.packed import pack_result
from stego_core.images.views import ViewCutter

if TYPE_CHECKING:
    from stego_core.training.views import Reads

_THREADS = 8  # reads wait for the network; decoding releases the interpreter lock


@dataclass(frozen=True, slots=True)
class ViewImages:
    """Which image each view is of.

    Attributes:
        image_ids: (V,) int64.
        crops: (V,) number of the view in its image.
        uris: image URI by image id.
    """

    image_ids: np.ndarray
    crops: np.ndarray
    uris: dict[int, str]


class Asked:
    """What a training worker reads: tells the tasks that fetch, and not earlier than they may.

    An actor beside the worker, whose calls wait for each other. A read is released when those that
    were released and not taken yet leave room for it; the next one to be taken always is. So what
    is ahead of the worker is bounded, whatever Ray Data would let run.

    Args:
        images: of the views.
        views_ahead: that may be released and not taken.
    """

    def __init__(self, images: ViewImages, views_ahead: int) -> None:
        self._images, self._views_ahead = images, views_ahead
        self._reads: Reads = []
        self._first = self._next = 0  # number of the first read, and of the next to be released
        self._released: dict[int, np.ndarray] = {}
        self._changed = asyncio.Condition()
        self._is_closed = False

    async def expect(self, first: int, reads: Reads) -> None:
        """Take over what is read from a number on; what was expected before is forgotten."""
        async with self._changed:
            self._reads, self._first, self._next = reads, first, first
            self._released = {}
            self._release()

    async def taken(self, number: int) -> None:
        """Take note that the worker has a read."""
        async with self._changed:
            self._released.pop(number, None)
            self._release()

    async def close(self) -> None:
        """Have nothing for anybody, also for those who wait, until it is opened."""
        async with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    async def open(self) -> None:
        """Answer again."""
        async with self._changed:
            self._is_closed = False

    async def views(self, number: int) -> tuple[np.ndarray, list[tuple[str, int, list[int]]]]:
        """Return the distinct views of a read, and their images; wait until it is released.

        Returns:
            Views in ascending order, and URI, image id and crops of each image in that order. Both
            are empty where nobody wants the read any more.
        """
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._is_closed or number in self._released or number < self._next
            )
            nothing = np.empty(0, np.int64)
            views = nothing if self._is_closed else self._released.get(number, nothing)
        images: list[tuple[str, int, list[int]]] = []
        for view in views:
            image_id, crop = int(self._images.image_ids[view]), int(self._images.crops[view])
            if not images or images[-1][1] != image_id:
                images.append((self._images.uris[image_id], image_id, []))
            images[-1][2].append(crop)
        return views, images

    def _release(self) -> None:
        ahead = sum(map(len, self._released.values()))
        while self._next < self._first + len(self._reads):
            views = np.unique(self._reads[self._next - self._first])
            if ahead and ahead + len(views) > self._views_ahead:
                break
            self._released[self._next] = views
            self._next += 1
            ahead += len(views)
        self._changed.notify_all()


def fetch_views(
    views: np.ndarray, images: list[tuple[str, int, list[int]]], cutter: ViewCutter
) -> pa.Table:
    """Return the pixels of views: the columns `view` and `pixels`, raw bytes of each.

    Raises:
        InputError: if an image that mining could read can't be read any more.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        cut = pool.map(lambda image: cutter.cut(*image), images)
        pixels = [view.tobytes() for parts in cut for view in parts]
    return pa.table({"view": views, "pixels": pa.array(pixels, pa.large_binary())})


def fetch_read(row: pa.Table, *, asked: Any, cutter: ViewCutter) -> pa.Table:
    """Return the packed pixels of the read that a row names, when it is its time (see `Asked`)."""
    number = row["unit"][0].as_py()
    views, images = ray.get(asked.views.remote(number))
    return pack_result(number, lambda: fetch_views(views, images, cutter))
