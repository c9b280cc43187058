from __future__ import annotations

import re

import pytest
import timm
import torch

from stego_core.errors import CheckpointError, ConfigError
from stego_core.model.registry import (
    build_network,
    find_backbone,
    fit_state,
    random_state,
    registry_names,
)


@pytest.fixture
def tiny():
    return find_backbone("test_vit")


@pytest.mark.parametrize("name", [name for name in registry_names() if name != "resnet50"])
def test_a_short_name_says_the_width_and_patch_size_that_timm_builds(name):
    record = find_backbone(name)
    letter, patch = re.search(r"-vit([sbl])(\d+)", name).groups()
    assert record.patch_size == int(patch)
    assert record.width == {"s": 384, "b": 768, "l": 1024}[letter]
    # DINOv3 and the -reg variants have four registers beside the class token.
    assert record.prefix_tokens == (5 if "dinov3" in name or name.endswith("-reg") else 1)
    assert record.is_transformer


def test_the_convolutional_network_has_the_record_of_its_last_stage():
    record = find_backbone("resnet50")
    assert (record.patch_size, record.width, record.prefix_tokens) == (32, 2048, 0)
    assert not record.is_transformer


def test_the_families_asked_for_are_all_there():
    expected = {f"dino-vit{size}{patch}" for size in "sb" for patch in (8, 16)}
    expected |= {f"dinov2-vit{size}14{kind}" for size in "sbl" for kind in ("", "-reg")}
    expected |= {"dinov3-vits16", "dinov3-vitb16", "resnet50"}
    assert set(registry_names()) == expected


def test_normalisation_and_licence_are_those_of_timm_not_one_constant():
    assert find_backbone("test_vit").mean == (0.5, 0.5, 0.5)
    assert find_backbone("dino-vits8").mean == (0.485, 0.456, 0.406)
    assert find_backbone("dino-vits8").licence == "apache-2.0"
    assert find_backbone("dinov3-vits16").licence == "dinov3-license"
    assert find_backbone("resnet50.bamboo").licence == "unknown"


def test_a_timm_name_without_tag_gets_the_default_tag():
    assert find_backbone("resnet50").timm_name == "resnet50.a1_in1k"
    assert find_backbone("test_vit").timm_name == "test_vit.r160_in1k"
    assert find_backbone("resnet50.tv_in1k").timm_name == "resnet50.tv_in1k"


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("dinov2_vits14", "dinov2-vits14"),
        ("resnet50.tv_in2k", "resnet50.tv_in1k"),
        ("vit_tiny_patch16_225", "vit_tiny_patch16_224"),
        ("@@@", "dinov2-vits14"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_ones_on_one_line(wrong, nearest):
    with pytest.raises(ConfigError) as caught:
        find_backbone(wrong)
    assert nearest in str(caught.value)
    assert "\n" not in str(caught.value)


def test_random_weights_are_the_same_each_time_and_leave_the_global_state_alone(tiny):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = random_state(tiny)
    assert torch.equal(torch.rand(3), expected)
    second = random_state(tiny)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["patch_embed.proj.weight"].std() > 0


def test_a_full_classifier_file_fits_without_its_classifier():
    for name, head in (("test_vit", "head.weight"), ("test_resnet", "fc.weight")):
        record = find_backbone(name)
        full = timm.create_model(record.timm_name).state_dict()
        assert head in full
        fitted = fit_state(dict(full), record, "a file")
        assert fitted.keys() == build_network(record.timm_name, device="meta").state_dict().keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.weight"), "1 missing (first: norm.weight)"),
        (lambda s: s.update(other=torch.zeros(1)), "1 unknown (first: other)"),
        (lambda s: s.update({"norm.bias": torch.zeros(5)}), "norm.bias (5,) instead of (64,)"),
        (lambda s: s.update({"norm.bias": 3}), "norm.bias () instead of (64,)"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 197, 64)), "pos_embed (1, 197, 64) instead"),
    ],
)
def test_tensors_that_do_not_fit_are_named_on_one_line(tiny, change, message):
    state = random_state(tiny)
    change(state)
    with pytest.raises(CheckpointError) as caught:
        fit_state(state, tiny, "f.pt")
    assert message in str(caught.value)
    assert "f.pt do not fit backbone 'test_vit'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_metas_own_layout_with_registers_becomes_that_of_timm():
    record = find_backbone("vit_small_patch14_reg4_dinov2")
    ours = {k: torch.zeros(v.shape) for k, v in _expected(record).items()}
    patches, registers = torch.rand(1, 1369, 384), torch.rand(1, 4, 384)
    theirs = {k: v for k, v in ours.items() if k not in ("reg_token", "pos_embed")}
    theirs["mask_token"] = torch.zeros(1, 384)
    theirs["register_tokens"] = registers
    theirs["pos_embed"] = torch.cat([torch.full((1, 1, 384), 2.0), patches], dim=1)
    fitted = fit_state(theirs, record, "a file")
    assert torch.equal(fitted["reg_token"], registers)
    assert torch.equal(fitted["pos_embed"], patches)
    assert torch.equal(fitted["cls_token"], torch.full((1, 1, 384), 2.0))


@pytest.mark.parametrize(
    ("key", "shape"),
    [("patch_embed.proj.weight", (64, 3, 8, 8)), ("pos_embed", (1, 401, 64))],
)
def test_weights_of_another_grid_are_refused_rather_than_resampled(tiny, key, shape):
    state = random_state(tiny)
    state["mask_token"] = torch.zeros(1, 64)
    assert fit_state(dict(state), tiny, "the same grid")
    state[key] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=re.escape(f"{key} {shape}")):
        fit_state(state, tiny, "another grid")


def _expected(record):
    return build_network(record.timm_name, device="meta").state_dict()
