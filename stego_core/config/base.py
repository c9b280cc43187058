"""What all settings share: refusal of unknown keys, and the ranges of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le, Lt

Positive = Annotated[int, Gt(0)]
NonNegative = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
NonNegativeFloat = Annotated[float, Ge(0)]
Decay = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Strict:
    """A table of settings that refuses keys it does not know."""

    # Read by pydantic only: a misspelt key in a TOML file is an error, never ignored.
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
