"""What a verification found, as data: for the terminal, for JSON and for the report.

Knows measurements and the verdict that follows from them. Does not know how they were made.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpd_export.accuracy.thresholds import Limits
from lpd_export.bundle.manifest import QuantizationDecision

SEQUENCE, GENERATION = "sequence", "generation"
"""Beside the phases: all steps teacher-forced on their own caches, and whole images drawn."""


def step_of(phase: str) -> int | None:
    """The step, from 1, that a decode phase is. Phases count from 0, as their files do."""
    number = phase.removeprefix("phase_")
    return int(number) + 1 if number.isdigit() else None


@dataclass(frozen=True)
class Measurement:
    """One judged metric of one tensor of one phase, over all images."""

    phase: str
    """phase_00, ..., detokenize, tokenize, sequence or generation."""
    tensor: str
    metric: str
    """One of `thresholds.JUDGED`."""
    value: float
    """The worst over the images, or the mean where the metric is a mean."""
    limit: float
    passed: bool


@dataclass(frozen=True)
class Figure:
    """A figure that is reported, and that the verdict does not follow from."""

    phase: str
    tensor: str
    metric: str
    """One of `thresholds.REPORTED`."""
    value: float


@dataclass(frozen=True)
class LayerError:
    """How far one layer's output is from the reference's, all layers before it included."""

    graph: str
    """decode, detokenize or tokenize."""
    layer: str
    """The module's name in the ONNX files, such as blocks.3.fc1."""
    relative_error: float
    """Length of the error over length of the reference's output (L2)."""
    largest_error: float
    growth: float
    """The relative error over the largest of the layers that feed it, or over one rounding of the
    precision if that is more; above 1 it grew here."""


@dataclass(frozen=True)
class Bisection:
    """Which layers of one graph must stay in higher precision for the thresholds to hold."""

    graph: str
    layers: int
    """All that could be quantized."""
    kept: list[str] | None
    """That must stay in higher precision; None if not even all of them are enough."""
    trials: int


@dataclass(frozen=True, eq=False)
class ImagePair:
    """The same image drawn by both sides from the same uniform numbers."""

    label: str
    expected: NDArray[np.uint8]
    """[height, width, 3], of what the bundle is compared with."""
    actual: NDArray[np.uint8]
    """[height, width, 3], of the bundle."""
    equal_tokens: float
    """Share."""


@dataclass(frozen=True)
class Step:
    """Metrics of one step of a generation, over all images."""

    step: int
    """From 1; its phase, and the file of it, has the number before."""
    cells: int
    kl: float
    """Mean KL divergence teacher-forced, in nats."""
    top_1: float
    """Share of equal most probable tokens, teacher-forced."""
    token_agreement: float
    """Share of equal tokens of images drawn freely."""


@dataclass(frozen=True, eq=False)
class Verification:
    """Everything that `lpd-export verify` found."""

    bundle: str
    name: str
    precision: str
    backend: str
    quantized: str
    """How many layers of each graph are quantized; empty if none."""
    against: str
    """`reference`, or the other bundle's folder."""
    ran: str
    """In words: what ran the bundle's graphs."""
    images: int
    seed: int
    cfg: float
    guidance: str
    versions: dict[str, str]
    """Of what computed and compared."""
    time: str
    """When, in ISO format with the time zone."""
    remarks: list[str]
    """What the reader must know to judge, such as another checkpoint than the bundle's."""
    measurements: list[Measurement]
    """All that is judged."""
    reported: list[Figure]
    """Figures without a limit."""
    limits: Limits
    """That the measurements were judged by."""
    steps: list[Step]
    pairs: list[ImagePair]
    layers: list[LayerError] = field(default_factory=list)
    layers_phase: str = ""
    """The decode phase that `layers` of the decode graph were taken in."""
    decisions: dict[str, QuantizationDecision] = field(default_factory=dict)
    """By graph, what the build tried and decided of the layers that are quantized."""
    bisections: list[Bisection] = field(default_factory=list)
    """A graph each, if they were asked for."""
    saved_phases: list[str] = field(default_factory=list)
    """Phases whose inputs and outputs were left for Polygraphy."""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every threshold holds."""
        return all(measurement.passed for measurement in self.measurements)

    @property
    def failures(self) -> list[Measurement]:
        """What failed, in the order of computation: the first is where to look."""
        return [measurement for measurement in self.measurements if not measurement.passed]

    @property
    def phases(self) -> list[str]:
        """Names of all phases, in the order of computation."""
        return list(dict.fromkeys(measurement.phase for measurement in self.measurements))

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the pictures; a decode phase's step counts from 1."""
        plain = {
            field.name: _plain(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in ("pairs", "limits")
        }
        first = _plain(self.failures[0]) if self.failures else None
        return {"passed": self.passed, "first_failure": first, **plain}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, Measurement):
        return {"step": step_of(value.phase), **dataclasses.asdict(value)}
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
