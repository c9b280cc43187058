"""What the label values of the official data sets mean to us: golden facts and tables."""

from __future__ import annotations

from typing import get_args, get_type_hints

import numpy as np
import pytest

from stego_core.config.schema import PrepareJob
from stego_core.datasets import camvid, cityscapes, coco_stuff, potsdam, voc
from stego_core.datasets.official import LabelTable
from stego_core.datasets.prepare import DATASETS
from stego_core.errors import InputError

SIZES = {
    "cocostuff27": 27,
    "cocostuff15": 15,
    "cocostuff3": 3,
    "cityscapes27": 27,
    "potsdam3": 3,
    "potsdam3-raw": 3,
    "voc2012": 21,
    "camvid": 11,
}


def mapped(name, *values):
    return DATASETS[name].to_classes(np.array([values], np.uint8))[0].tolist()


def test_the_schema_names_exactly_these_data_sets():
    literal = get_args(get_type_hints(PrepareJob)["dataset"])[0]
    assert set(get_args(literal)) == set(DATASETS) == set(SIZES)


@pytest.mark.parametrize("name", DATASETS)
def test_every_class_has_a_name_of_its_own(name):
    names = DATASETS[name].class_names
    assert len(names) == len(set(names)) == SIZES[name]
    assert all(n == n.strip() and n for n in names)


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "potsdam3-raw"])
def test_the_values_of_a_table_are_its_classes_and_255_and_255_is_ignored(name):
    classes = set()
    for value in range(256):
        try:
            classes.update(mapped(name, value))
        except InputError:
            continue
    assert classes == {*range(SIZES[name]), 255}
    assert mapped(name, 255) == [255]


def test_each_of_the_182_fine_ids_has_one_coarse_class():
    ids = [fine for _, fine_ids in coco_stuff.COARSE for fine in fine_ids]
    assert sorted(ids) == list(range(182))
    assert set(mapped("cocostuff27", *range(182))) == set(range(27))
    with pytest.raises(InputError, match=r"doesn't have: 182, 200$"):
        mapped("cocostuff27", 0, 182, 200, 182)


# Fine ids are those of COCO-Stuff's list of labels, less 1.
@pytest.mark.parametrize(
    ("fine", "coarse"),
    [
        (0, "person"),
        (1, "vehicle"),  # bicycle
        (16, "animal"),  # cat: COCO's id 17
        (51, "food-thing"),  # banana
        (61, "furniture-thing"),  # chair
        (105, "sky"),  # clouds
        (156, "sky"),  # sky-other
        (120, "food-stuff"),  # fruit
        (123, "plant"),  # grass
        (148, "ground"),  # road
        (154, "water"),  # sea
        (181, "solid"),  # wood
    ],
)
def test_known_fine_ids_have_their_coarse_class(fine, coarse):
    (class_id,) = mapped("cocostuff27", fine)
    assert DATASETS["cocostuff27"].class_names[class_id] == coarse


def test_cocostuff15_is_the_stuff_of_cocostuff27_less_12():
    coarse = np.array(mapped("cocostuff27", *range(182)))
    expected = np.where(coarse >= 12, coarse - 12, 255)
    assert mapped("cocostuff15", *range(182)) == expected.tolist()
    assert DATASETS["cocostuff15"].class_names == DATASETS["cocostuff27"].class_names[12:]


def test_cocostuff3_is_sky_plant_ground_in_this_order():
    assert DATASETS["cocostuff3"].class_names == ("sky", "plant", "ground")
    coarse = np.array(mapped("cocostuff27", *range(182)))
    expected = np.select([coarse == 23, coarse == 22, coarse == 21], [0, 1, 2], 255)
    assert mapped("cocostuff3", *range(182)) == expected.tolist()


def test_cityscapes_ids_below_7_are_ignored_and_33_is_the_last_class():
    assert mapped("cityscapes27", *range(7)) == [255] * 7
    assert mapped("cityscapes27", *range(7, 34)) == list(range(27))
    assert cityscapes.NAMES[mapped("cityscapes27", 33)[0]] == "bicycle"
    assert cityscapes.NAMES[mapped("cityscapes27", 7)[0]] == "road"
    assert cityscapes.NAMES[mapped("cityscapes27", 26)[0]] == "car"
    with pytest.raises(InputError, match="doesn't have: 34"):
        mapped("cityscapes27", 34)


def test_potsdam_joins_pairs_of_its_six_classes():
    assert mapped("potsdam3", 0, 4, 1, 5, 2, 3, 255) == [0, 0, 1, 1, 2, 2, 255]
    with pytest.raises(InputError, match="doesn't have: 6"):
        mapped("potsdam3", 6)


def test_potsdam_colours_are_the_six_classes():
    colours = {
        "impervious surface": (255, 255, 255),
        "building": (0, 0, 255),
        "low vegetation": (0, 255, 255),
        "tree": (0, 255, 0),
        "car": (255, 255, 0),
        "clutter": (255, 0, 0),
    }
    assert tuple(colours) == potsdam.SIX
    pixels = np.array([[*colours.values(), (0, 0, 0)]], np.uint8)
    assert potsdam.colours_to_ids(pixels)[0].tolist() == [0, 1, 2, 3, 4, 5, 255]
    assert potsdam.colours_to_classes(pixels)[0].tolist() == [0, 1, 2, 2, 0, 1, 255]
    near = np.clip(pixels + np.array([-3, 4, -5]), 0, 255).astype(np.uint8)
    assert (potsdam.colours_to_ids(near) == potsdam.colours_to_ids(pixels)).all()
    with pytest.raises(InputError, match=r"colour .* doesn't have: \[255, 0, 255\]"):
        potsdam.colours_to_ids(np.array([[[255, 0, 255]]], np.uint8))


def test_voc_and_camvid_keep_their_ids():
    assert mapped("voc2012", *range(21), 255) == [*range(21), 255]
    assert (voc.NAMES[0], voc.NAMES[15], voc.NAMES[20]) == ("background", "person", "tv monitor")
    assert mapped("camvid", *range(12)) == [*range(11), 255]
    assert camvid.NAMES[3] == "road"


@pytest.mark.parametrize(
    "labels",
    [
        np.zeros((2, 2, 3), np.uint8),
        np.zeros((2, 2)),
        np.full((1, 1), 300, np.uint16),
        np.full((1, 1), -1, np.int16),
        np.full((1, 1), 2**40, np.int64),
    ],
)
def test_what_is_no_label_map_of_the_data_set_is_refused(labels):
    with pytest.raises(InputError):
        LabelTable({0: 0})(labels)


def test_a_table_maps_like_a_loop():
    table = {value: (value * 7) % 5 for value in range(40)}
    labels = np.random.default_rng(0).integers(0, 40, (9, 11)).astype(np.uint16)
    expected = [[table[int(value)] for value in row] for row in labels]
    assert LabelTable(table)(labels).tolist() == expected
    assert LabelTable(table)(labels).dtype == np.uint8
