"""Logging set-up, and the redaction of credentials in all that a run writes."""

from __future__ import annotations

import logging
import re
import sys

_SECRETS = [
    # key=value and "key": "value" pairs whose key names a secret
    re.compile(
        r"""(?ix) ((?:secret|password|passwd|token|api[_-]?key|access[_-]?key)[\w-]*
        ["']?\s*[=:]\s*["']?) (?!null\b|\*\*\*) [^\s"',&}]+"""
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


class _Redact(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), None
        return True


def setup(*, debug: bool = False) -> None:
    """Send log lines to standard error, one line per event; called by jobs only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(_Redact())
    root = logging.getLogger("stego_core")
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    root.propagate = False
