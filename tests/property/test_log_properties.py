from __future__ import annotations

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stego_core.log import redact

QUICK = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["token", "secret_x", "n", "password"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
TEXTS = st.text(alphabet="token=:\"\\' ,&}{ab\n1*", max_size=25)


@QUICK
@given(st.dictionaries(st.sampled_from(["api_key", "a", "Token"]), VALUES | TEXTS))
def test_redacted_json_is_still_json(record):
    assert json.loads(redact(json.dumps(record))).keys() == record.keys()


@QUICK
@given(st.text(min_size=4, max_size=20).filter(lambda text: "***" not in text))
def test_no_text_under_a_secret_key_survives(secret):
    redacted = redact(json.dumps({"my_secret": secret, "n": 1}))
    assert json.loads(redacted) == {"my_secret": "***", "n": 1}


@QUICK
@given(TEXTS)
def test_redacting_twice_changes_nothing_more(text):
    once = redact(text)
    assert redact(once) == once
