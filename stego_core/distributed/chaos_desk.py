"""Where a soak lays what its drivers need as local files: their settings and their logs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stego_core.log import redact
from stego_core.storage import fs
from stego_core.storage.run import RunDirectory


@contextmanager
def local_folder(run: RunDirectory) -> Iterator[Path]:
    """Give the folder of the drivers' files.

    It is the run directory itself where that is local, else a temporary folder, which is deleted
    afterwards: what is of use later is to be brought into the run directory by `keep`.

    Args:
        run: where the soak writes.
    """
    if fs.is_local(run.uri):
        folder = fs.local_path(run.uri)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        yield Path(name)


def keep(run: RunDirectory, file: Path) -> None:
    """Bring a text file of `local_folder` into the run directory, redacted, if it isn't there yet.

    Args:
        run: where the soak writes.
        file: a driver may have been killed in the middle of a letter of it.

    Raises:
        OSError: as the filesystem reports it.
    """
    if not fs.is_local(run.uri):
        text = redact(file.read_text(errors="replace"))
        fs.write_bytes(run.path(file.name), text.encode())
