"""The table of docs/backbones.md says what the registry and timm say."""

from __future__ import annotations

from pathlib import Path

import pytest

from stego_core.model.registry import find_backbone, registry_names

PAGE = Path(__file__).parents[3] / "docs" / "backbones.md"


def table_rows() -> dict[str, list[str]]:
    """Return the cells of each row of the table of short names, by short name."""
    section = PAGE.read_text("utf-8").split("## Short names")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row for row in rows}


def test_the_page_lists_the_names_of_the_registry_in_its_order():
    assert list(table_rows()) == registry_names()


@pytest.mark.parametrize("name", registry_names())
def test_the_page_states_what_the_registry_knows_of_a_backbone(name):
    record = find_backbone(name)
    facts = [record.timm_name, str(record.patch_size), str(record.width), record.licence]
    assert table_rows()[name] == [name, *facts]


def test_the_page_says_that_the_resnet_of_timm_was_trained_with_labels():
    assert "**`resnet50` is supervised**" in PAGE.read_text("utf-8")
