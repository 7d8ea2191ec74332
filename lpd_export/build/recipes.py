"""The recipes that come with lpd-export, and how the word that a user gives finds one.

Knows that each row of the published table is one, where the files of the others are, in the
repository and in an installed package, and where their bundles go. Does not know what a recipe may
say.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lpd_export.build.published import PUBLISHED, published_settings
from lpd_export.build.request import HUB_PREFIX, read_recipe
from lpd_export.errors import UserError
from lpd_export.formats import TENSORRT

BUNDLES = Path("engines")
"""Where the bundle of a recipe that is given by name goes, in the working folder."""
FILES = ("checkpoint", "tokenizer", "classes", "schedule")
"""The settings that are files to read, unless they are on the hub."""


def recipes_folder() -> Path:
    """The folder of recipe files: `engines` of the repository, in a wheel part of the package."""
    package = Path(__file__).parents[1]
    installed = package / "engines"
    return installed if installed.is_dir() else package.parent / "engines"


def published_recipes() -> dict[str, dict[str, Any]]:
    """The settings of the published models' recipes by name: MODEL-RES[-stepsN][-int8]."""
    recipes = {}
    for row in PUBLISHED:
        steps = "" if row == published_settings(row.model, row.resolution) else f"-steps{row.steps}"
        for precision, suffix in (("fp16", ""), ("int8", "-int8")):
            recipes[f"{row.model}-{row.resolution}{steps}{suffix}"] = {
                "model": row.model,
                "res": row.resolution,
                "steps": row.steps,
                "cfg": row.cfg,
                "repulsion": row.repulsion,
                "precision": precision,
                "backend": TENSORRT.name,
            }
    return recipes


def named_recipe(text: str, replaced: Collection[str] = ()) -> dict[str, Any]:
    """The settings of the recipe that a user means: a file of that path, else one of that name.

    The bundle of a recipe that is given by name goes to engines/NAME of the working folder.

    Args:
        text: a path or a name.
        replaced: settings that the user gives besides, which are left out.

    Raises:
        UserError: if there is neither (with the names that come close and all there are), it is
            wrong, or it needs files that are only in the repository.
    """
    published = published_recipes()
    files = {path.stem: path for path in recipes_folder().glob("*.toml")}
    names = sorted([*published, *files])
    # A folder may have a recipe's name: its bundle has.
    if text in names and not Path(text).is_file():
        settings = published[text] if text in published else read_packaged(files[text])
        return settings | {"out": str(BUNDLES / text)}
    if os.path.lexists(text):
        path, ours = Path(text), recipes_folder()
        project = ours.parent if path.resolve().parent == ours else None
        return read_recipe(path, project, replaced)
    close = difflib.get_close_matches(Path(text).stem.lower(), names)
    meant = f" (did you mean {' or '.join(close)}?)" if close else ""
    raise UserError(
        f"there is no recipe {text}{meant}: give a file, or one of the names {', '.join(names)}"
    )


def read_packaged(path: Path) -> dict[str, Any]:
    """A recipe of `recipes_folder`; raises UserError where the files it names are not."""
    settings = read_recipe(path, path.parents[1])
    for file in (settings[key] for key in FILES if key in settings):
        if not file.startswith(HUB_PREFIX) and not Path(file).exists():
            raise UserError(
                f"the recipe {path.stem} needs {Path(file).name}, which is in lpd-export's "
                "repository and not in the installed package: build engines/"
                f"{path.name} in a clone of it"
            )
    return settings
