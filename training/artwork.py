"""Emoji artwork as training data: which drawings there are, and what each is a drawing of.

Knows how icon sets spell a concept, the classes of `artwork_classes.toml`, which concepts are held
out, and how a drawing becomes pixels. It does not know where packages come from.

A *concept* is what is drawn, as Unicode names it (`cat-face`); a *drawing* is one artist's of it.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

SIDE = 64
CLASSES_FILE = Path(__file__).with_name("artwork_classes.toml")
HELD_OUT_SHARE = 0.06
"""Of the families of a class, at least one, that are for validation."""
LARGEST_HELD_OUT = 0.25
"""Of a class's concepts, what a family that is held out may have, if there is a smaller one."""
SKIN_TONE = re.compile("-(light|medium|medium-light|medium-dark|dark|tone[1-5])(-|$)|-skin-tone")
"""In names of icons that differ from another in a tint alone; `light-blue-heart` is none."""


@dataclass(frozen=True)
class ArtworkClass:
    """What a class holds: selectors of concepts, and whether a mirrored drawing is one of it."""

    concepts: tuple[str, ...]
    """`heart/` takes a Unicode subgroup, `cat-*` names by pattern, `!cat-face` takes names out."""
    mirror: bool = False
    not_by: tuple[str, ...] = ()
    """Sets that draw it as something else, such as a flag as a disc."""

    def holds(self, concept: str, subgroup: str) -> bool:
        """Whether a concept of this Unicode subgroup ("" if it has none) is of the class."""
        taken_out = [word[1:] for word in self.concepts if word.startswith("!")]
        if any(fnmatchcase(concept, pattern) for pattern in taken_out):
            return False
        return any(
            word[:-1] == subgroup if word.endswith("/") else fnmatchcase(concept, word)
            for word in self.concepts
        )


def read_classes(path: Path = CLASSES_FILE) -> dict[str, ArtworkClass]:
    """The classes by name, in the order of their ids."""
    table = tomllib.loads(path.read_text("utf-8"))
    return {
        name: ArtworkClass(
            tuple(entry["concepts"].split()),
            entry.get("mirror", False),
            tuple(entry.get("not_by", ())),
        )
        for name, entry in sorted(table.items())
    }


# --------------------------------------------------------------------------------- the concepts


def subgroups(emoji: list[dict[str, str]]) -> dict[str, str]:
    """The Unicode subgroup of each concept, of emoji.json's entries; skin tones are left out."""
    return {
        concept_name(entry["name"]): entry["subgroup"]
        for entry in emoji
        if "skin tone" not in entry["name"] and entry["subgroup"] != "hair-style"
    }


def concept_name(name: str) -> str:
    """A name of Unicode's, or of an icon, in the spelling of concepts: "Dog Face" is dog-face.

    Icon sets spell the flag of Peru in three ways: flag-peru, flag-for-peru, flag-for-flag-peru.
    """
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    plain = plain.lower().replace("&", "and").replace("'", "")
    dashed = re.sub("[^a-z0-9]+", "-", plain).strip("-")
    return re.sub("^flag-for-(flag-)?", "flag-", dashed)


def class_of(classes: Mapping[str, ArtworkClass], concept: str, subgroup: str) -> str | None:
    """The class of a concept, or None where it fits nowhere.

    Raises:
        ValueError: if two classes hold it.
    """
    found = [name for name, entry in classes.items() if entry.holds(concept, subgroup)]
    if len(found) > 1:
        raise ValueError(f"the concept {concept} is in two classes: {' and '.join(found)}")
    return found[0] if found else None


def family(concept: str) -> str:
    """What concepts have in common that are nearly one drawing, such as man- and woman-biking."""
    bare = re.sub("^(person|man|woman|men|women|people)-", "", concept)
    return bare.removesuffix("-facing-right")


def held_out(class_of_concept: Mapping[str, str | None]) -> set[str]:
    """The concepts, of these with their classes, that no drawing is trained on.

    Of each class the families with the lowest hash, which a concept more or less does not change;
    and whatever else is of such a family, in other classes or in none.
    """
    by_class: dict[str, Counter[str]] = {}
    for concept, class_name in class_of_concept.items():
        if class_name is not None:
            by_class.setdefault(class_name, Counter())[family(concept)] += 1
    chosen = set()
    for sizes in by_class.values():
        most = max(LARGEST_HELD_OUT * sizes.total(), min(sizes.values()))
        ranked = sorted(
            (name for name, size in sizes.items() if size <= most),
            key=lambda name: hashlib.sha256(name.encode()).digest(),
        )
        chosen.update(ranked[: max(1, round(HELD_OUT_SHARE * len(sizes)))])
    return {concept for concept in class_of_concept if family(concept) in chosen}


# --------------------------------------------------------------------------------- the drawings


def drawings(icons: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Concepts and SVG documents of an icon set, `icons.json` of an @iconify-json package."""
    seen = set()
    for name, icon in sorted(icons["icons"].items()):
        concept = concept_name(name)
        if concept in seen:
            continue
        seen.add(concept)
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        yield (
            concept,
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{SIDE}" height="{SIDE}">'
            f"{icon['body']}</svg>",
        )


def render(svg: str) -> Image.Image:
    """An SVG document as RGB of 64x64 pixels, on white.

    Raises:
        ValueError: if it is no SVG.
    """
    content = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    with Image.open(io.BytesIO(content)) as picture:
        return picture.convert("RGB")


def read_icons(content: bytes) -> dict[str, Any]:
    """The icon set of `icons.json`."""
    icons: dict[str, Any] = json.loads(content)
    return icons
