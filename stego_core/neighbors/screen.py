"""Candidates for nearest neighbours by fast arithmetic, with a bound on what it got wrong.

A tile of scores is a matrix product in float32, or in bfloat16 with float32 sums. The best of a
tile are found among the best of its column groups, so most scores are read only once.

Legend: Q queries, G gallery rows, D channels, W candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stego_core.neighbors.scores import NONE, OwnGroups, no_neighbors

Precision = Literal["fp32", "bf16"]
_COLUMNS = 32768  # of a tile at most
_GROUP = 32  # columns whose largest score stands for all
# Of a sum in float32. A GPU's tensor cores, which multiply what holds bfloat16, cut off what a CPU
# rounds, and may hold a bit less.
_ROUNDOFF = {"fp32": 2.0**-24, "bf16": 2.0**-22}


@dataclass(frozen=True, slots=True)
class Screened:
    """Candidates of each query.

    Attributes:
        scores: (Q, W) float32, falling: approximate.
        indices: (Q, W) int64 gallery rows; `NONE` where the score is -inf.
        error: no approximate score, of any gallery row, is further from the true one.
    """

    scores: Tensor
    indices: Tensor
    error: float


@dataclass(frozen=True, slots=True)
class _Operand:
    """Rows as the product takes them, their largest norm, and the largest norm of what was cut."""

    rows: Tensor
    norm: float
    cut: float


def screen(
    queries_QD: Tensor,
    gallery_GD: Tensor,
    width: int,
    *,
    query_groups_Q: Tensor,
    gallery_groups_G: Tensor,
    tile_bytes: int,
    precision: Precision,
) -> Screened:
    """Return the `width` best gallery rows of every query by approximate score.

    Args:
        queries_QD: float32.
        gallery_GD: float32.
        width: candidates wanted.
        query_groups_Q: int64 group of each query; rows of its own group are no candidates.
        gallery_groups_G: int64 group of each gallery row.
        tile_bytes: bound on the score tile, and on the gallery block that is multiplied at a time.
        precision: of the products.
    """
    dim = gallery_GD.shape[1]
    columns = max(1, min(_COLUMNS, tile_bytes // (4 * dim), len(gallery_GD)))
    rows = max(1, min(len(queries_QD), tile_bytes // (4 * columns)))
    none = no_neighbors(len(queries_QD), width)
    scores, indices = none[0].to(queries_QD.device), none[1].to(queries_QD.device)
    queries = _operand(queries_QD, precision)
    buffer = torch.empty(rows * columns, device=queries_QD.device)
    error = 0.0
    with _multiplying(precision):
        for offset in range(0, len(gallery_GD), columns):
            block = _operand(gallery_GD[offset : offset + columns], precision)
            own = OwnGroups(gallery_groups_G[offset : offset + columns])
            for start in range(0, len(queries_QD), rows):
                part = slice(start, start + rows)
                tile = _product(queries.rows[part], block.rows, buffer)
                own.exclude(tile, query_groups_Q[part])
                _update(scores[part], indices[part], tile, offset)
            error = max(error, _error(queries, block, dim, _ROUNDOFF[precision]))
    return Screened(scores, indices.masked_fill_(scores == -torch.inf, NONE), error)


def _operand(rows: Tensor, precision: Precision) -> _Operand:
    norm = _largest_norm(rows)
    if precision == "fp32":
        return _Operand(rows, norm, 0.0)
    # Rounded here, not by the product: so what it cuts off is known.
    rounded = rows.bfloat16().float()
    return _Operand(rounded, norm, _largest_norm(rows - rounded))


def _largest_norm(rows: Tensor) -> float:
    return float(torch.linalg.vector_norm(rows, dim=1).max()) if len(rows) else 0.0


def _error(queries: _Operand, block: _Operand, dim: int, roundoff: float) -> float:
    # Of a sum in any order: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1.
    summing = 1.01 * dim * roundoff * (queries.norm + queries.cut) * (block.norm + block.cut)
    cutting = queries.cut * block.norm + (queries.norm + queries.cut) * block.cut
    return summing + 1.01 * cutting


@contextmanager
def _multiplying(precision: Precision) -> Iterator[None]:
    """Multiply float32 tensors that hold bfloat16 values at the rate of fewer bits.

    oneDNN does it in bfloat16 on a CPU. On a GPU it is TF32, which holds more bits than bfloat16,
    so that no product is rounded either.
    """
    cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # not in its stubs
    gpu: Any = torch.backends.cuda.matmul
    before = cpu.fp32_precision, gpu.fp32_precision
    is_fast = precision == "bf16"
    cpu.fp32_precision, gpu.fp32_precision = ("bf16", "tf32") if is_fast else ("ieee", "ieee")
    try:
        yield
    finally:
        cpu.fp32_precision, gpu.fp32_precision = before


def _product(queries: Tensor, block: Tensor, buffer: Tensor) -> Tensor:
    # One buffer for all tiles: asking the system for fresh pages costs as much as the product.
    tile = buffer[: len(queries) * len(block)].view(len(queries), len(block))
    return torch.mm(queries, block.T, out=tile)


def _update(best_QW: Tensor, indices_QW: Tensor, tile: Tensor, offset: int) -> None:
    """Put the best of a tile of scores among the best so far, in place."""
    width = best_QW.shape[1]
    grouped = tile.shape[1] - tile.shape[1] % _GROUP
    columns = [torch.arange(grouped, tile.shape[1], device=tile.device).expand(len(tile), -1)]
    if grouped:
        stride = grouped // _GROUP
        maxima = tile[:, :grouped].view(len(tile), _GROUP, stride).amax(1)
        # A group matters only if its best beats the worst of the kept.
        count = int((maxima > best_QW[:, -1:]).sum(1).max())
        groups = maxima.topk(min(count, width), 1, sorted=False).indices
        members = torch.arange(0, grouped, stride, device=tile.device)
        columns.append((groups[:, None, :] + members[None, :, None]).flatten(1))
    candidates = torch.cat(columns, 1)
    if not candidates.shape[1]:
        return
    scores = torch.cat([best_QW, tile.gather(1, candidates)], 1)
    indices = torch.cat([indices_QW, candidates + offset], 1)
    scores, order = scores.topk(width, 1)
    best_QW.copy_(scores)
    indices_QW.copy_(indices.gather(1, order))
