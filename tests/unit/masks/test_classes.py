"""Clusters that a person has named: merged, ignored, or left as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stego_core.errors import ConfigError
from stego_core.masks.classes import name_classes, read_names
from stego_core.masks.palette import cluster_colors

OWN = [f"cluster {number}" for number in range(5)]


def names_file(folder: Path, text: str) -> str:
    path = folder / "names.toml"
    path.write_text(text)
    return str(path)


def test_clusters_of_one_name_are_one_class_and_those_without_stay(tmp_path: Path) -> None:
    given = read_names(names_file(tmp_path, '3 = "road"\n1 = "road "\n0 = ""\n'), 5)
    classes = name_classes(OWN, given)
    assert classes.names == ("road", "cluster 2", "cluster 4")
    assert classes.clusters == ((1, 3), (2,), (4,))
    labels = np.array([[0, 1, 2], [3, 4, 255]], np.uint8)
    found = classes.apply(labels)
    assert found.dtype == np.uint8
    assert found.tolist() == [[255, 0, 1], [0, 2, 255]]
    assert classes.colors.tolist() == cluster_colors(5)[[1, 2, 4]].tolist()
    assert [row["clusters"] for row in classes.legend()] == [[1, 3], [2], [4]]
    assert not classes.is_identity


def test_without_names_classes_are_clusters() -> None:
    classes = name_classes(OWN, read_names(None, 5))
    assert classes.is_identity
    assert classes.names == tuple(OWN)
    assert name_classes(OWN, {4: "sky"}).is_identity


def test_more_than_255_classes_take_16_bits() -> None:
    classes = name_classes([f"cluster {number}" for number in range(300)], {7: ""})
    found = classes.apply(np.array([[6, 7, 299]], np.uint16))
    assert found.dtype == np.uint16
    assert found.tolist() == [[6, 65_535, 298]]


def test_everything_that_is_wrong_with_names_is_told_at_once(tmp_path: Path) -> None:
    text = '0 = "sky"\n9 = "road"\nx = "car"\n2 = 7\n"-1" = "a"\n3 = "two\\nlines"\n'
    with pytest.raises(ConfigError) as caught:
        read_names(names_file(tmp_path, text), 5)
    told = [problem.partition("names.toml: ")[2] for problem in caught.value.problems]
    assert told == [
        "9: no cluster; they are 0 to 4",
        "x: no cluster; they are 0 to 4",
        "2: the name must be one line of text",
        "-1: no cluster; they are 0 to 4",
        "3: the name must be one line of text",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0 = sky", "is no TOML file"),
        ("\n".join(f'{n} = ""' for n in range(5)), "all clusters are ignored"),
    ],
)
def test_a_file_that_names_nothing_is_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        read_names(names_file(tmp_path, text), 5)
    with pytest.raises(ConfigError, match="no such file"):
        read_names(str(tmp_path / "other.toml"), 5)
