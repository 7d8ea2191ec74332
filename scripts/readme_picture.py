"""Draws the README's picture: an image a class, how one fills in, edits, and quality over steps.

    make demo
    python scripts/claims.py
    python scripts/readme_picture.py

The images are those of the demo bundle with this --seed, chosen by nobody. The curves are those of
the measurement that is kept beside the model.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import click
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from claims_results import Claims, draw_curves
from lpd_export import Pipeline
from lpd_export.errors import UserError
from lpd_export.files import write_atomically
from lpd_export.images import contact_sheet

EXIT_MISTAKE = 2
WIDTH = 1400
"""Of the picture, in pixels."""
DPI = 140
CLASS_COLUMNS, STEP_COLUMNS = 9, 10
CELL = 128
"""Width of an image, in pixels."""
HEADING, MARGIN = 22, 18


def sheet_of_classes(pipeline: Pipeline, seed: int, temperature: float) -> Image.Image:
    """An image of every class."""
    classes = range(pipeline.manifest.model.num_classes)
    images = pipeline.generate(list(classes), seed=seed, batch=4, temperature=temperature)
    names = [image.class_name for image in images]
    return contact_sheet([image.pixels for image in images], names, CLASS_COLUMNS, CELL)


def sheet_of_steps(
    pipeline: Pipeline, class_name: str, seed: int, temperature: float
) -> Image.Image:
    """One image after each of its steps."""
    image = pipeline.generate([class_name], seed=seed, temperature=temperature)[0]
    done = np.cumsum(image.schedule.group_sizes)
    captions = [f"{step}: {cells} of {done[-1]}" for step, cells in enumerate(done, start=1)]
    return contact_sheet(list(pipeline.trace(image)), captions, STEP_COLUMNS, CELL)


def sheet_of_edits(
    pipeline: Pipeline, class_name: str, seed: int, temperature: float
) -> Image.Image:
    """One image whose right half is made anew again and again."""
    image = pipeline.generate([class_name], seed=seed, temperature=temperature)[0]
    side = pipeline.manifest.resolution
    half = (side // 2, 0, side, side)
    masked = pipeline.prepare_edit(image, box=half).masked
    edits = pipeline.edit(
        image,
        classes=[class_name] * (STEP_COLUMNS - 2),
        box=half,
        seed=seed + 1,
        batch=4,
        temperature=temperature,
    )
    pictures = [image.pixels, masked, *(edit.pixels for edit in edits)]
    return contact_sheet(pictures, ["original", "kept", *[""] * len(edits)], STEP_COLUMNS, CELL)


def curves(claims: Claims) -> Image.Image:
    """Distance, likelihood and time over the number of steps."""
    figure = Figure(figsize=(WIDTH / DPI, 3.4), layout="constrained")
    draw_curves(claims, list(figure.subplots(1, 3)))
    content = io.BytesIO()
    figure.savefig(content, dpi=DPI)
    return Image.open(content).convert("RGB")


def stack(parts: list[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures below one another on white, each under its heading."""
    font = ImageFont.load_default(HEADING)
    height = sum(picture.height + HEADING + 2 * MARGIN for _, picture in parts)
    width = max(WIDTH, *(picture.width for _, picture in parts))
    whole = Image.new("RGB", (width, height + MARGIN), "white")
    draw, top = ImageDraw.Draw(whole), MARGIN
    for heading, picture in parts:
        draw.text((MARGIN, top), heading, "#1b1b1b", font)
        whole.paste(picture, (0, top + HEADING + MARGIN // 2))
        top += picture.height + HEADING + 2 * MARGIN
    return whole


@click.command()
@click.option(
    "--bundle", type=click.Path(path_type=Path), default=Path("engines/demo"), show_default=True
)
@click.option(
    "--claims",
    type=click.Path(path_type=Path),
    default=Path("models/lpd-emoji/claims.json"),
    show_default=True,
    help="What scripts/claims.py measured.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--temperature", default=0.8, show_default=True, help="Of the images, as in `make demo`."
)
@click.option("--steps-of", default="sad-face", show_default=True, help="Class that fills in.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("docs/lpd-emoji.png"), show_default=True
)
def main(
    bundle: Path, claims: Path, seed: int, temperature: float, steps_of: str, out: Path
) -> None:
    """Draws the README's picture."""
    try:
        measured = Claims.read(claims)
        pipeline = Pipeline.open(bundle)
        steps = len(pipeline.choose_schedule(None).group_sizes)
        picture = stack(
            [
                (
                    "What was asked for, and what came",
                    sheet_of_classes(pipeline, seed, temperature),
                ),
                (
                    f"One image in {steps} steps",
                    sheet_of_steps(pipeline, steps_of, seed, temperature),
                ),
                (
                    "Half of it made anew",
                    sheet_of_edits(pipeline, steps_of, seed, temperature),
                ),
                ("How many steps it takes", curves(measured)),
            ]
        )
        content = io.BytesIO()
        picture.save(content, "PNG", optimize=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, content.getvalue())
    except UserError as error:
        click.echo(f"readme_picture: error: {error}", err=True)
        sys.exit(EXIT_MISTAKE)
    except OSError as error:
        reason = error.strerror or error
        click.echo(f"readme_picture: error: cannot write {out}: {reason}", err=True)
        sys.exit(EXIT_MISTAKE)
    click.echo(f"{out}: {picture.width}x{picture.height}, {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
