"""Optional libraries that are missing or broken, and weights that are missing, damaged or fine."""

from __future__ import annotations

import sys

import pytest
import safetensors.torch

from stego_core.config.backbone import BackboneConfig
from stego_core.doctor.findings import State, examine
from stego_core.doctor.parts import EXTRAS, check_extra, check_weights
from stego_core.model.registry import find_backbone, random_state
from stego_core.model.weights import cache_path

TINY = BackboneConfig(name="test_vit")


def one(findings):
    (finding,) = findings
    return finding


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cache_path(find_backbone("test_vit"))
    path.parent.mkdir(parents=True)
    return path


@pytest.mark.parametrize("name", EXTRAS)
def test_a_missing_extra_is_passed_over_and_says_which_it_is(name, monkeypatch):
    for module in ("faiss", "pydensecrf", "pydensecrf.densecrf", "jinja2"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "path", [])
    finding = one(check_extra(name))
    assert finding.state is State.SKIP
    assert "extra `" in finding.found


@pytest.mark.parametrize("content", ["import no_such_library", "raise ImportError('libcudart')"])
def test_a_broken_extra_is_a_failure(content, tmp_path, monkeypatch):
    (tmp_path / "faiss.py").write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    finding = one(examine([("faiss", lambda: check_extra("faiss"))]))
    assert (finding.state, finding.exit_code) == (State.FAIL, 2)
    assert "no_such_library" in finding.found or "libcudart" in finding.found


def test_an_extra_that_is_there_says_its_version():
    finding = one(check_extra("report"))
    assert finding.state is State.OK
    assert finding.found.split()[1][0].isdigit()


def test_weights_that_are_not_there_are_told_and_not_fetched(cache):
    finding = one(check_weights(TINY))
    assert finding.state is State.WARN
    assert str(cache) in finding.advice
    assert list(cache.parent.iterdir()) == []


def test_weights_of_the_cache_are_loaded(cache):
    cache.write_bytes(safetensors.torch.save(random_state(find_backbone("test_vit"))))
    finding = one(check_weights(TINY))
    assert finding.state is State.OK
    assert str(cache) in finding.found


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"damaged", 2), (safetensors.torch.save({}), 2)],
    ids=["damaged", "other"],
)
def test_weights_that_can_not_be_used_fail(cache, content, code):
    cache.write_bytes(content)
    finding = one(examine([("weights", lambda: check_weights(TINY))]))
    assert (finding.state, finding.exit_code) == (State.FAIL, code)
    assert "\n" not in finding.line()


def test_a_file_of_weights_that_is_missing_and_a_backbone_that_nobody_knows_fail(tmp_path):
    missing = BackboneConfig(name="test_vit", weights=str(tmp_path / "w.safetensors"))
    unknown = BackboneConfig(name="no-such-network")
    found = [one(examine([("weights", lambda c=c: check_weights(c))])) for c in (missing, unknown)]
    assert [f.exit_code for f in found] == [3, 2]
