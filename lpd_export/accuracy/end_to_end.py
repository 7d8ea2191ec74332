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
from lpd_export.accuracy.context import Context
from lpd_export.accuracy.results import GENERATION, SEQUENCE, ImagePair
from lpd_export.accuracy.sides import Drawn, Task
from lpd_export.bundle.classes import display_name
from lpd_export.errors import GraphError, NumericalError
from lpd_reference.generate import draw

MOST_PAIRS = 16
"""Images that the report shows side by side."""


def draw_actual(context: Context) -> Drawn | None:
    """The bundle's images, or None with a remark if it gives none."""
    try:
        return context.actual.draw(context.task, context.report)
    except (GraphError, NumericalError) as error:
        context.remarks.append(f"{context.actual.name} draws no image: {error}")
        return None


def compare_sequences(context: Context, comparison: Comparison) -> NDArray[np.float64]:
    """Sequences of all images; returns KL divergence and top-1 agreement by step [K, 2]."""
    by_step, task = [], context.task
    for i in range(task.images):
        context.report(f"comparing whole sequences: image {i + 1} of {task.images}")
        one, other = compare_sequence(context, i, comparison)
        by_step.append(
            [
                (kl_divergence(one[c], other[c]), top_1_agreement(one[c], other[c]))
                for c in cells_by_step(task)
            ]
        )
    return np.mean(by_step, axis=0)


def cells_by_step(task: Task) -> list[slice]:
    """The cells of each step, in generation order."""
    return [slice(phase.first_cell, phase.first_cell + phase.queries) for phase in task.phases]


def compare_sequence(
    context: Context, image: int, comparison: Comparison
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """All steps of one image teacher-forced, each side on its own caches.

    Returns the guided logits [S, V] of both sides.
    """
    one, other = (
        side.sequence_logits(context.task.image(image), context.drawn.token_ids[[image]])[0].numpy()
        for side in context.sides
    )
    comparison.note(SEQUENCE, GUIDED, "sequence_kl", kl_divergence(one, other))
    comparison.note(SEQUENCE, GUIDED, "sequence_top_1", top_1_agreement(one, other))
    return one, other


def compare_generation(
    context: Context, other: Drawn | None, comparison: Comparison
) -> NDArray[np.float64]:
    """Whole images drawn with the same uniform numbers; returns the share of equal tokens by step.

    Whether or not an image's tokens part from the expected ones, each must be what the
    reference's own rule draws from the logits that the bundle has for the tokens before it: then
    rounding explains all differences, and not the loop or the sampler.
    """
    task, drawn = context.task, context.drawn
    if other is None:
        comparison.note(GENERATION, "token_ids", "unexplained_draws", float("nan"))
        return np.zeros(len(task.phases))
    equal_by_step = []
    for i, logits in enumerate(context.actual.drawn_logits(task, other.token_ids)):
        one, two = (side.token_ids[i][task.orders[i]] for side in (drawn, other))
        equal = np.array_equal(one, two)
        equal_by_step.append([agreement(one[c], two[c]) for c in cells_by_step(task)])
        explained = draw(logits, torch.from_numpy(task.uniform[i])).numpy()
        unexplained = float(np.sum(explained != two))
        comparison.note(GENERATION, "token_ids", "unexplained_draws", unexplained)
        comparison.note(GENERATION, "token_ids", "token_agreement", agreement(one, two))
        comparison.note(GENERATION, "token_ids", "equal_images", float(equal))
        if equal:
            value = psnr(drawn.pixels[i], other.pixels[i].astype(np.float64), 255.0)
            comparison.note(GENERATION, "pixels", "generation_psnr", value)
    compare_edits(context, comparison)
    return np.mean(equal_by_step, axis=0)


def compare_edits(context: Context, comparison: Comparison) -> None:
    """The first images once more, with tokens given for the first half of their cells.

    These are those of the image turned upside down, which it would not draw itself. Given ones must
    stay, and the others be what the reference's rule draws from the logits after the given ones.
    """
    task = context.task.first(context.actual.batch)
    orders, half = task.orders, task.schedule.cells // 2
    given = context.drawn.token_ids[: task.images, ::-1].copy()
    np.put_along_axis(given, orders[:, half:], -1, axis=1)
    edited = context.actual.edit(task, given)
    for i, logits in enumerate(context.actual.drawn_logits(task, edited)):
        expected = draw(logits, torch.from_numpy(task.uniform[i])).numpy()
        expected[:half] = given[i][orders[i, :half]]
        unexplained = float(np.sum(edited[i][orders[i]] != expected))
        comparison.note(GENERATION, "token_ids", "unexplained_draws", unexplained)


def make_pairs(context: Context, other: Drawn) -> list[ImagePair]:
    """What the report shows side by side."""
    task, drawn = context.task, context.drawn
    names = context.bundle.manifest.class_names
    return [
        ImagePair(
            label=display_name(names, task.labels[i]),
            expected=drawn.pixels[i],
            actual=other.pixels[i],
            equal_tokens=agreement(drawn.token_ids[i], other.token_ids[i]),
        )
        for i in range(min(task.images, MOST_PAIRS))
    ]
