"""A file of requests, JSON lines or CSV: a line asks for images that share a class and settings.

Loads no torch, so that a mistake is told at once, with its line. Does not know class names.
"""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from lpd_export.bounds import (
    Cfg,
    GuidanceSchedule,
    Positive,
    Probability,
    Seed,
    Temperature,
    in_words,
)
from lpd_export.errors import UserError
from lpd_export.files import read_file


@with_config(ConfigDict(strict=True, allow_inf_nan=False, extra="forbid"))
class RequestLine(TypedDict, total=False):
    """What a line says; what it leaves out is as the command line has it."""

    class_: Annotated[int | str | None, Field(alias="class")]
    """A number or a name; `all` is every class in turn, `none` no class."""
    count: Positive
    """Images, of each class if there are several; one by default."""
    seed: Seed
    index: Seed
    """Of the first image, the others count on from it; by default its place in the run."""
    cfg: Cfg
    guidance: GuidanceSchedule
    temperature: Temperature
    top_k: Positive
    top_p: Probability


LARGEST = 2**28
"""Bytes: a million lines are not that many."""
LINE = TypeAdapter(RequestLine)
SCHEMA: dict[str, Any] = LINE.json_schema()["properties"]
KEYS = tuple(SCHEMA)


def read_requests(path: str | Path) -> list[RequestLine]:
    """The lines of a `.jsonl` or `.csv` file; empty ones do not count.

    Raises:
        UserError: if it is none, or a line has an unknown key or a wrong value; with its number.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".csv"):
        raise UserError(f"{path} must be named .jsonl or .csv: that says how it is read")
    try:
        text = read_file(path, "the requests", LARGEST).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: see its byte {error.start}") from error
    read = _csv_lines if path.suffix == ".csv" else _json_lines
    lines = list(read(path, text))
    if not lines:
        raise UserError(f'{path} has no requests: a line for each, such as {{"class": 207}}')
    return lines


def _json_lines(path: Path, text: str) -> Iterator[RequestLine]:
    # Not splitlines: a name may hold other characters that end a line for Python.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                request = LINE.validate_json(line)
            except ValidationError as error:
                raise _mistake(path, number, error) from error
            yield _with_class(path, number, request)


def _csv_lines(path: Path, text: str) -> Iterator[RequestLine]:
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="")
    try:
        for row in reader:
            if "" in row:
                raise UserError(
                    f"{path}, line {reader.line_num}: it has more cells than the first line names"
                )
            given = {key: value.strip() for key, value in row.items() if value and value.strip()}
            try:
                request = LINE.validate_python(given, strict=False)
            except ValidationError as error:
                number = reader.line_num if _kind(error) != "extra_forbidden" else 1
                raise _mistake(path, number, error) from error
            yield _with_class(path, reader.line_num, request)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _with_class(path: Path, number: int, request: RequestLine) -> RequestLine:
    if "class_" not in request:
        raise UserError(f"{path}, line {number}: it names no class: give one, or none")
    return request


def _kind(error: ValidationError) -> str:
    return error.errors()[0]["type"]


def _mistake(path: Path, number: int, error: ValidationError) -> UserError:
    first = error.errors()[0]
    where = f"{path}, line {number}"
    if not first["loc"]:
        return UserError(f'{where}: not a JSON object such as {{"class": 207}}: {first["msg"]}')
    key = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, KEYS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(KEYS)}"
        return UserError(f"{where}: there is no key {key!r}: {hint}")
    value = first["input"]
    if key == "class":
        return UserError(f"{where}: class must be a name or a number, but it is {value!r}")
    return UserError(f"{where}: {key} must be {in_words(SCHEMA[key])}, but it is {value!r}")
