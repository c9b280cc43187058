"""What mining a pile of images takes on a given cluster, from measured costs.

    python -m benchmarks.simulate --images 100000000 --accelerators 64

The costs of an image are those of `results/stage_costs.json`, the cluster is that of the command
line; docs/scaling.md says where they come from and what was checked. Stages of one job run side by
side, so the slowest sets the pace. There is no stage for training or segmentation. Nothing here
measures anything.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

COSTS = Path(__file__).resolve().parent / "results" / "stage_costs.json"
_IN_FLIGHT = 3  # units per actor: two in work, and one that is ready
_UNIT_VIEWS = 64
_TRAINING_LISTS = 64  # vectors seen per list of an inverted file
_KMEANS_STEPS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """What there is and what it costs.

    Attributes:
        images: of the pile.
        crops: views of each image.
        accelerators: GPUs, or actors on CPUs.
        accelerator_images_per_s: views through the backbone, of one accelerator.
        cpus: for decoding, beside the accelerators.
        search_gflops: matrix products of one accelerator, in 10^9 operations per second.
        scan_efficiency: share of `search_gflops` that scanning the lists of an index reaches.
        accelerator_price: per hour, with the machine it sits in.
        cpu_price: per hour and CPU.
        storage_price: per GB and month.
        efficiency: share of the time in which the slowest stage is busy; below 1 for stragglers.
    """

    images: int = 100_000_000
    crops: int = 1
    accelerators: int = 64
    accelerator_images_per_s: float = 400.0
    cpus: int = 512
    search_gflops: float = 100_000.0
    scan_efficiency: float = 0.05
    accelerator_price: float = 2.0
    cpu_price: float = 0.04
    storage_price: float = 0.023
    efficiency: float = 0.85


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What one image costs, and the processes around it.

    Attributes:
        start_s: of a job, before the first unit.
        decode_s: CPU seconds per image: read, decode, resize.
        image_bytes: of the file.
        pixel_bytes: of a view between decoding and backbone.
        feature_bytes: of a view in the feature store; 0 where nothing is stored.
        dim: channels of an embedding, and of a class token.
        neighbors: kept per view.
        base_bytes: memory of the driver and of Ray's own processes, without what grows.
        actor_bytes: memory of an actor, with the backbone.
    """

    start_s: float = 20.0
    decode_s: float = 0.02
    image_bytes: float = 200_000.0
    pixel_bytes: float = 322 * 322 * 3
    feature_bytes: float = 23 * 23 * 384 * 2
    dim: int = 384
    neighbors: int = 30
    base_bytes: float = 1.0e9
    actor_bytes: float = 1.0e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What is to be expected; times in seconds, sizes in bytes, money in the prices' unit."""

    embed_s: float
    bottleneck: str
    exact_search_s: float
    ivf_search_s: float
    read_bytes: float
    object_store_bytes: float
    in_flight_bytes: float
    memory_bytes: float
    feature_store_bytes: float
    embedding_bytes: float
    unit_table_bytes: float
    neighbor_table_bytes: float
    pq_index_bytes: float
    compute_price: float
    storage_price_per_month: float


def exact_flops(views: int, dim: int) -> float:
    """Return the operations of comparing all views with all."""
    return 2.0 * views * views * dim


def ivf_flops(views: int, dim: int, lists: int, probes: int) -> float:
    """Return the operations of training, filling and searching an inverted file.

    K-means and filling compare vectors with all centroids; a query is compared with all centroids
    and with the vectors of `probes` lists of average length.
    """
    training = min(views, _TRAINING_LISTS * lists) * lists * _KMEANS_STEPS
    return 2.0 * dim * (training + 2 * views * lists + views * probes * views / lists)


def predict(cluster: Cluster, costs: Costs, *, lists: int = 0, probes: int = 32) -> Prediction:
    """Return what the mining of the pile takes.

    Args:
        cluster: sizes, speeds and prices.
        costs: of an image.
        lists: of the inverted file; 0 takes four times the square root of the number of views.
        probes: lists searched per query.
    """
    views = cluster.images * cluster.crops
    stages = {
        "decoding": cluster.images * costs.decode_s / cluster.cpus,
        "backbone": views / (cluster.accelerators * cluster.accelerator_images_per_s),
    }
    bottleneck = max(stages, key=lambda name: stages[name])
    embed_s = costs.start_s + stages[bottleneck] / cluster.efficiency
    rate = cluster.accelerators * cluster.search_gflops * 1e9 * cluster.efficiency
    lists = lists or max(1, round(4 * views**0.5))
    ivf_s = ivf_flops(views, costs.dim, lists, probes) / (rate * cluster.scan_efficiency)
    features = views * costs.feature_bytes
    embeddings = views * costs.dim * 4.0
    unit_tables = 2 * embeddings  # with class tokens
    neighbors = views * costs.neighbors * 13.0  # id, crop, score; not compressed
    # A pile that is smaller than that is under way as a whole.
    in_flight = costs.pixel_bytes * min(views, cluster.accelerators * _IN_FLIGHT * _UNIT_VIEWS)
    # The driver holds what unit tables hold, and the object store the embeddings for the search.
    grown = in_flight + unit_tables + embeddings
    memory = costs.base_bytes + cluster.accelerators * costs.actor_bytes + grown
    hourly = cluster.accelerators * cluster.accelerator_price + cluster.cpus * cluster.cpu_price
    return Prediction(
        embed_s=embed_s,
        bottleneck=bottleneck,
        exact_search_s=exact_flops(views, costs.dim) / rate,
        ivf_search_s=ivf_s,
        read_bytes=cluster.images * costs.image_bytes,
        object_store_bytes=views * costs.pixel_bytes + embeddings,
        in_flight_bytes=in_flight,
        memory_bytes=memory,
        feature_store_bytes=features,
        embedding_bytes=embeddings,
        unit_table_bytes=unit_tables,
        neighbor_table_bytes=neighbors,
        pq_index_bytes=views * (costs.dim / 8 + 8.0),
        compute_price=(embed_s + ivf_s) / 3600 * hourly,
        storage_price_per_month=(features + unit_tables + neighbors) / 1e9 * cluster.storage_price,
    )


def read_costs(path: Path = COSTS) -> Costs:
    """Return the measured costs, with the defaults for what the file does not say."""
    known = {field.name for field in fields(Costs)}
    found = json.loads(path.read_text()) if path.exists() else {}
    return Costs(**{name: value for name, value in found.items() if name in known})


def main() -> None:
    """Print the prediction for the cluster of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for field in fields(Cluster):
        default = field.default
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(default), default=default
        )
    parser.add_argument("--lists", type=int, default=0, help="of the inverted file; 0: 4 sqrt(N)")
    parser.add_argument("--probes", type=int, default=32)
    parser.add_argument("--no-store", action="store_true", help="keep embeddings only")
    found = vars(parser.parse_args())
    options = {"lists": found.pop("lists"), "probes": found.pop("probes")}
    costs = asdict(read_costs())
    if found.pop("no_store"):
        costs["feature_bytes"] = 0.0
    prediction = predict(Cluster(**found), Costs(**costs), **options)
    print(json.dumps(asdict(prediction), indent=2))


if __name__ == "__main__":
    main()
