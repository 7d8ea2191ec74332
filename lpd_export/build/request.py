"""What to build: the request behind `lpd-export build`, and its TOML file form.

A recipe names the same settings as the command line, with the same words; paths in it are
relative to the recipe. The types and bounds of all settings are here; what they mean together is
in `refusals` and `settings`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lpd_export.bounds import STRICT, Cfg, GuidanceSchedule, Seed, in_words
from lpd_export.errors import UserError
from lpd_export.files import inside, read_file
from lpd_export.formats import BACKENDS, ONNXRUNTIME, PRECISIONS

PATHS = (
    "checkpoint",
    "tokenizer",
    "classes",
    "schedule",
    "keep_layers",
)
"""What a recipe reads, in its own or the working folder."""
WRITTEN = ("timing_cache", "out")
"""What a recipe writes, in its own folder."""
HUB_PREFIX = "hf:"
MOST_BYTES = 2**14
"""Of a recipe: reading TOML takes time with the square of a key's length."""
ENGINE_FIELDS = (
    "workspace",
    "optimization_level",
    "timing_cache",
    "hardware_compatible",
    "compute_capability",
)
"""Settings that only engines have."""
CHOICES = {
    "guidance": get_args(GuidanceSchedule),
    "precision": tuple(PRECISIONS),
    "backend": tuple(BACKENDS),
}


class BuildRequest(BaseModel):
    """Everything that a user can say of a build; None leaves it to the build.

    See `lpd-export build --help` for what each means.

    Raises:
        UserError: for an unknown setting, one of a wrong type, or one out of its bounds.
    """

    model_config = STRICT | ConfigDict(frozen=True, extra="forbid")

    model: str | None = None
    res: Annotated[int, Field(ge=1, le=2048)] | None = None
    steps: Annotated[int, Field(ge=1, le=16384)] | None = None
    checkpoint: str | None = None
    tokenizer: str | None = None
    heads: Annotated[int, Field(ge=1, le=1024)] | None = None
    classes: str | None = None
    schedule: str | None = None
    orders: Annotated[int, Field(ge=1, le=10_000)] | None = None
    repulsion: Annotated[int, Field(ge=0, le=1024)] | None = None
    cfg: Cfg | None = None
    guidance: GuidanceSchedule = "linear"
    precision: str = "fp32"
    keep_layers: str | None = None
    backend: str = ONNXRUNTIME.name
    max_batch: Annotated[int, Field(ge=1, le=4096)] | None = None
    workspace: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    optimization_level: Annotated[int, Field(ge=0, le=5)] | None = None
    timing_cache: str | None = None
    hardware_compatible: bool = False
    compute_capability: Annotated[tuple[str, ...], Field(strict=False)] = ()
    random_weights: bool = False
    seed: Seed = 0
    out: str | None = None
    force: bool = False

    @field_validator(*CHOICES)
    @classmethod
    def _is_a_choice(cls, value: str, info: ValidationInfo) -> str:
        if value not in CHOICES[str(info.field_name)]:
            raise ValueError
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _told_in_a_sentence(
        cls, values: Any, handler: ModelWrapValidatorHandler[BuildRequest], info: ValidationInfo
    ) -> BuildRequest:
        """The context of a validation, if any, gives each setting the name that its user used."""
        try:
            return handler(values)
        except ValidationError as error:
            name = str(error.errors()[0]["loc"][0])
            if name not in cls.model_fields:
                raise UserError(f"there is no setting {name!r}; there are {known()}") from error
            written: Callable[[str], str] = info.context or option
            raise UserError(
                f"{written(name)} must be {wanted(name)}, but it is {values[name]!r}"
            ) from error


def option(name: str) -> str:
    """A setting as the command line writes it."""
    return f"--{name.replace('_', '-')}"


def known() -> str:
    """The settings of a recipe, as it writes them."""
    names = (name for name in BuildRequest.model_fields if name != "force")
    return ", ".join(name.replace("_", "-") for name in names)


def wanted(name: str) -> str:
    """What a setting must be, in words."""
    if name in CHOICES:
        return " or ".join(CHOICES[name])
    return in_words(BuildRequest.model_json_schema()["properties"][name])


def read_recipe(
    path: Path, project: Path | None = None, replaced: Collection[str] = ()
) -> dict[str, Any]:
    """The settings of a recipe by field of BuildRequest; `out` defaults to the recipe's stem.

    Args:
        path: of a TOML file.
        project: what it reads lies in here or in its own folder; by default the working folder.
        replaced: settings that the user gives besides: the recipe's own are not looked up.

    Raises:
        UserError: for a file that is not TOML, an unknown key, a wrong value or a path that leads
            elsewhere, with its line.
    """
    try:
        text = read_file(path, "the recipe", MOST_BYTES).decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the recipe {path}: it is not text") from error
    try:
        entries = tomllib.loads(text)
    # ValueError: TOML's own, and that of Python for a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not TOML: {error}") from error
    keys = {key.replace("-", "_"): key for key in entries}

    def written(name: str) -> str:
        return f"{path}, line {_line_of(keys[name], text)}: {keys[name]}"

    for name, key in keys.items():
        if name not in BuildRequest.model_fields or name == "force":
            where = f"{path}, line {_line_of(key, text)}"
            raise UserError(f"{where}: there is no setting {key!r}; there are {known()}")
    values = {name: entries[key] for name, key in keys.items()}
    request = BuildRequest.model_validate(values, context=written)
    settings = request.model_dump(exclude_unset=True)
    readable = [folder.resolve() for folder in (path.parent, project or Path.cwd())]
    for name in PATHS:
        if name in replaced:
            settings.pop(name, None)
        elif name in settings and not settings[name].startswith(HUB_PREFIX):
            file = path.parent / settings[name]
            if "\0" in settings[name] or not any(map(file.resolve().is_relative_to, readable)):
                raise UserError(
                    f"{written(name)}: {settings[name]!r} leads out of the recipe's folder and of "
                    f"the working folder: give it as --{name.replace('_', '-')} instead"
                )
            settings[name] = str(file)
    for name in WRITTEN:
        if name in settings:
            try:
                settings[name] = str(inside(path.parent, settings[name]))
            except UserError as error:
                raise UserError(f"{written(name)}: {error}") from error
    return {"out": str(path.parent / path.stem), **settings}


def _line_of(key: str, text: str) -> int:
    pattern = re.compile(rf"""\s*(\[+\s*)?["']?{re.escape(key)}["']?\s*(=|\]|\.)""")
    lines = text.splitlines()
    return next((number for number, line in enumerate(lines, 1) if pattern.match(line)), 1)
