"""One precision for all workers of a run: as asked, or what its first start found, and kept."""

from __future__ import annotations

from typing import Final

import ray
from ray.exceptions import RayError
from ray.util import get_node_ip_address

from stego_core.distributed.cluster import total
from stego_core.errors import ClusterError
from stego_core.model.backbone import resolve_precision
from stego_core.storage.run import RunDirectory

_PROBE_S: Final = 600.0  # a cluster may have to grow first
PRECISION: Final = "precision.json"
"""Beside the results: what was asked, what was taken, and for which device."""


def settle_precision(run: RunDirectory, asked: str, *, is_kept: bool = True) -> str:
    """Return the precision that every worker of a run computes in, and record it.

    `auto` is decided once, by a node that the work runs on. A later start keeps the decision, on
    whatever hardware, so that what is there and what is added are alike.

    Args:
        run: of the output.
        asked: `auto`, `fp32` or `bf16`.
        is_kept: whether an earlier start's decision stands.
    """
    told = told_precision(run) if asked == "auto" and is_kept else asked
    if told != "auto":
        taken, device = told, None
    else:
        device = "cuda" if total("GPU") else "cpu"
        taken = _probe(device)
    earlier = run.read_json(PRECISION) or {}
    # To ask for what `auto` once took changes nothing: `auto` stands.
    if earlier.get("precision") != taken or earlier.get("asked") not in (asked, "auto"):
        run.write_json(PRECISION, {"asked": asked, "precision": taken, "device": device})
        run.event("precision", asked=asked, taken=taken, device=device)
    return taken


def told_precision(run: RunDirectory) -> str:
    """Return what an earlier start decided for `auto`; `auto` if none did."""
    told = run.read_json(PRECISION) or {}
    return str(told.get("precision", "auto")) if told.get("asked") == "auto" else "auto"


def _probe(device: str) -> str:
    nodes = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if nodes == {get_node_ip_address()}:
        return resolve_precision("auto", device)  # no process has to be started for it
    probe = ray.remote(resolve_precision)
    # A node that has something for the actors: the head of a large cluster has no CPU to give.
    options = {"num_cpus": 0, "num_gpus": 0.01} if device == "cuda" else {"num_cpus": 0.01}
    try:
        return str(ray.get(probe.options(**options).remote("auto", device), timeout=_PROBE_S))
    except RayError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ClusterError(f"no node said which precision it computes in: {reason}") from error
