"""The recipes that come with lpd-export, and how the word that a user gives finds one.

Knows where they are, in the repository and in an installed package, and where their bundles go.
Does not know what a recipe may say.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from lpd_export.build.request import HUB_PREFIX, read_recipe
from lpd_export.errors import UserError

BUNDLES = Path("engines")
"""Where the bundle of a recipe that is given by name goes, in the working folder."""
FILES = ("checkpoint", "tokenizer", "classes", "schedule")
"""The settings that are files to read, unless they are on the hub."""


def recipes_folder() -> Path:
    """The folder of the recipes: `engines` of the repository, in a wheel part of the package."""
    package = Path(__file__).parents[1]
    installed = package / "engines"
    return installed if installed.is_dir() else package.parent / "engines"


def recipe_names() -> list[str]:
    """The recipes that can be given by name."""
    return sorted(path.stem for path in recipes_folder().glob("*.toml"))


def find_recipe(text: str) -> Path:
    """The recipe file that a user means: a file of that path, else the recipe of that name.

    Raises:
        UserError: if there is neither, with the names that come close and all there are.
    """
    names = recipe_names()
    # A folder may have a recipe's name: its bundle has.
    if text in names and not Path(text).is_file():
        return recipes_folder() / f"{text}.toml"
    if os.path.lexists(text):
        return Path(text)
    close = difflib.get_close_matches(Path(text).stem.lower(), names)
    meant = f" (did you mean {' or '.join(close)}?)" if close else ""
    raise UserError(
        f"there is no recipe {text}{meant}: give a file, or one of the names {', '.join(names)}"
    )


def named_recipe(text: str) -> dict[str, Any]:
    """The settings of the recipe that `find_recipe` finds, as `read_recipe` gives them.

    The bundle of a recipe that is given by name goes to engines/NAME of the working folder.

    Raises:
        UserError: if there is none, it is wrong, or it needs files that are only in the repository.
    """
    path = find_recipe(text)
    settings = read_recipe(path)
    if path == Path(text):
        return settings
    settings["out"] = str(BUNDLES / text)
    for file in (settings[key] for key in FILES if key in settings):
        if not file.startswith(HUB_PREFIX) and not Path(file).exists():
            raise UserError(
                f"the recipe {text} needs {Path(file).name}, which is in lpd-export's repository "
                f"and not in the installed package: build engines/{path.name} in a clone of it"
            )
    return settings
