"""The bounds of what more than one request, record or manifest holds, each declared once.

Knows numbers and patterns, not what they are asked for.
"""

from __future__ import annotations

import math
import operator
from typing import Annotated, Literal, SupportsFloat, SupportsIndex

from pydantic import Field

from lpd_export.errors import UserError

MOST_CFG = 1000
"""Published guidance ends below 8; far above this, guided logits leave their type's range."""
TEMPERATURES = 0.001, 1000
"""Colder is top-k 1, warmer is uniform."""

GuidanceSchedule = Literal["linear", "constant"]
"""How guidance goes over the tokens of an image."""
Cfg = Annotated[float, Field(ge=0, le=MOST_CFG)]
Temperature = Annotated[float, Field(ge=TEMPERATURES[0], le=TEMPERATURES[1])]
Seed = Annotated[int, Field(ge=0, le=2**64 - 1)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""A SHA-256 in hexadecimal."""


def whole_number(name: str, value: SupportsIndex, least: int) -> int:
    """`value` as an int. Raises UserError, by its name, for another type or one below `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name} must be a whole number, but it is {value!r}") from None
    if number < least:
        raise UserError(f"{name} must be at least {least}, but it is {number}")
    return number


def finite_number(name: str, value: SupportsFloat) -> float:
    """`value` as a float. Raises UserError, by its name, for another type, NaN or infinity."""
    if not isinstance(value, SupportsFloat) or not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, but it is {value!r}")
    return float(value)
