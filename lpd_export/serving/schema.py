"""The bodies of requests, as OpenAI's clients write them, with our settings beside theirs.

Knows names, types and bounds, and how a mistake in them is told. Does not know a model: which
classes and sizes there are is asked of it later.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field

from lpd_export.bounds import (
    Cfg,
    EditOrder,
    GuidanceSchedule,
    Positive,
    Probability,
    Seed,
    Temperature,
    in_words,
)
from lpd_export.pictures import Fit
from lpd_export.serving.request import MOST_IMAGES

MOST_STEPS = 4096
MOST_SHOWN = 120
"""Characters of a wrong value that an error repeats."""

Index = Annotated[int, Field(ge=0, le=2**64 - 1 - MOST_IMAGES)]


class Settings(BaseModel):
    """What generations and edits have in common."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: Annotated[str, Field(max_length=200)] | None = Field(
        None, description="A bundle by its folder's name; may be left out where there is one."
    )
    n: Annotated[int, Field(ge=1, le=MOST_IMAGES)] = Field(1, description="How many images.")
    size: Annotated[str, Field(max_length=20)] | None = Field(
        None, description="`auto`, or the model's own, such as `256x256`."
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="The PNG in base64, or as a data URL."
    )
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    user: Annotated[str, Field(max_length=1000)] | None = Field(None, description="Not looked at.")
    stream: bool | None = Field(None, description="Server-sent events instead of one answer.")
    partial_images: Annotated[int, Field(ge=0, le=MOST_STEPS)] | None = Field(
        None,
        description="With `stream`: pictures of unfinished steps, spread evenly over the steps; "
        "at most one a step. Each is decoded on the way, which takes time.",
    )
    seed: Seed | None = Field(
        None, description="By default a random one below 2^32, told in the answer."
    )
    index: Index = Field(
        0, description="Of the first image; with the seed it determines the random numbers."
    )
    cfg: Cfg | None = Field(None, description="Guidance scale; by default the model's.")
    guidance: GuidanceSchedule | None = None
    temperature: Temperature = 1.0
    top_k: Positive | None = None
    top_p: Probability | None = None
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = Field(
        None, description="By default the bundle's; others take a schedule made for them."
    )
    details: bool = Field(
        False,
        description="Adds `step_of_cell` to each image: [cells], raster order, from 0; -1 where "
        "it is kept.",
    )


class GenerationRequest(Settings):
    """Images of a class."""

    model_config = ConfigDict(strict=True)

    prompt: Annotated[str, Field(min_length=1, max_length=1000)] = Field(
        description="A class: its name or number, or `none`."
    )
    order: Literal["locality", "random", "raster"] | None = Field(
        None, description="How the cells come; by default as in the bundle's schedule."
    )


class EditForm(Settings):
    """Images that keep a part of one; the rest is made anew. A multipart form."""

    prompt: Annotated[str, Field(max_length=1000)] = Field(
        "none", description="A class: its name or number; by default none."
    )
    image: UploadFile = Field(description="Any picture; what is transparent in it is made anew.")
    mask: UploadFile | None = Field(
        None,
        description="What is made anew: the transparent part, or of a mask without such the white.",
    )
    box: Annotated[str, Field(pattern=r"^\d{1,9}(,\d{1,9}){3}$")] | None = Field(
        None, description="Instead of a mask: `X0,Y0,X1,Y1` in pixels of the image."
    )
    outpaint: Positive | None = Field(
        None, description="Instead of a mask: so many of the model's pixels around the image."
    )
    fit: Fit = "crop"
    order: EditOrder = "locality"
    paste: bool = Field(True, description="Whether kept pixels are the image's own.")


def sentence(error: dict[str, Any], schema: dict[str, Any]) -> tuple[str, str | None]:
    """What was wrong with a body, and which parameter it was.

    Args:
        error: the first of pydantic's or FastAPI's, its place beginning with `body`.
        schema: of the body.
    """
    kind, place, value = error["type"], error["loc"][1:], error.get("input")
    if kind == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error']} at character {place[0]}", None
    if not place or not isinstance(place[0], str):
        return "the body must be an object with the parameters, and is not", None
    name = place[0]
    known = schema["properties"]
    if kind == "missing":
        return f"{name} is missing: {known[name].get('description', 'it is needed')}", name
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(known)}"
        return f"there is no parameter {shown(name)}: {hint}", name[:MOST_SHOWN]
    if kind in ("string_too_long", "string_too_short"):
        ((side, limit),) = error["ctx"].items()
        bound = f"{'at most' if side == 'max_length' else 'at least'} {limit}"
        return f"{name} must have {bound} characters, but it has {len(value or '')}", name
    if kind == "string_pattern_mismatch":
        return f"{name} must be like 16,0,48,32, but it is {shown(value)}", name
    return f"{name} must be {in_words(known[name])}, but it is {shown(value)}", name


def shown(value: object) -> str:
    """A value as an error repeats it, in ASCII and not at any length."""
    text = ascii(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
