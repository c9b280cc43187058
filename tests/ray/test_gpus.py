"""The workers of a cluster with GPUs meet through NCCL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ray_cluster import TINY, Cluster, draw_pictures, ray_head

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_training_on_a_cluster_with_gpus_opens_nccl(cluster: Cluster, tmp_path: Path) -> None:
    """With real GPUs it trains, one worker on each. Else Ray is told of two, and NCCL refuses."""
    real = torch.cuda.device_count()
    pictures, out = draw_pictures(tmp_path / "pictures", 24), tmp_path / "run"
    common = ["--data.root", str(pictures), "--out", str(out), *TINY, "--views.resolution", "64"]
    common += ["--backbone.precision", "fp32"]
    cluster.run("mine_neighbors.py", *common)  # which needs a device that is there
    env = {key: value for key, value in cluster.env.items() if key != "RAY_ADDRESS"}
    flags = ["--num-cpus=4", "--include-dashboard=false", f"--num-gpus={real or 2}"]
    with ray_head(tmp_path, "ray.log", env, *flags) as address:
        pretended = replace(cluster, env=env | {"RAY_ADDRESS": address})
        job = [
            "train.py",
            *common,
            "--train.steps",
            "20",
            "--clusters.count",
            "3",
            "--workers",
            str(real or 2),
        ]
        done = pretended.run(*job, check=0 if real else 5)
    # With one GPU a worker meets nobody: the backend of such a plan is a matter of
    # tests/unit/test_plan_actors.py.
    if not real:
        assert "ProcessGroupNCCL is only supported with GPUs, no GPUs found" in done.stderr
