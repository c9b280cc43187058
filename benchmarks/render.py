"""Write the table of docs/performance.md from benchmarks/results/*.json.

    python -m benchmarks.render

Only what lies between the two markers of the document is replaced.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, Row, line

DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- begin of the table: make bench -->", "<!-- end of the table -->"
HEAD = "| what | against | bar | median | of repeats | |\n|---|---|---|---|---|---|"
# The order of the table; files of other studies lie in the same folder.
BENCHMARKS = (
    "training_step",
    "streaming",
    "schedule",
    "precision",
    "segment_throughput",
    "ray_overhead",
    "knn",
    "crf",
    "memory",
)


def table(results: list[dict[str, Any]]) -> str:
    """Return the table and a line on each machine that its rows come from."""
    rows = [line(Row(**row)) for result in results for row in result["rows"]]
    machines: dict[str, list[str]] = {}
    for result in results:
        facts = result["machine"]
        bf16 = [flag for flag in facts["instructions"] if "bf16" in flag] or ["no bf16"]
        packages = ", ".join(f"{n} {facts['packages'][n]}" for n in ("torch", "ray"))
        text = f"{facts['cpu']}, {facts['cores']} cores ({', '.join(bf16)}), {packages}"
        machines.setdefault(text, []).append(f"{result['benchmark']} ({result['seconds']:.0f} s)")
    where = [f"{text}: {', '.join(names)}." for text, names in machines.items()]
    return "\n".join([HEAD, *rows, "", *where])


def render(document: str, results: list[dict[str, Any]]) -> str:
    """Return the document with a new table between its markers."""
    before, found_begin, rest = document.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not found_begin or not found_end:
        raise ValueError(f"the document needs the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def read_results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the result files of the table's benchmarks that are there, in the table's order."""
    paths = [folder / f"{name}.json" for name in BENCHMARKS]
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    return [result for result in found if "rows" in result]


def main() -> None:
    """Rewrite the table in place."""
    DOCUMENT.write_text(render(DOCUMENT.read_text(), read_results()))


if __name__ == "__main__":
    main()
