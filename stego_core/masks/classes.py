"""From clusters to classes that a person has named: several clusters may be one class, or none."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stego_core.errors import ConfigError
from stego_core.masks.palette import cluster_colors, color_hex
from stego_core.storage import fs

IGNORED = 255
"""Value of a pixel that belongs to no class, where there are at most 255 of them."""
_IGNORED_16 = 65_535


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of an export.

    Attributes:
        names: of class 0, 1, ...
        clusters: of each class, rising.
        num_clusters: K; clusters that are in no class are ignored.
    """

    names: tuple[str, ...]
    clusters: tuple[tuple[int, ...], ...]
    num_clusters: int

    @property
    def is_identity(self) -> bool:
        """Tell whether class k is cluster k alone, for all clusters."""
        return self.clusters == tuple((k,) for k in range(self.num_clusters))

    @property
    def colors(self) -> np.ndarray:
        """Return uint8 (classes, 3): a class has the colour of its first cluster."""
        colors = cluster_colors(self.num_clusters)
        return colors[[members[0] for members in self.clusters]].reshape(-1, 3)

    def apply(self, labels_HW: np.ndarray) -> np.ndarray:
        """Return class ids for cluster ids.

        Args:
            labels_HW: (H, W) uint8 or uint16 cluster ids.

        Returns:
            (H, W) uint8, 255 where a pixel has no class; for more than 255 classes uint16 and
            65535.
        """
        wide = len(self.names) > IGNORED
        table = np.full(65_536, _IGNORED_16 if wide else IGNORED, np.uint16 if wide else np.uint8)
        for number, members in enumerate(self.clusters):
            table[list(members)] = number
        found: np.ndarray = table[labels_HW]
        return found

    def legend(self) -> list[dict[str, Any]]:
        """Return id, name, colour and clusters of each class, for a JSON file."""
        return [
            {"id": number, "name": name, "color": color_hex(color), "clusters": list(members)}
            for number, (name, members, color) in enumerate(
                zip(self.names, self.clusters, self.colors, strict=True)
            )
        ]


def name_classes(clusters: Sequence[str], given: Mapping[int, str]) -> Classes:
    """Return the classes that names make of clusters, numbered by their first cluster.

    Args:
        clusters: the model's own name of each cluster.
        given: names by cluster id; "" for a cluster that is ignored.

    >>> name_classes(["c0", "c1", "c2"], {0: "road", 2: "road"}).clusters
    ((0, 2), (1,))
    """
    members: dict[str, list[int]] = {}
    for cluster, own in enumerate(clusters):
        if name := given.get(cluster, own):
            members.setdefault(name, []).append(cluster)
    return Classes(tuple(members), tuple(map(tuple, members.values())), len(clusters))


def read_names(uri: str | None, num_clusters: int) -> dict[int, str]:
    """Return the names of a TOML file by cluster id.

    Args:
        uri: of a file of lines such as `3 = "road"`; None for no names.
        num_clusters: K.

    Raises:
        ConfigError: one line for everything that is wrong with it.
    """
    if uri is None:
        return {}
    try:
        given = tomllib.loads(fs.read_bytes(uri).decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(f"--names {uri}: no such file") from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"--names {uri} is no TOML file: {error}") from error
    names, problems = {}, []
    for key, name in given.items():
        cluster = int(key) if key.isascii() and key.isdigit() and key == str(int(key)) else -1
        if not 0 <= cluster < num_clusters:
            problems.append(f"{key}: no cluster; they are 0 to {num_clusters - 1}")
        elif not isinstance(name, str) or len(name.splitlines()) > 1:
            problems.append(f"{key}: the name must be one line of text")
        else:
            names[cluster] = name.strip()
    if len(names) == num_clusters and not any(names.values()):
        problems.append("all clusters are ignored: name one")
    if problems:
        raise ConfigError(*(f"--names {uri}: {problem}" for problem in problems))
    return names
