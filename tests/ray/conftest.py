"""The fixtures of `ray_cluster` for the tests of this folder."""

from ray_cluster import cluster, data, model

__all__ = ["cluster", "data", "model"]
