"""A soak: the segmentation job again and again while parts of it are killed at random moments.

After each round the rows are compared with those of an undisturbed run: once each, the same bytes.
"""

from __future__ import annotations

import io
import logging
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from stego_core.config.load import dump_toml
from stego_core.config.method import HeadConfig
from stego_core.config.schema import BackboneConfig, ChaosJob, SegmentJob
from stego_core.distributed.chaos_cluster import GivenCluster, LocalCluster, Victims
from stego_core.errors import ClusterError, StegoError
from stego_core.masks.verify import row_digests, verify_output
from stego_core.model.backbone import load_backbone
from stego_core.model.head import Head
from stego_core.model.registry import find_backbone
from stego_core.model.segmenter import model_card, save_segmenter
from stego_core.model.weights import resolve_weights
from stego_core.storage import fs
from stego_core.storage.run import RunDirectory

logger = logging.getLogger(__name__)

_CLUSTERS = 5
_MAX_STARTS = 50  # of one round, beyond those that a fault asks for
_POLL_S = 0.05


@dataclass(slots=True)
class Tally:
    """What a soak has seen so far.

    Attributes:
        faults: injected, by kind.
        failures: starts of the job that ended with an error of their own, by exit code.
        counts: rows expected, found, lost, duplicated and changed.
    """

    faults: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    def record(self, job: ChaosJob, rounds: int) -> dict[str, Any]:
        """Return the summary as JSON values."""
        rows = {name: self.counts[name] for name in _ROWS}
        return {
            "rounds": rounds,
            "faults": sum(self.faults.values()),
            "faults_by_kind": dict(self.faults),
            "job_failures": dict(self.failures),
            "rows": rows,
            "seed": job.seed,
        }


_ROWS = ("expected", "found", "lost", "duplicated", "changed")


def plan_soak(job: ChaosJob) -> list[str]:
    """Return what a soak would do, one line each, without touching anything."""
    where = f"{job.nodes} nodes on this machine" if job.nodes else "the cluster of the environment"
    return [
        f"input: {job.input or f'{job.images} drawn pictures'}, model: {job.model or 'random'}",
        f"cluster: {where}",
        f"faults: {job.faults.rounds} round(s) of {job.faults.per_round}, about every "
        f"{job.faults.mean_s:g} s: {', '.join(job.faults.kinds)}",
        f"output: {job.out}/calm, {job.out}/round-<n>, {job.out}/chaos.json",
    ]


def soak(job: ChaosJob, run: RunDirectory, *, script: str) -> None:
    """Run the rounds and write `chaos.json`.

    Args:
        job: the settings.
        run: where everything goes.
        script: path of segment_bucket.py.

    Raises:
        StegoError: if a row was lost, duplicated or changed; the summary is there.
        ClusterError: if a job does not end.
    """
    segment = _segment_job(job, run)
    for name in ("calm", *(f"round-{number:03d}" for number in range(job.faults.rounds))):
        fs.delete(run.path(name))
    victims: Victims = GivenCluster()
    if job.nodes:
        victims = LocalCluster(nodes=job.nodes, num_cpus=job.node_cpus)
    rng, tally, rounds = random.Random(job.seed), Tally(), 0
    started_s = time.monotonic()
    try:
        calm = _Round(job, replace(segment, out=run.path("calm")), run, script)
        calm.finish(victims, rng, Tally(), faults=0)
        expected = row_digests(run.path("calm"))
        while rounds < job.faults.rounds and time.monotonic() - started_s < job.faults.minutes * 60:
            out = run.path(f"round-{rounds:03d}")
            one = _Round(job, replace(segment, out=out), run, script)
            one.finish(victims, rng, tally, faults=job.faults.per_round)
            rounds += 1
            _compare(out, expected, tally)
            record = tally.record(job, rounds)
            run.write_json("chaos.json", record)
            run.event("chaos/round", **record)
            logger.info("round %d: %s", rounds, record)
    finally:
        victims.close()
    rows = tally.counts
    run.count(faults=sum(tally.faults.values()), **{name: rows[name] for name in _ROWS})
    if rows["lost"] or rows["duplicated"] or rows["changed"]:
        raise StegoError(
            f"{rows['lost']} rows lost, {rows['duplicated']} duplicated, {rows['changed']} "
            f"changed: {job.out}/chaos.json"
        )


def _compare(out: str, expected: dict[int, bytes], tally: Tally) -> None:
    found = verify_output(out)
    digests = row_digests(out)
    tally.counts["expected"] += len(expected)
    tally.counts["found"] += found.rows
    tally.counts["lost"] += len(expected.keys() - digests.keys())
    tally.counts["duplicated"] += found.duplicated
    same = sum(expected.get(image) == digest for image, digest in digests.items())
    tally.counts["changed"] += len(digests) - same


class _Round:
    """One output: the job is started until it ends well, and disturbed while it runs."""

    def __init__(self, job: ChaosJob, segment: SegmentJob, run: RunDirectory, script: str) -> None:
        self._job, self._run, self._script = job, run, script
        name = segment.out.rpartition("/")[2]
        config = fs.local_path(run.path(f"{name}.toml"))
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(dump_toml(segment))
        self._command = [sys.executable, script, "--config", str(config)]
        self._log = fs.local_path(run.path(f"{name}.log")).open("ab")

    def finish(self, victims: Victims, rng: random.Random, tally: Tally, *, faults: int) -> None:
        """Inject the faults, then let the job end; start it again whenever it died."""
        failures = 0
        with self._log:
            while True:
                driver = self._start(victims)
                while faults and self._lives(driver, rng.expovariate(1 / self._job.faults.mean_s)):
                    faults -= self._inject(driver, victims, rng, tally)
                code = driver.wait()
                if code == 0:
                    return  # perhaps too quick for all of its faults: the others don't count
                if code > 0:
                    failures += 1
                    tally.failures[str(code)] += 1
                    logger.info("the job ended with exit code %d; starting it again", code)
                if failures > _MAX_STARTS:
                    raise ClusterError(f"the job failed {failures} times: {self._log.name}")

    def _start(self, victims: Victims) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603 - our own script
            self._command, env=victims.environment(), stdout=self._log, stderr=self._log
        )

    def _lives(self, driver: subprocess.Popen[bytes], seconds: float) -> bool:
        """Wait; tell whether the driver still runs."""
        end_s = time.monotonic() + seconds
        while driver.poll() is None and time.monotonic() < end_s:
            time.sleep(_POLL_S)
        return driver.poll() is None

    def _inject(
        self, driver: subprocess.Popen[bytes], victims: Victims, rng: random.Random, tally: Tally
    ) -> bool:
        kind = rng.choice(self._job.faults.kinds)
        if kind == "driver":
            driver.kill()
            is_done = driver.wait() < 0  # else it had ended by itself
        else:
            is_done = victims.kill(kind, rng)
        if is_done:
            tally.faults[kind] += 1
            self._run.event("chaos/fault", kind=kind)
        return is_done


def _segment_job(job: ChaosJob, run: RunDirectory) -> SegmentJob:
    """Return the job of all rounds, with pictures and a model of random weights where none are."""
    source, model = job.input, job.model
    if source is None:
        source = run.path("pictures")
        _draw(source, job.images, job.seed)
    if model is None:
        model = run.path("random-model")
        _random_model(model)
    return SegmentJob(
        input=source,
        model=model,
        actors=job.actors,
        predict=job.predict,
        precision="fp32",
        limits=job.limits,
    )


def _draw(folder: str, count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for number in range(count):
        height, width = generator.choice([64, 80, 96], 2)
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        fs.write_bytes(fs.join(folder, f"picture-{number:05d}.png"), buffer.getvalue())


def _random_model(folder: str) -> None:
    config = BackboneConfig(name="test_vit", weights="random", precision="fp32")
    head_config = HeadConfig(kind="linear", dim=16, dropout=0, whiten=0, smooth=0)
    backbone = load_backbone(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = Head(backbone.width, head_config)
        clusters = torch.randn(_CLUSTERS, head.dim)
    tensors = {f"head.{key}": value for key, value in head.state_dict().items()}
    card = model_card(
        weights=resolve_weights(find_backbone(config.name), config.weights),
        config=config,
        head=head_config,
        cluster_names=[f"cluster {number}" for number in range(_CLUSTERS)],
        num_classes=0,
        class_names=[],
    )
    save_segmenter(folder, {**tensors, "clusters": clusters}, card)
