"""What workers that share a batch tell each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_T = TypeVar("_T")


class _GatherRows(torch.autograd.Function):
    """Concatenate the rows of all workers; gradients flow back to the worker that made them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous()
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.count
        return total[start : start + ctx.count]


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all workers in rank order; without other workers, the rows."""
    gathered: Tensor = rows
    if dist.is_initialized() and dist.get_world_size() > 1:
        gathered = _GatherRows.apply(rows)
    return gathered


def mean_over_workers(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all workers, without gradient."""
    value = value.detach().clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def sum_over_workers(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all workers, without gradient."""
    value = value.detach().clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


def from_first_worker(find: Callable[[], _T]) -> _T:
    """Return on every worker what rank 0 finds; the others do not look."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return find()
    box: list[Any] = [find() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    found: _T = box[0]
    return found


def worker_rank() -> int:
    """Return the number of this worker: its rows come after those of lower ones."""
    return dist.get_rank() if dist.is_initialized() else 0
