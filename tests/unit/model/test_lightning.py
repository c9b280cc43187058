"""Checkpoints of the original code become models that compute what the original computes."""

from __future__ import annotations

import json
import shutil

import fsspec
import pytest
import torch
import torch.nn.functional as F
from factories import picture
from lightning_files import drawn, save_checkpoint, state_dict

from stego_core.config.schema import ImportJob
from stego_core.errors import CheckpointError, InputError
from stego_core.model import lightning_layout
from stego_core.model.lightning import import_checkpoint, plan_import
from stego_core.model.segmenter import load_segmenter
from stego_core.model.weights import cache_path
from stego_core.storage.lease import hold
from stego_core.storage.run import RunDirectory


@pytest.fixture(autouse=True)
def tiny_architecture(monkeypatch, tmp_path):
    """A network of 0.4 million weights beside the four of the original; no cache, no hub."""
    tiny = {(64, 16): ("vit_test", "test_vit")}
    monkeypatch.setattr(lightning_layout, "ARCHITECTURES", lightning_layout.ARCHITECTURES | tiny)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def imported(path, out):
    import_checkpoint(
        ImportJob(checkpoint=str(path), out=str(out)), RunDirectory(str(out), job="import")
    )
    return out


def tiny(path, *, classes=5, config=None, **parts):
    state = state_dict("test_vit", classes=classes, **parts)
    return state, save_checkpoint(
        path, state, classes=classes, **{"model_type": "vit_test", **(config or {})}
    )


def original_code(state, features):
    """The original's projection, by hand: one matrix product per token and branch."""
    tokens = features.flatten(2).transpose(1, 2)

    def layer(name, x):
        return x @ state[f"{name}.weight"][:, :, 0, 0].T + state[f"{name}.bias"]

    code = layer("net.cluster1.0", tokens)
    if "net.cluster2.0.weight" in state:
        code = code + layer("net.cluster2.2", layer("net.cluster2.0", tokens).clamp(min=0))
    return code.transpose(1, 2).reshape(len(features), -1, *features.shape[2:])


@pytest.mark.parametrize("nonlinear", [True, False])
@torch.no_grad()
def test_an_imported_model_gives_the_code_and_the_clusters_of_the_original_formulas(
    nonlinear, tmp_path
):
    config = {} if nonlinear else {"projection_type": "linear"}
    state, path = tiny(tmp_path / "c.ckpt", nonlinear=nonlinear, config=config)
    model = load_segmenter(str(imported(path, tmp_path / "run")), precision="fp32")
    pixels = torch.from_numpy(picture(64, 96))[None]
    features, code = model.encode(pixels)
    expected = original_code(state, features)
    # Sums of hundreds of products, in another order: the smallest codes differ in the fifth digit.
    torch.testing.assert_close(code, expected, rtol=1e-5, atol=1e-4)

    probe = F.normalize(state["cluster_probe.clusters"], dim=1)
    cosines = torch.einsum("bkhw,nk->bnhw", F.normalize(expected, dim=1), probe)
    found = model.products(code, "cluster").argmax(1)
    assert torch.equal(found, cosines.argmax(1))
    logits = F.conv2d(expected, state["linear_probe.weight"], state["linear_probe.bias"])
    torch.testing.assert_close(model.products(code, "linear"), logits, rtol=1e-5, atol=1e-4)

    _, flipped = model.encode(pixels, flip=True)
    mirrored = original_code(state, model.encode(pixels.flip(2))[0]).flip(3)
    torch.testing.assert_close(flipped, (expected + mirrored) / 2, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_the_networks_weights_are_those_of_the_checkpoint_for_a_vit_of_the_original(tmp_path):
    state = state_dict("dino-vits16")
    # Not what any initialisation gives: the import can't have drawn it itself.
    for number, name in enumerate(["net.model.cls_token", "net.model.norm.bias"]):
        state[name] = drawn(*state[name].shape, seed=100 + number)
    path = save_checkpoint(tmp_path / "c.ckpt", state)
    run = imported(path, tmp_path / "run")
    model = load_segmenter(str(run))
    network = model.backbone._network.state_dict()
    names = {name.removeprefix("net.model.") for name in state if name.startswith("net.model.")}
    assert network.keys() == names
    assert all(torch.equal(network[name], state[f"net.model.{name}"]) for name in names)
    assert model.backbone.record.timm_name == "vit_small_patch16_224.dino"
    assert not cache_path(model.backbone.record).exists()


def test_a_model_moves_with_its_backbone_and_says_where_it_came_from(tmp_path):
    _, path = tiny(tmp_path / "c.ckpt")
    run = imported(path, tmp_path / "run")
    first = load_segmenter(str(run)).encode(torch.from_numpy(picture())[None])[1]
    shutil.move(run / "model", tmp_path / "elsewhere")
    shutil.rmtree(run)
    path.unlink()
    model = load_segmenter(str(tmp_path / "elsewhere"))
    assert torch.equal(model.encode(torch.from_numpy(picture())[None])[1], first)
    card = json.loads((tmp_path / "elsewhere" / "model.json").read_text())
    assert card["backbone"]["weights"] == "backbone.safetensors"
    assert card["backbone_weights"]["source"] == "checkpoint c.ckpt"
    assert card["backbone_weights"]["sha256"] == model.backbone.weights.sha256
    assert (card["head"]["whiten"], card["head"]["smooth"]) == (0, 0)


def test_weights_elsewhere_may_be_given(tmp_path):
    _, path = tiny(tmp_path / "c.ckpt")
    run = imported(path, tmp_path / "run")
    moved = shutil.move(run / "model" / "backbone.safetensors", tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="--weights takes another place of that file"):
        load_segmenter(str(run))
    assert load_segmenter(str(run), weights=str(moved)).backbone.weights.path == moved


def test_a_backbone_that_was_exchanged_is_refused(tmp_path):
    _, path = tiny(tmp_path / "c.ckpt")
    run = imported(path, tmp_path / "run")
    weights = run / "model" / "backbone.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="other weights of"):
        load_segmenter(str(run))


def test_a_model_without_probe_or_baseline_says_so_when_asked(tmp_path):
    _, path = tiny(tmp_path / "c.ckpt", linear=False)
    model = load_segmenter(str(imported(path, tmp_path / "run")))
    assert not model.has_baseline
    assert not model.classifiers
    for kind in ("linear", "baseline_kmeans"):
        with pytest.raises(CheckpointError, match="the model has no"):
            model.products(torch.zeros(1, 6, 2, 2), kind)


def test_a_plan_says_what_the_file_holds_and_touches_nothing(tmp_path):
    _, path = tiny(tmp_path / "c.ckpt", clusters=7, config={"extra_clusters": 2})
    lines = plan_import(ImportJob(checkpoint=str(path), out=str(tmp_path / "run")))
    text = "\n".join(lines)
    assert "test_vit" in text
    assert "clusters: 7; classes of the linear probe: 5" in text
    assert "not used: decoder, train_cluster_probe" in text
    assert [p.name for p in tmp_path.iterdir()] == ["c.ckpt"]


def test_settings_that_are_not_stored_are_no_reason_to_refuse(tmp_path):
    """The released Cityscapes file lacks some; a file without any is told by its tensors."""
    state, path = tiny(tmp_path / "c.ckpt")
    torch.save({"state_dict": state}, path)
    imported(path, tmp_path / "run")
    torch.save({"state_dict": state, "hyper_parameters": {"cfg": {"dim": "${x}"}}}, path)
    imported(path, tmp_path / "run")
    assert load_segmenter(str(tmp_path / "run")).num_clusters == 5


def test_keys_of_the_last_attention_are_taken_where_the_checkpoint_was_made_on_them(tmp_path):
    _, path = tiny(tmp_path / "c.ckpt", config={"dino_feat_type": "KK"})
    imported(path, tmp_path / "run")
    card = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert card["backbone"]["feature"] == "key"


def problems(path, tmp_path) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        imported(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert all(str(path) in line for line in caught.value.problems)
    return list(caught.value.problems)


def test_all_settings_that_disagree_with_the_tensors_are_listed(tmp_path):
    wrong = {
        "arch": "feature-pyramid",
        "model_type": "vit_base",
        "dino_patch_size": 8,
        "dino_feat_type": "values",
        "projection_type": "linear",
        "dim": 70,
        "extra_clusters": 3,
    }
    state = state_dict("test_vit")
    path = save_checkpoint(tmp_path / "c.ckpt", state, classes=27, **wrong)
    found = problems(path, tmp_path)
    assert len(found) == len(wrong) + 1
    for name in [*wrong, "n_classes"]:
        assert sum(f" {name} = " in line for line in found) == 1, (name, found)


def test_a_head_that_is_none_is_refused(tmp_path):
    _, path = tiny(tmp_path / "c.ckpt", nonlinear=False, config={"projection_type": None})
    (line,) = problems(path, tmp_path)
    assert "projection_type = None" in line


def test_all_tensors_of_another_shape_are_listed(tmp_path):
    state = state_dict("test_vit")
    state["net.cluster1.0.bias"] = torch.zeros(7)
    state["net.cluster2.2.weight"] = torch.zeros(6, 65, 1, 1)
    state["cluster_probe.clusters"] = torch.zeros(5, 7)
    del state["linear_probe.bias"]
    state["net.cluster3.weight"] = torch.zeros(1)
    found = problems(save_checkpoint(tmp_path / "c.ckpt", state), tmp_path)
    assert len(found) == 5
    for name in ("cluster1.0.bias", "cluster2.2", "clusters", "linear_probe.bias", "cluster3"):
        assert sum(name in line for line in found) == 1, (name, found)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("net.cluster1.0.weight", "is missing"),
        ("cluster_probe.clusters", "is missing"),
        ("net.model.patch_embed.proj.weight", "is missing"),
        ("net.model.blocks.1.attn.qkv.weight", "do not fit backbone"),
    ],
)
def test_a_tensor_that_is_missing_is_named(name, word, tmp_path):
    state = state_dict("test_vit")
    del state[name]
    found = problems(save_checkpoint(tmp_path / "c.ckpt", state, model_type="vit_test"), tmp_path)
    assert any(word in line and name.removeprefix("net.model.") in line for line in found)


def test_a_network_that_is_none_of_dinos_is_refused(tmp_path):
    state = state_dict("test_vit")
    state["net.model.patch_embed.proj.weight"] = torch.zeros(192, 3, 8, 8)
    (line,) = problems(save_checkpoint(tmp_path / "c.ckpt", state), tmp_path)
    assert "width 192 and patch size 8" in line


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    state = state_dict("test_vit")
    state["net.cluster1.0.bias"][2] = torch.nan
    path = save_checkpoint(tmp_path / "c.ckpt", state, model_type="vit_test")
    (line,) = problems(path, tmp_path)
    assert "not finite" in line


@pytest.mark.parametrize("content", [[], {"epoch": 1}, {"state_dict": {"a": 1}}, 3])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "c.ckpt")
    (line,) = problems(tmp_path / "c.ckpt", tmp_path)
    assert "not a Lightning checkpoint" in line


def test_a_trained_model_is_never_replaced_by_an_imported_one(tmp_path):
    _, path = tiny(tmp_path / "c.ckpt")
    card = tmp_path / "run" / "model" / "model.json"
    card.parent.mkdir(parents=True)
    card.write_text("{}")
    with pytest.raises(CheckpointError, match="give another --out"):
        imported(path, tmp_path / "run")
    assert card.read_text() == "{}"


def test_checkpoint_and_model_may_lie_in_a_store(tmp_path):
    _, path = tiny(tmp_path / "c.ckpt")
    store = fsspec.filesystem("memory")
    store.pipe("/files/c.ckpt", path.read_bytes())
    imported("memory://files/c.ckpt", "memory://runs/imported")
    local = load_segmenter(str(imported(path, tmp_path / "run")))
    remote = load_segmenter("memory://runs/imported")
    pixels = torch.from_numpy(picture())[None]
    assert torch.equal(remote.encode(pixels)[1], local.encode(pixels)[1])
    with pytest.raises(InputError, match="can't be read"):
        imported("memory://files/no.ckpt", tmp_path / "run")


def test_a_folder_that_another_job_writes_gets_no_model(tmp_path):
    _, path = tiny(tmp_path / "c.ckpt")
    with hold(str(tmp_path / "run")), pytest.raises(CheckpointError, match="another job"):
        imported(path, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
