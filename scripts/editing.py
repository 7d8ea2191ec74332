"""Measures edits on held-out images: what comes where cells are made anew.

    python scripts/editing.py            # all of it, 160 images a row
    python scripts/editing.py --short    # a part of the rows, 40 images a row

A row is a mask (left half, centre, border, random 50 % and 90 % of the cells), an order of the new
cells, a number of steps, and the class asked for: the image's own, none, or another. Of each: the
Fréchet distance of the results (what is kept pasted back) to the training images between features
of a classifier, how often the classifier sees what was asked for (the own class where none was),
and the likelihood of the true tokens given the kept ones, in nats a new token without guidance.
The table is printed; --out holds it as editing.json, bars as editing.png, and a sheet of results.
--picture draws examples instead, for the docs.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `training` is not installed

import click
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from lpd_export import Pipeline, Sampling
from lpd_export.errors import UserError
from lpd_export.evaluation.classifier import Classifier
from lpd_export.evaluation.classifier import load as load_classifier
from lpd_export.evaluation.metrics import frechet_distance
from lpd_export.files import write_atomically
from lpd_export.images import contact_sheet
from lpd_export.runtime.editing import Edit
from lpd_export.runtime.requests import GeneratedImage
from lpd_export.schedule.schedule_file import Schedule
from lpd_reference import CheckpointError
from readme_picture import stack
from training.data import ImageSet, TrainingError, load_image_set, to_signed

EXIT_MISTAKE = 2
SHORT = 40
"""Images a row of a short measurement."""
CHUNK = 40
"""Images looked at together."""

Mask = NDArray[np.bool_]


def of_place(inside: Callable[[Mask, Mask], Mask]) -> Callable[[int, int], Mask]:
    """A mask [grid, grid] from places 0 to 1, down and right, the same for all images."""

    def mask(grid: int, image: int) -> Mask:
        place = (np.arange(grid) + 0.5) / grid
        return inside(*np.meshgrid(place, place, indexing="ij"))

    return mask


def at_random(share: float) -> Callable[[int, int], Mask]:
    """A mask of so many cells, another for each image."""

    def mask(grid: int, image: int) -> Mask:
        chosen = np.random.default_rng(image).permutation(grid * grid)
        return (chosen < round(share * grid * grid)).reshape(grid, grid)

    return mask


def middle(down: Mask, right: Mask) -> Mask:
    """The middle half of both axes."""
    return (abs(down - 0.5) < 0.25) & (abs(right - 0.5) < 0.25)


MASKS = {
    "left half": of_place(lambda down, right: right < 0.5),
    "centre": of_place(middle),
    "border": of_place(lambda down, right: ~middle(down, right)),
    "random 50 %": at_random(0.5),
    "random 90 %": at_random(0.9),
}


@dataclass(frozen=True)
class Row:
    """What is asked for, and what was measured of it."""

    mask: str
    order: str
    steps: int
    asked: str
    """`own`, `none` or `another` class."""
    frechet_distance: float = 0.0
    accuracy: float = 0.0
    nats: float = 0.0


def rows(steps: int, fewer: int, short: bool) -> list[Row]:
    """What is measured: each order, number of steps and class beside the first, which is usual."""
    usual = [("locality", steps, "own")]
    others = [("random", steps, "own"), ("locality", fewer, "own")]
    others += [("locality", steps, "none"), ("locality", steps, "another")]
    more = [] if short else [("random", fewer, "own")]
    return [Row(mask, *settings) for mask in MASKS for settings in usual + others + more]


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    pipeline: Pipeline
    classifier: Classifier
    training: torch.Tensor
    """Features of the training images [N, F]."""
    held_out: ImageSet
    seed: int
    batch: int

    def labels(self, asked: str) -> list[int | None]:
        """The class asked for of each held-out image."""
        own = self.held_out.labels.tolist()
        if asked == "none":
            return [None] * len(own)
        classes = len(self.held_out.class_names)
        away = np.random.default_rng(self.seed).integers(1, classes, len(own)).tolist()
        return (
            own if asked == "own" else [(a + b) % classes for a, b in zip(own, away, strict=True)]
        )

    def schedule(self, steps: int) -> Schedule:
        """The bundle's own if it has so many steps, else one like it."""
        own = self.pipeline.choose_schedule(None)
        return own if own.steps == steps else Schedule.make(own.grid, steps, repulsion=2, count=1)

    def look(self, pixels: NDArray[np.uint8]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [N, F] and classes seen [N]."""
        images = to_signed(torch.from_numpy(pixels))
        features = torch.cat([self.classifier.features(part) for part in images.split(CHUNK)])
        return features, self.classifier.head(features).argmax(dim=1)


@torch.inference_mode()
def measure(row: Row, setting: Setting) -> tuple[Row, list[NDArray[np.uint8]]]:
    """The row with its figures, and the images."""
    pipeline, schedule = setting.pipeline, setting.schedule(row.steps)
    grid, sampling = schedule.grid, pipeline.sampling()
    edits: list[Edit] = []
    requests = []
    for index, label in enumerate(setting.labels(row.asked)):
        mask = MASKS[row.mask](grid, index)
        edit = pipeline.prepare_edit(setting.held_out.pixels[index].numpy(), mask)
        edits.append(edit)
        requests += edit.requests([label], setting.seed + index, sampling, schedule, row.order)
    drawn = pipeline.stream(requests, batch=setting.batch, schedule=schedule)
    images = [edit.paste(image.pixels) for edit, image in zip(edits, drawn, strict=True)]
    features, seen = setting.look(np.stack(images))
    own = torch.tensor(setting.labels("own" if row.asked == "none" else row.asked))
    nats = []
    for start in range(0, len(edits), setting.batch):
        some = slice(start, start + setting.batch)
        tokens = np.stack([edit.token_ids for edit in edits[some]])
        orders = np.stack([request.order_of(schedule) for request in requests[some]])
        labels = [request.label for request in requests[some]]
        logits = pipeline.forced_logits(tokens, labels, orders, Sampling(), schedule)
        true = torch.from_numpy(np.take_along_axis(tokens, orders, axis=1))
        of_true = torch.from_numpy(logits).log_softmax(dim=-1).gather(-1, true[..., None])[..., 0]
        for values, order, edit in zip(of_true, orders, edits[some], strict=True):
            nats.append(-values[torch.from_numpy(~edit.kept[order])].mean())
    measured = replace(
        row,
        frechet_distance=frechet_distance(setting.training, features),
        accuracy=float((seen == own).double().mean()),
        nats=float(torch.stack(nats).mean()),
    )
    return measured, images


def table(measured: list[Row], originals: Row) -> str:
    """Markdown."""
    lines = [
        "| mask | order | steps | class | Fréchet distance | accuracy | nats a new token |",
        "|---|---|---|---|---|---|---|",
        f"| (the held-out images) | | | own | {originals.frechet_distance:.2f} | "
        f"{originals.accuracy:.1%} | |",
    ]
    for row in measured:
        figures = f"{row.frechet_distance:.2f} | {row.accuracy:.1%} | {row.nats:.3f}"
        lines.append(f"| {row.mask} | {row.order} | {row.steps} | {row.asked} | {figures} |")
    return "\n".join(lines)


def bars(measured: list[Row], originals: Row) -> Figure:
    """A group of bars a mask, a bar each order, number of steps and class."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    kinds = list(dict.fromkeys((row.order, row.steps, row.asked) for row in measured))
    panels = {"frechet_distance": "Fréchet distance", "accuracy": "sees what was asked for"}
    panels["nats"] = "nats a new token"
    width = 0.8 / len(kinds)
    for axes, (name, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for place, kind in enumerate(kinds):
            of_kind = [row for row in measured if (row.order, row.steps, row.asked) == kind]
            at = np.arange(len(of_kind)) + (place - len(kinds) / 2 + 0.5) * width
            order, steps, asked = kind
            label = f"{order}, {steps} steps, {asked}"
            axes.bar(at, [getattr(row, name) for row in of_kind], width, label=label)
        axes.set_xticks(np.arange(len(MASKS)), list(MASKS), rotation=20, fontsize=8)
        axes.set_title(title, fontsize=10)
        if name != "nats":
            axes.axhline(getattr(originals, name), color="grey", linewidth=1, linestyle="--")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8
    )
    return figure


# ------------------------------------------------------------------------------------- picture


def draw_picture(pipeline: Pipeline, seed: int, temperature: float) -> Image.Image:
    """A face completed four ways, an image made wider, and others turned into another class."""
    side = pipeline.manifest.resolution

    def first(name: str) -> GeneratedImage:
        return pipeline.generate([name], seed=seed, temperature=temperature)[0]

    def row(
        source: GeneratedImage, classes: list[str], **what: object
    ) -> tuple[list[NDArray[np.uint8]], list[str]]:
        edit = pipeline.prepare_edit(source, **what)  # type: ignore[arg-type]
        results = pipeline.edit(
            source,
            classes=classes,
            seed=seed + 1,
            temperature=temperature,
            batch=4,
            **what,  # type: ignore[arg-type]
        )
        pictures = [edit.picture, edit.masked, *(image.pixels for image in results)]
        return pictures, ["original", "mask", *(image.class_name for image in results)]

    half, part = side // 2, side // 4 if pipeline.manifest.model.cells < 64 else side // 8
    names = pipeline.manifest.class_names
    known = {name for own in names for name in ([own] if isinstance(own, str) else own)}

    def one_of(*wanted: str) -> str:
        return next((name for name in wanted if name in known), max(known))

    face = one_of("smiling-face", "smiling face")
    heart, cat = one_of("heart"), one_of("animal-face", "cat face", "cat")
    others = [one_of("sad-face", "sad face", "dog face"), one_of("smiling-face", "monkey face")]
    parts = []
    for heading, (pictures, labels) in (
        (
            "Half of a face completed four ways",
            row(first(face), [face] * 4, box=(half, 0, side, side)),
        ),
        ("A heart, and what is around it", row(first(heart), [heart] * 4, outpaint=part)),
        (
            "The middle made anew, as another class",
            row(
                first(cat),
                [cat, cat, *others],
                box=(part, part, side - part, side - part),
            ),
        ),
    ):
        parts.append((heading, contact_sheet(pictures, labels, len(pictures), 192)))
    return stack(parts)


# ------------------------------------------------------------------------------------- command


@click.command()
@click.option(
    "--bundle", type=click.Path(path_type=Path), default=Path("engines/demo"), show_default=True
)
@click.option(
    "--images", type=click.Path(path_type=Path), default=Path("data/lpd-emoji"), show_default=True
)
@click.option(
    "--classifier",
    type=click.Path(path_type=Path),
    default=Path("models/lpd-emoji/classifier.safetensors"),
    show_default=True,
)
@click.option("--short", is_flag=True, help=f"{SHORT} images a row, and the rows that tell most.")
@click.option("--steps", type=(int, int), default=(20, 8), show_default=True)
@click.option("--samples", type=click.IntRange(min=4), help="Images a row.  [default: all]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/editing"), show_default=True
)
@click.option(
    "--picture", type=click.Path(path_type=Path), help="Draw examples there, and measure nothing."
)
@click.option("--temperature", default=0.8, show_default=True, help="Of the examples.")
def main(
    bundle: Path,
    images: Path,
    classifier: Path,
    short: bool,
    steps: tuple[int, int],
    samples: int | None,
    seed: int,
    batch: int,
    threads: int,
    out: Path,
    picture: Path | None,
    temperature: float,
) -> None:
    """Measures edits on held-out images."""
    torch.set_num_threads(threads)
    try:
        pipeline = Pipeline.open(bundle, threads=threads)
        if picture:
            content = io.BytesIO()
            draw_picture(pipeline, seed, temperature).save(content, "PNG", optimize=True)
            write_atomically(picture, content.getvalue())
            return
        training, held_out = (load_image_set(images, split) for split in ("train", "validation"))
        count = min(samples or (SHORT if short else len(held_out)), len(held_out))
        chosen = torch.from_numpy(np.random.default_rng(seed).permutation(len(held_out))[:count])
        held_out = replace(held_out, pixels=held_out.pixels[chosen], labels=held_out.labels[chosen])
        setting = Setting(
            pipeline, load_classifier(classifier), torch.empty(0), held_out, seed, batch
        )
        out.mkdir(parents=True, exist_ok=True)
        with torch.inference_mode():
            setting = replace(setting, training=setting.look(training.pixels.numpy())[0])
            features, seen = setting.look(held_out.pixels.numpy())
        originals = Row(
            "",
            "",
            0,
            "own",
            frechet_distance(setting.training, features),
            float((seen == held_out.labels).double().mean()),
        )
        measured, sheet = [], []
        for asked in track(rows(*steps, short), "measuring"):
            row, edited = measure(asked, setting)
            measured.append(row)
            sheet += [
                (held_out.pixels[0].numpy(), "original"),
                *(
                    (image, f"{row.mask}, {row.order} {row.steps}, {row.asked}")
                    for image in edited[:7]
                ),
            ]
            kept = {"images": count, "originals": asdict(originals)}
            kept["rows"] = [asdict(row) for row in measured]
            write_atomically(out / "editing.json", json.dumps(kept, indent=1).encode())
        bars(measured, originals).savefig(out / "editing.png", dpi=150)
        contact_sheet(*zip(*sheet, strict=True), columns=8).save(out / "samples.png")
    except (UserError, TrainingError, CheckpointError) as error:
        click.echo(f"editing: error: {error}", err=True)
        sys.exit(EXIT_MISTAKE)
    except OSError as error:
        click.echo(f"editing: error: cannot write {out}: {error.strerror or error}", err=True)
        sys.exit(EXIT_MISTAKE)
    click.echo(table(measured, originals))
    click.echo(f"\n{count} images a row; {out}/editing.json, editing.png and samples.png")


if __name__ == "__main__":
    main()
