"""Names that come from data, such as lists of a download, as places below a folder."""

from __future__ import annotations

import re

from stego_core.errors import InputError
from stego_core.storage import fs

_DRIVE = re.compile(r"[A-Za-z]:")


def below(folder_uri: str, name: str) -> str:
    """Append a relative name to a folder, if it stays in it on every system.

    >>> below("s3://bucket/imgs", "train/0001.jpg")
    's3://bucket/imgs/train/0001.jpg'

    Raises:
        InputError: if the name is absolute, leads out of the folder, or holds a NUL.
    """
    parts = re.split(r"[/\\]", name)
    if {"", ".", ".."} & {*parts} or "\0" in name or _DRIVE.match(name):
        raise InputError(f"the name {name[:100]!a} leads out of its folder: correct the list")
    return fs.join(folder_uri, name)
