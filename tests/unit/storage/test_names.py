"""No name that comes from data leads out of the folder that it is put below."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stego_core.errors import InputError
from stego_core.storage.names import below


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/../../x",
        "/etc/passwd",
        "",
        "a//b",
        ".",
        "a\0.png",
        "..\\x",
        "C:\\x",
        "C:x",
        "a/..",
    ],
)
def test_a_name_that_leads_elsewhere_on_any_system_is_refused(name):
    with pytest.raises(InputError, match="leads out of its folder"):
        below("/out", name)


@pytest.mark.parametrize("name", ["%2e%2e%2fx", "..x", "a/b.c", "grüße 100%.png", "CON", "-rf"])
def test_odd_names_that_stay_are_kept_as_they_are(name):
    assert below("/out", name) == f"/out/{name}"


@given(st.text(alphabet="./\\ab:%2e\0", max_size=12))
def test_whatever_is_let_through_stays_below(name):
    try:
        place = below("/out/folder", name)
    except InputError:
        return
    resolved = Path(place).resolve()
    assert resolved.is_relative_to("/out/folder")
    assert resolved != Path("/out/folder")
