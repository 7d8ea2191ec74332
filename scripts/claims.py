"""Measures LPD's claims on a model of one's own: few steps, their order, queries that see others.

    python scripts/claims.py                # the demo model, 2000 images a row
    python scripts/claims.py --samples 200  # a first look
    python scripts/claims.py --raster engines/raster --alone engines/alone    # models of their own

The rows are raster order with one token a step, random and locality-aware orders in fewer and fewer
steps, and locality-aware order whose queries cannot see one another. For each, images are drawn
from the exported bundle and compared with the training images: by the Fréchet distance between the
features that a classifier of the same images sees, and by how often it sees the class that was
asked for. The likelihood is that of held-out images, teacher-forced. The time is of one image
alone. A model that was trained for raster order, or without mutual visibility, is given as a bundle
of its own, of the same tokenizer and classes. The table is printed; --out holds it as claims.json,
the curves as claims.png and a sheet of samples a row.

It takes an hour on a laptop and can be stopped: what is drawn is kept and not drawn again, and a
greater --samples adds to it.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[1]))  # `training` is not installed

import click
import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional as F

from claims_results import Claims, Floor, Row, Variant, draw_curves, table
from lpd_export import Pipeline
from lpd_export.bench.devices import torch_threads
from lpd_export.bundle.manifest import MANIFEST, Bundle
from lpd_export.errors import UserError
from lpd_export.evaluation.classifier import Classifier
from lpd_export.evaluation.classifier import load as load_classifier
from lpd_export.evaluation.metrics import Moments, distance_figure, frechet_distance
from lpd_export.files import sha256, write_atomically
from lpd_export.images import contact_sheet, save_png
from lpd_export.runtime.requests import ImageRequest
from lpd_export.runtime.sampler import GuidanceSchedule, Sampling
from lpd_export.schedule.schedule_file import Schedule
from lpd_reference import CheckpointError, load_tokenizer
from training.data import ImageSet, TrainingError, load_image_set, seeded, to_signed

EXIT_FAILED = 1
EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
STEPS = "256,64,32,20,12,8"
PUBLISHED_STEPS = 20
"""At which the queries' view of one another is taken away."""
ORDERS = 256
"""Orders that the images of a variant follow, each drawn by an image's own randomness."""
CHUNK = 40
"""Images drawn or looked at between two savings."""
TIMED = 7
"""Images timed of each variant, one at a time, after one that is not."""
TOKENIZER_FILE, CLASSIFIER_FILE = "vq.safetensors", "classifier.safetensors"


@dataclass(frozen=True)
class Setting:
    """What all variants share."""

    bundle: Path
    raster: Path | None
    """A bundle whose model was trained for raster order."""
    alone: Path | None
    """A bundle whose model was trained without mutual visibility."""
    models: Path
    grid: int
    repulsion: int
    samples: int
    seed: int
    batch: int
    sampling: Sampling
    classifier: Classifier
    training: ImageSet
    held_out: ImageSet
    out: Path
    kept: Path
    """What is drawn, in a folder of everything that it depends on but the variant."""

    def bundle_of(self, variant: Variant) -> Path:
        own = self.raster if variant.kind == "raster" else self.alone
        return own if variant.own_model and own is not None else self.bundle

    def variants(self, steps: list[int]) -> list[Variant]:
        """The rows of the table."""
        published = published_variant(steps)
        alone = replace(published, mutual_visibility=False)
        return [
            Variant("raster", self.grid**2, own_model=self.raster is not None),
            *(Variant(kind, count) for kind in ("random", "locality") for count in steps),
            alone,
            *([replace(alone, own_model=True)] if self.alone is not None else []),
        ]


def published_variant(steps: list[int]) -> Variant:
    """Locality-aware order in 20 steps, or in the most if these are not asked for."""
    return Variant("locality", PUBLISHED_STEPS if PUBLISHED_STEPS in steps else steps[0])


@functools.cache
def schedule_of(variant: Variant, grid: int, repulsion: int) -> Schedule:
    """The schedule of a variant."""
    count = 1 if variant.kind == "raster" else ORDERS
    return Schedule.make(
        grid, steps=variant.steps, kind=variant.kind, repulsion=repulsion, count=count, seed=0
    )


def labels_of(images: ImageSet, start: int, stop: int) -> list[int]:
    """The classes asked for of samples `start` to `stop`: those of the images, shuffled anew
    each time that all of them have been asked for."""
    labels = []
    for sample in range(start, stop):
        turn, place = divmod(sample, len(images))
        labels.append(int(images.labels[shuffled(len(images), turn)[place]]))
    return labels


@functools.cache
def shuffled(count: int, turn: int) -> torch.Tensor:
    return torch.randperm(count, generator=seeded(turn))


# ------------------------------------------------------------------ at work, a process a core


def begin_work(setting: Setting) -> None:
    """Prepares a process for the tasks below: one thread, and what all tasks share."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent lets what is at work finish
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    global _setting
    _setting = setting


def end_with_parent() -> None:
    """Ends this process when its parent is killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(EXIT_FAILED)


_setting: Setting
"""Of this process, once its work has begun."""


@functools.lru_cache(maxsize=1)
def open_pipeline(bundle: Path, mutual_visibility: bool) -> Pipeline:
    return Pipeline.open(bundle, threads=1, mutual_visibility=mutual_visibility)


def pipeline_of(variant: Variant) -> Pipeline:
    return open_pipeline(_setting.bundle_of(variant), variant.mutual_visibility)


@torch.inference_mode()
def draw(variant: Variant, start: int, stop: int) -> None:
    """Draws samples `start` to `stop` and keeps what the classifier sees in them."""
    labels = labels_of(_setting.training, start, stop)
    images = pipeline_of(variant).stream(
        [
            ImageRequest(label, _setting.seed, index, _setting.sampling)
            for index, label in enumerate(labels, start)
        ],
        batch=_setting.batch,
        schedule=schedule_of(variant, _setting.grid, _setting.repulsion),
    )
    pixels = np.stack([image.pixels for image in images])
    if start == 0:
        names = [_setting.training.class_names[label] for label in labels]
        sheet = contact_sheet(list(pixels), names, columns=10)
        save_png(np.asarray(sheet), _setting.out / f"{variant.name}.png")
    signed = to_signed(torch.from_numpy(pixels))
    seen = _setting.classifier.logits(signed).argmax(dim=1)
    features = _setting.classifier.features(signed)
    save_arrays(
        samples_file(variant, _setting, start, stop), features=features.numpy(), seen=seen.numpy()
    )


@torch.inference_mode()
def measure_likelihood(variant: Variant, training: bool, start: int, stop: int) -> None:
    """Keeps the negative log-likelihood of images `start` to `stop`, without guidance.

    They are held-out images, or as many training images.
    """
    token_ids, labels = tokenized(training)
    rows = np.arange(start, stop)
    schedule = schedule_of(variant, _setting.grid, _setting.repulsion)
    orders = schedule.orders[rows % len(schedule.orders)].astype(np.int64)
    ids, order = token_ids[start:stop], torch.from_numpy(orders)
    pipeline = pipeline_of(variant)
    logits = torch.from_numpy(
        pipeline.forced_logits(
            ids.numpy(), labels[start:stop].tolist(), orders, pipeline.sampling(cfg=1.0), schedule
        )
    )
    nats = F.cross_entropy(logits.transpose(1, 2), ids.gather(1, order), reduction="none")
    file = likelihood_file(variant, training, _setting, start, stop)
    save_arrays(file, nats=nats.mean(dim=1).numpy())


@functools.cache
def tokenized(training: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [N, S] and labels [N] of held-out or training images."""
    tokenizer = load_tokenizer(_setting.models / TOKENIZER_FILE).eval()
    images, count = _setting.training if training else _setting.held_out, len(_setting.held_out)
    some = shuffled(len(images), 0)[:count]
    pixels = to_signed(images.pixels[some])
    token_ids = torch.cat([tokenizer.encode(part) for part in pixels.split(CHUNK)])
    return token_ids, images.labels[some]


def samples_file(variant: Variant, setting: Setting, start: int, stop: int) -> Path:
    return setting.kept / variant.name / f"samples-{start:06d}-{stop:06d}.npz"


def likelihood_file(
    variant: Variant, training: bool, setting: Setting, start: int, stop: int
) -> Path:
    name = "training" if training else "held-out"
    return setting.kept / variant.name / f"{name}-{start:06d}-{stop:06d}.npz"


def save_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """An .npz file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    write_atomically(path, content.getvalue())


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path) as file:
        return dict(file)


def parts(count: int) -> list[tuple[int, int]]:
    """Ranges of a chunk each, below `count`."""
    return [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]


def work(
    rows: list[Variant], published: Variant, setting: Setting, workers: int, progress: Progress
) -> None:
    """Draws and measures whatever is not kept yet, a process a worker."""
    samples, held_out = parts(setting.samples), parts(len(setting.held_out))
    jobs: list[Callable[[], None]] = []
    for variant in rows:
        for training in (False, True) if variant == published else (False,):
            for part in held_out:
                if not likelihood_file(variant, training, setting, *part).exists():
                    jobs.append(functools.partial(measure_likelihood, variant, training, *part))
    # All rows grow together: whoever stops early has as many samples of each.
    for part in samples:
        for variant in rows:
            if not samples_file(variant, setting, *part).exists():
                jobs.append(functools.partial(draw, variant, *part))
    context = multiprocessing.get_context("spawn")
    task = progress.add_task(f"{len(jobs)} parts", total=len(jobs))
    with ProcessPoolExecutor(workers, context, begin_work, (setting,)) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                progress.advance(task)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


# ----------------------------------------------------------------------------------------- time


def measure_times(
    rows: list[Variant], setting: Setting, progress: Progress
) -> dict[Variant, float]:
    """Median seconds an image of each variant, one image at a time, the variants in turn."""
    task = progress.add_task("timing", total=(TIMED + 1) * len(rows))
    label = labels_of(setting.training, 0, 1)[0]
    bundles = {setting.bundle_of(variant) for variant in rows}
    pipelines = {bundle: Pipeline.open(bundle, threads=1) for bundle in bundles}
    seconds: dict[Variant, list[float]] = {variant: [] for variant in rows}
    for turn in range(TIMED + 1):
        for variant in rows:
            # A mask of other values takes no other time.
            pipeline = pipelines[setting.bundle_of(variant)]
            schedule = schedule_of(variant, setting.grid, setting.repulsion)
            start = time.perf_counter()
            request = ImageRequest(label, setting.seed, turn, setting.sampling)
            list(pipeline.stream([request], schedule=schedule))
            if turn:
                seconds[variant].append(time.perf_counter() - start)
            progress.advance(task)
    return {variant: statistics.median(values) for variant, values in seconds.items()}


# -------------------------------------------------------------------------------- real images


@torch.inference_mode()
def look(classifier: Classifier, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [N, F] and the class ids seen [N] of images [N, 3, H, H] in [-1, 1]."""
    features, seen = [], []
    for chunk in images.split(CHUNK):
        features.append(classifier.features(chunk))
        seen.append(classifier.logits(chunk).argmax(dim=1))
    return torch.cat(features), torch.cat(seen)


@torch.inference_mode()
def measure_floor(setting: Setting, training_nats: float) -> tuple[torch.Tensor, Floor]:
    """Features of the training images, and how real images measure."""
    training, held_out = setting.training, setting.held_out
    images = to_signed(training.pixels)
    tokenizer = load_tokenizer(setting.models / TOKENIZER_FILE).eval()
    features, _ = look(setting.classifier, images)
    decoded = torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in images.split(CHUNK)])
    again, seen_again = look(setting.classifier, decoded.clamp(-1, 1))
    _, seen = look(setting.classifier, to_signed(held_out.pixels))
    one, other = shuffled(len(training), 0).tensor_split(2)
    floor = Floor(
        halves_frechet_distance=frechet_distance(features[one], features[other]),
        reconstructed_frechet_distance=frechet_distance(features, again),
        reconstructed_accuracy=float((seen_again == training.labels).double().mean()),
        held_out_accuracy=float((seen == held_out.labels).double().mean()),
        training_nats=training_nats,
    )
    return features, floor


def read_steps(text: str, grid: int) -> list[int]:
    """Numbers of steps, separated by commas, most first."""
    words = text.split(",")
    most = grid * grid
    if not all(word.strip().isdecimal() and 1 <= int(word) <= most for word in words):
        raise UserError(f"--steps {text!r} must be whole numbers from 1 to {most}, such as {STEPS}")
    return sorted({int(word) for word in words}, reverse=True)


def measure(setting: Setting, steps: list[int], workers: int) -> Claims:
    """Everything that is printed."""
    rows, published = setting.variants(steps), published_variant(steps)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        work(rows, published, setting, workers, progress)
        # How several threads get on with each other would weigh more than the steps.
        with torch_threads(1):
            times = measure_times(rows, setting, progress)
    real, floor = measure_floor(setting, mean_nats(published, True, setting))
    samples = parts(setting.samples)
    measured = []
    for variant in rows:
        drawn = [load_arrays(samples_file(variant, setting, *part)) for part in samples]
        features = torch.from_numpy(np.concatenate([part["features"] for part in drawn]))
        seen = np.concatenate([part["seen"] for part in drawn])
        distance = distance_figure(Moments.of(real), features)
        measured.append(
            Row(
                variant=variant,
                frechet_distance=distance.value,
                frechet_distance_error=distance.standard_error,
                accuracy=float(np.mean(seen == labels_of(setting.training, 0, setting.samples))),
                nats=mean_nats(variant, False, setting),
                seconds=times[variant],
            )
        )
    return Claims(
        samples=setting.samples,
        training_images=len(setting.training),
        held_out_images=len(setting.held_out),
        cfg=setting.sampling.cfg,
        rows=measured,
        floor=floor,
    )


def mean_nats(variant: Variant, training: bool, setting: Setting) -> float:
    """Mean negative log-likelihood a token of what `measure_likelihood` kept."""
    files = [
        likelihood_file(variant, training, setting, *part) for part in parts(len(setting.held_out))
    ]
    return float(np.concatenate([load_arrays(file)["nats"] for file in files]).mean())


def read_setting(
    bundle: Path,
    raster: Path | None,
    alone: Path | None,
    images: Path,
    models: Path,
    samples: int,
    seed: int,
    batch: int,
    cfg: float | None,
    out: Path,
) -> Setting:
    """Raises UserError or TrainingError if the parts are missing or do not belong together."""
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    training, held_out = (load_image_set(images, split) for split in ("train", "validation"))
    files = [models / name for name in (CLASSIFIER_FILE, TOKENIZER_FILE)]
    classifier = load_classifier(files[0])
    if (training.resolution, len(training.class_names)) != (
        manifest.resolution,
        manifest.model.num_classes,
    ) or training.class_names != classifier.class_names:
        raise UserError(
            f"{bundle} draws images of {manifest.resolution} px, {images} holds some of "
            f"{training.resolution} px in {len(training.class_names)} classes, and {files[0]} "
            f"tells {len(classifier.class_names)} classes apart: give what belongs together"
        )
    sampling = Sampling(
        cfg=manifest.cfg if cfg is None else cfg, guidance=cast(GuidanceSchedule, manifest.guidance)
    )
    # The weights are loaded by whoever works, but what is wrong with them is told at once.
    load_tokenizer(files[1])
    others = [other for other in (raster, alone) if other is not None]
    for other in others:
        theirs = Bundle.open(other).manifest
        if (theirs.made["tokenizer"], theirs.class_names) != (
            manifest.made["tokenizer"],
            manifest.class_names,
        ):
            raise UserError(
                f"{other} was not made of the tokenizer and classes of {bundle}: their images "
                "cannot be compared"
            )
    manifests = [folder / MANIFEST for folder in (bundle, *others)]
    digests = [*map(sha256, (*manifests, *files)), training.digest(), held_out.digest()]
    key = "-".join(digest[:6] for digest in digests)
    return Setting(
        bundle=bundle,
        raster=raster,
        alone=alone,
        models=models,
        grid=manifest.model.grid,
        repulsion=opened.schedule().repulsion or 0,
        samples=samples,
        seed=seed,
        batch=batch,
        sampling=sampling,
        classifier=classifier,
        training=training,
        held_out=held_out,
        out=out,
        kept=out / f"{key}-seed{seed}-cfg{sampling.cfg:g}",
    )


@click.command()
@click.option(
    "--bundle", type=click.Path(path_type=Path), default=Path("engines/demo"), show_default=True
)
@click.option(
    "--raster", type=click.Path(path_type=Path), help="A bundle trained for raster order."
)
@click.option(
    "--alone",
    type=click.Path(path_type=Path),
    help="A bundle trained without mutual visibility.",
)
@click.option(
    "--images", type=click.Path(path_type=Path), default=Path("data/lpd-emoji"), show_default=True
)
@click.option(
    "--models",
    type=click.Path(path_type=Path),
    default=Path("models/lpd-emoji"),
    show_default=True,
    help="Folder of vq.safetensors and classifier.safetensors.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=4),
    default=2000,
    show_default=True,
    help="Images a row.",
)
@click.option("--steps", default=STEPS, show_default=True, help="Of random and locality order.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Drawn together."
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one a CPU core]")
@click.option("--cfg", type=float, help="Guidance scale.  [default: the bundle's]")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/claims"), show_default=True
)
def main(
    bundle: Path,
    raster: Path | None,
    alone: Path | None,
    images: Path,
    models: Path,
    samples: int,
    steps: str,
    seed: int,
    batch: int,
    workers: int | None,
    cfg: float | None,
    out: Path,
) -> None:
    """Measures LPD's claims: few steps, their order, queries that see each other."""
    try:
        setting = read_setting(
            bundle, raster, alone, images, models, samples, seed, batch, cfg, out
        )
        counts = read_steps(steps, setting.grid)
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock", timeout=0):
            claims = measure(setting, counts, workers or torch.get_num_threads())
            claims.write(out / "claims.json")
            figure = Figure(figsize=(11, 3.6), layout="constrained")
            draw_curves(claims, list(figure.subplots(1, 3)))
            figure.savefig(out / "claims.png", dpi=150)
    except Timeout:
        click.echo(f"claims: error: another process measures in {out}: wait for it", err=True)
        sys.exit(EXIT_MISTAKE)
    except (UserError, TrainingError, CheckpointError) as error:
        click.echo(f"claims: error: {error}", err=True)
        sys.exit(EXIT_MISTAKE)
    except OSError as error:
        click.echo(f"claims: error: cannot write {out}: {error.strerror or error}", err=True)
        sys.exit(EXIT_MISTAKE)
    except BrokenProcessPool:
        click.echo(
            "claims: error: a process at work was killed, perhaps for want of memory: the same "
            "command goes on from here, with fewer --workers if need be",
            err=True,
        )
        sys.exit(EXIT_FAILED)
    except KeyboardInterrupt:
        click.echo("claims: interrupted; the same command goes on from here", err=True)
        sys.exit(EXIT_INTERRUPTED)
    click.echo(table(claims))
    click.echo(
        f"\n{samples} images a row, guidance {claims.cfg:g}; "
        f"{out}/claims.json, claims.png and samples of each row"
    )


if __name__ == "__main__":
    main()
