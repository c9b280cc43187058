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
    """Return the table and a line on each run and machine that its rows come from."""
    parts = [part for result in results for part in (result, *result.get("earlier", []))]
    rows = [line(Row(**row)) for part in parts for row in part["rows"]]
    origins: dict[str, list[str]] = {}
    for part in parts:
        facts = part["machine"]
        bf16 = [flag for flag in facts["instructions"] if "bf16" in flag] or ["no bf16"]
        packages = ", ".join(f"{n} {facts['packages'][n]}" for n in ("torch", "ray"))
        text = f"{facts['cpu']}, {facts['cores']} cores ({', '.join(bf16)}), {packages}"
        text = f"Run of {part.get('run') or 'unknown time'}, {text}"
        if facts.get("commit"):
            text += f", commit {facts['commit']}"
        origins.setdefault(text, []).append(_name(part, is_kept=part not in results))
    where = [f"{text}: {', '.join(names)}." for text, names in origins.items()]
    return "\n".join([HEAD, *rows, "", "\n\n".join(where)])


def _name(part: dict[str, Any], *, is_kept: bool) -> str:
    if is_kept:  # some rows of that run only
        return f"{part['benchmark']} (only: {'; '.join(row['what'] for row in part['rows'])})"
    return f"{part['benchmark']} ({part['seconds']:.0f} s)"


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
