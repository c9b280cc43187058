"""What all settings share: refusal of unknown keys, and the ranges of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le, Lt

Positive = Annotated[int, Gt(0)]
NonNegative = Annotated[int, Ge(0)]
LabelValue = Annotated[int, Ge(0), Le(254)]  # of label files of 8 bits; 255 is ignored
PositiveFloat = Annotated[float, Gt(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
NonNegativeFloat = Annotated[float, Ge(0)]
Decay = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Strict:
    """A table of settings that refuses keys it does not know."""

    # Read by pydantic only: a misspelt key in a TOML file is an error, never ignored.
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}


class Space(Mapping[str, Any]):
    """What a study varies: a table of a TOML file that is no part of the command line.

    Keys and values are read by `stego_core.config.space`; here it is any table. It is a class of
    its own so that the command line can tell it from a setting.

    Args:
        values: the table, as TOML gives it.
    """

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self._values = dict(values or {})

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Space({self._values})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Tell pydantic that this is a table with any keys."""
        from pydantic_core import core_schema

        table = core_schema.dict_schema(core_schema.str_schema())
        return core_schema.no_info_after_validator_function(cls, table)
