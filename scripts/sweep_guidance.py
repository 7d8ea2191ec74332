"""Which guidance and temperature a model draws best with, by distance and class accuracy.

    python scripts/sweep_guidance.py
    python scripts/sweep_guidance.py --cfg 2,3 --temperature 0.8,1 --samples 2000

Draws images of the bundle with each setting, in the classes of the training images, and compares
them with these as `claims.py` does: by the Fréchet distance between the features that a classifier
of the same images sees, and by how often it sees the class that was asked for. What is drawn is
kept: the same command goes on from there. --out holds the table as sweep.json.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import cast

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from claims import (
    CLASSIFIER_FILE,
    EXIT_INTERRUPTED,
    EXIT_MISTAKE,
    labels_of,
    load_arrays,
    look,
    save_arrays,
)
from lpd_export import Pipeline
from lpd_export.bundle.manifest import MANIFEST
from lpd_export.errors import UserError
from lpd_export.evaluation.classifier import Classifier
from lpd_export.evaluation.classifier import load as load_classifier
from lpd_export.evaluation.metrics import Moments, distance_figure
from lpd_export.files import sha256, write_atomically
from lpd_export.runtime.requests import ImageRequest
from lpd_export.runtime.sampler import GuidanceSchedule, Sampling
from lpd_reference import CheckpointError
from training.data import ImageSet, TrainingError, load_image_set, to_signed

Arrays = dict[str, np.ndarray]


def read_numbers(option: str, text: str) -> list[float]:
    """Numbers, separated by commas."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} {text!r} must be numbers such as 1,2.5,4") from error


def draw(
    pipeline: Pipeline,
    classifier: Classifier,
    training: ImageSet,
    sampling: Sampling,
    samples: int,
    batch: int,
) -> Arrays:
    """What the classifier sees in images with these settings: features, and whether it is right."""
    labels = labels_of(training, 0, samples)
    requests = [ImageRequest(label, 0, index, sampling) for index, label in enumerate(labels)]
    images = pipeline.stream(requests, batch=batch)
    features, seen = look(
        classifier, to_signed(torch.from_numpy(np.stack([image.pixels for image in images])))
    )
    return {"features": features.numpy(), "right": seen.numpy() == np.array(labels)}


@click.command()
@click.option(
    "--bundle", type=click.Path(path_type=Path), default=Path("engines/demo"), show_default=True
)
@click.option(
    "--images", type=click.Path(path_type=Path), default=Path("data/lpd-emoji"), show_default=True
)
@click.option(
    "--models",
    type=click.Path(path_type=Path),
    default=Path("models/lpd-emoji"),
    show_default=True,
    help="Folder of classifier.safetensors.",
)
@click.option("--cfg", "scales", default="1,1.5,2,3,4,5", show_default=True)
@click.option("--temperature", "temperatures", default="0.7,0.8,0.9,1", show_default=True)
@click.option("--guidance", "kinds", default="constant,linear", show_default=True)
@click.option("--samples", type=click.IntRange(min=4), default=500, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/sweep"), show_default=True
)
def main(
    bundle: Path,
    images: Path,
    models: Path,
    scales: str,
    temperatures: str,
    kinds: str,
    samples: int,
    batch: int,
    out: Path,
) -> None:
    """Measures how well a model draws with each guidance and temperature."""
    console = Console(stderr=True)
    try:
        settings = [
            Sampling(cfg=cfg, guidance=cast(GuidanceSchedule, kind), temperature=temperature)
            for kind, cfg, temperature in itertools.product(
                kinds.split(","),
                read_numbers("--cfg", scales),
                read_numbers("--temperature", temperatures),
            )
        ]
        training = load_image_set(images, "train")
        classifier = load_classifier(models / CLASSIFIER_FILE)
        pipeline = Pipeline.open(bundle)
        kept = out / f"{sha256(bundle / MANIFEST)[:8]}-{training.digest()[:8]}-{samples}"
        with torch.inference_mode():
            real, _ = look(classifier, to_signed(training.pixels))
        rows = []
        for sampling in track(settings, "drawing", console=console):
            name = f"{sampling.guidance}-{sampling.cfg:g}-{sampling.temperature:g}.npz"
            if not (kept / name).exists():
                with torch.inference_mode():
                    drawn = draw(pipeline, classifier, training, sampling, samples, batch)
                save_arrays(kept / name, **drawn)
            arrays = load_arrays(kept / name)
            distance = distance_figure(Moments.of(real), torch.from_numpy(arrays["features"]))
            accuracy = float(arrays["right"].mean())
            row = {"distance": distance.value, "error": distance.standard_error}
            rows.append(asdict(sampling) | row | {"accuracy": accuracy})
        write_atomically(out / "sweep.json", (json.dumps(rows, indent=1) + "\n").encode())
    except (UserError, TrainingError, CheckpointError) as error:
        click.echo(f"sweep_guidance: error: {error}", err=True)
        sys.exit(EXIT_MISTAKE)
    except OSError as error:
        click.echo(f"sweep_guidance: error: cannot write {out}: {error.strerror}", err=True)
        sys.exit(EXIT_MISTAKE)
    except KeyboardInterrupt:
        click.echo("sweep_guidance: interrupted; the same command goes on from here", err=True)
        sys.exit(EXIT_INTERRUPTED)
    table = Table("guidance", "cfg", "temperature", "Fréchet distance", "accuracy")
    for row in sorted(rows, key=lambda row: row["distance"]):
        table.add_row(
            row["guidance"],
            f"{row['cfg']:g}",
            f"{row['temperature']:g}",
            f"{row['distance']:.2f} ± {row['error']:.2f}",
            f"{row['accuracy']:.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
