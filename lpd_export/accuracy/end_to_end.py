"""Whole images by both sides: all steps on a side's own caches, and images drawn freely.

Knows what is measured over many steps, where errors add up. Does not know single phases.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lpd_export.accuracy.comparison import (
    GUIDED,
    Comparison,
    agreement,
    kl_divergence,
    psnr,
    top_1_agreement,
)
from lpd_export.accuracy.implementations import Drawn, Task
from lpd_export.accuracy.results import GENERATION, SEQUENCE, ImagePair, Steps
from lpd_export.accuracy.sides import Sides
from lpd_export.bundle.classes import display_name
from lpd_export.bundle.manifest import Manifest
from lpd_export.errors import GraphError, NumericalError, UserError
from lpd_export.progress import Report
from lpd_reference.generate import draw

MOST_PAIRS = 16
"""Images that the report shows side by side."""


def draw_expected(task: Task, sides: Sides, report: Report) -> Drawn:
    """The images that all else is compared with.

    Raises:
        UserError: if there are none.
    """
    try:
        return sides.expected.draw(task, report)
    except (GraphError, NumericalError) as error:
        raise UserError(
            f"there is nothing to compare with, {sides.expected.name} draws no image: {error}"
        ) from error


def draw_actual(task: Task, sides: Sides, report: Report) -> Drawn | None:
    """The bundle's images, or None with a remark if it gives none."""
    try:
        return sides.actual.draw(task, report)
    except (GraphError, NumericalError) as error:
        sides.remarks.append(f"{sides.actual.name} draws no image: {error}")
        return None


def compare_sequences(
    task: Task, sides: Sides, drawn: Drawn, comparison: Comparison, report: Report
) -> Steps:
    """Sequences of all images; returns the metrics by step."""
    kl, top_1 = [], []
    cells = [slice(p.first_cell, p.first_cell + p.queries) for p in task.phases]
    for i in range(task.images):
        report(f"comparing whole sequences: image {i + 1} of {task.images}")
        one, other = compare_sequence(task, i, sides, drawn, comparison)
        kl.append([kl_divergence(one[c], other[c]) for c in cells])
        top_1.append([top_1_agreement(one[c], other[c]) for c in cells])
    return Steps(
        cells=task.schedule.group_sizes.tolist(),
        kl=np.mean(kl, axis=0).tolist(),
        top_1=np.mean(top_1, axis=0).tolist(),
        token_agreement=[],
    )


def compare_sequence(
    task: Task, image: int, sides: Sides, drawn: Drawn, comparison: Comparison
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """All steps of one image teacher-forced, each side on its own caches.

    Returns the guided logits [S, V] of both sides.
    """
    one, other = (
        side.sequence_logits(task.image(image), drawn.token_ids[[image]])[0].numpy()
        for side in (sides.expected, sides.actual)
    )
    comparison.note(SEQUENCE, GUIDED, "sequence_kl", kl_divergence(one, other))
    comparison.note(SEQUENCE, GUIDED, "sequence_top_1", top_1_agreement(one, other))
    return one, other


def compare_generation(
    task: Task, sides: Sides, drawn: Drawn, other: Drawn | None, comparison: Comparison
) -> list[float]:
    """Whole images drawn with the same uniform numbers; returns the share of equal tokens by step.

    Whether or not an image's tokens part from the expected ones, each must be what the
    reference's own rule draws from the logits that the bundle has for the tokens before it: then
    rounding explains all differences, and not the loop or the sampler.
    """
    if other is None:
        for metric in ("token_agreement", "unexplained_draws"):
            comparison.note(GENERATION, "token_ids", metric, float("nan"))
        return [0.0 for _ in task.phases]
    equal_by_step = []
    for i, logits in enumerate(sides.actual.drawn_logits(task, other.token_ids)):
        one, two = (side.token_ids[i][task.orders[i]] for side in (drawn, other))
        comparison.note(GENERATION, "token_ids", "token_agreement", agreement(one, two))
        equal_by_step.append(
            [
                agreement(*(ids[p.first_cell : p.first_cell + p.queries] for ids in (one, two)))
                for p in task.phases
            ]
        )
        explained = draw(logits, torch.from_numpy(task.uniform[i])).numpy()
        unexplained = float(np.sum(explained != two))
        comparison.note(GENERATION, "token_ids", "unexplained_draws", unexplained)
        if np.array_equal(one, two):
            pixels = (images.pixels[i].astype(np.float64) for images in (drawn, other))
            comparison.note(
                GENERATION, "pixels", "generation_psnr", psnr(next(pixels), next(pixels), 255.0)
            )
    return [float(share) for share in np.mean(equal_by_step, axis=0)]


def make_pairs(task: Task, manifest: Manifest, drawn: Drawn, other: Drawn) -> list[ImagePair]:
    """What the report shows side by side."""
    return [
        ImagePair(
            label=display_name(manifest.class_names, task.labels[i]),
            expected=drawn.pixels[i],
            actual=other.pixels[i],
            equal_tokens=agreement(drawn.token_ids[i], other.token_ids[i]),
        )
        for i in range(min(task.images, MOST_PAIRS))
    ]
