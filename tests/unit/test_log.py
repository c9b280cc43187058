from __future__ import annotations

import logging

import pytest

from stego_core import log

SECRET = "hunter2-hunter2"


@pytest.fixture(autouse=True)
def _restored():
    root = logging.getLogger("stego_core")
    before = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:], root.propagate = before[0], before[2]
    root.setLevel(before[1])


@pytest.mark.parametrize(
    "text",
    [
        f"AWS_SECRET_ACCESS_KEY={SECRET}",
        f"aws_session_token = {SECRET}",
        f'{{"password": "{SECRET}"}}',
        f"{{'api_key': '{SECRET}'}}",
        f"api-key: {SECRET}",
        f"opening s3://user:{SECRET}@bucket/key failed",
        f"GET https://host/x?a=1&token={SECRET}&b=2",
        f"GET https://host/x?X-Amz-Signature={SECRET}",
    ],
)
def test_what_looks_like_a_credential_is_replaced_and_the_rest_stays(text):
    redacted = log.redact(text)
    assert SECRET not in redacted
    assert "***" in redacted
    assert redacted.replace("***", SECRET) == text


@pytest.mark.parametrize(
    "text",
    [
        "train 20/1000  loss 0.1234  3.4 steps/s",
        "s3://bucket/a@b/c.jpg",
        "http://localhost:8265/api",
        '{"tokens": 256, "secret": null}',
        "16 tokens per image",
    ],
)
def test_ordinary_lines_stay_as_they_are(text):
    assert log.redact(text) == text


@pytest.mark.parametrize("debug", [False, True])
def test_secrets_in_messages_arguments_and_tracebacks_never_reach_the_screen(capsys, debug):
    log.setup(debug=debug)
    logger = logging.getLogger("stego_core.somewhere")
    logger.warning("secret=%s", SECRET)
    logger.info("settings %s", {"password": SECRET})
    try:
        raise ValueError(f"can't open s3://me:{SECRET}@bucket")
    except ValueError:
        logger.exception("failed")
    shown = capsys.readouterr().err
    assert SECRET not in shown
    assert shown.count("***") == 4  # the source line stands in the traceback, too
    assert "ValueError: can't open s3://me:***@bucket" in shown


def test_debug_lines_are_shown_only_when_asked_for_and_each_line_once(capsys):
    logger = logging.getLogger("stego_core.somewhere")
    log.setup()
    log.setup()
    logger.debug("fine print")
    logger.info("an event")
    assert capsys.readouterr().err.count("an event") == 1
    log.setup(debug=True)
    logger.debug("fine print")
    assert "fine print" in capsys.readouterr().err
