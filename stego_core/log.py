"""Logging set-up, and the redaction of credentials in all that a run writes."""

from __future__ import annotations

import logging
import re
import sys

_KEY = r"(?:secret|password|passwd|token|api[_-]?key|access[_-]?key|signature)"
_SECRETS = [
    # "key": "value" of JSON, whatever the value holds
    re.compile(rf'(?i)("[\w.-]*{_KEY}[\w.-]*"\s*:\s*")(?:[^"\\\n]|\\.)+'),
    # key=value and key: value; a number of JSON is a count, and text in its place is not JSON
    re.compile(
        rf"""(?ix) ({_KEY}[\w-]*(?:\\?["'])?\s*[=:]\s*(?:\\?["'])?)
        (?!null\b|\*\*\*|(?<=":[ ])[\dtf\[{{-]) (?:[^\s"'\\,&}}]|\\[^"'])+"""
    ),
    # user:password@ of a URI
    re.compile(r"(?i)(\b[a-z][a-z0-9+.-]*://[^\s/@:]+:)[^\s/@]+(?=@)"),
    # AWS access key ids
    re.compile(r"()\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
]


def redact(text: str) -> str:
    """Replace what looks like a credential by `***`.

    >>> redact("aws_secret_access_key=abc/def")
    'aws_secret_access_key=***'
    >>> redact("s3://me:hunter2@bucket/key")
    's3://me:***@bucket/key'
    """
    for pattern in _SECRETS:
        text = pattern.sub(r"\1***", text)
    return text


class _RedactingFormatter(logging.Formatter):
    # The formatted text, not the message: tracebacks are part of it.
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def setup(*, debug: bool = False) -> None:
    """Send log lines to standard error, one line per event; called by jobs only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_RedactingFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger("stego_core")
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    root.propagate = False
