"""Nothing that reads a file runs what is in it: no pickle, no unchecked torch.load, no eval."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "stego_core").rglob("*.py"), *(ROOT / "jobs").glob("*.py")])
READER = ROOT / "stego_core" / "model" / "safe_pickle.py"
DISTRIBUTED = ROOT / "stego_core" / "distributed"
CHILD = ROOT / "stego_core" / "child.py"
ALLOWED = {
    # A reader of pickles that imports and calls nothing; tests/unit/model/test_safe_pickle.py.
    READER: ["pickle"],
    # A parent hands its child the function to run. It pickles that itself and sends it first; no
    # byte of a file is in it, and the child answers with bytes.
    CHILD: ["pickle"],
    DISTRIBUTED / "isolate.py": ["ray.cloudpickle"],
    DISTRIBUTED / "culprits.py": ["ray.cloudpickle"],
}
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "read_pickle", "to_pickle", "unpickle", "load_module", "PyExtensionType"}
# What must be stated in a call of this name, and its only value.
STATED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "np.save": ("allow_pickle", False),
    "np.savez": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}


def findings(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += _of_names(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            # `from ray import cloudpickle` names it as `import ray.cloudpickle` does.
            within = [f"{module}.{alias.name}" for alias in node.names]
            found += _of_names([module]) or _of_names(within)
        elif isinstance(node, ast.Attribute):
            found += _of_names([ast.unparse(node)] if node.attr in MODULES else [])
        elif isinstance(node, ast.Call):
            found += _of_call(node)
    return found


def _of_names(names: Iterable[str]) -> list[str]:
    return sorted(name for name in set(names) if set(name.split(".")) & MODULES)


def _of_call(node: ast.Call) -> list[str]:
    name = ast.unparse(node.func)
    last = name.rpartition(".")[2]
    # `model.eval()` and `re.compile` are other things than the built-in functions.
    is_call = last in CALLS and (name == last or last not in ("eval", "exec"))
    found = [name] if is_call else []
    if name == "yaml.load":
        found.append(name)
    if name in STATED:
        key, value = STATED[name]
        stated = {keyword.arg: keyword.value for keyword in node.keywords}
        constant = stated.get(key)
        if not (isinstance(constant, ast.Constant) and constant.value is value):
            found.append(f"{name} without {key}={value}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_that_reads_files_can_run_code(path):
    assert findings(path.read_text()) == ALLOWED.get(path, [])


def test_the_one_reader_of_pickles_overrides_what_pickle_would_import_and_call():
    (reader,) = [
        node
        for node in ast.walk(ast.parse(READER.read_text()))
        if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases)
    ]
    assert {"find_class", "persistent_load"} <= {part.name for part in reader.body[1:]}
    text = READER.read_text()
    assert "pickle.load" not in text
    assert "importlib" not in text


def test_the_one_pickle_that_is_loaded_is_the_one_that_the_parent_made():
    loads = [
        ast.unparse(node)
        for path in (CHILD, DISTRIBUTED / "isolate.py", DISTRIBUTED / "culprits.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and "pickle.load" in ast.unparse(node)
        and "pickle" in ast.unparse(node.func)
    ]
    assert not re.search(r"Unpickler|from pickle|pickle as", CHILD.read_text())
    # The first message of the pipe; what it gives is called, once.
    assert sorted(loads) == ["pickle.loads(pipe.recv_bytes())", "pickle.loads(pipe.recv_bytes())()"]


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ("import pickle", 1),
        ("from cloudpickle import loads", 1),
        ("from ray import cloudpickle", 1),
        ("from ray import cloudpickle as harmless", 1),
        ("from ray.cloudpickle import loads", 1),
        ("import ray.cloudpickle as harmless", 1),
        ("ray.cloudpickle.loads(data)", 1),
        ("from ray import data", 0),
        ("def f():\n    import joblib.numpy_pickle", 1),
        ("torch.load(p)", 1),
        ("torch.load(p, weights_only=flag)", 1),
        ("torch.load(p, weights_only=True)", 0),
        ("np.load(p)", 1),
        ("np.load(p, allow_pickle=True)", 1),
        ("np.load(p, allow_pickle=False)", 0),
        ("pd.read_pickle(p)", 1),
        ("eval(text)", 1),
        ("model.eval()", 0),
        ("yaml.load(text)", 1),
    ],
)
def test_the_check_finds_what_it_looks_for(source, number):
    assert len(findings(source)) == number
