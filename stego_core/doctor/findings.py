"""What the doctor found: one line a check, and whether to go on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

from stego_core.errors import EXIT_OK, ClusterError, ConfigError, InputError, StegoError
from stego_core.log import redact


class State(StrEnum):
    """How a check ended: `WARN` and `SKIP` let jobs run, `FAIL` does not."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check.

    Args:
        check: its name, one word.
        state: how it ended.
        found: what is there, on one line.
        advice: what to do about it; empty if nothing.
        exit_code: what a failure of it makes of the doctor's exit code.
    """

    check: str
    state: State
    found: str
    advice: str = ""
    exit_code: int = EXIT_OK

    def line(self) -> str:
        """Return it as a line for a person, without credentials.

        >>> Finding("disk", State.WARN, "/tmp: 3.0 GiB free", "make room").line()
        'warn  disk      /tmp: 3.0 GiB free -> make room'
        """
        text = f"{self.state:<5} {self.check:<9} {self.found}"
        return redact(" ".join(text.split("\n")) + (f" -> {self.advice}" if self.advice else ""))

    def record(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "check": self.check,
            "state": self.state.value,
            "found": self.found,
            "advice": self.advice,
            "exit_code": self.exit_code,
        }


Check: TypeAlias = Callable[[], Iterable[Finding]]


def examine(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """Run the checks in their order; one that raises is a failure, and the next ones still run."""
    for name, check in checks:
        try:
            yield from check()
        except StegoError as error:
            line = next(iter(str(error).splitlines()), type(error).__name__)
            yield Finding(name, State.FAIL, line, exit_code=error.exit_code)
        except Exception as error:  # a broken library raises anything when it is imported
            found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            yield Finding(name, State.FAIL, found, exit_code=ConfigError.exit_code)


def conclude(findings: list[Finding]) -> None:
    """Raise what the first failure asks for, if there is one.

    Raises:
        ConfigError, InputError, ClusterError: with the exit code of the first failure.
    """
    failed = [finding for finding in findings if finding.state is State.FAIL]
    if not failed:
        return
    names = ", ".join(dict.fromkeys(finding.check for finding in failed))
    known = {error.exit_code: error for error in (ConfigError, InputError, ClusterError)}
    error = known.get(failed[0].exit_code, ConfigError)
    raise error(f"{len(failed)} of {len(findings)} checks failed: {names}")
