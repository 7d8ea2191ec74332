"""Makes the training images of lpd-emoji: emoji of two artists in a folder a class.

    python scripts/prepare_emoji.py
    python scripts/prepare_emoji.py --tarballs ~/downloads --out data/lpd-emoji

Fetches two npm packages, Noto Emoji and Twemoji at 64 px, and checks their SHA-512. The registry is
that of npm's own configuration where npm is installed, else NPM_CONFIG_REGISTRY or npm's default.
Pictures are composed on white and written as `<out>/train/<class>/<code points>-<artist>.png` and
`<out>/validation/...`, with the class names in `<out>/classes.json` and where all of it comes from
in `<out>/licences.md`. About 6 % of emoji, two of each class at least, are for validation. A hash
of the code points chooses them, so both artists' pictures of an emoji are on one side and the
choice never changes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # `training` is not installed

import click
from PIL import Image
from rich.console import Console
from rich.table import Table

from lpd_export.errors import UserError
from lpd_export.files import check_writable, uninterrupted
from training import npm

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
SIDE = 64
SPLITS = ("train", "validation")
VALIDATION_BELOW = 13
"""Emoji whose first hash byte is below this, 13 of 256 or 5.1 %, are for validation."""
VALIDATION_AT_LEAST = 2
"""Emoji of each class that are for validation in any case, those of lowest hash."""
CLASSES_FILE, LICENCES_FILE = "classes.json", "licences.md"


@dataclass(frozen=True)
class Package:
    """An npm package with one artist's emoji."""

    artist: str
    version: str
    integrity: str
    """As npm writes it: `sha512-` and the digest in base64."""
    credit: str

    @property
    def name(self) -> str:
        return f"emoji-datasource-{self.artist}"

    @property
    def published(self) -> npm.Package:
        return npm.Package(self.name, self.version, self.integrity)

    @property
    def tarball(self) -> str:
        return self.published.tarball


PACKAGES = (
    Package(
        "google",
        "16.0.0",
        "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
        "Pictures: [Noto Emoji](https://github.com/googlefonts/noto-emoji), copyright Google LLC, "
        "[Apache License 2.0](https://www.apache.org/licenses/LICENSE-2.0).",
    ),
    Package(
        "twitter",
        "16.0.0",
        "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        "Pictures: [Twemoji](https://github.com/jdecked/twemoji), copyright Twitter, Inc., "
        "X Corp. and other contributors, "
        "[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/).",
    ),
)


@dataclass(frozen=True)
class EmojiClass:
    """Which emoji a class holds: Unicode subgroups, without some emoji, and others by name."""

    subgroups: str
    """Separated by commas."""
    without: str = ""
    """Short names, separated by spaces."""
    also: str = ""
    """Short names out of any subgroup, taken from the class that has the subgroup."""

    def subgroup_names(self) -> list[str]:
        return [name.strip() for name in self.subgroups.split(",") if name.strip()]


# What one sees at a glance decides. Left out, since too few look alike for a class: insects, faces
# that are neutral, sick or in costume, body parts, people walking or resting, families, musical
# instruments, tools, paper, office and household things, symbols that are on no button.
CLASSES: dict[str, EmojiClass] = {
    "animal": EmojiClass("animal-mammal, animal-reptile", without="feet pig_nose bat"),
    "animal-face": EmojiClass(
        "cat-face, monkey-face, animal-amphibian",
        also="monkey_face dog wolf fox_face raccoon cat lion_face tiger horse moose unicorn_face "
        "zebra_face cow pig mouse hamster rabbit bear polar_bear koala panda_face",
    ),
    "athlete": EmojiClass(
        "person-sport",
        also="runner man-running woman-running person_running_facing_right "
        "woman_running_facing_right man_running_facing_right",
    ),
    "bird": EmojiClass("animal-bird", without="feather wing"),
    "building": EmojiClass(
        "place-building, place-religious",
        without="building_construction bricks rock wood statue_of_liberty",
    ),
    "button": EmojiClass(
        "alphanum, keycap, arrow, av-symbol, zodiac, transport-sign",
        without="cinema low_brightness high_brightness back end on soon top",
    ),
    "clock": EmojiClass("time", without="hourglass hourglass_flowing_sand"),
    "clothing": EmojiClass(
        "clothing",
        without="eyeglasses dark_sunglasses goggles folding_hand_fan purse handbag pouch "
        "shopping_bags school_satchel hair_pick prayer_beads lipstick ring gem",
        also="martial_arts_uniform running_shirt_with_sash",
    ),
    "drink": EmojiClass("drink", without="ice_cube"),
    "flag": EmojiClass(
        "country-flag, subdivision-flag", also="rainbow-flag transgender_flag pirate_flag"
    ),
    "food": EmojiClass("food-prepared, food-asian, food-sweet", without="salt canned_food egg"),
    "fruit-and-vegetable": EmojiClass("food-fruit, food-vegetable"),
    "hand": EmojiClass(
        "hand-fingers-open, hand-fingers-partial, hand-single-finger, hand-fingers-closed, hands",
        also="writing_hand nail_care",
    ),
    "heart": EmojiClass("heart", without="love_letter", also="hearts"),
    "landscape": EmojiClass(
        "place-geographic",
        also="foggy night_with_stars cityscape sunrise_over_mountains sunrise city_sunset "
        "city_sunrise bridge_at_night motorway railway_track stars milky_way rice_scene ocean",
    ),
    "person": EmojiClass(
        "person, person-gesture",
        without="deaf_person deaf_man deaf_woman",
        also="person_with_crown prince princess man_with_turban man-wearing-turban "
        "woman-wearing-turban man_with_gua_pi_mao person_with_headscarf person_in_tuxedo "
        "man_in_tuxedo woman_in_tuxedo bride_with_veil man_with_veil woman_with_veil",
    ),
    "plant": EmojiClass(
        "plant-flower, plant-other",
        without="empty_nest nest_with_eggs mushroom",
        also="christmas_tree",
    ),
    "sad-face": EmojiClass(
        "face-concerned", without="yawning_face", also="pensive unamused face_exhaling"
    ),
    "shape": EmojiClass("geometric"),
    "sky": EmojiClass(
        "sky & weather",
        without="thermometer cyclone closed_umbrella umbrella umbrella_with_rain_drops "
        "umbrella_on_ground snowflake snowman snowman_without_snow fire droplet wind_blowing_face "
        "tornado fog zap comet",
    ),
    "smiling-face": EmojiClass(
        "face-smiling, face-affection, face-tongue",
        also="hugging_face face_with_hand_over_mouth face_with_cowboy_hat partying_face sunglasses "
        "nerd_face",
    ),
    "sport": EmojiClass("sport", also="8ball dart"),
    "vehicle": EmojiClass(
        "transport-ground, transport-water, transport-air",
        without="station busstop oil_drum fuelpump wheel rotating_light traffic_light "
        "vertical_traffic_light octagonal_sign construction anchor ring_buoy parachute seat "
        "satellite flying_saucer roller_skate",
    ),
    "water-animal": EmojiClass("animal-marine", also="turtle crocodile"),
    "worker": EmojiClass(
        "person-role",
        without="pregnant_woman pregnant_man pregnant_person breast-feeding woman_feeding_baby "
        "man_feeding_baby person_feeding_baby",
    ),
}


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("data/lpd-emoji"),
    show_default=True,
    help="The folder to make.",
)
@click.option(
    "--tarballs",
    type=click.Path(path_type=Path),
    help="A folder that holds the packages already: "
    + " and ".join(package.tarball for package in PACKAGES)
    + ".",
)
@click.option("--force", is_flag=True, help="Replace a folder that this script made.")
def main(out: Path, tarballs: Path | None, force: bool) -> None:
    """Makes the training images of lpd-emoji."""
    console = Console()
    try:
        check_destination(out, force)
        counts = prepare(out, tarballs, console)
    except UserError as error:
        click.echo(f"prepare_emoji: error: {error}", err=True)
        sys.exit(EXIT_MISTAKE)
    except KeyboardInterrupt:
        click.echo("prepare_emoji: interrupted, nothing was written", err=True)
        sys.exit(EXIT_INTERRUPTED)
    console.print(table_of(counts))
    total = sum(counts.values())
    console.print(f"{out}: {total} images of {SIDE}x{SIDE} pixels in {len(CLASSES)} classes")


def check_destination(out: Path, force: bool) -> None:
    """Raises UserError if `out` is there and may not be replaced, or cannot be written."""
    if os.path.lexists(out):
        if not force:
            raise UserError(
                f"{out} is there already: use it, choose another --out, or make it anew with "
                "--force"
            )
        ours = {*SPLITS, CLASSES_FILE, LICENCES_FILE}
        foreign = {out.name} if not out.is_dir() else {entry.name for entry in out.iterdir()} - ours
        if foreign:
            raise UserError(
                f"{out} was not made by this script, it holds {min(foreign)}: move that away, or "
                "choose another --out"
            )
    check_writable(out.parent)


def prepare(out: Path, tarballs: Path | None, console: Console) -> Counter[tuple[str, str]]:
    """Writes the whole folder `out`, or nothing; the number of images of each (split, class).

    Raises:
        UserError: if a package cannot be had or is not the expected one, or `out` not be written.
    """
    partial = out.with_name(f".{out.name}.partial")
    replaced = out.with_name(f".{out.name}.replaced")
    counts: Counter[tuple[str, str]] = Counter()
    try:
        # Before anything is deleted, since a download may fail.
        with tempfile.TemporaryDirectory() as scratch:
            paths = []
            for package in PACKAGES:
                if tarballs is None:
                    console.print(f"fetching {package.tarball}")
                    paths.append(npm.fetch(package.published, Path(scratch)))
                else:
                    paths.append(tarballs / package.tarball)
                npm.check_integrity(package.published, paths[-1])
            shutil.rmtree(partial, ignore_errors=True)
            for split in SPLITS:
                for class_name in CLASSES:
                    (partial / split / class_name).mkdir(parents=True)
            licences = [licences_heading()]
            for package, path in zip(PACKAGES, paths, strict=True):
                console.print(f"reading {package.tarball}")
                counts += write_images(package, path, partial)
                licences.append(licence_section(package, path))
        (partial / LICENCES_FILE).write_text("\n".join(licences), encoding="utf-8")
        (partial / CLASSES_FILE).write_text(json.dumps(class_names(), indent=1) + "\n")
        with uninterrupted():
            if os.path.lexists(out):
                shutil.rmtree(replaced, ignore_errors=True)
                out.rename(replaced)
            partial.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        with uninterrupted():
            if os.path.lexists(replaced) and not os.path.lexists(out):
                replaced.rename(out)
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)
    return counts


# ---------------------------------------------------------------------------------- the images


def class_names() -> list[str]:
    """The class names in the order of their ids."""
    return sorted(CLASSES)


def class_of(emoji: dict[str, Any]) -> str | None:
    """The class of an entry of emoji.json; None for those left out."""
    named, grouped, dropped = class_tables()
    short_name = emoji["short_name"]
    if short_name in named:
        return named[short_name]
    if short_name in dropped:
        return None
    return grouped.get(emoji["subcategory"])


def class_tables() -> tuple[dict[str, str], dict[str, str], set[str]]:
    """CLASSES turned round: classes by short name, classes by subgroup, short names left out."""
    named: dict[str, str] = {}
    grouped: dict[str, str] = {}
    dropped: set[str] = set()
    for name, content in CLASSES.items():
        named |= dict.fromkeys(content.also.split(), name)
        grouped |= dict.fromkeys(content.subgroup_names(), name)
        dropped |= set(content.without.split())
    return named, grouped, dropped


def code_point_hash(unified: str) -> bytes:
    """A digest of code points such as `1F469-200D-1F692`, the same for ever."""
    return hashlib.sha256(unified.upper().encode()).digest()


def validation_emoji(entries: list[dict[str, Any]]) -> set[str]:
    """The code points of the emoji for validation, out of all entries of emoji.json."""
    of_class: dict[str, list[str]] = {name: [] for name in CLASSES}
    for emoji in entries:
        name = class_of(emoji)
        if name is not None:
            of_class[name].append(emoji["unified"])
    chosen = set()
    for members in of_class.values():
        members.sort(key=code_point_hash)
        chosen |= set(members[:VALIDATION_AT_LEAST])
        chosen |= {one for one in members if code_point_hash(one)[0] < VALIDATION_BELOW}
    return chosen


def write_images(package: Package, tarball: Path, folder: Path) -> Counter[tuple[str, str]]:
    """Writes one artist's pictures; the number of each (split, class)."""
    counts: Counter[tuple[str, str]] = Counter()
    with tarfile.open(tarball, "r:gz") as archive:
        entries = json.loads(member(archive, "package/emoji.json"))
        validation = validation_emoji(entries)
        drawn = [emoji for emoji in entries if emoji.get(f"has_img_{package.artist}")]
        emoji_of_image = {emoji["image"]: emoji for emoji in drawn}
        for entry in archive:
            path = PurePosixPath(entry.name)
            if path.parent != PurePosixPath(f"package/img/{package.artist}/{SIDE}"):
                continue
            # Skin-tone variants have no entry of their own, and differ in a tint alone.
            emoji = emoji_of_image.get(path.name)
            class_name = None if emoji is None else class_of(emoji)
            if emoji is None or class_name is None:
                continue
            content = archive.extractfile(entry)
            if content is None:
                continue
            unified = emoji["unified"]
            split = "validation" if unified in validation else "train"
            file = folder / split / class_name / f"{unified.lower()}-{package.artist}.png"
            compose(content.read()).save(file)
            counts[split, class_name] += 1
    return counts


def member(archive: tarfile.TarFile, name: str) -> bytes:
    """A file of a package, which holds it: the package's hash has been checked."""
    content = archive.extractfile(name)
    assert content is not None
    return content.read()


def compose(content: bytes) -> Image.Image:
    """An encoded picture of any mode and size as RGB of 64x64 pixels, on white."""
    with Image.open(io.BytesIO(content)) as picture:
        rgba = picture.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    image = Image.alpha_composite(white, rgba).convert("RGB")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image


# ------------------------------------------------------------------------------ what is said


def licences_heading() -> str:
    return (
        "# Where these images come from\n\n"
        f"The pictures were composed on white as RGB of {SIDE}x{SIDE} pixels and sorted into "
        "folders by `scripts/prepare_emoji.py`; nothing else was changed.\n"
    )


def licence_section(package: Package, tarball: Path) -> str:
    """What a package is, whose pictures it holds, and the licence text that it carries."""
    with tarfile.open(tarball, "r:gz") as archive:
        text = member(archive, "package/LICENSE").decode()
    return (
        f"## Files `*-{package.artist}.png`\n\n"
        f"npm package [{package.name}](https://www.npmjs.com/package/{package.name}) "
        f"{package.version}, `{package.integrity}`.\n\n"
        f"{package.credit}\n\n"
        f"Data and code of the package:\n\n```\n{text.strip()}\n```\n"
    )


def table_of(counts: Counter[tuple[str, str]]) -> Table:
    table = Table("id", "class", *SPLITS)
    for label, name in enumerate(class_names()):
        table.add_row(str(label), name, *(str(counts[split, name]) for split in SPLITS))
    table.add_row("", "all", *(str(sum(counts[s, n] for n in CLASSES)) for s in SPLITS))
    return table


if __name__ == "__main__":
    main()
