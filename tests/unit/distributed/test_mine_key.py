"""Features lie below a key of what they were computed from: of all that, and of nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import picture, png_bytes, write_tree

from stego_core.config.load import load_job
from stego_core.config.schema import MineJob
from stego_core.distributed import mine as module
from stego_core.distributed import mine_record
from stego_core.model.weights import ResolvedWeights
from stego_core.storage.run import RunDirectory

FLAGS = {
    "--backbone.name": "test_vit",
    "--backbone.weights": "a.safetensors",
    "--backbone.precision": "fp32",  # `auto` would ask the cluster
    "--backbone.feature": "blocks",
    "--backbone.blocks": "-1",
    "--views.resolution": "64",
    "--views.crops": "five",
    "--compat.mining-dropout": None,
}
SWITCH = None  # the value of a flag that takes none


class Stopped(Exception):
    """Raised with the key, where a run would begin to embed."""


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the key of a job with some flags changed, taken from `mine` itself."""
    root = write_tree(tmp_path / "data", {f"{n}.png": png_bytes(picture(seed=n)) for n in range(3)})
    folders = iter(range(9))

    def stop(job: Any, run: Any, mined: Any, lease: Any) -> None:
        assert mined.store_uri.endswith(f"/features/{mined.key}")
        raise Stopped(mined.key)

    def find(weights: str = "0" * 64, **flags: str | None) -> str:
        path = Path("anywhere.safetensors")
        found = ResolvedWeights(path, flags.get("--backbone.weights") or "a file", weights)
        monkeypatch.setattr(module, "resolve_weights", lambda *_: found)
        monkeypatch.setattr(module, "_embed", stop)
        out = str(tmp_path / f"run-{next(folders)}")
        given = {"--data.root": str(root), "--out": out} | FLAGS | flags
        argv = [word for pair in given.items() for word in pair if word is not None]
        job = load_job(MineJob, argv, prog="test")
        run = RunDirectory(job.out, job="test")
        with pytest.raises(Stopped) as caught:
            module.mine(job, run, module.find_images(job), lease=None)  # type: ignore[arg-type]
        return str(caught.value)

    return find


@pytest.mark.parametrize(
    "change",
    [
        {"--backbone.name": "test_vit2"},
        {"--backbone.feature": "last"},
        {"--backbone.feature": "key"},
        {"--backbone.blocks": "-2"},
        {"--backbone.positions": "original"},
        {"--backbone.precision": "bf16"},
        {"--views.resolution": "80"},
        {"--views.crops": "random"},
        {"--views.crops": "whole"},
        {"--views.crop-ratio": "0.7"},
        {"--limits.max-pixels": "1000000"},
        {"--limits.max-bytes": "1000000"},
        {"--limits.max-side": "1000"},
        {"--limits.min-side": "9"},
        {"--data.limit": "2"},
        {"--seed": "1"},
        {"--compat.nearest-images": SWITCH},
        {"--compat.jpeg-crops": SWITCH},
        {"--store.max-bytes": "0"},
    ],
    ids=lambda change: " ".join(str(word) for pair in change.items() for word in pair),
)
def test_whatever_changes_features_gives_them_another_key(
    key: Any, change: dict[str, str | None]
) -> None:
    assert key(**change) != key()


@pytest.mark.parametrize(
    "change",
    [
        {"--backbone.weights": "b.safetensors"},  # the same bytes from elsewhere
        {"--workers": "2"},
        {"--max-failed": "0.5"},
        {"--limits.max-seconds": "9"},
        {"--store.max-bytes": "1000000000"},  # they fit, as before
        {"--neighbors.used": "3", "--neighbors.stored": "9"},
        {"--compat.skip-first-neighbor": SWITCH},
        {"--overwrite": SWITCH, "--debug": SWITCH, "--retry": SWITCH},
    ],
    ids=lambda change: " ".join(str(word) for pair in change.items() for word in pair),
)
def test_what_does_not_change_features_leaves_their_key(
    key: Any, change: dict[str, str | None]
) -> None:
    assert key(**change) == key()


def test_last_features_and_keys_differ_though_no_block_is_named(key: Any) -> None:
    assert key(**{"--backbone.feature": "last"}) != key(**{"--backbone.feature": "key"})


def test_other_weights_give_another_key_wherever_they_lie(key: Any) -> None:
    assert key(weights="1" * 64) != key(weights="0" * 64)


def test_another_layout_of_the_store_gives_another_key(
    key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key()
    monkeypatch.setattr(mine_record, "_STORE_VERSION", mine_record._STORE_VERSION + 1)
    assert key() != before


def test_other_images_under_the_same_names_give_another_key(key: Any, tmp_path: Path) -> None:
    before = key()
    assert key() == before
    write_tree(tmp_path / "data", {"1.png": png_bytes(picture(40, 40, seed=7))})
    assert key() != before


def test_a_seed_matters_only_where_something_is_drawn_and_blocks_where_they_are_taken(
    key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(FLAGS, "--compat.mining-dropout")
    assert key(**{"--seed": "1"}) == key()
    last = {"--backbone.feature": "last"}
    assert key(**last, **{"--backbone.blocks": "-2"}) == key(**last)


def test_every_setting_of_the_record_is_changed_by_a_test_above(tmp_path: Path) -> None:
    """A new ingredient has to be added here, with its change."""
    record = module.mining_record(replace(MineJob(), out=str(tmp_path)), "d")
    assert {*record} == {
        *("store", "backbone", "feature", "blocks", "precision", "views", "limits", "data"),
        *("compat", "dropout_seed"),
    }
    assert {*record["views"]} == {"resolution", "crops", "crop_ratio"}
    assert {*record["limits"]} == {"max_bytes", "max_pixels", "max_side", "min_side"}
    assert {*record["compat"]} == {"nearest_images", "jpeg_crops", "mining_dropout"}
