"""What the machine has, with the real probes where they can be made to fail and numbers else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stego_core.doctor import machine
from stego_core.doctor.findings import State
from stego_core.doctor.machine import GIB


def one(findings):
    (finding,) = findings
    assert "\n" not in finding.line()
    return finding


def test_this_machine_passes_what_the_tests_need_of_it():
    for check in (machine.check_python, machine.check_packages, machine.check_cpus):
        assert one(check()).state is State.OK
    assert one(machine.check_torch()).found.endswith(("fp32", "bf16"))
    assert machine.available_memory() > GIB // 2


def test_a_python_that_is_too_old_is_told_with_what_to_do(tmp_path, monkeypatch):
    install(tmp_path, "some-future-product", [], python=">=4.2")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = one(machine.check_python("some-future-product"))
    assert (finding.state, finding.exit_code) == (State.FAIL, 2)
    assert finding.found.endswith("; >=4.2 is needed")
    assert finding.advice == "make .venv anew with Python >=4.2"
    assert one(machine.check_python("no-such-product")).state is State.OK


def install(folder: Path, name: str, requires: list[str], python: str = ">=3.11") -> None:
    """Make the metadata of an installed distribution, as pip leaves them."""
    path = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    path.mkdir()
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Python: {python}"]
    lines += [f"Requires-Dist: {one}" for one in requires]
    (path / "METADATA").write_text("\n".join(lines) + "\n")


def test_packages_that_are_too_old_or_missing_are_all_named(tmp_path, monkeypatch):
    needs = ["pillow>=999", "numpy", "no-such-package>=1", "faiss-cpu>=999; extra == 'cpu'"]
    install(tmp_path, "some-product", needs)
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = one(machine.check_packages("some-product"))
    assert (finding.state, finding.exit_code) == (State.FAIL, 2)
    assert "pillow" in finding.found
    assert ">=999" in finding.found
    assert "no-such-package is missing" in finding.found
    assert "numpy" not in finding.found
    assert "faiss" not in finding.found  # an extra that nobody asked for


def test_a_checkout_that_is_not_installed_is_told():
    finding = one(machine.check_packages("no-such-product"))
    assert finding.state is State.WARN
    assert "pip install" in finding.advice


@pytest.mark.parametrize(
    ("available", "state"),
    [(None, "skip"), (GIB, "fail"), (3 * GIB, "warn"), (9 * GIB, "ok")],
)
def test_memory_is_judged_by_what_is_left(available, state):
    finding = one(machine.check_memory(available))
    assert finding.state.value == state
    assert finding.exit_code == (5 if state == "fail" else 0)


def test_the_limit_of_a_container_counts(tmp_path):
    (tmp_path / "memory.max").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{2 * GIB}\n")
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 1 kB\nMemAvailable:  {8 * GIB // 1024} kB\n")
    assert machine.available_memory(tmp_path, meminfo) == GIB
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_memory(tmp_path, meminfo) == 8 * GIB
    assert machine.available_memory(tmp_path / "none", tmp_path / "none") is None


def test_files_that_the_kernel_keeps_in_memory_count_as_free(tmp_path):
    (tmp_path / "memory.max").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{2 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\nactive_file 7\n")
    assert machine.available_memory(tmp_path, tmp_path / "none") == 2 * GIB


def test_the_limit_of_an_older_kernels_container_is_known(tmp_path):
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text(f"{2 * GIB}\n")
    stat = f"inactive_file 1\ntotal_inactive_file {GIB}\n"
    (tmp_path / "memory" / "memory.stat").write_text(stat)
    assert machine.available_memory(tmp_path, tmp_path / "none") == 2 * GIB


def test_a_quota_below_one_cpu_is_told(tmp_path):
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    finding = one(machine.check_cpus(tmp_path))
    assert finding.state is State.WARN
    assert "0.5" in finding.found
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert one(machine.check_cpus(tmp_path)).state is State.OK


@pytest.mark.parametrize(
    ("total", "free", "state"),
    [(100, 50, "ok"), (100, 6, "warn"), (10, 0.9, "fail"), (1000, 40, "fail")],
    ids=["enough", "little", "none", "fuller than Ray spills to"],
)
def test_a_disk_is_judged_by_what_is_free_on_it(total, free, state):
    sizes = tuple(int(n * GIB) for n in (total, total - free, free))
    finding = one(machine.check_disk("/somewhere", usage=lambda _: sizes))
    assert finding.state.value == state
    assert finding.exit_code == (5 if state == "fail" else 0)
    assert ("-> " in finding.line()) == (state != "ok")


def test_shared_memory_is_compared_with_what_ray_would_take_of_memory(tmp_path):
    few = (GIB, 0, GIB)
    finding = one(machine.check_shared_memory(str(tmp_path), memory=20 * GIB, usage=lambda _: few))
    assert finding.state is State.WARN
    assert "--shm-size=6gb" in finding.advice
    assert one(machine.check_shared_memory(str(tmp_path / "no"))).state is State.SKIP


def can_mount() -> bool:
    command = ["unshare", "-m", "true"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not can_mount(), reason="no mount namespaces here")
def test_a_real_small_disk_fails(tmp_path):
    # In a mount namespace of its own, which ends with the process.
    code = "from stego_core.doctor.machine import check_disk\nimport sys\n"
    code += "print(*(f.line() for f in check_disk(sys.argv[1])))"
    mount = 'mount -t tmpfs -o size=8m small "$0" && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, str(tmp_path), sys.executable, "-c", code]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("fail  disk"), done.stdout + done.stderr
    assert "0.0 GiB free" in done.stdout


def test_the_disk_of_an_output_that_is_not_there_yet_is_that_of_its_nearest_folder(tmp_path):
    assert machine.existing(f"file://{tmp_path}/a/b") == str(tmp_path)
    assert Path(machine.existing("runs/none")).is_dir()


def test_rays_folder_is_the_one_that_ray_is_told(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/elsewhere")
    assert machine.ray_folder() == "/elsewhere"
    monkeypatch.delenv("RAY_TMPDIR")
    assert Path(machine.ray_folder()).is_dir()
