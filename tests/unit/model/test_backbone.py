from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from stego_core.config.schema import BackboneConfig
from stego_core.errors import CheckpointError, ConfigError, ShapeError
from stego_core.model.backbone import load_backbone, resolve_precision
from stego_core.model.registry import build_network, find_backbone, random_state
from stego_core.model.weights import cache_path, read_state

# Tolerance of two float32 computations of the same sum in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def load(name="test_vit", weights="random", **settings):
    settings = {"precision": "fp32", **settings}
    return load_backbone(BackboneConfig(name=name, weights=weights, **settings))


def images(height, width, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(5))


def reference(name):
    """timm's own network with the same weights, and nothing of ours around it."""
    record = find_backbone(name)
    network = build_network(record.timm_name).eval()
    network.load_state_dict(random_state(record))
    return network


@pytest.mark.parametrize(
    ("name", "prefix"), [("test_vit", 1), ("test_vit3", 1), ("vit_tiny_patch16_dinov3_qkvb", 5)]
)
def test_last_features_are_the_final_tokens_without_class_and_registers(name, prefix):
    backbone = load(name)
    batch = images(48, 80)
    with torch.no_grad():
        tokens = reference(name).forward_features(batch)
    assert tokens.shape[1] == prefix + 3 * 5
    features = backbone(batch)
    assert features.shape == (2, backbone.width, 3, 5)
    for row in range(3):
        for column in range(5):
            expected = tokens[:, prefix + row * 5 + column]
            torch.testing.assert_close(features[:, :, row, column], expected, **CLOSE)


@pytest.mark.parametrize(("name", "heads"), [("test_vit", 2), ("test_vit3", 3)])
def test_keys_are_those_of_the_qkv_product_with_all_heads_side_by_side(name, heads):
    network, batch, products = reference(name), images(48, 80), []
    network.blocks[-1].attn.qkv.register_forward_hook(lambda _, __, out: products.append(out))
    with torch.no_grad():
        network.forward_features(batch)
    q_k_v = products[0].reshape(2, 16, 3, heads, -1)  # (B, tokens, 3, heads, channels of a head)
    features = load(name, feature="key")(batch)
    assert features.shape == (2, network.embed_dim, 3, 5)
    of_heads = features.reshape(2, heads, -1, 3, 5)
    for head in range(heads):
        expected = q_k_v[:, 1:, 1, head].transpose(1, 2).reshape(2, -1, 3, 5)
        torch.testing.assert_close(of_heads[:, head], expected, **CLOSE)


@pytest.mark.parametrize(
    ("name", "heads", "prefix"),
    [
        ("vit_tiny_patch16_224", 3, 1),
        ("dinov3-vits16", 6, 5),  # no bias at all
        ("vit_tiny_patch16_dinov3_qkvb", 3, 5),  # bias apart from the projection
        ("eva02_tiny_patch14_224", 3, 1),  # separate projections
    ],
)
def test_keys_are_those_that_attention_compares_but_for_the_rotation(
    name, heads, prefix, monkeypatch
):
    seen = []
    attend = F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append(k)
        return attend(q, k, v, **options)

    backbone = load(name, feature="key")
    side = backbone.patch_size
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        features = backbone(images(2 * side, 3 * side))
    used = seen[-1]  # (B, heads, tokens, channels of a head)
    assert used.shape[:3] == (2, heads, prefix + 6)
    of_heads = features.reshape(2, heads, -1, 6).transpose(2, 3)
    # A rotation by position keeps lengths; without one the keys themselves are equal.
    torch.testing.assert_close(of_heads.norm(dim=3), used[:, :, prefix:].norm(dim=3), **CLOSE)
    if not hasattr(backbone._network, "rope"):
        torch.testing.assert_close(of_heads, used[:, :, prefix:], **CLOSE)


def test_blocks_are_concatenated_in_the_networks_order_after_the_final_norm():
    network, batch, outputs = reference("test_vit"), images(32, 64), {}
    for index, block in enumerate(network.blocks):
        block.register_forward_hook(lambda _, __, out, i=index: outputs.update({i: out}))
    with torch.no_grad():
        network.forward_features(batch)
        expected = [network.norm(outputs[index]) for index in (2, 4, 5)]
    backbone = load(feature="blocks", blocks=(-1, 2, 4))
    assert backbone.width == 3 * 64
    features = backbone(batch)
    for part, tokens in zip(features.split(64, dim=1), expected, strict=True):
        maps = tokens[:, 1:].transpose(1, 2).reshape(2, 64, 2, 4)
        torch.testing.assert_close(part, maps, **CLOSE)


@pytest.mark.parametrize("blocks", [(), (6,), (-7,), (1, 1), (5, -1)])
def test_blocks_that_are_not_there_or_named_twice_are_refused(blocks):
    with pytest.raises(ConfigError, match="has blocks 0 to 5"):
        load(feature="blocks", blocks=blocks)


def test_a_convolutional_network_gives_its_last_stage():
    backbone, batch = load("test_resnet"), images(64, 96)
    with torch.no_grad():
        expected = reference("test_resnet").forward_features(batch)
    assert (backbone.patch_size, backbone.width) == (32, 96)
    torch.testing.assert_close(backbone(batch), expected, **CLOSE)
    third = load("test_resnet", feature="blocks", blocks=(-2,))
    assert (third.patch_size, third.width) == (16, 192)
    assert third(images(48, 80)).shape == (2, 192, 3, 5)


def test_a_network_without_keys_and_stages_of_several_sizes_are_refused():
    with pytest.raises(ConfigError, match="test_resnet' has no attention keys"):
        load("test_resnet", feature="key")
    with pytest.raises(ConfigError, match="cells of different size"):
        load("test_resnet", feature="blocks")


@pytest.mark.parametrize("shape", [(1, 3, 40, 32), (1, 3, 32, 40), (1, 4, 32, 32), (3, 32, 32)])
def test_images_that_are_not_multiples_of_the_patch_are_refused(shape):
    with pytest.raises(ShapeError, match="multiples of 16 pixels"):
        load()(torch.zeros(shape))


def test_a_network_of_one_image_size_says_so():
    backbone = load("mixer_s32_224")
    assert backbone(images(224, 224, batch=1)).shape == (1, 512, 7, 7)
    with pytest.raises(ShapeError, match="mixer_s32_224' can't take this size"):
        backbone(images(64, 64))


def test_positions_follow_the_image_when_only_its_size_changes():
    backbone = load()
    with torch.no_grad():
        positions = torch.zeros_like(backbone._network.pos_embed)
        ramp = torch.linspace(-1, 1, 10).repeat(10)  # rises from left to right on the 10 x 10 grid
        positions[0, 1:, 0] = ramp
        backbone._network.pos_embed.copy_(positions)
        tokens = backbone._network.patch_embed(torch.zeros(1, 3, 32, 160))
        embedded = backbone._network._pos_embed(tokens)[0, 1:, 0].reshape(2, 10)
    spread = embedded - embedded.mean()
    assert torch.allclose(spread[0], spread[1], atol=1e-5)
    assert torch.all(spread.diff(dim=1) > 0)


def test_it_stays_in_eval_mode_and_frozen_inside_a_model_that_trains():
    backbone = load()
    model = nn.Sequential(backbone, nn.Conv2d(64, 4, 1)).train()
    assert model[1].training
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    batch = images(32, 32).requires_grad_()
    assert not backbone(batch).requires_grad
    model(batch).sum().backward()
    assert batch.grad is None
    assert model[1].weight.grad is not None


def test_pixels_are_normalised_as_timm_says():
    pixels = np.random.default_rng(1).integers(0, 256, size=(2, 16, 32, 3), dtype=np.uint8)
    before = pixels.copy()
    prepared = load("vit_tiny_patch16_dinov3_qkvb").prepare(torch.from_numpy(pixels))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)
    assert prepared.dtype == torch.float32
    np.testing.assert_allclose(prepared.numpy(), expected, atol=1e-5)
    np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize(
    "pixels", [torch.zeros(1, 16, 16, 3), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)]
)
def test_pixels_of_another_kind_are_refused(pixels):
    with pytest.raises(ShapeError, match="uint8"):
        load().prepare(pixels)


def test_random_backbones_are_equal():
    batch = images(32, 32)
    assert torch.equal(load()(batch), load()(batch))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_gives_the_features_of_the_weights_in_it(tmp_path, suffix):
    state = {k: v * 1.25 for k, v in random_state(find_backbone("test_vit")).items()}
    path = tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    backbone = load(weights=str(path))
    assert backbone.weights.path == path
    network = reference("test_vit")
    network.load_state_dict(state)
    with torch.no_grad():
        expected = network.forward_features(images(32, 32))[:, 1:].transpose(1, 2)
    features = backbone(images(32, 32)).flatten(2)
    torch.testing.assert_close(features, expected, **CLOSE)
    assert not torch.allclose(features, load()(images(32, 32)).flatten(2))


def test_a_full_dino_checkpoint_gives_the_teacher(tmp_path):
    state = random_state(find_backbone("test_vit"))
    teacher = {f"module.backbone.{key}": value for key, value in state.items()}
    teacher["module.head.last_layer.weight_g"] = torch.zeros(3)
    student = {key: value + 1 for key, value in teacher.items()}
    path = tmp_path / "checkpoint.pth"
    arguments = argparse.Namespace(arch="vit_small", lr=0.1)
    torch.save({"student": student, "teacher": teacher, "epoch": 9, "args": arguments}, path)
    torch.testing.assert_close(load(weights=str(path))(images(32, 32)), load()(images(32, 32)))


class Opens:
    """Creates a file when it is unpickled, as hostile weights could run anything."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_with_code_is_refused_and_its_code_not_run(tmp_path):
    path, trace = tmp_path / "w.pth", tmp_path / "trace"
    torch.save({"teacher": random_state(find_backbone("test_vit")), "x": Opens(trace)}, path)
    with pytest.raises(CheckpointError, match="hold more than tensors") as caught:
        load(weights=str(path))
    assert "\n" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"no weights at all"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_file_is_one_line(tmp_path, suffix, content):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        read_state(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_network_is_one_line(tmp_path):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(random_state(find_backbone("test_vit3")), path)
    with pytest.raises(CheckpointError, match="do not fit backbone 'test_vit'") as caught:
        load(weights=str(path))
    assert "\n" not in str(caught.value)


def test_precision_is_taken_as_given_and_chosen_only_where_asked():
    assert resolve_precision("fp32", "cuda:0") == "fp32"
    assert resolve_precision("bf16", "cpu") == "bf16"
    assert resolve_precision("auto", "mps") == "fp32"
    flags = Path("/proc/cpuinfo")
    if flags.exists() and "flags" in flags.read_text():
        words = set(flags.read_text().split())
        expected = "bf16" if words & {"avx512_bf16", "amx_bf16", "amx_tile"} else "fp32"
        assert resolve_precision("auto", "cpu") == expected


def test_bf16_features_are_float32_and_near_those_of_fp32():
    exact, rough = load(), load(precision="bf16")
    assert rough.precision == "bf16"
    batch = images(64, 64)
    features = rough(batch)
    assert features.dtype == torch.float32
    assert not torch.equal(features, exact(batch))
    # bf16 keeps 8 bits: about 0.4 % of a value, and six blocks of it.
    assert F.cosine_similarity(features, exact(batch), dim=1).min() > 0.99


@pytest.mark.weights
def test_the_real_dinov2_gives_the_features_that_its_onnx_file_gives():
    record = find_backbone("dinov2-vits14")
    if not cache_path(record).exists():
        pytest.skip(f"no DINOv2 weights in {cache_path(record)}")
    backbone = load("dinov2-vits14", weights=None)
    rows, columns = np.mgrid[:224, :224]
    picture = np.stack([rows, columns, (rows + 2 * columns) % 224], axis=2).astype(np.uint8)
    features = backbone(backbone.prepare(torch.from_numpy(picture[None])))
    assert features.shape == (1, 384, 16, 16)
    # Means over the grid of the output of `backbone.layernorm` of the ONNX file itself, run on the
    # same normalised image by onnx.reference. It interpolates positions without antialiasing:
    # hence the tolerance.
    golden = torch.tensor([1.436, 1.420, 1.439, -3.614, 0.493, -1.963, 0.883, 2.000])
    torch.testing.assert_close(features.mean(dim=(0, 2, 3))[:8], golden, rtol=0, atol=0.3)


def test_keys_of_batches_computed_at_the_same_time_are_those_of_each():
    backbone = load("test_vit", feature="key")
    batches = [
        torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in range(8)
    ]
    alone = [backbone(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, expected in zip(pool.map(backbone, batches), alone, strict=True):
                assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "prefix", "has_token"),
    [("test_vit", 1, True), ("vit_wee_patch16_reg1_gap_256", 1, False)],
)
def test_a_register_is_no_class_token(name, prefix, has_token):
    batch = images(32, 48)
    with torch.no_grad():
        tokens = reference(name).forward_features(batch)
    assert tokens.shape[1] == prefix + 2 * 3
    features, token = load(name).with_class_token(batch)
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens[:, prefix:], **CLOSE)
    assert (token is not None) == has_token
    if has_token:
        torch.testing.assert_close(token, tokens[:, 0], **CLOSE)
