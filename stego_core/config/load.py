"""Flags and TOML files to a checked job, and a job back to TOML.

tyro parses the flags and prints the help; pydantic checks every value against the ranges of
`stego_core.config.schema`. Both stop being readable once something is wrong, so the problems are
found and worded by `stego_core.config.diagnose`, all at once and one line each.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from stego_core.config.base import Space
from stego_core.config.diagnose import (
    Flag,
    bare,
    flatten,
    group_flags,
    read_flags,
    read_table,
)
from stego_core.config.rules import clashes
from stego_core.config.schema import Job
from stego_core.errors import ConfigError

JobT = TypeVar("JobT", bound=Job)

# How a job is run, not what it computes: these never become part of the record of a run.
_PASSING = ("dry_run", "debug", "overwrite", "retry")

_CONFIG_HELP = (
    "--config FILE.toml reads settings from a file. It may be repeated: later files win over "
    "earlier ones, and flags win over files."
)


def load_job(
    job_type: type[JobT], argv: Sequence[str], *, prog: str, description: str = ""
) -> JobT:
    """Read a job from flags and `--config` files: defaults < files in their order < flags.

    Args:
        job_type: Which job to read.
        argv: The command line without the name of the program.
        prog: Name of the program, for `--help`.
        description: First lines of `--help`; without it, the docstring of the job.

    Returns:
        The job, with every value checked.

    Raises:
        ConfigError: one line for each problem of the files and of the flags.
        SystemExit: code 0, after `--help` has been printed to stdout.
    """
    if "-h" in argv or "--help" in argv:
        _tyro(job_type, ["--help"], job_type(), prog, description)
    settings = flatten(job_type)
    values: dict[str, Any] = {}
    problems: list[str] = []
    flags = group_flags(argv)
    for flag in flags:
        if flag.name == "--config":
            found, wrong = _read_file(flag, settings)
            values |= found
            problems += wrong
    base = _replace(job_type(), values)
    flags = [flag for flag in flags if flag.name != "--config"]
    found, wrong = read_flags(flags, settings)
    _refuse(_replace(base, found), problems + wrong)
    tokens = [token for flag in flags for token in flag.tokens]
    read = to_dict(_tyro(job_type, tokens, base, prog, description))
    # tyro does not know what a space is; no flag can have changed it.
    spaces = {path: dict(_at(base, path)) for path, kind in settings.items() if kind is Space}
    return validate(job_type, read | spaces)


def validate(job_type: type[JobT], values: Mapping[str, Any]) -> JobT:
    """Lay a nested mapping over the defaults of a job.

    Args:
        job_type: Which job to make.
        values: Nested settings under the names of the schema; what is left out keeps the default
            that it has in this job.

    Returns:
        The job, with every value checked.

    Raises:
        ConfigError: one line for each problem.
    """
    found, problems = read_table(values, flatten(job_type), "")
    job: JobT = _replace(job_type(), found)
    _refuse(job, problems)
    return job


def dump_toml(job: Job) -> str:
    """Write the settings of a job as TOML that `--config` reads back to an equal job.

    Settings that are None and those of the single call (dry_run, debug, overwrite) are left out.
    """
    import tomli_w

    return tomli_w.dumps(
        {key: value for key, value in _without_none(to_dict(job)).items() if key not in _PASSING}
    )


def to_dict(job: Any) -> dict[str, Any]:
    """Turn a job, or one of its parts, into nested plain dicts; tuples become lists."""
    plain: dict[str, Any] = _plain(job)
    return plain


def fingerprint(*parts: Any) -> str:
    """Hash what determines a result: 16 hex characters, the same on every machine.

    Args:
        parts: JSON-able values, mappings with string keys, or dataclasses. Their order counts,
            that of the keys does not.

    Raises:
        TypeError: for a value that has no JSON form.
        ValueError: for NaN or an infinity.
    """
    text = json.dumps(_plain(parts), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {part.name: _plain(getattr(value, part.name)) for part in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("only string keys have a JSON form")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }


def _replace(node: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    changes: dict[str, Any] = {}
    for part in dataclasses.fields(node):
        path, value = prefix + part.name, getattr(node, part.name)
        if dataclasses.is_dataclass(value):
            changes[part.name] = _replace(value, values, f"{path}.")
        elif path in values:
            changes[part.name] = values[path]
    return dataclasses.replace(node, **changes)


def _tyro(
    job_type: type[JobT], tokens: Sequence[str], default: JobT, prog: str, description: str
) -> JobT:
    import tyro

    helping = "--help" in tokens
    try:
        return tyro.cli(
            job_type,
            args=tokens,
            default=default,
            prog=prog,
            description=f"{description or job_type.__doc__}\n\n{_CONFIG_HELP}",
            console_outputs=helping,
            config=(tyro.conf.SuppressFixed,),  # a space can't be given by flags
        )
    except SystemExit:
        if helping:
            raise
        # A net for what `read_flags` lets through and tyro does not; no such case is known.
        line = " ".join(bare(token) for token in tokens)
        raise ConfigError(f"{line}: not understood; see {prog} --help") from None


def _read_file(flag: Flag, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    import tomllib

    if len(flag.words) != 1 or not flag.words[0]:
        return {}, ["--config: takes one file; repeat the flag for more"]
    name = bare(flag.words[0])
    try:
        table = tomllib.loads(Path(flag.words[0]).read_bytes().decode("utf-8-sig"))
    except OSError as error:
        return {}, [f"--config {name}: can't be read: {error.strerror}"]
    except ValueError as error:
        return {}, [f"--config {name}: not valid TOML: {error}"]
    return read_table(table, settings, f" in {name}")


def _refuse(job: Job, problems: list[str]) -> None:
    """Raise for the problems found and for settings of `job` that do not fit together."""
    # A refused value left its default behind: a clash with that default is no news to the user.
    refused = re.findall(r"[a-z_.]+", "\n".join(problems).replace("--", "").replace("-", "_"))
    news = [line for line in clashes(job) if not {*re.findall(r"([a-z_.]+) = ", line)} & {*refused}]
    if problems or news:
        raise ConfigError(*problems, *news)


def _at(job: Any, path: str) -> Any:
    for name in path.split("."):
        job = getattr(job, name)
    return job
