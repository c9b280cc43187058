"""Gaussian filtering in many dimensions on the permutohedral lattice, in torch.

Legend: d dimensions, P points, V lattice vertices, C channels.

Source: Adams, Baek and Davis 2010, "Fast high-dimensional filtering using the permutohedral
    lattice", written from the paper. There, a hash table finds vertices; here their keys are
    sorted, and splatting, blurring and slicing are products with sparse matrices, which a CPU and
    a GPU have fast kernels for.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from torch import Tensor

from stego_core.errors import ShapeError

_MAX_BITS = 63


class Lattice:
    """The vertices around sets of points: filters any values at these points, each set by itself.

    Args:
        features_dP: where the points are, in standard deviations of the Gaussian, float32.
        sets: into how many sets of equal size the points are divided, one after the other.

    Raises:
        ShapeError: if there is no point, the points can't be divided, or they are spread too wide
            to number the vertices.
    """

    def __init__(self, features_dP: Tensor, *, sets: int = 1) -> None:
        if features_dP.ndim != 2 or not features_dP.shape[1] or features_dP.shape[1] % sets:
            wanted = f"(d, P) with at least one, in {sets} equal sets"
            raise ShapeError(f"points are {wanted}, not {tuple(features_dP.shape)}")
        cells_dP, order_rP, weights_rP = _enclosing(features_dP)
        keys_rP, strides, key_bits = _vertex_keys(cells_dP, order_rP, sets)
        self._splat, self._slice, vertices_V = _weights(keys_rP, weights_rP, key_bits)
        self._pairs = [_neighbours(vertices_V, stride) for stride in strides]
        self.num_vertices = len(vertices_V)
        self._spare = (vertices_V.new_empty(0, 0, dtype=torch.float32),) * 2

    def filter(self, values_PC: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return the sum over all points of Gaussian times value, up to a constant factor.

        Args:
            values_PC: float32, contiguous.
            out: what to write to, `values_PC` too; None takes fresh memory.

        Returns:
            (P, C) float32.
        """
        size = (self.num_vertices, values_PC.shape[1])
        if self._spare[0].shape != size:
            # Kept from call to call: fresh memory of this size costs about as much as the products.
            self._spare = (values_PC.new_empty(size), values_PC.new_empty(size))
        now, spare = self._spare
        torch.mm(self._splat, values_PC, out=now)
        for pairs in self._pairs:  # half of both neighbours along one direction after the other
            torch.addmm(now, pairs, now, alpha=0.5, out=spare)
            now, spare = spare, now
        return torch.mm(self._slice, now, out=out)


def _enclosing(features_dP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the simplex of each point.

    Returns:
        The simplex's vertex of remainder 0 as coordinates along d of the d + 1 directions, whole
        numbers (d, P); the plane's coordinates by falling distance from it, int64 (d + 1, P);
        barycentric weights of the d + 1 vertices by remainder, (d + 1, P).
    """
    d, count = features_dP.shape
    # In units of d + 1, so that vertices of remainder 0 have whole coordinates. The factor makes
    # the variance of splat, blur and slice together 1 (section 3.1 of the paper).
    embed = torch.zeros(d + 1, d, dtype=torch.float64)
    for axis in range(d):
        embed[: axis + 1, axis], embed[axis + 1, axis] = 1, -(axis + 1)
        embed[:, axis] *= math.sqrt(2 / 3) / math.sqrt((axis + 1) * (axis + 2))
    plane = embed.to(features_dP) @ features_dP
    nearest = plane.round()
    rest = plane - nearest
    rank = torch.zeros(d + 1, count, dtype=torch.int8, device=plane.device)
    for i in range(d):
        is_less = (rest[i] < rest[i + 1 :]).to(torch.int8)
        rank[i] += is_less.sum(0, dtype=torch.int8)
        rank[i + 1 :] += 1 - is_less
    # Rounding may have left the plane: the coordinates rounded the most are rounded the other way.
    rank += nearest.sum(0).to(torch.int8)
    step = (rank < 0).to(torch.int8) - (rank > d).to(torch.int8)
    rank += (d + 1) * step
    nearest += step
    rest -= step
    places = torch.arange(d + 1, device=plane.device)[:, None].expand(-1, count)
    order = torch.empty_like(places, memory_format=torch.contiguous_format)
    order.scatter_(0, rank.long(), places)
    falling = rest.gather(0, order)
    weights = torch.empty_like(falling)
    weights[0] = 1 + falling[d] - falling[0]
    weights[1:] = (falling[:d] - falling[1:]).flip(0)
    return nearest[:d] - nearest[d], order, weights


def _vertex_keys(cells_dP: Tensor, order_rP: Tensor, sets: int) -> tuple[Tensor, list[int], int]:
    """Return a number for each vertex of each simplex, how far neighbours' differ, and its bits.

    Along each of the d + 1 directions the neighbour's number differs by a constant, which is what
    makes neighbours cheap to find. The set is the number's first digit.
    """
    low = cells_dP.amin(1).long() - 2  # room for the simplex's other vertices and their neighbours
    sizes = (cells_dP.amax(1).long() + 3 - low).tolist()
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    key_bits = (sets * math.prod(sizes)).bit_length()
    if key_bits > _MAX_BITS:
        raise ShapeError("the points are spread too wide for this lattice")
    stride_d = torch.tensor(strides, device=cells_dP.device)
    # From one remainder to the next, one coordinate after the other moves down, the last first; a
    # move of the plane's last coordinate moves all others up, relative to it.
    moves = torch.cat([-stride_d, stride_d.sum()[None]]).take(order_rP)
    keys = torch.empty_like(moves)
    torch.sum((cells_dP.long() - low[:, None]) * stride_d[:, None], 0, out=keys[0])
    firsts = torch.arange(sets, device=keys.device) * math.prod(sizes)
    keys[0].view(sets, -1).add_(firsts[:, None])
    for remainder in range(1, len(keys)):
        torch.add(keys[remainder - 1], moves[-remainder], out=keys[remainder])
    return keys, [*strides, sum(strides)], key_bits


def _weights(keys_rP: Tensor, weights_rP: Tensor, key_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the matrices of splatting (V, P) and slicing (P, V), and the vertices' rising keys."""
    corners, count = keys_rP.shape
    width = corners - 1
    shift = width.bit_length()  # slot = point · 2^shift + remainder: divided by a shift
    slots_rP = torch.arange(count, device=keys_rP.device) << shift
    slots_rP = slots_rP + torch.arange(corners, device=keys_rP.device)[:, None]
    slot_bits = (count << shift).bit_length()
    keys, slot = _sorted_pairs(keys_rP.flatten(), slots_rP.flatten(), key_bits, slot_bits)
    is_new = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
    torch.ne(keys[1:], keys[:-1], out=is_new[1:])
    places = torch.arange(len(keys), dtype=torch.int32, device=keys.device)
    starts = _compress(places, is_new)
    vertices = keys.index_select(0, starts)
    ends = torch.cat([starts, starts.new_tensor([len(keys)])])
    padded = weights_rP.new_zeros(count, 1 << shift)
    padded[:, :corners] = weights_rP.T
    size = (len(vertices), count)
    splat = _csr(ends, (slot >> shift).int(), padded.flatten().index_select(0, slot.int()), size)
    vertex = torch.empty(count << shift, dtype=torch.int32, device=keys.device)
    vertex.scatter_(0, slot, is_new.cumsum(0, dtype=torch.int32) - 1)
    vertex_Pr = vertex.view(count, -1)[:, :corners]
    rows = torch.arange(0, len(keys) + 1, corners, dtype=torch.int32, device=keys.device)
    slicing = _csr(rows, vertex_Pr.flatten(), padded[:, :corners].flatten(), size[::-1])
    return splat, slicing, vertices


def _neighbours(vertices_V: Tensor, stride: int) -> Tensor:
    """Return the matrix (V, V) that adds both neighbours of each vertex along one direction."""
    count = len(vertices_V)
    own = torch.arange(count, dtype=torch.int32, device=vertices_V.device)
    wanted = vertices_V + stride
    found = own + 1 if stride == 1 else _search(vertices_V, wanted)
    found = found.clamp(max=count - 1)
    is_there = vertices_V.index_select(0, found) == wanted
    after = found.masked_fill_(~is_there, count)
    before = torch.full((count + 1,), count, dtype=torch.int32, device=own.device)
    before.scatter_(0, after.long(), own)
    both = torch.stack([before[:count], after], 1)
    keep = both < count
    rows = torch.zeros(count + 1, dtype=torch.int32, device=own.device)
    torch.cumsum(keep[:, 0].int() + keep[:, 1], 0, out=rows[1:])
    columns = _compress(both.flatten(), keep.flatten())
    ones = torch.ones(len(columns), device=own.device)
    return _csr(rows, columns, ones, (count, count))


def _csr(rows: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")
        return torch.sparse_csr_tensor(rows, columns, values, size, check_invariants=False)


# numpy does the next three several times faster than torch on one CPU core.


def _sorted_pairs(
    keys: Tensor, slots: Tensor, key_bits: int, slot_bits: int
) -> tuple[Tensor, Tensor]:
    """Return both sorted by key, then slot; slots are unique."""
    if key_bits + slot_bits > _MAX_BITS:
        by_slot = slots.argsort()
        order = by_slot[keys[by_slot].argsort(stable=True)]
        return keys[order], slots[order]
    packed = keys.bitwise_left_shift(slot_bits).bitwise_or_(slots)
    if packed.device.type == "cpu":
        packed.numpy().sort()
    else:
        packed = packed.sort().values
    return packed >> slot_bits, packed.bitwise_and_((1 << slot_bits) - 1)


def _search(rising: Tensor, wanted: Tensor) -> Tensor:
    if rising.device.type == "cpu":
        return torch.from_numpy(np.searchsorted(rising.numpy(), wanted.numpy())).int()
    return torch.searchsorted(rising, wanted, out_int32=True)


def _compress(values: Tensor, keep: Tensor) -> Tensor:
    if values.device.type == "cpu":
        return torch.from_numpy(np.compress(keep.numpy(), values.numpy()))
    return values.masked_select(keep)
