"""What mining and segmenting a pile of images takes on a given cluster, from measured costs.

    python -m benchmarks.simulate --images 100000000 --accelerators 64

The costs of an image are those of `results/stage_costs.json`, the cluster is that of the command
line; docs/scaling.md says where they come from and what was checked. Stages of one job run side by
side, so the slowest sets the pace. Training has its memory only; a segmentation is of whole images,
without flip and CRF, whatever the crops. Nothing here measures anything.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from stego_core.neighbors.faiss_index import code_bytes

COSTS = Path(__file__).resolve().parent / "results" / "stage_costs.json"
_IN_FLIGHT = 3  # units per actor: two in work, and one that is ready
_UNIT_VIEWS = 64
_TRAINING_LISTS = 64  # vectors seen per list of an inverted file
_KMEANS_STEPS = 10
_QUERY_BLOCK = 8192  # views that an actor compares with its shard in one go
_SHARD_VIEWS = 2**20  # `neighbors.shard_views`, unless it is set


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """What there is and what it costs.

    Attributes:
        images: of the pile.
        crops: views of each image.
        accelerators: GPUs, or actors on CPUs; a training has as many workers.
        nodes: machines that they are on, each with an object store.
        accelerator_images_per_s: views through the backbone, of one accelerator.
        cpus: for decoding, beside the accelerators.
        search_gflops: matrix products of one accelerator, in 10^9 operations per second.
        scan_efficiency: share of `search_gflops` that FAISS reaches, in centroids and in lists.
        accelerator_price: per hour, with the machine it sits in.
        cpu_price: per hour and CPU.
        storage_price: per GB and month.
        efficiency: share of the time in which the slowest stage is busy; below 1 for stragglers.
    """

    images: int = 100_000_000
    crops: int = 1
    accelerators: int = 64
    nodes: int = 8
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
        base_bytes: memory of Ray's own processes on a node, and of the driver, without what grows.
        actor_bytes: memory of an actor, with the backbone.
        finish_s: CPU seconds per image after the model: upsample, encode, write.
        score_bytes: of an image between the model and that.
        mask_bytes: of a row of the masks table.
        train_gflops: of k-means on the one thread that trains an index, 10^9 operations per second.
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
    finish_s: float = 0.005
    score_bytes: float = 27 * 23 * 23 * 4
    mask_bytes: float = 5_000.0
    train_gflops: float = 84.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What is to be expected; times in seconds, sizes in bytes, money in the prices' unit.

    `ivf_search_s` holds `ivf_training_s`. `memory_bytes` is of mining, on all nodes together;
    `training_memory_bytes` is that of the embeddings and class tokens in all training workers.
    """

    embed_s: float
    bottleneck: str
    exact_search_s: float
    ivf_training_s: float
    ivf_search_s: float
    read_bytes: float
    object_store_bytes: float
    in_flight_bytes: float
    memory_bytes: float
    training_memory_bytes: float
    feature_store_bytes: float
    embedding_bytes: float
    unit_table_bytes: float
    neighbor_table_bytes: float
    pq_index_bytes: float
    compute_price: float
    storage_price_per_month: float
    segment_s: float
    segment_bottleneck: str
    segment_object_store_bytes: float
    mask_bytes: float
    segment_price: float


def search_waves(views: int, *, actors: int, shard_views: int) -> list[tuple[int, int]]:
    """Return the shards searched at a time: views of the largest, and actors of each shard."""
    shards, rest = -(-views // shard_views), views % shard_views
    blocks = views // shard_views * -(-shard_views // _QUERY_BLOCK) + -(-rest // _QUERY_BLOCK)
    step = min(actors, shards)
    return [
        (
            min(shard_views, views - first * shard_views),
            max(1, min(blocks, actors // min(step, shards - first))),
        )
        for first in range(0, shards, step)
    ]


def exact_flops(views: int, dim: int, waves: list[tuple[int, int]]) -> float:
    """Return the operations of an actor in all waves: its queries against its shard."""
    return 2.0 * dim * sum(views / actors * rows for rows, actors in waves)


def training_flops(views: int, dim: int, lists: int) -> float:
    """Return the operations of k-means: vectors of a sample against all centroids, again and again.

    What product quantisation adds, 0.14 ms a vector, is left out.
    """
    return 2.0 * dim * min(views, _TRAINING_LISTS * lists) * lists * _KMEANS_STEPS


def ivf_flops(
    views: int, dim: int, waves: list[tuple[int, int]], *, lists: int, probes: int
) -> float:
    """Return the operations of an actor in all waves, after training.

    Every actor fills an index of its own with its shard, and recall is measured with a second one.
    In each shard a query is compared with all centroids, and with the vectors of `probes` lists of
    average length. The exact scores of candidates are left out.
    """
    filling = 2 * lists * sum(rows for rows, _ in waves)
    queries = sum(views / actors * (lists + probes * rows / lists) for rows, actors in waves)
    return 2.0 * dim * (filling + queries)


def predict(
    cluster: Cluster,
    costs: Costs,
    *,
    lists: int = 0,
    probes: int = 32,
    shard_views: int = _SHARD_VIEWS,
) -> Prediction:
    """Return what the mining of the pile takes.

    Args:
        cluster: sizes, speeds and prices.
        costs: of an image.
        lists: of the inverted file; 0 takes four times the square root of the number of views.
        probes: lists searched per query.
        shard_views: of the gallery; each shard repeats the comparison with all centroids.
    """
    views = cluster.images * cluster.crops
    stages = {
        "decoding": cluster.images * costs.decode_s / cluster.cpus,
        "backbone": views / (cluster.accelerators * cluster.accelerator_images_per_s),
    }
    bottleneck = max(stages, key=lambda name: stages[name])
    embed_s = costs.start_s + stages[bottleneck] / cluster.efficiency
    rate = cluster.search_gflops * 1e9 * cluster.efficiency
    lists = lists or max(1, round(4 * views**0.5))
    waves = search_waves(views, actors=cluster.accelerators, shard_views=shard_views)
    training_s = training_flops(views, costs.dim, lists) / (costs.train_gflops * 1e9)
    flops = ivf_flops(views, costs.dim, waves, lists=lists, probes=probes)
    ivf_s = training_s + flops / (rate * cluster.scan_efficiency)
    features = views * costs.feature_bytes
    embeddings = views * costs.dim * 4.0
    unit_tables = 2 * embeddings  # with class tokens
    neighbors = views * costs.neighbors * 13.0  # id, crop, score; not compressed
    in_flight, memory = mining_memory(cluster, costs, views)
    hourly = cluster.accelerators * cluster.accelerator_price + cluster.cpus * cluster.cpu_price
    segment_s, segment_bottleneck = segmentation_time(cluster, costs)
    return Prediction(
        embed_s=embed_s,
        bottleneck=bottleneck,
        exact_search_s=exact_flops(views, costs.dim, waves) / rate,
        ivf_training_s=training_s,
        ivf_search_s=ivf_s,
        read_bytes=cluster.images * costs.image_bytes,
        object_store_bytes=views * costs.pixel_bytes + cluster.nodes * embeddings,
        in_flight_bytes=in_flight,
        memory_bytes=memory,
        training_memory_bytes=cluster.accelerators * unit_tables,
        feature_store_bytes=features,
        embedding_bytes=embeddings,
        unit_table_bytes=unit_tables,
        neighbor_table_bytes=neighbors,
        pq_index_bytes=views * (code_bytes(costs.dim) + 8.0),
        compute_price=(embed_s + ivf_s) / 3600 * hourly,
        storage_price_per_month=(features + unit_tables + neighbors) / 1e9 * cluster.storage_price,
        segment_s=segment_s,
        segment_bottleneck=segment_bottleneck,
        segment_object_store_bytes=cluster.images * (costs.pixel_bytes + costs.score_bytes),
        mask_bytes=cluster.images * costs.mask_bytes,
        segment_price=segment_s / 3600 * hourly,
    )


def mining_memory(cluster: Cluster, costs: Costs, views: int) -> tuple[float, float]:
    """Return the bytes of pixels under way, and those of all processes on all nodes together."""
    embeddings = views * costs.dim * 4.0
    # A pile that is smaller than that is under way as a whole.
    in_flight = costs.pixel_bytes * min(views, cluster.accelerators * _IN_FLIGHT * _UNIT_VIEWS)
    # The driver holds what unit tables hold, class tokens too; every node sees all embeddings.
    memory = cluster.accelerators * costs.actor_bytes + in_flight + 2 * embeddings
    return in_flight, memory + cluster.nodes * (costs.base_bytes + embeddings)


def segmentation_time(cluster: Cluster, costs: Costs) -> tuple[float, str]:
    """Return the seconds of segmenting the pile, and what they are for."""
    stages = {
        "decoding and masks": cluster.images * (costs.decode_s + costs.finish_s) / cluster.cpus,
        "backbone": cluster.images / (cluster.accelerators * cluster.accelerator_images_per_s),
    }
    bottleneck = max(stages, key=lambda name: stages[name])
    return costs.start_s + stages[bottleneck] / cluster.efficiency, bottleneck


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
    parser.add_argument("--shard-views", type=int, default=_SHARD_VIEWS)
    parser.add_argument("--no-store", action="store_true", help="keep embeddings only")
    found = vars(parser.parse_args())
    options = {name: found.pop(name) for name in ("lists", "probes", "shard_views")}
    costs = asdict(read_costs())
    if found.pop("no_store"):
        costs["feature_bytes"] = 0.0
    prediction = predict(Cluster(**found), Costs(**costs), **options)
    print(json.dumps(asdict(prediction), indent=2))


if __name__ == "__main__":
    main()
