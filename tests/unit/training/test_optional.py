"""Optional losses and studies in the step and in the loop."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from factories import (
    FakeFeatures,
    FakeLabels,
    FolderContext,
    Killed,
    make_views,
    picture,
    png_bytes,
    random_maps,
    ring_neighbors,
    states_equal,
    train_data,
    train_job,
    write_tree,
)

from stego_core.config.compat import MineCompat, TrainCompat
from stego_core.config.schema import BackboneConfig, ImageLimits, ViewConfig
from stego_core.errors import InputError
from stego_core.images.augment import augment, source_coords
from stego_core.loss.alignment import alignment_loss
from stego_core.loss.correspondence import correspondence_loss, sample_points
from stego_core.loss.crf import POINTS, SIDE, crf_loss
from stego_core.loss.reconstruction import reconstruction_loss
from stego_core.loss.salience import salient_points
from stego_core.model.backbone import load_backbone
from stego_core.training.loop import LocalContext, _reset_seed, train
from stego_core.training.optional import (
    OptionalInputs,
    check_sources,
    draw_optional,
    needs_labels,
    needs_pixels,
    read_optional,
)
from stego_core.training.sampler import draw_step
from stego_core.training.state import Optimizers
from stego_core.training.step import StepBatch, Trainable
from stego_core.training.views import FromBackbone

ALL = {"reconstruction": 0.5, "alignment": 0.4, "crf": 0.3, "salience": True, "oracle": True}
VIEW_SIDE = 32
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


class MapLabels(FakeLabels):
    """Label maps: class 0 at the left, class 1 at the right, nothing in the top rows."""

    def read_maps(self, views, side):
        maps = torch.zeros(len(views), side, side, dtype=torch.int64)
        maps[:, :, side // 2 :] = 1
        maps[:, : side // 4] = 255
        return maps


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """Nine views of nine pictures behind a small random backbone."""
    folder, views = tmp_path_factory.mktemp("pictures"), make_views(9)
    uris = {}
    for number, image_id in enumerate(views.image_ids.tolist()):
        write_tree(folder, {f"{image_id}.png": png_bytes(picture(40, 40, seed=number))})
        uris[image_id] = str(folder / f"{image_id}.png")
    backbone = load_backbone(BackboneConfig(name="test_vit", weights="random", precision="fp32"))
    config = ViewConfig(resolution=VIEW_SIDE)
    return FromBackbone(
        backbone, views, uris, config=config, limits=ImageLimits(), compat=MineCompat()
    )


def data_of(pixels):
    maps = pixels.read(np.arange(9))
    data = train_data(
        features=FakeFeatures(maps),
        channels=maps.shape[1],
        num_classes=2,
        side=VIEW_SIDE,
        pixels=pixels,
    )
    return replace(data, labels=MapLabels())


def batch_of(job, *, optional=None):
    draws = draw_step(job, 3, neighbors_VN=ring_neighbors(9), channels=8)
    maps = torch.from_numpy(random_maps(9)).float()
    return StepBatch(
        anchor=maps[draws.anchors],
        neighbor=maps[draws.neighbors],
        draws=draws,
        rows=slice(0, job.train.batch),
        labels=None,
        optional=optional or OptionalInputs(),
    )


def model_of(job, *, num_classes=0):
    return Trainable(job, channels=8, num_classes=num_classes, shifts={})


def inputs_of(job, step=3, *, data=None, channels=8, rows=None):
    draws = draw_optional(job, step, channels=channels, side=VIEW_SIDE)
    step_draws = draw_step(job, step, neighbors_VN=ring_neighbors(9), channels=channels)
    rows = rows or slice(0, job.train.batch)
    found = read_optional(
        draws,
        rows,
        (step_draws.anchors[rows], step_draws.neighbors[rows]),
        pixels=data.pixels if data and needs_pixels(job.loss) else None,
        labels=MapLabels() if needs_labels(job.loss) else None,
        side=VIEW_SIDE,
        device="cpu",
    )
    return found, draws, step_draws


def test_nothing_is_drawn_or_read_unless_it_is_asked_for():
    inputs, draws, _ = inputs_of(train_job())
    assert all(getattr(draws, field.name) is None for field in fields(draws))
    assert all(getattr(inputs, field.name) is None for field in fields(inputs))
    assert not needs_pixels(train_job().loss)
    assert not needs_labels(train_job().loss)


def test_the_options_leave_the_draws_of_a_step_as_they_are():
    plain, extended = (
        draw_step(job, 7, neighbors_VN=ring_neighbors(9), channels=8)
        for job in (train_job(), train_job(loss=ALL, train={"reset_probes_at": 2}))
    )
    for field in fields(plain):
        one, other = (np.asarray(getattr(d, field.name)) for d in (plain, extended))
        np.testing.assert_array_equal(one, other)


def test_seed_and_step_alone_decide_the_optional_draws_each_by_itself():
    def drawn(step=5, seed=0, **loss):
        job = train_job(seed=seed, loss=loss or ALL)
        draws = draw_optional(job, step, channels=8, side=VIEW_SIDE)
        return {field.name: getattr(draws, field.name) for field in fields(draws)}

    def equal(a, b):
        return a == b if isinstance(a, tuple) else torch.equal(a, b)

    first = drawn()
    torch.manual_seed(9)
    np.random.seed(9)
    assert all(equal(value, first[name]) for name, value in drawn().items())
    for other in (drawn(step=6), drawn(seed=1)):
        assert not any(equal(value, first[name]) for name, value in other.items())
    assert torch.equal(drawn(crf=1.0)["crf_pixels"], first["crf_pixels"])
    assert torch.equal(drawn(salience=True)["salience"], first["salience"])
    assert drawn(alignment=1.0)["augmentations"] == first["augmentations"]
    assert first["crf_pixels"].shape == (POINTS, 2)
    assert first["crf_pixels"].min() >= 0
    assert first["crf_pixels"].max() == SIDE - 1


def test_the_reconstruction_loss_compares_decoded_codes_with_what_the_teacher_saw():
    job = train_job(loss={"reconstruction": 0.5}, head={"dropout": 0.4})
    model, batch = model_of(job), batch_of(job)
    losses = model(batch)
    keep = batch.draws.keep
    code = model.head(batch.anchor, (keep[0, 0], keep[0, 1]))
    expected = reconstruction_loss(model.decoder(code), batch.anchor * keep[0, 2])
    torch.testing.assert_close(losses["reconstruction"], expected, **CLOSE)
    without = model_of(train_job(head={"dropout": 0.4}))
    assert without.decoder is None
    torch.testing.assert_close(losses["total"], without(batch)["total"] + 0.5 * expected, **CLOSE)


def test_the_decoder_is_trained_with_the_rate_of_the_head_and_part_of_the_state():
    job = train_job(loss={"reconstruction": 0.5}, train={"steps": 1})
    start = model_of(job)
    trained = train(job, train_data(), LocalContext(), device="cpu")
    moved = trained.decoder.weight - start.decoder.weight
    # Adam's first step is the learning rate, whatever the gradient.
    assert moved.abs().max().item() == pytest.approx(job.train.head_lr, rel=1e-2)
    assert "decoder.weight" in trained.state_dict()
    assert any(key.startswith("decoder.") for key in _moments(job, trained))


def _moments(job, model):
    optimizers = Optimizers(model, job.train)
    model(batch_of(job))["total"].backward()
    optimizers.step()
    return optimizers.tensors()


def test_the_optional_losses_leave_the_initial_weights_of_the_others_alone():
    plain, more = model_of(train_job()), model_of(train_job(loss={"reconstruction": 1.0}))
    assert all(torch.equal(more.state_dict()[k], v) for k, v in plain.state_dict().items())


def test_the_crf_loss_sees_the_images_and_codes_of_the_anchors(pixels):
    job = train_job(loss={"crf": 0.3})
    inputs, draws, step_draws = inputs_of(job, data=data_of(pixels))
    images = pixels.images(pixels.pixels(step_draws.anchors))
    assert torch.equal(inputs.images, images)
    assert inputs.augmented is None
    model, batch = model_of(job), batch_of(job, optional=inputs)
    losses = model(batch)
    code = model.head(batch.anchor, (batch.draws.keep[0, 0], batch.draws.keep[0, 1]))
    expected = crf_loss(images, code, draws.crf_pixels)
    torch.testing.assert_close(losses["crf"], expected, **CLOSE)
    plain = model(batch_of(job))["total"]
    torch.testing.assert_close(losses["total"], plain + 0.3 * expected, **CLOSE)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_alignment_loss_compares_the_view_with_its_augmented_copy(pixels, transposed):
    job = train_job(loss={"alignment": 0.4}, compat=TrainCompat(transposed_alignment=transposed))
    data = data_of(pixels)
    inputs, draws, step_draws = inputs_of(job, data=data, channels=data.channels)
    copies = [
        augment(view, change)
        for view, change in zip(pixels.pixels(step_draws.anchors), draws.augmentations, strict=True)
    ]
    features = pixels.embed(np.stack(copies))
    h, w = features.shape[2:]
    coords = [source_coords(change, VIEW_SIDE, h, w) for change in draws.augmentations]
    assert torch.equal(inputs.augmented, features)
    assert torch.equal(inputs.coords, torch.from_numpy(np.stack(coords)).float())
    model = Trainable(job, channels=data.channels, num_classes=0, shifts={})
    batch = StepBatch(
        anchor=data.features.read(step_draws.anchors),
        neighbor=data.features.read(step_draws.neighbors),
        draws=step_draws,
        rows=slice(0, 4),
        labels=None,
        optional=inputs,
    )
    code = model.head(batch.anchor, (step_draws.keep[0, 0], step_draws.keep[0, 1]))
    again = model.head(features, (draws.keep[0], draws.keep[1]))
    expected = alignment_loss(again, code, inputs.coords, transposed=transposed)
    found = model(batch)["alignment"]
    torch.testing.assert_close(found, expected, **CLOSE)
    other = alignment_loss(again, code, inputs.coords, transposed=not transposed)
    assert not torch.allclose(found, other, rtol=1e-3)


def test_two_halves_of_a_batch_read_what_the_whole_reads(pixels):
    job, data = train_job(loss=ALL), data_of(pixels)
    whole, _, _ = inputs_of(job, data=data)
    halves = [inputs_of(job, data=data, rows=slice(i, i + 2))[0] for i in (0, 2)]
    for name, axis in (("salience", 2), ("images", 0), ("augmented", 0), ("coords", 0)):
        parts = torch.cat([getattr(half, name) for half in halves], axis)
        torch.testing.assert_close(parts, getattr(whole, name), rtol=2e-3, atol=1e-3)
    assert torch.equal(torch.cat([half.keep for half in halves], 1), whole.keep)


def test_salient_points_are_where_the_losses_are_computed():
    job = train_job(loss={"salience": True, "negatives": 1})
    inputs, _, _ = inputs_of(job)
    model, batch = model_of(job, num_classes=2), batch_of(job, optional=inputs)
    draws, keep = batch.draws, batch.draws.keep
    code = model.head(batch.anchor, (keep[0, 0], keep[0, 1]))
    teacher = batch.anchor * keep[0, 2]
    grid = tuple(code.shape[2:])
    coords, others = (
        salient_points(uniform, labels != 255, salience, grid=grid)
        for uniform, labels, salience in zip(
            (draws.coords_anchor, draws.coords_other), inputs.labels, inputs.salience, strict=True
        )
    )
    f1, c1 = (sample_points(maps, coords) for maps in (teacher, code))
    f2, c2 = (sample_points(maps[draws.partners[0]], others) for maps in (teacher, code))
    losses = model(batch)
    expected = correspondence_loss(f1, f1, c1, c1, shift=job.loss.self.shift).mean()
    torch.testing.assert_close(losses["self"], expected, **CLOSE)
    expected = correspondence_loss(f1, f2, c1, c2, shift=job.loss.random.shift).mean()
    torch.testing.assert_close(losses["random"], expected, **CLOSE)
    plain = model(batch_of(job))
    assert not torch.allclose(plain["self"], losses["self"], rtol=1e-3)


def test_with_oracle_labels_the_features_of_the_teacher_do_not_matter():
    job = train_job(loss={"oracle": True}, head={"dropout": 0.0})
    inputs, _, _ = inputs_of(job)
    model, batch = model_of(job, num_classes=2), batch_of(job, optional=inputs)
    code = model.head(batch.anchor)
    points = sample_points(code, batch.draws.coords_anchor)
    maps = torch.nn.functional.one_hot(
        torch.where(inputs.labels[0] == 255, 0, inputs.labels[0] + 1), 3
    )
    labels = sample_points(maps.permute(0, 3, 1, 2).float(), batch.draws.coords_anchor)
    expected = correspondence_loss(labels, labels, points, points, shift=job.loss.self.shift)
    torch.testing.assert_close(model(batch)["self"], expected.mean(), **CLOSE)


@pytest.mark.parametrize("name", ["salience", "oracle"])
def test_a_study_with_labels_is_refused_without_labels(name):
    loss = train_job(loss={name: True}).loss
    with pytest.raises(InputError, match=f"loss.{name} needs labels"):
        check_sources(loss, has_labels=False)
    check_sources(loss, has_labels=True)
    check_sources(train_job().loss, has_labels=False)


def test_a_run_with_every_option_trains_and_reports_every_loss(pixels):
    job = train_job(loss=ALL, train={"steps": 3})
    context = LocalContext()
    model = train(job, data_of(pixels), context, device="cpu")
    last = [event for event in context.events if event["event"] == "train/step"][-1]
    for name in ("self", "knn", "random", "reconstruction", "alignment", "crf", "linear"):
        assert np.isfinite(last[f"loss/{name}"])
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_pixels_are_not_touched_when_no_loss_needs_them():
    class Untouchable:
        def __getattr__(self, name):
            raise AssertionError(name)

    job = train_job(loss={"reconstruction": 1.0}, train={"steps": 2})
    with pytest.raises(AssertionError, match="pixels"):
        inputs_of(train_job(loss={"crf": 1.0}), data=train_data(pixels=Untouchable()))
    train(job, train_data(), LocalContext(), device="cpu")


def test_the_probes_start_anew_at_their_step_and_the_head_goes_on():
    def run(steps, at=None, labels=True):
        job = train_job(train={"steps": steps, "reset_probes_at": at})
        return train(job, train_data(labels=labels), LocalContext(), device="cpu")

    before, untouched, reset = run(3), run(6), run(6, at=3)
    assert states_equal(untouched.head, reset.head)
    assert not states_equal(untouched.cluster_probe, reset.cluster_probe)
    assert not states_equal(untouched.linear_probe, reset.linear_probe)
    # Six Adam steps of 0.005 move a weight by 0.03 at most; new weights are elsewhere.
    moved = (reset.cluster_probe.clusters - before.cluster_probe.clusters).abs().max()
    assert moved > 0.5
    start = run(0)
    assert (reset.cluster_probe.clusters - start.cluster_probe.clusters).abs().max() > 0.5
    assert states_equal(run(6, at=3), reset)


def test_a_reset_at_a_step_that_is_never_reached_changes_nothing():
    job = train_job()
    later = train_job(train={"reset_probes_at": 6})  # the run has steps 0 to 5
    runs = [train(j, train_data(labels=True), LocalContext(), device="cpu") for j in (job, later)]
    assert states_equal(*runs)


def test_a_reset_forgets_the_moments_of_the_probes_only():
    job = train_job()
    model = model_of(job, num_classes=2)
    optimizers = Optimizers(model, job.train)
    labels = (torch.zeros(4, 5, dtype=torch.int64), torch.zeros(4, 5, 2))
    batch = batch_of(job)
    model(StepBatch(batch.anchor, batch.neighbor, batch.draws, batch.rows, labels))[
        "total"
    ].backward()
    optimizers.step()
    parts = {key.split(".")[0] for key in optimizers.tensors()}
    assert parts == {"head", "cluster_probe", "linear_probe"}
    optimizers.reset_probes()
    assert {key.split(".")[0] for key in optimizers.tensors()} == {"head"}


@pytest.mark.parametrize("dies_at", [2, 3, 4])
def test_a_run_that_was_killed_around_the_reset_ends_with_the_same_weights(tmp_path, dies_at):
    job = train_job(loss={"reconstruction": 0.5}, train={"reset_probes_at": 2})
    data = train_data(labels=True)
    whole = train(job, data, LocalContext(), device="cpu")
    with pytest.raises(Killed):
        train(job, data, FolderContext(tmp_path, dies_at=dies_at), device="cpu")
    resumed = train(job, data, FolderContext(tmp_path), device="cpu")
    assert states_equal(whole, resumed)


def test_the_first_step_after_a_reset_is_that_of_a_new_optimiser_on_new_probes():
    job = train_job(train={"steps": 3, "reset_probes_at": 2})
    trained = train(job, train_data(labels=True), LocalContext(), device="cpu")
    fresh = Trainable(job, channels=8, num_classes=2, shifts={})
    fresh.reset_probes(_reset_seed(job.seed))
    for name in ("cluster_probe.clusters", "linear_probe.classifier.weight"):
        moved = (trained.state_dict()[name] - fresh.state_dict()[name]).abs()
        # Adam's first step is the learning rate for every weight that has a gradient.
        assert moved.max().item() == pytest.approx(job.train.probe_lr, rel=1e-2), name
        assert (moved > 0.9 * job.train.probe_lr).float().mean() > 0.6
