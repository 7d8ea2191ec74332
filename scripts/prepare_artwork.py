"""Makes the training images of lpd-emoji: six sets of emoji artwork, in a folder a class.

    python scripts/prepare_artwork.py
    python scripts/prepare_artwork.py --tarballs ~/downloads --out data/emoji-artwork

Fetches the packages of the npm registry in which Iconify publishes the artwork as SVG, and
Unicode's names and groups; checks their SHA-512; renders every drawing on white at 64 px. The
registry is that of npm's own configuration where npm is installed, else NPM_CONFIG_REGISTRY or
npm's default. The folder holds

    train/CLASS/CONCEPT-SET.png        what an LPD is trained on
    validation/CLASS/CONCEPT-SET.png   concepts of which nothing is trained on
    unsorted/CONCEPT-SET.png           drawings of no class, for the tokenizer alone
    classes.json, mirrored.json        class names by id; those whose drawings may be mirrored
    licences.md                        where all of it comes from

Classes are those of training/artwork_classes.toml.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `training` is not installed

import click
from rich.console import Console
from rich.table import Table

from lpd_export.errors import UserError
from lpd_export.files import new_folder
from training.artwork import (
    SIDE,
    SKIN_TONE,
    class_of,
    drawings,
    held_out,
    read_classes,
    read_icons,
    render,
    subgroups,
)
from training.npm import Package, check_integrity, fetch, read_member

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
SPLITS = ("train", "validation")
UNSORTED = "unsorted"
FILES = ("classes.json", "mirrored.json", "licences.md")

APACHE = "[Apache License 2.0](https://www.apache.org/licenses/LICENSE-2.0)"
CC_BY = "[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/)"
MIT = "[MIT License](https://opensource.org/license/mit)"
NOTO = f"[Noto Emoji](https://github.com/googlefonts/noto-emoji), copyright Google LLC, {APACHE}."
FLUENT = (
    "[Fluent Emoji](https://github.com/microsoft/fluentui-emoji), copyright Microsoft "
    f"Corporation, {MIT}."
)


@dataclass(frozen=True)
class ArtworkSet:
    """One artist's drawings."""

    name: str
    package: Package
    credit: str


def iconify(name: str, version: str, integrity: str, credit: str) -> ArtworkSet:
    return ArtworkSet(name, Package(f"@iconify-json/{name}", version, integrity), credit)


SETS = (
    iconify(
        "fluent-emoji",
        "1.2.7",
        "sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        FLUENT,
    ),
    iconify(
        "fluent-emoji-flat",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        FLUENT,
    ),
    iconify(
        "noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        NOTO,
    ),
    iconify(
        "noto-v1",
        "1.2.5",
        "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        NOTO,
    ),
    iconify(
        "twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "[Twemoji](https://github.com/jdecked/twemoji), copyright Twitter, Inc., X Corp. and other "
        f"contributors, {CC_BY}.",
    ),
    iconify(
        "emojione",
        "1.2.3",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "[EmojiOne 2.3](https://github.com/EmojiTwo/emojitwo), copyright Ranks.com Inc. and "
        f"EmojiTwo contributors, {CC_BY}.",
    ),
)
NAMES = Package(
    "emoji.json",
    "16.0.0",
    "sha512-OWFSIAA5ZY2D7KTPxnS/oZTk5cs4ZE4+w/bHkpS+t6hj4AUwDH0okBGuffvsli6WMIimfgxb8ofadPC+UR+glw==",
)


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("data/emoji-artwork"),
    show_default=True,
    help="The folder to make.",
)
@click.option(
    "--tarballs",
    type=click.Path(path_type=Path),
    help="A folder that holds the packages already: "
    + ", ".join(package.tarball for package in (*(one.package for one in SETS), NAMES))
    + ".",
)
@click.option("--force", is_flag=True, help="Replace a folder that this script made.")
def main(out: Path, tarballs: Path | None, force: bool) -> None:
    """Makes the training images of lpd-emoji."""
    console = Console()
    try:
        counts = prepare(out, tarballs, force, console)
    except UserError as error:
        click.echo(f"prepare_artwork: error: {error}", err=True)
        sys.exit(EXIT_MISTAKE)
    except KeyboardInterrupt:
        click.echo("prepare_artwork: interrupted, nothing was written", err=True)
        sys.exit(EXIT_INTERRUPTED)
    console.print(table_of(counts))
    console.print(f"{out}: {counts.total()} images of {SIDE}x{SIDE} pixels")


def check_destination(out: Path, force: bool) -> None:
    """Raises UserError if `out` is there and may not be replaced."""
    if not os.path.lexists(out):
        return
    if not force:
        raise UserError(
            f"{out} is there already: use it, choose another --out, or make it anew with --force"
        )
    ours = {*SPLITS, UNSORTED, *FILES}
    foreign = {out.name} if not out.is_dir() else {entry.name for entry in out.iterdir()} - ours
    if foreign:
        raise UserError(
            f"{out} was not made by this script, it holds {min(foreign)}: move that away, or "
            "choose another --out"
        )


def prepare(
    out: Path, tarballs: Path | None, force: bool, console: Console
) -> Counter[tuple[str, str]]:
    """Writes the whole folder `out`, or nothing; the number of images of each (split, class).

    Raises:
        UserError: if a package cannot be had or is not the expected one, or `out` not be written.
    """
    with (
        new_folder(
            out,
            taken=f"another process is making {out}: wait for it",
            check=lambda: check_destination(out, force),
        ) as partial,
        tempfile.TemporaryDirectory() as scratch,
    ):

        def obtain(package: Package) -> Path:
            if tarballs is None:
                console.print(f"fetching {package.tarball}")
            path = (tarballs or Path(scratch)) / package.tarball
            if tarballs is None:
                path = fetch(package, Path(scratch))
            check_integrity(package, path)
            return path

        paths = [obtain(one.package) for one in SETS]
        subgroup_of = subgroups(json.loads(read_member(obtain(NAMES), "emoji.json")))
        counts = write_images(paths, subgroup_of, partial, console)
        (partial / "licences.md").write_text(licences(), encoding="utf-8")
    return counts


def write_images(
    paths: list[Path], subgroup_of: dict[str, str], folder: Path, console: Console
) -> Counter[tuple[str, str]]:
    """Renders the sets of these tarballs; the number of images of each (split, class)."""
    classes = read_classes()
    for split in SPLITS:
        for class_name in classes:
            (folder / split / class_name).mkdir(parents=True)
    (folder / UNSORTED).mkdir()
    (folder / "classes.json").write_text(json.dumps(list(classes), indent=1) + "\n")
    mirrored = [name for name, entry in classes.items() if entry.mirror]
    (folder / "mirrored.json").write_text(json.dumps(mirrored, indent=1) + "\n")

    documents = {
        (concept, one.name): svg
        for one, path in zip(SETS, paths, strict=True)
        for concept, svg in drawings(read_icons(read_member(path, "icons.json")))
    }
    class_of_concept = {
        concept: class_of(classes, concept, subgroup_of.get(concept, ""))
        for concept in sorted({concept for concept, _ in documents})
        if concept in subgroup_of or not SKIN_TONE.search(concept)
    }
    validation = held_out(class_of_concept)

    counts: Counter[tuple[str, str]] = Counter()
    seen: set[bytes] = set()
    # Held-out drawings first, so that what is drawn alike for two concepts is trained on nowhere.
    order = sorted(documents, key=lambda key: (key[0] not in validation, key))
    for number, (concept, set_name) in enumerate(order):
        class_name = class_of_concept.get(concept)
        if class_name is None and concept not in subgroup_of:
            continue  # a skin tone, or what Unicode does not know under this name
        if class_name is not None and set_name in classes[class_name].not_by:
            class_name = None
        if class_name is None and concept in validation:
            continue  # of no class to be measured on, and not to be trained on
        if number % 1000 == 0:
            console.print(f"rendering {number} of {len(order)}")
        picture = render(documents[concept, set_name])
        digest = hashlib.sha256(picture.tobytes()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        split = "validation" if concept in validation else "train"
        place = folder / UNSORTED if class_name is None else folder / split / class_name
        picture.save(place / f"{concept}-{set_name}.png")
        counts[UNSORTED if class_name is None else split, class_name or ""] += 1
    return counts


# ------------------------------------------------------------------------------ what is said


def licences() -> str:
    """Where the drawings come from, under which licence."""
    sections = [
        "# Where these images come from\n\n"
        f"The drawings were rendered on white as RGB of {SIDE}x{SIDE} pixels and sorted into "
        "classes by `scripts/prepare_artwork.py`; nothing else was changed. They are taken from "
        "the SVG packages of [Iconify](https://github.com/iconify/icon-sets).\n"
    ]
    for one in SETS:
        sections.append(
            f"## Files `*-{one.name}.png`\n\n{one.credit}\n\n"
            f"npm package [{one.package.name}](https://www.npmjs.com/package/{one.package.name}) "
            f"{one.package.version}, `{one.package.integrity}`.\n"
        )
    sections.append(
        "## Names and groups\n\n"
        f"npm package [{NAMES.name}](https://www.npmjs.com/package/{NAMES.name}) {NAMES.version}, "
        f"`{NAMES.integrity}`, {MIT}, made of Unicode's emoji-test.txt.\n"
    )
    return "\n".join(sections)


def table_of(counts: Counter[tuple[str, str]]) -> Table:
    names = list(read_classes())
    table = Table("id", "class", *SPLITS)
    for label, name in enumerate(names):
        table.add_row(str(label), name, *(str(counts[split, name]) for split in SPLITS))
    table.add_row("", "all", *(str(sum(counts[s, n] for n in names)) for s in SPLITS))
    table.add_row("", UNSORTED, str(counts[UNSORTED, ""]), "")
    return table


if __name__ == "__main__":
    main()
