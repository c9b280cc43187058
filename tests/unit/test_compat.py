"""Each switch of `compat` alone: that it does what it says, and that results are kept apart."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from factories import (
    FakeFeatures,
    make_views,
    picture,
    png_bytes,
    random_maps,
    ring_neighbors,
    train_job,
    unit_rows,
    write_neighbors,
)
from reference import optional_reference as reference

from stego_core.config.compat import EvaluateCompat, ImageCompat, MineCompat, TrainCompat
from stego_core.config.load import fingerprint
from stego_core.config.schema import (
    BackboneConfig,
    EvaluateJob,
    LabelMapConfig,
    MineJob,
    NeighborsConfig,
    SegmentJob,
    TrainJob,
    ViewConfig,
)
from stego_core.distributed import segment, train
from stego_core.distributed.evaluate import _prepare
from stego_core.distributed.evaluate_stages import EvaluateWorker
from stego_core.distributed.fetch import SquareViews, WholeImage
from stego_core.distributed.mine_record import mining_record
from stego_core.distributed.mine_stages import EmbedWorker, dropped_channels
from stego_core.images.geometry import Box, centre_square, resize_image, resize_labels
from stego_core.images.views import jpeg_round_trip
from stego_core.inference.predict import upsampled_argmax
from stego_core.loss.alignment import alignment_loss
from stego_core.loss.correspondence import overlapping_permutation
from stego_core.metrics.confusion import confusion_matrix
from stego_core.metrics.scores import score_clusters
from stego_core.model.backbone import load_backbone
from stego_core.model.head import Head
from stego_core.model.segmenter import CLUSTER, Segmenter, model_card, save_segmenter
from stego_core.neighbors.table import neighbor_indices, read_table
from stego_core.storage.feature_store import StoredFeatures, read_views
from stego_core.training import step as step_module
from stego_core.training.sampler import draw_step
from stego_core.training.step import StepBatch, Trainable

TINY = BackboneConfig(name="test_vit", weights="random", precision="fp32")
SWITCHES = {
    kind: [field.name for field in dataclasses.fields(kind)]
    for kind in (ImageCompat, MineCompat, TrainCompat, EvaluateCompat)
}


def mine_job(**compat):
    return MineJob(
        backbone=TINY, views=ViewConfig(resolution=32), compat=MineCompat(**compat), seed=3
    )


# nearest_images


def test_nearest_images_resizes_for_training_and_for_prediction_without_blending():
    image = picture(48, 48)
    plain = ViewConfig(resolution=16)
    prepares = [
        lambda nearest: SquareViews(plain, side=16, compat=MineCompat(nearest_images=nearest))(
            image, 7
        )[0],
        lambda nearest: WholeImage(resolution=16, patch=8, nearest=nearest)(image, 7),
        lambda nearest: _prepare(
            EvaluateJob(
                predict=LabelMapConfig(resolution=16),
                compat=EvaluateCompat(nearest_images=nearest),
            ),
            8,
        )(image, 7),
    ]
    for prepare in prepares:
        # Every third pixel, beginning with the middle one of the first three.
        np.testing.assert_array_equal(prepare(True), image[1::3, 1::3])
        np.testing.assert_array_equal(prepare(False), resize_image(image, 16, 16))


# jpeg_crops


def test_jpeg_crops_mines_crops_that_were_compressed():
    image, config = picture(40, 40), ViewConfig(crops="five", crop_ratio=0.5)
    found = SquareViews(config, side=20, compat=MineCompat(jpeg_crops=True))(image, 7)
    np.testing.assert_array_equal(found[3], jpeg_round_trip(image[20:, 20:]))
    plain = SquareViews(config, side=20, compat=MineCompat())(image, 7)
    np.testing.assert_array_equal(plain[3], image[20:, 20:])


# mining_dropout


def embedded(folder, *, unit=0, seed=3, **compat):
    """Two pictures through the mining stage; embeddings and stored features."""
    job = dataclasses.replace(mine_job(**compat), seed=seed)
    pixels = [picture(32, 32, seed=number) for number in range(2)]
    table = pa.table(
        {
            "image_id": pa.array([7, 8], pa.int64()),
            "status": ["ok", "ok"],
            "detail": pa.nulls(2, pa.string()),
            "pixels": pa.array([p.tobytes() for p in pixels], pa.large_binary()),
            "pixel_height": [32, 32],
            "pixel_width": [32, 32],
        }
    )
    worker = EmbedWorker(job=job, device="cpu", threads=1, store_uri=str(folder), is_stored=True)
    for number in range(unit + 1):  # units before it, since a store has no gaps
        worker(number, table)
    views = read_views(str(folder), unit + 1)
    features = StoredFeatures(str(folder), unit + 1).read(np.arange(2 * unit, 2 * unit + 2))
    return views.embeddings[2 * unit :], features


def test_mining_dropout_drops_channels_of_embeddings_but_not_of_stored_features(tmp_path):
    plain, features = embedded(tmp_path / "a")
    dropped, same_features = embedded(tmp_path / "b", mining_dropout=True)
    np.testing.assert_array_equal(features, same_features)
    gone = dropped == 0
    assert gone.sum(1).min() > 0
    assert gone.mean() < 0.3
    expected = np.where(gone, 0, plain)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(dropped, expected, atol=1e-5)
    assert not (gone[0] == gone[1]).all()


def test_mining_dropout_follows_from_seed_and_unit(tmp_path):
    runs = [
        embedded(tmp_path / str(number), mining_dropout=True, **options)[0]
        for number, options in enumerate([{}, {}, {"seed": 4}, {"unit": 1}])
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])
    assert not np.array_equal(runs[0], runs[3])


def test_mining_dropout_drops_one_channel_in_ten():
    means = dropped_channels(torch.ones(20, 1000), 0, 0)
    # 20 000 draws: the standard error is 0.002.
    assert (means == 0).double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert means.max().item() == pytest.approx(1 / 0.9)


# skip_first_neighbor


def mined(folder, views, *, stored=3, exclude_own=True, **compat):
    config = NeighborsConfig(stored=stored, used=stored, exclude_own=exclude_own)
    write_neighbors(folder / "neighbors", views, config, **compat)
    table = read_table(str(folder / "neighbors"), key="k")
    return neighbor_indices(table, views, stored)


def views_with_copies():
    """Three images of two crops; views 1 and 4 look exactly alike."""
    views = make_views(3, crops=2, dim=8)
    embeddings = unit_rows(6, 8)
    embeddings[4] = embeddings[1]
    return dataclasses.replace(views, embeddings=embeddings)


def ranking(views, query, left_out):
    scores = views.embeddings.astype(np.float64) @ views.embeddings[query].astype(np.float64)
    order = sorted(range(len(scores)), key=lambda view: (-round(scores[view], 6), view))
    return [view for view in order if view not in left_out]


def test_crops_of_one_image_may_be_neighbours_as_in_the_original(tmp_path):
    views = views_with_copies()
    plain = mined(tmp_path / "a", views)
    siblings = mined(tmp_path / "b", views, stored=5, exclude_own=False)
    for view in range(6):
        own = {view, view ^ 1}
        assert plain[view].tolist() == ranking(views, view, own)[:3]
        assert siblings[view].tolist() == ranking(views, view, {view})


def test_skip_first_neighbor_leaves_out_the_first_hit_whatever_it_is(tmp_path):
    views = views_with_copies()
    found = mined(tmp_path, views, skip_first_neighbor=True)
    for view in range(6):
        others = [other for other in ranking(views, view, {view ^ 1}) if other != view]
        alike = {1: [1, 4], 4: [1, 4]}.get(view, [view])
        first = [*alike, *(other for other in others if other not in alike)]
        assert found[view].tolist() == first[1:4]
    assert found[4, 0] == 4  # its copy, view 1, was left out: view 4 is its own neighbour
    assert found[1, 0] == 4


def test_both_together_leave_out_the_first_hit_of_all_views(tmp_path):
    views = views_with_copies()
    found = mined(tmp_path, views, stored=5, exclude_own=False, skip_first_neighbor=True)
    for view in range(6):
        assert found[view].tolist() == ranking(views, view, set())[1:]


# overlapping_partners


def test_overlapping_partners_draws_as_the_original_does():
    partners = {}
    for on in (False, True):
        job = train_job(
            train={"batch": 8},
            loss={"negatives": 4},
            compat=TrainCompat(overlapping_partners=on),
        )
        partners[on] = torch.cat(
            [
                draw_step(job, step, neighbors_VN=ring_neighbors(9), channels=8).partners
                for step in range(50)
            ]
        )
    sizes = {on: [len(set(row.tolist())) for row in rows] for on, rows in partners.items()}
    assert set(sizes[False]) == {8}
    repeats = np.mean([size < 8 for size in sizes[True]])
    generator = torch.Generator().manual_seed(0)
    draws = [overlapping_permutation(8, generator) for _ in range(500)]
    expected = np.mean([len(set(draw.tolist())) < 8 for draw in draws])
    # 200 and 500 draws: the standard error of the difference is 0.04.
    assert repeats == pytest.approx(expected, abs=0.13)
    assert (partners[True] != torch.arange(8)).all()


# worker_mean


@pytest.mark.parametrize("worker_mean", [False, True])
def test_worker_mean_centres_without_asking_the_other_workers(monkeypatch, worker_mean):
    job = train_job(compat=TrainCompat(worker_mean=worker_mean), loss={"zero_clamp": False})
    model = Trainable(job, channels=8, num_classes=0, shifts={})
    draws = draw_step(job, 3, neighbors_VN=ring_neighbors(9), channels=8)
    features = FakeFeatures(random_maps(9))
    batch = StepBatch(
        anchor=features.read(draws.anchors),
        neighbor=features.read(draws.neighbors),
        draws=draws,
        rows=slice(0, 4),
        labels=None,
    )
    alone = model(batch)
    # As if the other workers' correspondences were higher by 1 than this one's.
    monkeypatch.setattr(step_module, "mean_over_workers", lambda mean: mean + 0.5)
    together = model(batch)
    for kind in ("self", "knn", "random"):
        # Without a clamp the loss falls by the rise of the mean times the mean code cosine.
        fall = 0 if worker_mean else 0.5 * alone[f"correspondence/{kind}"]
        torch.testing.assert_close(together[kind], alone[kind] - fall, rtol=1e-4, atol=1e-6)


# transposed_alignment


def test_transposed_alignment_mistakes_a_horizontal_flip_for_a_vertical_one():
    code = torch.from_numpy(random_maps(1, height=4, width=4))
    x = torch.tensor([0.75, 0.25, -0.25, -0.75]).double()  # centres of cells, right to left
    y = x.flip(0)
    coords = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]
    assert alignment_loss(code.flip(3), code, coords).item() == pytest.approx(-1)
    assert alignment_loss(code.flip(2), code, coords, transposed=True).item() == pytest.approx(-1)


# centre_crop, dropped_extra_clusters


def _batch(pixels):
    """One view, or one whole image, as a batch."""
    return pixels.reshape(-1, *pixels.shape[-3:])


def model_folder(folder):
    backbone = load_backbone(TINY)
    job = train_job()
    torch.manual_seed(0)
    head = Head(backbone.width, job.head)
    tensors = {f"head.{key}": value for key, value in head.state_dict().items()}
    tensors |= {"clusters": torch.randn(4, 6), "baseline": torch.randn(4, backbone.width)}
    card = model_card(weights=backbone.weights, config=TINY, head=job.head)
    save_segmenter(str(folder), tensors, card)
    return Segmenter(backbone, tensors, card)


def test_centre_crop_scores_the_centre_square_at_the_resolution_of_prediction(tmp_path):
    segmenter = model_folder(tmp_path)
    image = picture(40, 90)
    labels = np.random.default_rng(0).integers(0, 4, (40, 90)).astype(np.uint8)
    found, pixels = {}, {}
    for on in (False, True):
        job = EvaluateJob(
            predict=LabelMapConfig(resolution=32), compat=EvaluateCompat(centre_crop=on)
        )
        pixels[on] = _batch(_prepare(job, 16)(image, 7))
        h, w = pixels[on].shape[1:3]
        table = pa.table(
            {
                "image_id": [7],
                "image_uri": ["a.png"],
                "status": ["ok"],
                "detail": pa.array([None], pa.string()),
                "pixels": pa.array([pixels[on].tobytes()], pa.large_binary()),
                "pixel_height": [h],
                "pixel_width": [w],
                "label": pa.array([png_bytes(labels)], pa.large_binary()),
                "label_failure": pa.nulls(1),
            }
        )
        worker = EvaluateWorker(
            model=str(tmp_path), precision="fp32", device="cpu", threads=1, job=job
        )
        receipt = json.loads(worker(0, table)["receipt"][0].as_py())
        found[on] = np.array(receipt["confusion"][CLUSTER])
    assert pixels[True].shape == (1, 32, 32, 3)
    square = centre_square(Box(0, 0, 40, 90))
    np.testing.assert_array_equal(pixels[True][0], resize_image(image, 32, 32, box=square))
    expected = {True: resize_labels(labels, 32, 32, box=square), False: labels}
    for on, true in expected.items():
        _, code = segmenter.encode(torch.from_numpy(pixels[on]))
        predicted = upsampled_argmax(segmenter.products(code, CLUSTER)[0], *true.shape)
        counts = confusion_matrix(true, predicted, num_classes=255, num_clusters=4)
        np.testing.assert_array_equal(found[on], counts)
    assert found[True].sum() == 32 * 32
    assert found[False].sum() == 40 * 90


@pytest.mark.parametrize("seed", range(6))
def test_dropped_extra_clusters_scores_as_the_original_does(seed):
    generator = np.random.default_rng(seed)
    stats = generator.integers(0, 50, (5, 3))  # [pred, label], two extra clusters
    stats[seed % 3] = 0  # an empty cluster: then the original may take an extra one
    scores = score_clusters(stats.T, dropped_extra=True)
    expected = reference.original_scores(stats)
    assert (scores.miou, scores.accuracy) == pytest.approx(expected, abs=1e-9)


def test_dropped_extra_clusters_hides_errors_that_are_counted_otherwise():
    # A third of the pixels lies in extra clusters.
    confusion = np.array([[10, 0, 5, 0], [0, 10, 0, 5]])
    hidden = score_clusters(confusion, dropped_extra=True)
    assert (hidden.accuracy, hidden.miou) == (100, 100)
    assert score_clusters(confusion).accuracy == pytest.approx(100 * 2 / 3)


def test_a_cluster_without_a_class_counts_as_a_class_of_iou_zero():
    # Class 1 has no pixels, so the extra cluster 2 suits it as well as cluster 1 does. Then class 1
    # is left out of the mean, and cluster 1 is the class of IoU 0 instead.
    scores = score_clusters(np.array([[9, 3, 0], [0, 0, 0]]), dropped_extra=True)
    assert scores.matching == {0: 0, 2: 1}
    assert scores.miou == pytest.approx((75 + 0) / 2)
    assert scores.accuracy == pytest.approx(75)
    assert score_clusters(np.array([[9, 3, 0], [0, 0, 0]])).miou == pytest.approx(75)


# what results are kept apart by


@pytest.mark.parametrize("name", SWITCHES[TrainCompat])
def test_every_switch_of_training_is_part_of_what_determines_the_model(name):
    on = TrainJob(compat=TrainCompat(**{name: True}))
    assert fingerprint(train._settings(on)) != fingerprint(train._settings(TrainJob()))


@pytest.mark.parametrize("name", SWITCHES[MineCompat])
def test_the_switches_that_change_features_are_part_of_their_key_and_others_are_not(name):
    plain, on = mining_record(mine_job(), "d"), mining_record(mine_job(**{name: True}), "d")
    assert (plain != on) == (name in {"nearest_images", "jpeg_crops", "mining_dropout"})


def test_the_seed_matters_to_mining_with_dropout_only():
    def record(seed, **compat):
        return mining_record(dataclasses.replace(mine_job(**compat), seed=seed), "d")

    assert record(0) == record(1)
    assert record(0, mining_dropout=True) != record(1, mining_dropout=True)


def test_the_switch_of_segmentation_is_part_of_its_record(tmp_path):
    model_folder(tmp_path)
    records = [
        segment._record(
            SegmentJob(compat=ImageCompat(nearest_images=on)), str(tmp_path), source="d"
        )
        for on in (False, True)
    ]
    assert records[0] != records[1]


def test_every_switch_is_off_by_default_and_says_what_the_original_does():
    for kind in SWITCHES:
        assert not any(dataclasses.asdict(kind()).values())
    names = {name for switches in SWITCHES.values() for name in switches}
    assert len(names) == 9
