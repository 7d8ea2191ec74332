"""The bounds of what more than one request, record or manifest holds, each declared once.

Knows numbers and patterns, not what they are asked for.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

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
