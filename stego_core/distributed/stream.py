"""Features that nobody stored: computed by Ray Data as a training worker reads them (ADR 26).

One row of the plan is one read of the worker: its number → the pixels of its views (CPU tasks) →
their features (backbone actors), in the order of the reads. One execution serves all reads of a
training, those of the steps and those before and after: the actors load the backbone once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from stego_core.config.schema import BackboneConfig
from stego_core.distributed.mine_stages import FeatureWorker
from stego_core.distributed.packed import UnitError, Worker, raise_if_failed, unpack
from stego_core.distributed.stream_plan import StreamPlan
from stego_core.distributed.stream_reads import Asked, ViewImages, fetch_read
from stego_core.distributed.units import (
    ATTEMPTS,
    MAX_BLOCKS,
    UNIT_RETRIES,
    configure,
    last_line,
)
from stego_core.errors import ClusterError
from stego_core.images.views import ViewCutter
from stego_core.training.views import Reads

logger = logging.getLogger(__name__)

_SPARE_READS = 512  # of a plan, beside those of the steps: the passes before and after them


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """What streamed features are.

    Attributes:
        backbone: that computes them.
        cutter: of the views.
        images: of the views.
        shape: (h, w, C) of each view's features.
        weights_sha256: of the weights that mining had; None does not compare.
    """

    backbone: BackboneConfig
    cutter: ViewCutter
    images: ViewImages
    shape: tuple[int, int, int]
    weights_sha256: str | None = None


class StreamedFeatures:
    """A source of features for one training worker; use it as a context.

    Args:
        settings: what is computed.
        plan: by whom.
        steps: of the training, for the length of Ray Data's plan; more reads begin another one.
        debug: show Ray's progress.
    """

    def __init__(
        self, settings: StreamSettings, plan: StreamPlan, *, steps: int, debug: bool = False
    ) -> None:
        self._settings, self._plan, self._debug = settings, plan, debug
        self._length = min(MAX_BLOCKS, 2 * steps + _SPARE_READS)
        self._number = self._expected = 0  # of the next read, and after the last expected one
        self._blocks: Generator[pa.Table, None, None] | None = None
        node = ray.get_runtime_context().get_node_id()
        options = {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, True)}
        self._asked: Any = (
            ray.remote(Asked).options(**options).remote(settings.images, plan.views_ahead)
        )

    def __enter__(self) -> StreamedFeatures:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the actors."""
        self._stop()
        ray.kill(self._asked)

    def expect(self, reads: Reads) -> None:
        """Compute what will be read, as far ahead as the plan allows."""
        if self._number < self._expected:
            self._stop()  # what is on its way is not what follows
        self._expected = self._number + len(reads)
        ray.get(self._asked.expect.remote(self._number, reads))

    def read(self, views: np.ndarray) -> Tensor:
        """Return (B, C, h, w) float32.

        Raises:
            ValueError: if another read was expected.
            InputError: if an image that mining could read can't be read any more.
            ClusterError: if Ray fails again and again.
        """
        if self._number == self._expected:
            self.expect([views])
        table = self._take()
        distinct, places = np.unique(views, return_inverse=True)
        if not np.array_equal(table["view"].to_numpy(), distinct):
            self._stop()
            self._expected = self._number
            raise ValueError(f"read {self._number} is not the one that was expected")
        features = np.empty((len(views), *self._settings.shape), np.float32)
        for row, place in enumerate(places):
            cell = np.frombuffer(table["features"][place].as_buffer(), np.float16)
            features[row] = cell.reshape(self._settings.shape)
        self._asked.taken.remote(self._number)
        self._number += 1
        return torch.from_numpy(features).permute(0, 3, 1, 2)

    def _take(self) -> pa.Table:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._take_once()
            except (RayError, ExecutionTimeoutError, SystemError, UnitError) as error:
                self._stop()
                reason = last_line(error)
                if attempt == ATTEMPTS:
                    raise ClusterError(f"Ray failed {attempt} times, last: {reason}") from error
                logger.warning("streaming of features failed, starting it again: %s", reason)
                time.sleep(min(2**attempt, 30))
        raise AssertionError("unreachable")

    def _take_once(self) -> pa.Table:
        table = next(self._start(), None)
        if table is None:  # the plan has come to its end
            self._stop()
            table = next(self._start())
        raise_if_failed(table)
        return table

    def _start(self) -> Generator[pa.Table, None, None]:
        if self._blocks is None:
            self._blocks = self._stream(self._number)
        return self._blocks

    def _stop(self) -> None:
        if self._blocks is not None:
            with suppress(RayError):  # it may be what has died
                ray.get(self._asked.close.remote())  # tasks that wait would be waited for
            self._blocks.close()
            self._blocks = None

    def _stream(self, first: int) -> Generator[pa.Table, None, None]:
        configure(debug=self._debug)
        ray.get(self._asked.open.remote())
        plan, settings = self._plan, self._settings
        numbers = [{"unit": number} for number in range(first, first + self._length)]
        data = ray.data.from_items(numbers, override_num_blocks=self._length)
        one: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
        data = data.map_batches(
            fetch_read,
            fn_kwargs={"asked": self._asked, "cutter": settings.cutter},
            compute=TaskPoolStrategy(size=plan.fetch_tasks),
            num_cpus=plan.fetch_cpus,
            max_retries=UNIT_RETRIES,
            **one,
        )
        actors = plan.backbone
        worker = {
            "config": settings.backbone,
            "device": actors.device,
            "threads": actors.threads,
            "side": settings.cutter.side,
            "weights_sha256": settings.weights_sha256,
        }
        data = data.map_batches(
            Worker,
            fn_constructor_kwargs={"factory": FeatureWorker, "kwargs": worker},
            compute=ActorPoolStrategy(
                size=actors.count,
                # A small read has fewer batches than an actor has threads.
                max_tasks_in_flight_per_actor=max(2, actors.threads) + 1,
                max_concurrent_calls_per_actor=max(2, actors.threads),
                enable_true_multi_threading=True,
            ),
            num_cpus=actors.num_cpus,
            num_gpus=actors.num_gpus or None,
            max_task_retries=UNIT_RETRIES,
            **one,
        )
        data.context.execution_options.preserve_order = True
        # Without prefetching: the last read that is expected would wait for the one after it.
        for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for index in range(batch.num_rows):
                yield unpack(batch.slice(index, 1))[1]
