"""The bounds of what more than one request, record or manifest holds, each declared once.

Knows types of values, with their bounds, and how a value out of them is told; not what they are
asked for.
"""

from __future__ import annotations

import functools
import os
import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from lpd_export.errors import UserError

STRICT = ConfigDict(strict=True, allow_inf_nan=False)
"""Of a request: no text where a number is wanted, and numbers are finite."""

GuidanceSchedule = Literal["linear", "constant"]
"""How guidance goes over the tokens of an image."""
EditOrder = Literal["locality", "random"]
"""How the new cells of an edit come: grown from the kept ones, or anyhow."""
Natural = Annotated[int, Field(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Cfg = Annotated[float, Field(ge=0, le=1000)]
"""Published guidance ends below 8; far above 1000, guided logits leave their type's range."""
Temperature = Annotated[float, Field(ge=0.001, le=1000)]
"""Colder is top-k 1, warmer is uniform."""
Probability = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, le=2**64 - 1)]
Threads = Annotated[int, Field(ge=1, le=max(64, 4 * (os.cpu_count() or 1)))]
"""Far too many end the process inside ONNX Runtime, without a word."""
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""A SHA-256 in hexadecimal."""
DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")
"""Where graphs run, as a whole: a GPU may be one of several."""

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal, a log or a page may obey instead of showing it.

Control characters, ends of lines, changes of the direction of writing, and halves of characters.
"""

WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text in quotes",
    "boolean": "true or false",
    "array": "a list of texts in quotes",
}
SIDES = (
    ("minimum", "at least"),
    ("exclusiveMinimum", "above"),
    ("maximum", "at most"),
    ("exclusiveMaximum", "below"),
)


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=STRICT)


def checked(what: str, value: object, kind: Any) -> Any:
    """`value`, if it is of a type with bounds such as `Seed`; NumPy's numbers are taken as well.

    Raises:
        UserError: `what` must be this, but it is that.
    """
    try:
        plain = value.item() if hasattr(value, "item") else value  # a number of NumPy
        return _adapter(kind).validate_python(plain)
    except ValidationError as error:
        wanted = in_words(_adapter(kind).json_schema())
        raise UserError(f"{what} must be {wanted}, but it is {value!r}") from error


def printable(text: str) -> str:
    """Text in which a terminal obeys nothing: what it might is written as in Python, `\\x1b`."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def in_words(schema: dict[str, Any]) -> str:
    """What a value of a JSON schema must be: `a whole number from 1 to 2048`."""
    schema = schema.get("anyOf", [schema])[0]
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return " or ".join(schema["enum"])
    if "prefixItems" in schema:
        return f"{len(schema['prefixItems'])} whole numbers"
    words = WORDS[schema["type"]]
    if "minimum" in schema and "maximum" in schema:
        return f"{words} from {_number(schema['minimum'])} to {_number(schema['maximum'])}"
    sides = (f"{side} {_number(schema[key])}" for key, side in SIDES if key in schema)
    return " ".join([words, " and ".join(sides)]).strip()


def _number(value: float) -> str:
    return "2^64 - 1" if value == 2**64 - 1 else str(value)
