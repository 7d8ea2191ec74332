"""A sheet of images without labels, to see whether someone who does not know them names them.

    python scripts/naming_sheet.py                       # sheet.png, answers.csv to fill in
    python scripts/naming_sheet.py --judge answers.csv   # the share that was named right

Draws one image of each class of a bundle, in random order; nobody chooses among them. The sheet
shows their numbers. answers.csv has a line a number, with an empty second column for the class that
someone takes it for, and the class names as comments above. The seed says what was drawn, so that
judging needs no file that would give the answers away.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import click
import numpy as np

from lpd_export import Pipeline
from lpd_export.bundle.manifest import Bundle
from lpd_export.errors import UserError
from lpd_export.files import write_atomically
from lpd_export.images import contact_sheet, save_png

EXIT_MISTAKE = 2
COLUMNS, CELL = 9, 128


def shuffled(class_names: tuple[str, ...], seed: int) -> list[str]:
    """The classes in the order of the sheet."""
    return [
        class_names[place] for place in np.random.default_rng(seed).permutation(len(class_names))
    ]


def read_answers(path: Path) -> dict[int, str]:
    """The class that each number was taken for."""
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
        return {int(number): answer.strip() for number, answer in csv.reader(lines)}
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path}: it must have a line NUMBER,CLASS for each image"
        ) from error


@click.command()
@click.option(
    "--bundle", type=click.Path(path_type=Path), default=Path("engines/demo"), show_default=True
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--temperature", type=float, default=0.8, show_default=True)
@click.option("--judge", type=click.Path(path_type=Path), help="Filled-in answers to compare.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/naming"), show_default=True
)
def main(bundle: Path, seed: int, temperature: float, judge: Path | None, out: Path) -> None:
    """Draws a sheet without labels, or judges what was made of it."""
    try:
        names = tuple(first for first, *_ in Bundle.open(bundle).manifest.class_names)
        order = shuffled(names, seed)
        if judge is not None:
            answers = read_answers(judge)
            wrong = [
                f"{number}: {answers.get(number) or 'nothing'}, not {name}"
                for number, name in enumerate(order, 1)
                if answers.get(number) != name
            ]
            right = len(order) - len(wrong)
            click.echo(
                "\n".join([*wrong, f"{right} of {len(order)} right, {right / len(order):.0%}"])
            )
            return
        images = Pipeline.open(bundle).generate(order, seed=seed, batch=4, temperature=temperature)
        numbers = [str(number) for number in range(1, len(order) + 1)]
        sheet = contact_sheet([image.pixels for image in images], numbers, COLUMNS, CELL)
        out.mkdir(parents=True, exist_ok=True)
        save_png(np.asarray(sheet), out / "sheet.png")
        lines = [*(f"# {name}" for name in names), *(f"{number}," for number in numbers)]
        write_atomically(out / "answers.csv", ("\n".join(lines) + "\n").encode())
    except UserError as error:
        click.echo(f"naming_sheet: error: {error}", err=True)
        sys.exit(EXIT_MISTAKE)
    except OSError as error:
        click.echo(f"naming_sheet: error: cannot write {out}: {error.strerror}", err=True)
        sys.exit(EXIT_MISTAKE)
    click.echo(f"{out / 'sheet.png'}: fill in {out / 'answers.csv'}, and give it as --judge")


if __name__ == "__main__":
    main()
