"""What every part of one verification works with: both sides, the task, the limits.

Knows how they are had. Does not know what is compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lpd_export.accuracy.bundle_side import BundleSide, check_same_model, open_bundle
from lpd_export.accuracy.reference_side import open_reference
from lpd_export.accuracy.request import REFERENCE, VerifyRequest
from lpd_export.accuracy.sides import Drawn, Side, Task
from lpd_export.accuracy.thresholds import Limits
from lpd_export.bundle.manifest import Bundle, ModelDescription
from lpd_export.errors import GraphError, NumericalError, UserError
from lpd_export.precision.calibration import spread_labels
from lpd_export.progress import Report
from lpd_export.runtime.randomness import image_randomness
from lpd_export.runtime.sampler import Sampling


@dataclass(frozen=True, eq=False)
class Context:
    """One verification."""

    request: VerifyRequest
    bundle: Bundle
    task: Task
    expected: Side
    """What the bundle is compared with: the reference, or another bundle."""
    actual: BundleSide
    drawn: Drawn
    """By the expected side; all phases are fed these tokens and images."""
    limits: Limits
    remarks: list[str]
    """What the reader must know to judge; lines are added as things come up."""
    scratch: Path
    """A folder that is removed in the end."""
    report: Report
    """Called with a line at the start of each stage."""

    @property
    def sides(self) -> tuple[Side, Side]:
        """Expected and actual."""
        return self.expected, self.actual

    @property
    def model(self) -> ModelDescription:
        """What both sides compute."""
        return self.actual.pipeline.manifest.model

    @property
    def cache_shape(self) -> tuple[int, ...]:
        """Of one row's keys or values, as the judged bundle's graphs have them."""
        return self.actual.pipeline.manifest.cache_shape


def open_context(
    request: VerifyRequest, bundle: Bundle, task: Task, scratch: Path, report: Report
) -> Context:
    """Loads both sides, and has the expected one draw its images.

    Raises:
        UserError: if a side cannot be had here, they are different models, or there are no images.
    """
    remarks: list[str] = []
    precisions = [bundle.manifest.precision]
    actual = open_bundle(bundle, request, scratch / "actual", report)
    expected: Side
    if request.against == REFERENCE:
        expected = open_reference(request, bundle.manifest, remarks, report)
    else:
        other = Bundle.open(request.against)
        check_same_model(bundle, other)
        expected = open_bundle(other, request, scratch / "expected", report)
        precisions.append(other.manifest.precision)
    try:
        drawn = expected.draw(task, report)
    except (GraphError, NumericalError) as error:
        raise UserError(
            f"there is nothing to compare with, {expected.name} draws no image: {error}"
        ) from error
    limits = Limits.of(precisions, request.thresholds)
    return Context(request, bundle, task, expected, actual, drawn, limits, remarks, scratch, report)


def make_task(bundle: Bundle, images: int, seed: int) -> Task:
    """Images of classes as far apart as possible, with the bundle's own schedule and guidance."""
    manifest, schedule = bundle.manifest, bundle.schedule()
    chances = [image_randomness(seed, i, schedule.cells, schedule.count) for i in range(images)]
    return Task(
        schedule=schedule,
        labels=spread_labels(manifest.model.num_classes, images),
        order_indices=[chance.order_index for chance in chances],
        uniform=np.stack([chance.uniform for chance in chances]),
        sampling=Sampling(cfg=manifest.cfg, guidance=manifest.guidance),
        seed=seed,
    )
