"""The run directory: what a job leaves behind, and how it tells where it stands.

`config.resolved.toml`, `status.json` (state, stage, exit code, counts), `events.jsonl`, and the
folders of the stages. The directory may lie in a bucket; there `events.jsonl`, which object stores
can't append to, is written anew at each event.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from typing import Any, Final

from stego_core.errors import CheckpointError
from stego_core.log import redact
from stego_core.storage import fs

_NONE: Final = object()  # what a record says of a key that it does not have


class RunDirectory:
    """Status, events and records of one job.

    Args:
        uri: local path or URI; made when the first file is written.
        job: name of the job, as status and events show it.
        events: name of the event file; a second process of the same run takes another name where
            the directory lies in an object store.

    Attributes:
        is_told: whether this process has written a status.
    """

    def __init__(self, uri: str, *, job: str, events: str = "events.jsonl") -> None:
        self.uri = uri
        self._job = job
        self._counts: dict[str, int] = {}
        self._stage = "start"
        self._events_name = events
        self._remote_events: bytes | None = None
        self._started_s = time.monotonic()
        self.is_told = False

    def path(self, *parts: str) -> str:
        """Return the URI of something below the directory."""
        return fs.join(self.uri, *parts)

    def event(self, name: str, **values: Any) -> None:
        """Append one line to the event file."""
        record = {"time": round(time.time(), 3), "job": self._job, "event": name, **values}
        line = redact(json.dumps(record, default=str)).encode() + b"\n"
        if fs.is_local(self.uri):
            path = fs.local_path(self.path(self._events_name))
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as stream:
                stream.write(line)
            return
        if self._remote_events is None:
            self._remote_events = fs.read_if_exists(self.path(self._events_name)) or b""
        self._remote_events += line
        fs.write_bytes(self.path(self._events_name), self._remote_events)

    def status(self, state: str, *, stage: str | None = None, **fields: Any) -> None:
        """Write `status.json`: running, done or failed, the stage, the counts, the exit code."""
        self._stage = stage or self._stage
        record = {
            "job": self._job,
            "state": state,
            "stage": self._stage,
            "exit_code": None,
            "counts": self._counts,
            "elapsed_s": round(time.monotonic() - self._started_s, 1),
            **fields,
        }
        self.is_told = True
        self.write_json("status.json", record)

    def count(self, **counts: int) -> None:
        """Set counts that the next status shows."""
        self._counts.update(counts)

    def write_json(self, name: str, record: Any) -> None:
        """Write a JSON file below the directory, redacted, replacing an older one."""
        text = redact(json.dumps(record, indent=2, default=str))
        fs.write_bytes(self.path(name), text.encode() + b"\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return a JSON file below the directory, or None if it isn't there."""
        data = fs.read_if_exists(self.path(name))
        return None if data is None else dict(json.loads(data))

    def refuse_others(self, results: Collection[str]) -> None:
        """Raise CheckpointError if there is what no run has made: it may be a user's own.

        Args:
            results: files and folders that a run of this job writes, and deletes.
        """
        if self.read_json("fingerprint.json") is not None:
            return
        if found := sorted({*fs.list_names(self.uri)} & {*results}):
            raise CheckpointError(
                f"{self.uri} has {', '.join(found)}, but no fingerprint.json, so no output made "
                "it: give another --out, or delete it yourself"
            )

    def refuse_outputs(self, *results: str) -> None:
        """Raise CheckpointError if another job has left any of these: its records would be lost."""
        if found := sorted({*fs.list_names(self.uri)} & {*results}):
            raise CheckpointError(
                f"{self.uri} is the output of another job ({', '.join(found)}): give another --out"
            )

    def claim(
        self,
        record: dict[str, Any],
        *,
        overwrite: bool = False,
        clear: Callable[[], None] | None = None,
    ) -> bool:
        """Tie the directory to what determines its results; tell whether it was tied before.

        Args:
            record: settings, model and data; compared key by key with an earlier run's.
            overwrite: replace the record instead of refusing.
            clear: deletes the results of another record. It is done before the new record is
                written: a job that dies in between must not take them for its own.

        Raises:
            CheckpointError: if the directory holds the results of another record; the message
                names the keys that differ.
        """
        earlier = self.read_json("fingerprint.json")
        # As it would be read back: a redacted setting must not look like another one.
        record = json.loads(redact(json.dumps(record)))
        if earlier == record:
            return True
        if earlier is not None and not overwrite:
            keys = differing(earlier, record)
            raise CheckpointError(
                f"{self.uri} holds results of other settings ({', '.join(keys)} differ): "
                "give another --out, or --overwrite where the job has it"
            )
        if clear is not None:
            clear()
        self.write_json("fingerprint.json", record)
        return False


def differing(old_record: dict[str, Any], new_record: dict[str, Any]) -> list[str]:
    """Return the sorted paths of what two records say differently, or only one of them says."""
    old, new = _flat(old_record), _flat(new_record)
    return sorted(k for k in {*old, *new} if old.get(k, _NONE) != new.get(k, _NONE))


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a record of one level: a setting by its path, as flags and files name it."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        path = prefix + key
        flat |= _flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return flat
