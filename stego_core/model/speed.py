"""How long the backbone takes for a view on this machine, for the plan of a dry run."""

from __future__ import annotations

import os
import time

import torch

from stego_core.config.schema import BackboneConfig
from stego_core.model.backbone import resolve_precision
from stego_core.model.registry import build_network, find_backbone

_LARGEST = 10**8  # parameters; the plan of a job is not to take as long as the job
_VIEWS = 4


def seconds_per_view(config: BackboneConfig, side: int) -> float | None:
    """Return what one view takes on all CPUs of this machine, measured on a few empty views.

    The weights are zeros: they don't matter here and need not be there yet.

    Args:
        config: of the backbone.
        side: of a view, in pixels.

    Returns:
        Seconds, or None for networks too large to try.
    """
    network = build_network(find_backbone(config.name).timm_name, device="meta")
    if sum(parameter.numel() for parameter in network.parameters()) > _LARGEST:
        return None
    network = network.to_empty(device="cpu").eval()
    views = torch.zeros(_VIEWS, 3, side, side)
    use_bf16 = resolve_precision(config.precision, "cpu") == "bf16"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.zero_()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as the job computes: a batch on each thread
        network(views[:1])  # the first pass prepares kernels
        # CPU time, so that what else the machine does now is not counted.
        started_s = time.process_time()
        network(views)
        took_s = time.process_time() - started_s
        torch.set_num_threads(threads)
    return took_s / _VIEWS / (os.cpu_count() or 1)
