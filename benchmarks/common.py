"""The frame of all benchmarks: options, repeats, machine facts, result files, the table.

A benchmark is a module with `measure(options) -> list[Row]`; benchmarks/README.md has the rules.
Nothing here imports torch or ray, so that a module can set up its process before it does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

# As the jobs' workers have it (stego_core/distributed/environment.py): baselines get the same.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "ray", "timm", "numpy", "pyarrow", "pillow", "faiss-cpu", "pydensecrf2")
_FLAGS = ("amx_bf16", "amx_tile", "avx512_bf16", "avx512f", "avx2")


def kept_trials(kind: str, studies: list[Path]) -> dict[str, Path]:
    """Return the table of trials of each study, by name of its data set.

    Args:
        kind: of the study; tables are kept as benchmarks/results/<kind>-<set>.parquet.
        studies: the `--out` of `jobs/tune.py`, named after its data set, whose table is copied
            there; or such a file, which is only read.
    """
    found: dict[str, Path] = {}
    for study in studies:
        name, path = study.stem.removeprefix(f"{kind}-"), study
        if study.is_dir():
            path = RESULTS / f"{kind}-{study.name}.parquet"
            shutil.copyfile(study / "trials.parquet", path)
        found[name] = path
    return found


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation, the latter where there are several values."""
    mean = statistics.fmean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


@dataclass(frozen=True, slots=True)
class Options:
    """What every benchmark may read.

    Attributes:
        images: folder of photographs.
        model: run directory of a trained model, with its feature store.
        data: labelled data (`imgs/`, `labels/`), or None.
        repeats: how often each side is measured.
        run: name of the run, the same for all benchmarks that are started together.
    """

    images: str = "runs/demo-images"
    model: str = "runs/demo"
    data: str | None = None
    repeats: int = 3
    run: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        what: what was measured.
        against: its baseline, measured in the same run.
        bar: what `value` should reach.
        values: the ratio of each repeat; the table shows the median.
        direction: whether the bar is a least or a greatest value.
        unit: of the values: `x` (times), `%` (values are shares, 0.85 = 85 %), or a plain unit.
        facts: sizes, rates and whatever else a reader needs to judge the ratio; JSON.
        note: one sentence for the table, such as why a bar is missed.
        needs_data: whether the row is measured only where `--data` is given.
    """

    what: str
    against: str
    bar: float
    values: list[float]
    direction: Literal["at least", "at most"] = "at least"
    unit: str = "x"
    facts: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    needs_data: bool = False

    @property
    def value(self) -> float:
        """Return the median of the repeats."""
        return statistics.median(self.values)

    @property
    def is_reached(self) -> bool:
        """Return whether the median reaches the bar."""
        if self.direction == "at least":
            return self.value >= self.bar
        return self.value <= self.bar


def seconds(function: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    started_s = time.perf_counter()
    function()
    return time.perf_counter() - started_s


def machine() -> dict[str, Any]:
    """Return what a reader has to know of machine and code, and the load before the measurement."""
    lines = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    present = facts.get("flags", "").split()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": facts.get("model name", platform.processor() or "unknown"),
        "cores": os.cpu_count(),
        "instructions": [flag for flag in _FLAGS if flag in present],
        "memory_gib": round(memory / 2**30, 1),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Return the commit of the checkout, with a + where the code is another; None without git."""
    git = ["git", "-C", str(ROOT)]
    # Each benchmark of a run writes results and renews the table before the next one begins.
    changed = [*git, "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs"]
    try:
        found, others = (
            subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
            for command in ([*git, "rev-parse", "--short", "HEAD"], changed)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{found}+" if others else found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that all benchmarks share."""
    default = Options()
    found = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    found.add_argument("--images", default=default.images, help="folder of photographs")
    found.add_argument("--model", default=default.model, help="run directory of a trained model")
    found.add_argument("--data", default=default.data, help="labelled data (imgs/, labels/)")
    found.add_argument("--repeats", type=int, default=default.repeats)
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    found.add_argument("--run", default=now, help="name of the run in the table; its start")
    return found


def run(name: str, doc: str | None, measure: Callable[[Options], list[Row]]) -> None:
    """Measure as the command line says; write `results/<name>.json` and print its rows.

    Call it under `if __name__ == "__main__"`; `name` is the module's.
    """
    options = Options(**vars(parser(doc).parse_args()))
    facts = machine()
    started_s = time.perf_counter()
    rows = measure(options)
    write(name, rows, facts, time.perf_counter() - started_s, options)
    for row in rows:
        print(line(row))


def write(
    name: str, rows: list[Row], facts: dict[str, Any], took_s: float, options: Options
) -> None:
    """Write the result file of a benchmark, unless nothing was measured.

    Without `--data`, rows of an earlier run that need it are kept, with that run's facts.
    """
    path = RESULTS / f"{name}.json"
    if not rows:
        print(f"{name}: nothing measured, {path.name} stays as it is")
        return
    earlier = json.loads(path.read_text()) if path.exists() and options.data is None else {}
    content = {
        "benchmark": name,
        "run": options.run,
        "seconds": round(took_s, 1),
        "machine": facts,
        "rows": [asdict(row) for row in rows],
        "earlier": _with_data(earlier, measured={row.what for row in rows}),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, default=float) + "\n")


def _with_data(result: dict[str, Any], *, measured: set[str]) -> list[dict[str, Any]]:
    """Return a result, and those kept in it, cut down to the rows that need `--data`."""
    kept = []
    for one in [result, *result.get("earlier", [])]:
        rows = [row for row in one.get("rows", []) if row.get("needs_data")]
        rows = [row for row in rows if row["what"] not in measured]
        if rows:
            kept.append({**one, "rows": rows, "earlier": []})
    return kept


def line(row: Row) -> str:
    """Return a row of the table of docs/performance.md."""
    reached = (
        f"**{_number(row.value, row.unit)}**" if row.is_reached else _number(row.value, row.unit)
    )
    spread = f"{_number(min(row.values), row.unit)} to {_number(max(row.values), row.unit)}"
    bar = f"{row.direction} {_number(row.bar, row.unit)}"
    cells = (row.what, row.against, bar, reached, spread, row.note)
    return "| " + " | ".join(cells) + " |"


def _number(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.4g} %"
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text} times" if unit == "x" else f"{text} {unit}"
