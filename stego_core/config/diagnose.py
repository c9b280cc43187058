"""What is wrong with flags and tables of settings, in one readable line each.

Works on the flattened schema: a mapping from dotted path to annotation. Every function returns
what it could read together with a line for everything that it could not; nothing is raised here.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from stego_core.config.base import Space

# `scheme://user:secret@`, where a port is no secret, or a signature in the query of a URI.
_SECRET = re.compile(
    r"://[^/@:\s]*:(?!\d+(?:[/?]|$))[^@\s]+@"
    r"|://\S*[?&](?:sig|[^=&\s]*(?:secret|token|passw|signature|credential)[^=&\s]*)=",
    re.IGNORECASE,
)

# pydantic's names of errors, in words; the braces are filled with pydantic's own context.
_EXPECTED = {
    "int_type": "not an integer",
    "float_type": "not a number",
    "finite_number": "not a finite number",
    "string_type": "not a string",
    "bool_type": "must be true or false",
    "tuple_type": "not a list",
    "dict_type": "not a table",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "must be {expected}",
}


class Flag(NamedTuple):
    """One flag of the command line; the name is empty for what stands before the first flag."""

    name: str
    """With hyphens, as the help prints it."""
    words: list[str]
    """Its values, also that of `--name=value`."""
    tokens: list[str]
    """The words as they were typed, the flag itself included."""


def flatten(cls: type[Any], prefix: str = "") -> dict[str, Any]:
    """List everything below a dataclass: dotted path to annotation, the tables included."""
    found: dict[str, Any] = {}
    hints = get_type_hints(cls, include_extras=True)
    for part in dataclasses.fields(cls):
        annotation = hints[part.name]
        found[prefix + part.name] = annotation
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            found |= flatten(annotation, f"{prefix}{part.name}.")
    return found


def group_flags(argv: Sequence[str]) -> list[Flag]:
    """Cut a command line into flags with their values; a negative number is a value."""
    flags = [Flag("", [], [])]
    for token in argv:
        if token[:1] == "-" and len(token) > 1 and not _is_number(token):
            name, equals, value = token.partition("=")
            flags.append(Flag(name.replace("_", "-"), [value] if equals else [], [token]))
        else:
            flags[-1].words.append(token)
            flags[-1].tokens.append(token)
    return flags


def _is_number(token: str) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    return True


def read_flags(
    flags: Sequence[Flag], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Read flags against the flattened schema.

    Returns:
        The values that are right, by dotted path, and one line for each problem.
    """
    paths = flag_paths(settings)
    names = {**paths, "--config": "", "--help": ""}
    values: dict[str, Any] = {}
    problems: list[str] = []
    for flag in flags:
        if not flag.name:
            problems += [f"{_name(word)}: not a flag{_nearest(word, names)}" for word in flag.words]
        elif flag.name not in paths:
            problems.append(f"{_name(flag.tokens[0])}: unknown flag{_nearest(flag.name, names)}")
        else:
            path = paths[flag.name]
            value, wrong = _read_flag(flag, path, settings[path])
            problems += wrong
            if not wrong:
                values[path] = value
    return values, problems


def flag_paths(settings: Mapping[str, Any]) -> dict[str, str]:
    """List every flag of a flattened schema, those that switch off included, with its path."""
    paths: dict[str, str] = {}
    for path, annotation in settings.items():
        if dataclasses.is_dataclass(annotation) or annotation is Space:
            continue
        name = path.replace("_", "-")
        paths[f"--{name}"] = path
        if annotation is bool:
            head, dot, tail = name.rpartition(".")
            paths[f"--{head}{dot}no-{tail}"] = path
    return paths


def _read_flag(flag: Flag, path: str, annotation: Any) -> tuple[Any, list[str]]:
    shown = " ".join([flag.name, *map(bare, flag.words)])
    if annotation is bool:
        is_on = flag.name == "--" + path.replace("_", "-")
        return is_on, [f"{shown}: takes no value"] if flag.words else []
    if get_origin(annotation) is not tuple:
        if len(flag.words) != 1:
            return None, [f"{shown}: {'takes one value' if flag.words else 'needs a value'}"]
        value, wrong = _check(annotation, _from_text(annotation, flag.words[0]))
        return value, [f"{shown}: {expected}" for _, _, expected in wrong]
    item = get_args(annotation)[0]
    value, wrong = _check(annotation, [_from_text(item, word) for word in flag.words])
    return value, [f"{flag.name} {bare(str(bad))}: {expected}" for _, bad, expected in wrong]


def _from_text(annotation: Any, word: str) -> Any:
    """Give the value a word stands for; the word itself where it is of another type."""
    if get_origin(annotation) is Annotated:
        return _from_text(get_args(annotation)[0], word)
    if type(None) in get_args(annotation):
        return None if word == "None" else _from_text(get_args(annotation)[0], word)
    if annotation in (int, float):
        try:
            return annotation(word)
        except ValueError:
            return word
    return word


def read_table(
    table: Mapping[str, Any], settings: Mapping[str, Any], where: str, prefix: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """Read a nested table against the flattened schema.

    Args:
        table: Nested settings.
        settings: Dotted path to annotation, of the whole job.
        where: Words that follow the offending value, such as ` in my.toml`.
        prefix: Path of this table, with a dot at its end.

    Returns:
        The values that are right, by dotted path, and one line for each problem.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in table.items():
        path = f"{prefix}{key}"
        name = show(key) if "." in str(key) else bare(str(key))
        shown = f"{prefix}{name} = {show(value)}{where}"
        # A quoted key may hold dots: it is one name, never a path.
        if path not in settings or "." in str(key):
            problems.append(f"{shown}: unknown key{_nearest(path, settings)}")
        elif not dataclasses.is_dataclass(settings[path]):
            checked, wrong = _check(settings[path], value)
            if not wrong:
                values[path] = checked
            problems += [
                f"{path}{at} = {show(bad)}{where}: {expected}" for at, bad, expected in wrong
            ]
        elif not isinstance(value, Mapping):
            problems.append(f"{shown}: not a table")
        else:
            found, wrong_below = read_table(value, settings, where, f"{path}.")
            values |= found
            problems += wrong_below
    return values, problems


def _check(annotation: Any, value: Any) -> tuple[Any, list[tuple[str, Any, str]]]:
    """Check one value; problems are (index such as `[1]` or nothing, value, what is expected)."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))
    # Strict, so that true is no number and "10" no integer; what TOML calls a list is our tuple.
    plain = tuple(value) if isinstance(value, list) else value
    try:
        return adapter.validate_python(plain, strict=True), []
    except ValidationError as error:
        wrong = []
        for detail in error.errors():
            words = _EXPECTED.get(detail["type"])
            expected = words.format(**detail.get("ctx", {})) if words else detail["msg"]
            at = "".join(f"[{index}]" for index in detail["loc"])
            wrong.append((at, detail["input"], expected))
        return None, wrong


def _nearest(name: str, names: Mapping[str, Any]) -> str:
    """End a line with the valid name that is meant, preferring one with the same last part."""
    import difflib

    given = name.partition("=")[0].lstrip("-")
    tail = given.rpartition(".")[2]
    same_tail = [known for known in names if known.lstrip("-").rpartition(".")[2] == tail]
    by_name = {known.lstrip("-"): known for known in same_tail or names}
    close = difflib.get_close_matches(given, by_name, n=1, cutoff=0.0 if same_tail else 0.6)
    return f"; did you mean {by_name[close[0]]}?" if close else "; see --help"


def _name(token: str) -> str:
    """Show what stands before `=`; a secret may hold that sign, so the whole token is looked at."""
    return bare(token if holds_credentials(token) else token.partition("=")[0])


def bare(word: str) -> str:
    """Show a word as it was typed, quoted where it would break the line."""
    is_plain = word != "" and word.isprintable() and " " not in word and not holds_credentials(word)
    return word if is_plain else show(word)


def show(value: Any) -> str:
    """Show a value on one line of at most 80 characters, without credentials."""
    text = json.dumps(value, default=str, ensure_ascii=False, skipkeys=True)
    if holds_credentials(text):
        return "(hidden: holds credentials)"
    if not text.isprintable():
        text = json.dumps(value, default=str, skipkeys=True)
    return text if len(text) <= 80 else text[:77] + "..."


def holds_credentials(text: str) -> bool:
    """Whether a text holds a URI with a user's secret or a signature in it."""
    return _SECRET.search(text) is not None
