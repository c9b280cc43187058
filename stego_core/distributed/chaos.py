"""A soak: a segmentation or training again and again, parts of it killed at random moments.

After each round the results are compared with those of an undisturbed run: once each, the same
bytes.
"""

from __future__ import annotations

import logging
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stego_core.config.load import dump_toml
from stego_core.config.schema import ChaosJob, SegmentJob, TrainJob
from stego_core.distributed.chaos_cluster import GivenCluster, LocalCluster, Victims
from stego_core.distributed.chaos_desk import keep, local_folder
from stego_core.distributed.chaos_targets import Found, make_target
from stego_core.errors import ClusterError, StegoError
from stego_core.storage import fs
from stego_core.storage.lease import Lease, hold
from stego_core.storage.run import RunDirectory

logger = logging.getLogger(__name__)

_MAX_STARTS = 50  # of one round, beyond those that a fault asks for
_POLL_S = 0.05


@dataclass(slots=True)
class Tally:
    """What a soak has seen so far.

    Attributes:
        faults: injected, by kind.
        failures: starts of the job that ended with an error of their own, by exit code.
        counts: results expected, found, lost, duplicated and changed.
        notes: what else was counted.
    """

    faults: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def record(self, job: ChaosJob, rounds: int, *, unit: str) -> dict[str, Any]:
        """Return the summary as JSON values; `unit` is what was compared, rows or files."""
        return {
            "target": job.target,
            "rounds": rounds,
            "faults": sum(self.faults.values()),
            "faults_by_kind": dict(self.faults),
            "job_failures": dict(self.failures),
            unit: {name: self.counts[name] for name in _COUNTS},
            **self.notes,
            "seed": job.seed,
        }


_COUNTS = ("expected", "found", "lost", "duplicated", "changed")


def plan_soak(job: ChaosJob) -> list[str]:
    """Return what a soak would do, one line each, without touching anything."""
    where = f"{job.nodes} nodes on this machine" if job.nodes else "the cluster of the environment"
    what = f"settings: {job.settings or f'{job.steps} small steps'}"
    if job.target == "segment":
        what = f"model: {job.model or 'random'}"
    return [
        f"{job.target}, input: {job.input or f'{job.images} drawn pictures'}, {what}",
        f"cluster: {where}",
        f"faults: {job.faults.rounds} round(s) of {job.faults.per_round}, about every "
        f"{job.faults.mean_s:g} s: {', '.join(job.faults.kinds)}",
        f"output: {job.out}/calm, {job.out}/round-<n>, {job.out}/chaos.json",
    ]


def soak(job: ChaosJob, run: RunDirectory, *, jobs: Path) -> None:
    """Run the rounds and write `chaos.json`.

    Args:
        job: the settings.
        run: where everything goes.
        jobs: folder of segment_bucket.py and train.py.

    Raises:
        StegoError: if a result was lost, duplicated or changed; the summary is there.
        CheckpointError: if another soak writes there.
        ClusterError: if a job does not end, or another soak took the output over.
    """
    with hold(job.out) as lease, local_folder(run) as folder:
        # As Ctrl-C does: nobody else would end the cluster.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        _soak(job, run, jobs, folder, lease)


def _soak(job: ChaosJob, run: RunDirectory, jobs: Path, folder: Path, lease: Lease) -> None:
    fs.write_bytes(run.path("config.resolved.toml"), dump_toml(job).encode())
    target = make_target(job, run)
    for name in ("calm", *(f"round-{number:03d}" for number in range(job.faults.rounds))):
        fs.delete(run.path(name))
    victims: Victims = GivenCluster()
    if job.nodes:
        victims = LocalCluster(nodes=job.nodes, num_cpus=job.node_cpus)
    rng, tally, rounds = random.Random(job.seed), Tally(), 0
    started_s = time.monotonic()
    try:
        script = jobs / target.script
        calm = _Round(job, target.into(run.path("calm")), run, script, folder)
        calm.finish(victims, rng, Tally(), faults=0)
        expected = target.found(run.path("calm"))
        while rounds < job.faults.rounds and time.monotonic() - started_s < job.faults.minutes * 60:
            lease.check()
            out = run.path(f"round-{rounds:03d}")
            one = _Round(job, target.into(out), run, script, folder)
            one.finish(victims, rng, tally, faults=job.faults.per_round)
            rounds += 1
            _compare(target.found(out), expected, tally)
            record = tally.record(job, rounds, unit=target.unit)
            run.write_json("chaos.json", record)
            run.event("chaos/round", **record)
            logger.info("round %d: %s", rounds, record)
    finally:
        victims.close()
    counts = tally.counts
    run.count(faults=sum(tally.faults.values()), **{name: counts[name] for name in _COUNTS})
    if counts["lost"] or counts["duplicated"] or counts["changed"]:
        raise StegoError(
            f"{counts['lost']} {target.unit} lost, {counts['duplicated']} duplicated, "
            f"{counts['changed']} changed: {job.out}/chaos.json"
        )


def _compare(found: Found, expected: Found, tally: Tally) -> None:
    calm, digests = expected.digests, found.digests
    tally.counts["expected"] += len(calm)
    tally.counts["found"] += len(digests) + found.duplicated
    tally.counts["lost"] += len(calm.keys() - digests.keys())
    tally.counts["duplicated"] += found.duplicated
    same = sum(calm.get(name) == digest for name, digest in digests.items())
    tally.counts["changed"] += len(digests) - same
    tally.notes.update(found.notes)


class _Round:
    """One output: the job is started until it ends well, and disturbed while it runs.

    Args:
        job: the settings of the soak.
        one: the job that is disturbed.
        run: where the soak writes.
        script: what runs that job.
        folder: `local_folder` of the run.
    """

    def __init__(
        self,
        job: ChaosJob,
        one: SegmentJob | TrainJob,
        run: RunDirectory,
        script: Path,
        folder: Path,
    ) -> None:
        self._job, self._run = job, run
        name = one.out.rpartition("/")[2]
        config, self._log_file = folder / f"{name}.toml", folder / f"{name}.log"
        config.write_text(dump_toml(one))
        keep(run, config)
        self._command = [sys.executable, str(script), "--config", str(config)]
        self._log = self._log_file.open("ab")

    def finish(self, victims: Victims, rng: random.Random, tally: Tally, *, faults: int) -> None:
        """Inject the faults, then let the job end; start it again whenever it died.

        Raises:
            ClusterError: if it does not end well, however often it is started.
        """
        try:
            with self._log:
                self._finish(victims, rng, tally, faults)
        finally:
            keep(self._run, self._log_file)

    def _finish(self, victims: Victims, rng: random.Random, tally: Tally, faults: int) -> None:
        failures = 0
        while True:
            driver = self._start(victims)
            try:
                while faults and self._lives(driver, rng.expovariate(1 / self._job.faults.mean_s)):
                    faults -= self._inject(driver, victims, rng, tally)
                code = driver.wait()
            finally:  # of a soak that is ended; else it has ended already
                driver.kill()
                driver.wait()
            if code == 0:
                return  # perhaps too quick for all of its faults: the others don't count
            if code > 0:
                failures += 1
                tally.failures[str(code)] += 1
                logger.info("the job ended with exit code %d; starting it again", code)
            if failures > _MAX_STARTS:
                log = self._run.path(self._log_file.name)
                raise ClusterError(f"the job failed {failures} times: {log}")

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
