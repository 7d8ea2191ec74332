"""What to build: the request behind `lpd-export build`, and its TOML file form.

A recipe names the same settings as the command line, with the same words; paths in it are
relative to the recipe.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpd_export.errors import UserError

PATHS = (
    "checkpoint",
    "tokenizer",
    "classes",
    "schedule",
    "keep_layers",
    "timing_cache",
    "out",
)
HUB_PREFIX = "hf:"


@dataclass(frozen=True)
class BuildRequest:
    """Everything that a user can say of a build; None leaves it to the build.

    See `lpd-export build --help` for what each means.
    """

    model: str | None = None
    res: int | None = None
    steps: int | None = None
    checkpoint: str | None = None
    tokenizer: str | None = None
    heads: int | None = None
    classes: str | None = None
    schedule: str | None = None
    orders: int | None = None
    repulsion: int | None = None
    cfg: float | None = None
    guidance: str = "linear"
    precision: str = "fp32"
    keep_layers: str | None = None
    backend: str = "onnxruntime"
    max_batch: int | None = None
    workspace: int | None = None
    optimization_level: int | None = None
    timing_cache: str | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    compute_capability: tuple[str, ...] = ()
    weight_stripped: bool = False
    random_weights: bool = False
    seed: int = 0
    out: str | None = None
    force: bool = False


ENGINE_FIELDS = (
    "workspace",
    "optimization_level",
    "timing_cache",
    "version_compatible",
    "hardware_compatible",
    "compute_capability",
    "weight_stripped",
)
"""Settings that only engines have."""
CHOICES = {
    "guidance": ("linear", "constant"),
    "precision": ("fp32", "bf16", "fp16", "int8"),
    "backend": ("onnxruntime", "tensorrt", "tensorrt-rtx"),
}


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of a recipe by field of BuildRequest; `out` defaults to the recipe's stem.

    Raises:
        UserError: for a file that is not TOML, an unknown key or a wrong value, with its line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"cannot read the recipe {path}: {reason}") from error
    try:
        entries = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not TOML: {error}") from error
    types_by_key = field_types()
    settings: dict[str, Any] = {"out": str(path.with_suffix(""))}
    for key, value in entries.items():
        name = key.replace("-", "_")
        where = f"{path}, line {_line_of(key, text)}"
        if name not in types_by_key or name == "force":
            known = ", ".join(name.replace("_", "-") for name in types_by_key if name != "force")
            raise UserError(f"{where}: there is no setting {key!r}; there are {known}")
        settings[name] = _checked(key, name, value, types_by_key[name], where)
        if name in PATHS and not value.startswith(HUB_PREFIX):
            settings[name] = str(path.parent / value)
    return settings


def field_types() -> dict[str, type]:
    """The type of each setting, None aside."""
    hints = typing.get_type_hints(BuildRequest)

    def plain(hint: Any) -> type:
        if typing.get_origin(hint) is tuple:
            return tuple
        options = typing.get_args(hint) or (hint,)
        return next(option for option in options if option is not types.NoneType)

    return {field.name: plain(hints[field.name]) for field in dataclasses.fields(BuildRequest)}


def _checked(key: str, name: str, value: Any, expected: type, where: str) -> Any:
    words = {
        int: "a whole number",
        float: "a number",
        str: "text in quotes",
        bool: "true or false",
        tuple: "a list of texts in quotes",
    }
    accepted: Any = {float: (int, float), tuple: list}.get(expected, expected)
    if (
        not isinstance(value, accepted)
        or (isinstance(value, bool) and expected is not bool)
        or (expected is tuple and not all(isinstance(entry, str) for entry in value))
    ):
        raise UserError(f"{where}: {key} must be {words[expected]}, but it is {value!r}")
    if name in CHOICES and value not in CHOICES[name]:
        raise UserError(f"{where}: {key} must be {' or '.join(CHOICES[name])}, but it is {value!r}")
    return expected(value)


def _line_of(key: str, text: str) -> int:
    pattern = re.compile(rf"""\s*(\[+\s*)?["']?{re.escape(key)}["']?\s*(=|\]|\.)""")
    lines = text.splitlines()
    return next((number for number, line in enumerate(lines, 1) if pattern.match(line)), 1)
