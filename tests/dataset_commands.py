"""The commands of docs/datasets.md, and trees of the official layouts for them to work on."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "unit" / "datasets"))

from official_trees import TREES  # noqa: E402 - found by the path above

from stego_core.config.load import load_job  # noqa: E402
from stego_core.config.schema import PrepareJob  # noqa: E402
from stego_core.datasets.prepare import plan_prepare, prepare  # noqa: E402
from stego_core.distributed.data import decoders  # noqa: E402
from stego_core.storage.run import RunDirectory  # noqa: E402


def jobs_in(page: str) -> list[list[str]]:
    """Return the commands of a page of the documentation, without `python`."""
    text = (ROOT / "docs" / page).read_text()
    return [
        shlex.split(line)[1:]
        for block in re.findall(r"```(?:sh)?\n(.*?)```", text, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("python jobs/") and "[--" not in line
    ]


def jobs_in_header(path: Path) -> list[list[str]]:
    """Return the commands that stand at the top of a preset, without `python`."""
    text = path.read_text().partition("\n\n")[0].replace("\n# ", "\n")
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("python jobs/")]


COMMANDS = jobs_in("datasets.md")
# Those at the top of the presets, where they are none of the page's.
HEADERS = [
    command
    for path in sorted((ROOT / "configs").glob("*.toml"))
    for command in jobs_in_header(path)
    if "--data.root" in command and "DATA/cocostuff27" in command and command not in COMMANDS
]


def commands(script: str, *more: list[str]) -> list[list[str]]:
    return [command[1:] for command in [*COMMANDS, *more] if command[0] == f"jobs/{script}"]


def value(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def placed(command: list[str], tmp_path: Path, source: Path | str = "SOURCE") -> list[str]:
    """Return a command whose folders lie below `tmp_path`."""
    places = {"DATA": str(tmp_path / "data"), "SOURCE": str(source), "runs": str(tmp_path / "runs")}
    places["configs"] = str(ROOT / "configs")
    names = "|".join(places)
    return [re.sub(f"^({names})(?=/|$)", lambda m: places[m[1]], word) for word in command]


def prepared(name: str, tmp_path: Path) -> tuple[PrepareJob, list[str]]:
    """Prepare a data set from a synthetic tree; return the job and the lines of its plan."""
    (found,) = [c for c in commands("prepare_data.py") if value(c, "--dataset") == name]
    argv = placed(found, tmp_path, TREES[name](tmp_path / "source"))
    job = load_job(PrepareJob, argv, prog="prepare_data.py")
    lines = plan_prepare(job)
    prepare(job, RunDirectory(job.out, job="prepare_data"), decoders(job.limits))
    return job, lines
