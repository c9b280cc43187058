"""A listing is a sequence of files like any other, in less memory."""

import tempfile

import pyarrow as pa
import pytest

from stego_core.storage.fs import ListedFile
from stego_core.storage.listing import Listing


def files(count):
    return [ListedFile(f"s3://b/p/{n}.jpg", f"{n}.jpg", n, f"{n:032x}") for n in range(count)]


@pytest.mark.parametrize("count", [0, 1, 70_000])  # the last is more than one chunk
def test_it_gives_back_what_it_was_made_of(count):
    listing = Listing(iter(files(count)))
    assert len(listing) == count
    assert listing == files(count)
    assert listing != files(count + 1)


def test_a_long_one_lies_in_a_file_that_is_gone_already(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = pa.total_allocated_bytes()
    listing = Listing(files(150_000))
    assert pa.total_allocated_bytes() - before < 1_000_000  # 17 MB as plain arrays
    assert not list(tmp_path.iterdir())
    assert listing[149_999] == files(150_000)[-1]


def test_it_is_indexed_and_cut_like_a_list():
    listing, plain = Listing(files(9)), files(9)
    assert (listing[0], listing[-1], listing[3]) == (plain[0], plain[-1], plain[3])
    assert listing[2:7:2] == plain[2:7:2]
    with pytest.raises(IndexError):
        listing[9]


def test_a_file_takes_less_than_half_of_what_an_object_takes():
    count = 20_000
    assert Listing(files(count)).table.nbytes / count < 120  # 384 as objects with three strings
