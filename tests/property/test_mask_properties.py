from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from stego_core.masks.codec import decode_mask, encode_mask
from stego_core.masks.table import Segmentation, segmented_row

QUICK = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
SHAPES = arrays.array_shapes(min_dims=2, max_dims=2, max_side=24)
LABELS = st.sampled_from([np.uint8, np.uint16]).flatmap(lambda kind: arrays.arrays(kind, SHAPES))
UNIT = st.floats(0, 1, width=32)


@QUICK
@given(LABELS)
def test_decoding_gives_back_what_was_encoded(labels):
    again = decode_mask(encode_mask(labels))
    assert again.dtype == labels.dtype
    np.testing.assert_array_equal(again, labels)


@QUICK
@given(LABELS)
def test_the_same_map_always_gives_the_same_bytes_whatever_its_layout(labels):
    assert encode_mask(labels) == encode_mask(np.asfortranarray(labels))


@QUICK
@given(LABELS, arrays.arrays(np.float32, SHAPES, elements=UNIT))
def test_the_clusters_of_a_row_add_up_to_the_image(labels, confidence):
    row = segmented_row(Segmentation(labels, confidence, 0.5))
    clusters = row["clusters"]
    assert sum(c["pixels"] for c in clusters) == labels.size
    assert abs(sum(c["share"] for c in clusters) - 1) < 1e-6
    assert [c["cluster"] for c in clusters] == sorted({*labels.ravel().tolist()})
    weighted = sum(c["share"] * c["confidence"] for c in clusters)
    assert abs(weighted - row["mean_confidence"]) < 1e-5
    assert (row["mask_height"], row["mask_width"]) == labels.shape
