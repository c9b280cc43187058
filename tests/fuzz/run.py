"""Fuzz the decoder: every accepted format from seeds of its own, in processes that may die.

`make fuzz` runs it. It ends with exit code 1 if any input made the decoder crash, hang, raise or
take more memory than docs/security.md states; such inputs are kept below `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from seeds import FORMATS, make_seeds, real_seeds

TARGET = Path(__file__).with_name("target.py")
ROOT = TARGET.parents[2]
TIMEOUT_S, RSS_MIB = 10, 1024


def fuzz_format(image_format: str, inputs: int, options: argparse.Namespace) -> dict:
    """Feed `inputs` inputs of one format, in as many processes as that takes."""
    folder = options.out / image_format.lower()
    corpus, seeds, findings = (folder / name for name in ("corpus", "seeds", "findings"))
    shutil.rmtree(seeds, ignore_errors=True)
    for path in (corpus, seeds, findings):
        path.mkdir(parents=True, exist_ok=True)
    drawn = make_seeds(image_format)
    real = real_seeds(options.seeds, image_format, options.max_bytes) if options.seeds else []
    for number, data in enumerate([*drawn, *real]):
        (seeds / f"{number:03d}").write_bytes(data)
    started, done, runs = time.monotonic(), 0, 0
    ends: Counter[str] = Counter()
    while done < inputs and runs < options.processes:
        runs += 1
        done += run_process(inputs - done, options.seed + runs, folder, options.max_bytes)
        tally = folder / "tally.json"
        ends.update(json.loads(tally.read_text()) if tally.exists() else {})
        tally.unlink(missing_ok=True)
    return {
        "format": image_format,
        "seeds": {"drawn": len(drawn), "real": len(real)},
        "inputs": done,
        "ends": dict(ends.most_common()),
        "processes": runs,
        "corpus": len(list(corpus.iterdir())),
        "findings": sorted(path.name for path in findings.iterdir()),
        "seconds": round(time.monotonic() - started, 1),
    }


def run_process(inputs: int, seed: int, folder: Path, max_bytes: int) -> int:
    """Run one process until it has had its inputs or dies; return how many it was given."""
    flags = [f"-runs={inputs}", f"-seed={seed}", f"-max_len={max_bytes}"]
    flags += [f"-timeout={TIMEOUT_S}", f"-rss_limit_mb={RSS_MIB}", "-print_final_stats=1"]
    flags += [f"-artifact_prefix={folder}/findings/", "-reload=0", "-verbosity=1", "-len_control=0"]
    command = [sys.executable, str(TARGET), *flags, f"{folder}/corpus", f"{folder}/seeds"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env["STEGO_FUZZ_TALLY"] = str(folder / "tally.json")
    log = folder / f"log-{seed}.txt"
    with log.open("wb") as stream:
        subprocess.run(command, env=env, stdout=stream, stderr=stream, check=False)
    text = log.read_text(errors="replace")
    stated = re.findall(r"stat::number_of_executed_units:\s*(\d+)", text)
    # A process that died says no sum; its last line of progress counts.
    return (
        int(stated[-1]) if stated else max(map(int, re.findall(r"^#(\d+)", text, re.M)), default=0)
    )


def main(argv: list[str] | None = None) -> int:
    """Run all formats; print and keep a summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="of all formats together")
    parser.add_argument("--seeds", type=Path, help="folder of real images to start from, too")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-bytes", type=int, default=32 * 1024, help="longest input")
    parser.add_argument("--processes", type=int, default=20, help="at most, for each format")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    options = parser.parse_args(argv)
    options.out = options.out.absolute()
    share = -(-options.inputs // len(options.formats))
    results = [fuzz_format(image_format, share, options) for image_format in options.formats]
    for result in results:
        print(json.dumps(result))
    summary = {"inputs": sum(r["inputs"] for r in results), "formats": results}
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    found = sum(len(result["findings"]) for result in results)
    print(f"{summary['inputs']} inputs, {found} findings; {options.out}/summary.json")
    return 1 if found or summary["inputs"] < options.inputs else 0


if __name__ == "__main__":
    sys.exit(main())
