"""Python, torch, processors, memory and disks of this machine."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from stego_core.doctor.findings import Finding, State
from stego_core.errors import ClusterError, ConfigError
from stego_core.storage import fs

GIB = 2**30
_DISTRIBUTION = "stego-ray"
# Ray, the driver and one actor with a small backbone take about 2 GiB before the first picture.
MIN_MEMORY, ADVISED_MEMORY = 2 * GIB, 4 * GIB
MIN_DISK, ADVISED_DISK = GIB, 10 * GIB
# Ray stops spilling to a disk that is fuller than this, and its object store wants this of memory.
_FULL, _STORE_SHARE = 0.95, 0.3
_CGROUP = Path("/sys/fs/cgroup")
# Limit, use and its parts: of version 2, and of version 1.
_CGROUP_MEMORY = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)

Usage = Callable[[str], tuple[int, int, int]]
"""Total, used and free bytes of the file system of a path, as `shutil.disk_usage` gives them."""


def check_python(distribution: str = _DISTRIBUTION) -> Iterator[Finding]:
    """Tell the interpreter and the system; what is too old for this project is a failure."""
    found = f"{platform.python_version()} on {platform.platform()}"
    stated = ""
    with suppress(metadata.PackageNotFoundError):  # `check_packages` says so
        stated = str(metadata.metadata(distribution).json.get("requires_python", ""))
    if SpecifierSet(stated).contains(platform.python_version(), prereleases=True):
        yield Finding("python", State.OK, found)
    else:
        advice = f"make .venv anew with Python {stated}"
        code = ConfigError.exit_code
        yield Finding("python", State.FAIL, f"{found}; {stated} is needed", advice, code)


def check_packages(distribution: str = _DISTRIBUTION) -> Iterator[Finding]:
    """Compare installed packages with the floors of this project, security ones included."""
    try:
        stated = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        found = f"{distribution} is not installed as a package, so versions can't be compared"
        yield Finding("packages", State.WARN, found, "pip install . in the repository")
        return
    required = [Requirement(line) for line in stated]
    needed = [r for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = [line for requirement in needed if (line := _unmet(requirement))]
    if wrong:
        advice = f"pip install --upgrade {distribution}"
        code = ConfigError.exit_code
        yield Finding("packages", State.FAIL, "; ".join(wrong), advice, code)
    else:
        yield Finding("packages", State.OK, f"{len(needed)} are as new as they must be")


def _unmet(requirement: Requirement) -> str:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    # A build of one's own is often a pre-release by its name.
    if requirement.specifier.contains(Version(version), prereleases=True):
        return ""
    return f"{requirement.name} {version} is not {requirement.specifier}"


def check_torch() -> Iterator[Finding]:
    """Tell which device torch computes on and in which arithmetic."""
    import torch

    from stego_core.model.backbone import resolve_precision

    if torch.cuda.is_available():
        precision = resolve_precision("auto", "cuda")
        for number in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(number)
            size = f"{device.total_memory / GIB:.0f} GiB, {precision}"
            yield Finding("torch", State.OK, f"{torch.__version__}, GPU {device.name}, {size}")
        return
    precision = resolve_precision("auto", "cpu")
    extras = [name for name in ("amx", "avx512_bf16") if _has(name)]
    shown = f"{torch.__version__}, no GPU, CPU with {', '.join(extras) or 'neither AMX nor bf16'}"
    found = f"{shown}: {precision}"
    if Path("/dev/nvidiactl").exists():
        advice = "install a torch build for the CUDA version that nvidia-smi shows"
        yield Finding(
            "torch", State.WARN, f"{found}; a GPU is there but torch can't use it", advice
        )
    else:
        yield Finding("torch", State.OK, found)


def _has(name: str) -> bool:
    import torch

    # torch has had the question under these names only.
    asked = {"amx": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}[name]
    return bool(getattr(torch.cpu, asked, bool)())


def check_cpus(cgroup: Path = _CGROUP) -> Iterator[Finding]:
    """Tell how many CPUs may be used, and whether a container's quota is less than Ray will see."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = re.match(r"(\d+) (\d+)", _text(cgroup / "cpu.max"))
    share = int(quota[1]) / int(quota[2]) if quota else float(usable or 1)
    found = f"{usable} usable of {os.cpu_count()}"
    if share < 1:
        advice = "give the container at least one CPU"
        yield Finding("cpus", State.WARN, f"{found}, quota {share:.2g}", advice)
    else:
        yield Finding("cpus", State.OK, f"{found}, quota {share:.3g}" if quota else found)


def available_memory(cgroup: Path = _CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Return the bytes that may still be taken, a container's limit included; None if unknown."""
    free = re.search(r"MemAvailable:\s+(\d+) kB", _text(meminfo))
    found = [int(free[1]) * 1024] if free else []
    for names in _CGROUP_MEMORY:
        limit, used, stat = (_text(cgroup / name).strip() for name in names)
        if limit.isdigit() and used.isdigit():
            # The kernel gives back what it keeps of files before it kills anybody.
            kept = [int(n) for n in re.findall(r"^(?:total_)?inactive_file (\d+)$", stat, re.M)]
            found.append(max(0, int(limit) - int(used) + max(kept, default=0)))
    return min(found, default=None)


def check_memory(available: int | None) -> Iterator[Finding]:
    """Judge the memory that is left, in bytes."""
    if available is None:
        yield Finding("memory", State.SKIP, "this system does not say how much is left")
        return
    found = f"{available / GIB:.1f} GiB available"
    advice = "end other programs, or lower --limits.max-pixels (20 bytes a pixel, 8 at a time)"
    if available < MIN_MEMORY:
        yield Finding("memory", State.FAIL, found, advice, ClusterError.exit_code)
    else:
        is_low = available < ADVISED_MEMORY
        yield Finding("memory", State.WARN if is_low else State.OK, found, advice if is_low else "")


def check_disk(path: str, *, usage: Usage = shutil.disk_usage) -> Iterator[Finding]:
    """Judge the room for Ray's session and what it spills, or for a local output."""
    total, _, free = usage(path)
    if not total:
        yield Finding("disk", State.SKIP, f"{path} does not say how large it is")
        return
    found = f"{path}: {free / GIB:.1f} GiB free of {total / GIB:.0f}"
    if free < MIN_DISK or free < total * (1 - _FULL):
        advice = "make room, or set RAY_TMPDIR (Ray) or --out to another disk"
        yield Finding("disk", State.FAIL, found, advice, ClusterError.exit_code)
    elif free < ADVISED_DISK:
        advice = "feature stores and what Ray spills may need more"
        yield Finding("disk", State.WARN, found, advice)
    else:
        yield Finding("disk", State.OK, found)


def check_shared_memory(
    path: str = "/dev/shm",  # noqa: S108 - where Ray's object store lives
    *,
    memory: int | None = None,
    usage: Usage = shutil.disk_usage,
) -> Iterator[Finding]:
    """Judge the room for Ray's object store against the memory, in bytes."""
    if not Path(path).is_dir():
        yield Finding("shm", State.SKIP, f"no {path} on this system")
        return
    _, _, free = usage(path)
    wanted = int((memory or 0) * _STORE_SHARE)
    found = f"{path}: {free / GIB:.1f} GiB free"
    if free < wanted:
        advice = f"in a container: --shm-size={-(-wanted // GIB)}gb; Ray uses a slow disk otherwise"
        yield Finding("shm", State.WARN, found, advice)
    else:
        yield Finding("shm", State.OK, found)


def ray_folder() -> str:
    """Return where Ray's sessions and what it spills go on this machine."""
    return os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()


def existing(path: str) -> str:
    """Return the nearest folder of a local URI that is there already."""
    folder = fs.local_path(path).absolute()
    return str(next(parent for parent in (folder, *folder.parents) if parent.exists()))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
