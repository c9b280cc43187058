"""The zip archives that torch.save writes, read without torch.load and within limits.

Nothing is extracted to disk, and no size is believed before it was compared with the file's.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from stego_core.errors import CheckpointError, InputError
from stego_core.model.safe_pickle import TensorSpec, load_pickle
from stego_core.storage import fs

MAX_FILE_BYTES = 16 * 2**30
MAX_ENTRIES = 20_000
_MAX_DIRECTORY_BYTES = 8 * 2**20
_ENCRYPTED = 1
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    EOFError,
    ValueError,
    struct.error,
)


class TorchArchive:
    """An open archive; made by `open_archive`.

    Attributes:
        content: what was saved, as `load_pickle` returns it; tensors are not read yet.
    """

    def __init__(self, archive: zipfile.ZipFile, num_bytes: int) -> None:
        self._archive = archive
        self._entries = _checked_entries(archive.infolist(), num_bytes)
        order = self._entries.get("byteorder")
        if order is not None and archive.read(order) != b"little":
            raise CheckpointError("its numbers are not in little-endian order; convert it")
        if "data.pkl" not in self._entries:
            raise CheckpointError("it holds no data.pkl: not a file of torch.save")
        self.content: Any = load_pickle(archive.read(self._entries["data.pkl"]), self._num_bytes)

    def _num_bytes(self, key: str) -> int:
        entry = self._entries.get(f"data/{key}")
        if entry is None:
            raise CheckpointError(f"it lacks storage {key[:40]!a}: truncated or damaged")
        return entry.file_size

    def read(self, spec: TensorSpec) -> Tensor:
        """Return a tensor of the archive, contiguous, with memory of its own.

        Raises:
            CheckpointError: if its bytes are damaged.
        """
        if not spec.storage.count:
            return torch.empty(spec.shape, dtype=spec.storage.dtype)
        try:
            data = bytearray(self._archive.read(self._entries[f"data/{spec.storage.key}"]))
        except (*_ZIP_ERRORS, OSError) as error:
            raise CheckpointError(f"a storage of it is damaged ({error})") from error
        numbers = torch.frombuffer(data, dtype=spec.storage.dtype)
        return numbers.as_strided(spec.shape, spec.stride, spec.offset).clone(
            memory_format=torch.contiguous_format
        )


@contextmanager
def open_archive(uri: str) -> Iterator[TorchArchive]:
    """Open a file of `torch.save`, local or a URI.

    Raises:
        InputError: if there is no such file, or it can't be read.
        CheckpointError: if it is no such archive, is damaged, or holds more than plain data; what
            the body of the `with` raises of these is given the file's name, too.
    """
    with ExitStack() as stack:
        try:
            yield _open(uri, stack)
        except CheckpointError as error:
            lines = (f"checkpoint {uri}: {line}" for line in error.problems)
            raise CheckpointError(*lines) from error


def _open(uri: str, stack: ExitStack) -> TorchArchive:
    try:
        filesystem, path = fs.open_uri(uri)
        stream = stack.enter_context(filesystem.open_input_file(path))
        num_bytes = stream.size()
        if num_bytes > MAX_FILE_BYTES:
            raise CheckpointError(f"it has {num_bytes} bytes, more than {MAX_FILE_BYTES}")
        if stream.read(4) != b"PK\x03\x04":
            raise CheckpointError(
                "not a zip archive as torch.save has written since torch 1.6; if it is older and "
                "you trust it, write it anew: torch.save(torch.load(OLD, weights_only=False), NEW)"
            )
        capped = _Capped(stream)
        archive = stack.enter_context(zipfile.ZipFile(capped))
        capped.cap = num_bytes
        return TorchArchive(archive, num_bytes)
    except OSError as error:
        reason = error.strerror or next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"checkpoint {uri} can't be read: {reason}") from error
    except _ZIP_ERRORS as error:
        raise CheckpointError(f"the archive is truncated or damaged ({error})") from error


class _Capped:
    """A stream that refuses to read much at once: a directory's stated size is only a claim."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.cap = _MAX_DIRECTORY_BYTES

    def read(self, count: int = -1) -> bytes:
        """Return up to `count` bytes; ValueError if that is beyond the cap."""
        if count > self.cap:
            raise ValueError(f"a directory of {count} bytes")
        data: bytes = self._stream.read(self.cap if count < 0 else count)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _checked_entries(entries: list[zipfile.ZipInfo], num_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """Return the entries by their name below the archive's one folder."""
    if len(entries) > MAX_ENTRIES:
        raise CheckpointError(f"the archive has {len(entries)} entries, more than {MAX_ENTRIES}")
    if sum(entry.file_size for entry in entries) > num_bytes:
        raise CheckpointError("the archive's entries claim more bytes than the file has")
    found: dict[str, zipfile.ZipInfo] = {}
    roots = {entry.filename.partition("/")[0] for entry in entries}
    for entry in entries:
        shown = f"{entry.filename[:60]!a}"
        parts = entry.filename.split("/")
        if len(roots) > 1 or {"", ".", ".."} & {*parts} or "\\" in entry.filename:
            raise CheckpointError(f"entry {shown} is not named as torch.save names them")
        is_plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & _ENCRYPTED
        if not is_plain or entry.compress_size != entry.file_size:
            raise CheckpointError(f"entry {shown} is not stored as torch.save stores them")
        if entry.header_offset + entry.file_size > num_bytes:
            raise CheckpointError(f"entry {shown} claims more bytes than the file has")
        name = "/".join(parts[1:])
        if name in found:
            raise CheckpointError(f"entry {shown} is there twice")
        found[name] = entry
    return found
