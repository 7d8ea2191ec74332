"""How close to the reference a bundle must be: what is judged, and a row of limits a precision.

Knows the metrics, the limits, why they are what they are, and how a user overrides one. Does not
know how anything is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from lpd_export.errors import UserError


class Metric(NamedTuple):
    """Something that is measured."""

    name: str
    title: str
    """What it is called where a person reads it."""
    description: str
    """What it is, with its unit."""
    reason: str
    """Where its limits come from, or why it has none."""
    higher_is_better: bool = False


JUDGED = (
    Metric(
        "rows_left_alone",
        "change of rows left alone",
        "largest change of a cache row that the phase does not write",
        "a row is written or left as it is; no precision excuses anything between",
    ),
    Metric(
        "cache_error",
        "cache error",
        "error of the keys and values written, over their length (L2)",
        "ten roundings of the type: the unit roundoff is 6e-8, 5e-4 and 4e-3; FP32 also bears "
        "another order of summation",
    ),
    Metric(
        "logits_error",
        "logits error",
        "error of the raw logits, over their length (L2)",
        "as cache_error",
    ),
    Metric(
        "logits_largest_error",
        "largest logit error",
        "largest error of a raw logit, over the largest logit",
        "the worst of thousands of logits, where the mean would hide it",
    ),
    Metric(
        "kl",
        "KL (nats)",
        "mean KL divergence of the guided distribution in a phase, in nats",
        "in a single phase of few cells, so wider than sequence_kl",
    ),
    Metric(
        "image_psnr",
        "image PSNR (dB)",
        "PSNR of decoded images in dB, the signal's range being 2",
        "FP32's own noise is at 120 dB, and norms of another epsilon are below 105; 8-bit pixels "
        "are 59 dB from the exact value; 35 dB is a good JPEG, and what a build in INT8 asks "
        "of all its images together; the worst of 8 then had 29.97",
        higher_is_better=True,
    ),
    Metric(
        "index_agreement",
        "index agreement",
        "share of equal token indices when images are encoded",
        "cells between two codebook rows may fall to either side",
        higher_is_better=True,
    ),
    Metric(
        "sequence_kl",
        "KL over all steps (nats)",
        "mean KL divergence over all steps, each on its own earlier caches, in nats",
        "0.02 nats change the odds of a token by about 20 %",
    ),
    Metric(
        "sequence_top_1",
        "top-1 agreement over all steps",
        "share of all cells whose most probable token is the same, each on its own caches",
        "a little below the 99, 97 and 95 % that are promised of many images: few images scatter "
        "by half a percent",
        higher_is_better=True,
    ),
    Metric(
        "unexplained_draws",
        "draws not explained by rounding",
        "tokens that the reference's sampler would not draw from the bundle's own logits, or that "
        "were given to an edit and did not stay",
        "images may part through rounding of the logits alone; guidance and sampling are in FP32 "
        "in every precision",
    ),
    Metric(
        "generation_psnr",
        "PSNR of images of equal tokens (dB)",
        "PSNR in dB of the 8-bit pixels of images all of whose tokens are equal",
        "as image_psnr, with pixels that may be rounded to either side",
        higher_is_better=True,
    ),
)
"""What the verdict follows from. Metrics that say the same of different things share a line."""

REPORTED = (
    Metric(
        "token_agreement",
        "token agreement",
        "share of equal tokens in whole images drawn with the same uniform numbers",
        "in FP32 one draw in 100,000 is moved over a border by rounding, in a lower precision one "
        "in most images; what follows is another image, equally good. unexplained_draws judges "
        "every draw",
        higher_is_better=True,
    ),
    Metric(
        "equal_images",
        "images of equal tokens",
        "share of the images that have all tokens equal",
        "as token_agreement; generation_psnr is measured on these images alone",
        higher_is_better=True,
    ),
)
"""Figures that say something to a reader, and that no verdict can follow from."""

METRICS = {metric.name: metric for metric in (*JUDGED, *REPORTED)}

# fmt: off
_COLUMNS = ("cache_error", "logits_error", "logits_largest_error", "kl", "image_psnr",
            "index_agreement", "sequence_kl", "sequence_top_1", "generation_psnr")
_ROWS = {
    "fp32": (1e-5, 1e-5, 5e-5, 1e-8, 105.0, 0.999, 1e-8, 0.999, 50.0),
    "fp16": (5e-3, 5e-3, 2e-2, 1e-3,  50.0, 0.99,  5e-4, 0.985, 45.0),
    "bf16": (4e-2, 4e-2, 1e-1, 2e-2,  35.0, 0.9,   1e-2, 0.96,  35.0),
    "int8-weights": (0.03, 0.03, 0.08, 1e-2,  28.0, 0.9,   6e-3, 0.955, 28.0),
    "int4-weights": (0.3, 0.3, 0.5,  0.12,  28.0, 0.9,   6e-2, 0.86,  28.0),
    "int8": (0.15, 0.15, 0.3,  5e-2,  28.0, 0.9,   2e-2, 0.94,  28.0),
    "fp8":  (0.3, 0.3, 0.5,  0.12,  50.0, 0.99,   6e-2, 0.88,  45.0),
}
# fmt: on
LIMITS = {
    precision: {
        "rows_left_alone": 0.0,
        "unexplained_draws": 0.0,
        **dict(zip(_COLUMNS, row, strict=True)),
    }
    for precision, row in _ROWS.items()
}
"""The limits of every judged metric, a row a precision."""


@dataclass(frozen=True)
class Limits:
    """The limits of one verification."""

    precision: str
    """Whose limits they are: that of the two sides whose limits are the looser."""
    by_metric: dict[str, float]
    """In the order of JUDGED."""
    overridden: dict[str, float]
    """The precision's own limits of the metrics that the user gave another."""

    @classmethod
    def of(cls, precisions: Iterable[str], overrides: Iterable[str] = ()) -> Limits:
        """The limits for what is compared, the loosest of its precisions, with the user's own.

        Args:
            precisions: of both sides, the bundle's first; the reference is fp32.
            overrides: texts METRIC=LIMIT.

        Raises:
            UserError: for a metric that is not judged, or a limit that is not a finite number.
        """
        rows = {precision: LIMITS[precision] for precision in precisions}
        own = {
            metric.name: (min if metric.higher_is_better else max)(
                row[metric.name] for row in rows.values()
            )
            for metric in JUDGED
        }
        loosest = [precision for precision, row in rows.items() if row == own]
        given = dict(_parse(text) for text in overrides)
        return cls(
            loosest[0] if loosest else " and ".join(rows),
            own | given,
            {metric: own[metric] for metric, limit in given.items() if limit != own[metric]},
        )

    def limit(self, metric: str) -> float:
        """The limit of a metric."""
        return self.by_metric[metric]

    def met(self, metric: str, value: float) -> bool:
        """Whether a value of a metric keeps its limit; NaN never does."""
        return met(metric, value, self.by_metric[metric])


def met(metric: str, value: float, limit: float) -> bool:
    """Whether a value of a metric keeps a limit; NaN never does."""
    return value >= limit if METRICS[metric].higher_is_better else value <= limit


def _parse(text: str) -> tuple[str, float]:
    name, equals, number = text.partition("=")
    known = [metric.name for metric in JUDGED]
    if name not in known or not equals:
        raise UserError(
            f"--threshold {text} is not METRIC=LIMIT with one of the metrics {', '.join(known)}"
        )
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise UserError(f"--threshold {text}: {number!r} is not a finite number")
    return name, limit
