"""The promises that the tree keeps: sizes, scripts, and who may know of Ray."""

from __future__ import annotations

import ast
import stat
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "stego_core").rglob("*.py"))
JOBS = sorted((ROOT / "jobs").glob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_JOB_LINES = 300, 60, 60
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def name(path):
    return path.relative_to(ROOT).as_posix()


def imported(tree):
    """Return the top packages of every import, also of those inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def long_functions(tree, limit):
    """Return (name, lines) of functions that are too long."""
    sizes = [
        (node.name, node.end_lineno - node.lineno + 1)
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS)
    ]
    return [(function, lines) for function, lines in sizes if lines > limit]


def imported_at_load(path):
    """Return the files of the package that a module imports as it is loaded."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {ROOT / (name.replace(".", "/") + ".py") for name in names}
    return files & set(SOURCES)


def circles(imports):
    """Return the modules that reach themselves through imports."""
    found = []
    for start in imports:
        seen, left = set(), list(imports[start])
        while left:
            module = left.pop()
            if module not in seen:
                seen.add(module)
                left += imports[module]
        found += [start] if start in seen else []
    return found


def test_no_modules_import_each_other_as_they_are_loaded():
    """Else one of them can't be the first: a worker that started with it died of ImportError."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    imports = {path: imported_at_load(path) for path in SOURCES}
    assert sum(map(len, imports.values())) > 100
    assert [name(path) for path in circles(imports)] == []


def test_there_is_something_to_look_at():
    assert len(SOURCES) > 30
    assert len(JOBS) >= 5


def test_the_checks_below_can_fail():
    tree = ast.parse("def f():\n    import ray.data\n    from torch import nn\n")
    assert imported(tree) == {"ray", "torch"}
    assert long_functions(tree, 2) == [("f", 3)]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    assert long_functions(ast.parse(text), MAX_FUNCTION_LINES) == []


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_ray_is_known_only_to_the_distributed_package(path):
    if "distributed" not in path.relative_to(ROOT).parts:
        assert "ray" not in imported(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", JOBS, ids=name)
def test_jobs_are_short_executable_scripts(path):
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env python")
    assert len(text.splitlines()) <= MAX_JOB_LINES
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_every_package_says_what_it_is():
    for path in (ROOT / "stego_core").rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), name(path)


def test_test_files_have_names_of_their_own():
    files = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(files) == len(set(files))
