"""A file of requests, JSON lines or CSV: a line asks for images that share a class and settings.

A line may be an edit, of an image in the file's folder. Loads no torch, so that a mistake is told
at once, with its line. Does not know class names, and reads no picture.
"""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

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
from lpd_export.edit_request import EditRequest
from lpd_export.errors import UserError
from lpd_export.files import read_file
from lpd_export.pictures import Fit


def _box(value: object) -> object:
    """A list of JSON, or the text in a cell of a CSV, as what it is checked for."""
    value = value.split(",") if isinstance(value, str) else value
    return tuple(value) if isinstance(value, list) else value


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
    image: str
    """What is edited; this and what follows as `EditRequest` has it, files in the file's folder."""
    mask: str
    box: Annotated[tuple[int, int, int, int], BeforeValidator(_box)]
    outpaint: int
    fit: Fit
    order: EditOrder
    paste: bool


class Asked(NamedTuple):
    """A line, and where it is."""

    where: str
    """`FILE, line 3`."""
    line: RequestLine
    """With its class."""
    edit: EditRequest | None


LARGEST = 2**28
"""Bytes: a million lines are not that many."""
LINE = TypeAdapter(RequestLine)
SCHEMA: dict[str, Any] = LINE.json_schema()["properties"]
KEYS = tuple(SCHEMA)
OF_EDIT = KEYS[KEYS.index("image") :]


def read_requests(path: str | Path) -> list[Asked]:
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


def _json_lines(path: Path, text: str) -> Iterator[Asked]:
    # Not splitlines: a name may hold other characters that end a line for Python.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                request = LINE.validate_json(line)
            except ValidationError as error:
                raise _mistake(path, number, error) from error
            yield _asked(path, number, request)


def _csv_lines(path: Path, text: str) -> Iterator[Asked]:
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
            yield _asked(path, reader.line_num, request)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _asked(path: Path, number: int, line: RequestLine) -> Asked:
    where = f"{path}, line {number}"
    of_edit: dict[str, Any] = {key: line[key] for key in OF_EDIT if key in line}  # type: ignore[literal-required]
    if "image" in line:
        try:
            edit = EditRequest(**of_edit, folder=path.parent)
            return Asked(where, {"class_": edit.default_class(), **line}, edit)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    if of_edit:
        raise UserError(f"{where}: {next(iter(of_edit))} is of an edit: say of which image")
    if "class_" not in line:
        raise UserError(f"{where}: it names no class: give one, or none")
    return Asked(where, line, None)


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
