"""How good the images of a bundle, a folder or an `.npz` are, beside those of a reference.

Puts the parts together: images are seen chunk by chunk, what was seen is kept on disk at once, so
that the same command goes on where it was stopped, and the figures follow from all of it. Does not
know the command line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lpd_export.errors import Interrupted, NumericalError, UserError
from lpd_export.evaluation import metrics
from lpd_export.evaluation.features import (
    INCEPTION_SHA256,
    Extractor,
    InceptionExtractor,
    Seen,
    open_extractor,
    where_features_are,
)
from lpd_export.evaluation.metrics import Figure, Moments
from lpd_export.evaluation.request import (
    CLASSIFIER,
    DEFAULT_BATCH,
    PER_CLASS,
    STATISTICS,
    EvaluateRequest,
)
from lpd_export.evaluation.sources import BundleImages, Chunk, Label, Source, open_images
from lpd_export.evaluation.statistics import (
    IMAGES,
    MEAN,
    Statistics,
    entries,
    read_statistics,
    write_statistics,
)
from lpd_export.files import cache_folder, strict_json, write_atomically
from lpd_export.progress import Progress, Report
from lpd_export.runtime.pipeline import Pipeline

KEPT = "evaluation"
"""In the cache, a folder of what was seen of images, a file a chunk."""
TITLES = {
    "inception": {"frechet_distance": "FID", "score": "inception score"},
    "classifier": {"frechet_distance": "Fréchet distance", "score": "classifier score"},
}
"""Published names are of Inception's features alone."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured."""

    images: str
    count: int
    against: str | None
    against_count: int | None
    """None where a file of statistics does not say it."""
    features: dict[str, Any]
    generation: dict[str, Any] | None
    """How a bundle's images were generated; None of others."""
    figures: dict[str, Figure | None]
    """None where the reference, or what is known of the images, does not give it."""
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For `--json` and `--out`."""
        figures = {
            name: None
            if figure is None
            else {"value": figure.value, "standard_error": figure.standard_error}
            | ({"bias": figure.bias} if name == "frechet_distance" else {})
            for name, figure in self.figures.items()
        }
        return dataclasses.asdict(self) | {"figures": figures, "notes": list(self.notes)}

    def lines(self) -> list[str]:
        """For the terminal."""
        against = f" against {self.against}" if self.against else ""
        of = f" ({self.against_count} images)" if self.against_count else ""
        features = self.features
        lines = [
            f"{self.count} images of {self.images}{against}{of}, by {features['dimensions']} "
            f"features of {features['file']}"
        ]
        if self.generation:
            settings = (f"{name} {value}" for name, value in self.generation.items())
            lines.append(", ".join(settings))
        titles = TITLES[features["name"]]
        for name, figure in self.figures.items():
            if figure is None:
                continue
            title = titles.get(name, name)
            if name in ("precision", "recall", "accuracy"):
                value = f"{figure.value:.1%} ± {figure.standard_error:.1%}"
            else:
                value = f"{figure.value:.2f} ± {figure.standard_error:.2f}"
            if name == "frechet_distance":
                value += f", of which about {figure.bias:.2f} for want of more images"
            lines.append(f"{title:<18}{value}")
        return lines + list(self.notes)


def evaluate(
    request: EvaluateRequest,
    report: Report = lambda stage: None,
    advance: Progress = lambda stage, step, steps: None,
) -> Evaluation:
    """Does what is asked for.

    Args:
        request: the evaluation.
        report: called with each stage.
        advance: called after each chunk of images, and each part of what is computed.

    Raises:
        UserError: if the request is wrong, or something cannot be read or compared.
        Interrupted: on Ctrl-C; what was seen is kept.
    """
    request.check()
    path = request.features or request.beside(CLASSIFIER)
    if path is None:
        raise UserError(f"nothing says what sees the images: {where_features_are()}")
    against = request.against or request.beside(STATISTICS)
    if against is None and request.save_statistics is None:
        raise UserError(
            "nothing says what the images are compared with: give --against, an .npz of statistics "
            "such as the ADM suite's, or a folder of images"
        )
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    report(f"loading {path}")
    extractor = open_extractor(path, device)
    statistics, real = open_reference(against, extractor) if against else (None, None)
    report(f"loading {request.images}")
    source, generation = open_source(request)
    for some in (source, real):
        if some is not None:
            check_images(some, extractor)

    seen_real = None
    if real is not None:
        report(f"reading {real.name}")
        seen_real, _ = see(real, extractor, advance)
    report(f"{'generating' if generation else 'reading'} {source.count} images of {source.name}")
    seen, labels = see(source, extractor, advance)

    report("computing")
    reference = (
        statistics.moments if statistics else Moments.of(seen_real.features) if seen_real else None
    )
    figures, notes = compute(seen, labels, source, extractor, reference, seen_real, advance)
    if isinstance(extractor, InceptionExtractor) and not extractor.sha256.startswith(
        INCEPTION_SHA256
    ):
        notes.append(
            f"{path} is not the file that published figures are computed with: its SHA-256 begins "
            f"with {extractor.sha256[:8]}, theirs with {INCEPTION_SHA256}"
        )
    result = Evaluation(
        images=source.name,
        count=source.count,
        against=str(against) if against else None,
        against_count=statistics.count if statistics else real.count if real else None,
        features={
            "name": extractor.name,
            "file": str(path),
            "sha256": extractor.sha256,
            "dimensions": extractor.dimensions,
        },
        generation=generation,
        figures=figures,
        notes=tuple(notes),
    )
    if request.save_statistics is not None:
        moments = Moments.of(seen.features)
        write_statistics(
            request.save_statistics,
            Statistics(request.save_statistics, moments, extractor.sha256, source.count),
        )
    if request.out is not None:
        write_atomically(request.out, (strict_json(result.as_json()) + "\n").encode())
    return result


def open_reference(path: Path, extractor: Extractor) -> tuple[Statistics | None, Source | None]:
    """What images are compared with: moments, if the file holds them, and images, if any.

    Raises:
        UserError: if there are neither, or the moments are of other features.
    """
    if path.suffix != ".npz" or not path.is_file():
        return None, open_images(path)
    found = entries(path)
    if MEAN not in found and IMAGES in found:
        return None, open_images(path)
    statistics = read_statistics(path)
    if statistics.dimensions != extractor.dimensions:
        raise UserError(
            f"{path} holds statistics of {statistics.dimensions} features, and {extractor.path} "
            f"gives {extractor.dimensions}: {where_features_are()}"
        )
    if statistics.features not in (None, extractor.sha256):
        raise UserError(
            f"{path} holds statistics of the features of another file than {extractor.path}: make "
            f"them again, with `lpd-export evaluate FOLDER --features {extractor.path} "
            "--save-statistics FILE`"
        )
    return statistics, open_images(path) if IMAGES in found else None


def open_source(request: EvaluateRequest) -> tuple[Source, dict[str, Any] | None]:
    """The images that are evaluated, and how they are generated, if they are."""
    if not request.of_bundle:
        return open_images(request.images), None
    pipeline = Pipeline.open(request.images, device=request.device, threads=request.threads)
    sampling = pipeline.sampling(
        cfg=request.cfg,
        guidance=request.guidance,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
    )
    per_class, seed = request.per_class or PER_CLASS, request.seed or 0
    batch = request.batch or min(DEFAULT_BATCH, pipeline.manifest.max_batch or DEFAULT_BATCH)
    schedule = pipeline.choose_schedule(request.schedule)
    source = BundleImages(request.images, pipeline, per_class, seed, sampling, batch, schedule)
    how = {"per_class": per_class, "seed": seed, **dataclasses.asdict(sampling), "batch": batch}
    return source, how | {"steps": schedule.steps, "orders": schedule.count}


def check_images(source: Source, extractor: Extractor) -> None:
    """Raises UserError if there are too few images, or they are known to be of another size."""
    if source.count <= extractor.dimensions:
        raise UserError(
            f"{source.name} gives {source.count} images, and a distance over "
            f"{extractor.dimensions} features takes more than {extractor.dimensions} (published "
            "ones 50,000): give more, of a bundle with --per-class"
        )
    check_side(source.name, source.side, extractor)


def check_side(name: str, side: int | None, extractor: Extractor) -> None:
    if None not in (side, extractor.side) and side != extractor.side:
        raise UserError(
            f"the images of {name} are of {side} pixels, and {extractor.path} sees images of "
            f"{extractor.side}: give images or --features that belong together"
        )


# --------------------------------------------------------------------------------- what is seen


def see(source: Source, extractor: Extractor, advance: Progress) -> tuple[Seen, list[Label]]:
    """What is seen of all images, and the classes that were asked for.

    Raises:
        UserError: if images cannot be read, or are of another size than the extractor takes.
        NumericalError: if the extractor gives NaN or infinity.
        Interrupted: on Ctrl-C.
    """
    folder = cache_folder() / KEPT
    seen: list[Seen] = []
    labels: list[Label] = []
    try:
        for chunk in source.chunks():
            seen.append(see_chunk(chunk, source.name, extractor, folder))
            labels += chunk.labels
            advance("image", len(labels), source.count)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted: {len(labels)} of {source.count} images of {source.name} are seen, the "
            "same command goes on from there"
        ) from None
    return Seen(torch.cat([s.features for s in seen]), torch.cat([s.logits for s in seen])), labels


def see_chunk(chunk: Chunk, name: str, extractor: Extractor, folder: Path) -> Seen:
    """What is seen of a chunk's images: from the disk if it was seen before, else kept there."""
    key = hashlib.sha256(f"{extractor.sha256} {chunk.key}".encode()).hexdigest()
    path = folder / f"{key}.npz"
    try:
        with np.load(path) as file:
            return Seen(*(torch.from_numpy(file[field]) for field in Seen._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not there, or damaged: it is made again
    pixels = chunk.pixels()
    check_side(name, max(pixels.shape[1:3]), extractor)
    if extractor.side is not None:
        check_side(name, min(pixels.shape[1:3]), extractor)
    seen = extractor.see(pixels)
    if not all(values.isfinite().all() for values in seen):
        raise NumericalError(f"{extractor.path} gives NaN or infinity for images of {name}")
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, features=seen.features, logits=seen.logits)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())
    return seen


def compute(
    seen: Seen,
    labels: list[Label],
    source: Source,
    extractor: Extractor,
    reference: Moments | None,
    real: Seen | None,
    advance: Progress,
) -> tuple[dict[str, Figure | None], list[str]]:
    """The figures by name, and what must be said of those that are missing."""
    notes = []
    distance = None
    if reference is not None:
        distance = metrics.distance_figure(
            reference, seen.features, lambda part, parts: advance("part", part, parts)
        )
    precision = recall = None
    if real is not None:
        precision = metrics.share_figure(metrics.inside_manifold(seen.features, real.features))
        recall = metrics.share_figure(metrics.inside_manifold(real.features, seen.features))
    elif reference is not None:
        notes.append("precision and recall take images to compare with, not their statistics alone")
    accuracy = None
    classes = len(extractor.class_names)
    asked = [label for label in labels if label is not None and label < classes]
    if classes and len(asked) == len(labels):
        if source.class_names in ((), extractor.class_names):
            hits = seen.logits.argmax(dim=1) == torch.tensor(asked)
            accuracy = metrics.share_figure(hits)
        else:
            notes.append(f"{extractor.path} tells other classes apart than those asked for")
    figures = {
        "frechet_distance": distance,
        "score": metrics.score_figure(seen.logits),
        "precision": precision,
        "recall": recall,
        "accuracy": accuracy,
    }
    return figures, notes
