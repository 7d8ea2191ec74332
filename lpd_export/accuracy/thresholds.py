"""How close to the reference a bundle must be: one table, by metric and precision.

Knows the limits, why they are what they are, and how a user overrides one. Does not know how
anything is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lpd_export.errors import UserError

PRECISIONS = ("fp32", "fp16", "bf16", "int8")


@dataclass(frozen=True)
class Threshold:
    """A limit that a metric must keep."""

    metric: str
    title: str
    """What it is called where a person reads it."""
    description: str
    """What the metric is, with its unit."""
    at_most: bool
    """Whether the value must be at most or at least the limit."""
    fp32: float
    fp16: float
    bf16: float
    int8: float
    reason: str
    """Where these limits come from."""

    def limit(self, precision: str) -> float:
        """The limit for a precision; infinite where none is asked."""
        return float(getattr(self, precision))

    def met(self, value: float, limit: float) -> bool:
        """Whether a value keeps a limit; NaN never does."""
        return value <= limit if self.at_most else value >= limit


NO_UPPER_LIMIT, NO_LOWER_LIMIT = math.inf, -math.inf

THRESHOLDS = (
    Threshold(
        "rows_left_alone",
        "change of rows left alone",
        "largest change of a cache row that the phase does not write",
        at_most=True,
        fp32=0.0,
        fp16=0.0,
        bf16=0.0,
        int8=0.0,
        reason="a row is written or left as it is; no precision excuses anything between",
    ),
    Threshold(
        "cache_error",
        "cache error",
        "error of the keys and values written, over their length (L2)",
        at_most=True,
        fp32=1e-5,
        fp16=5e-3,
        bf16=4e-2,
        int8=0.15,
        reason="ten roundings of the type: the unit roundoff is 6e-8, 5e-4 and 4e-3; FP32 also "
        "bears another order of summation",
    ),
    Threshold(
        "logits_error",
        "logits error",
        "error of the raw logits, over their length (L2)",
        at_most=True,
        fp32=1e-5,
        fp16=5e-3,
        bf16=4e-2,
        int8=0.15,
        reason="as cache_error",
    ),
    Threshold(
        "logits_largest_error",
        "largest logit error",
        "largest error of a raw logit, over the largest logit",
        at_most=True,
        fp32=5e-5,
        fp16=2e-2,
        bf16=1e-1,
        int8=0.3,
        reason="the worst of thousands of logits, where the mean would hide it",
    ),
    Threshold(
        "logits_cosine",
        "logits cosine",
        "cosine of raw logits",
        at_most=False,
        fp32=0.999999,
        fp16=0.9999,
        bf16=0.999,
        int8=0.98,
        reason="follows from logits_error; what other tools report",
    ),
    Threshold(
        "absolute_error",
        "absolute error",
        "largest error of a value of the keys and values written, the raw logits or the image",
        at_most=True,
        fp32=NO_UPPER_LIMIT,
        fp16=NO_UPPER_LIMIT,
        bf16=NO_UPPER_LIMIT,
        int8=NO_UPPER_LIMIT,
        reason="told, not judged: what is much depends on how large the values of a model are; "
        "cache_error, logits_largest_error and image_psnr judge the same outputs",
    ),
    Threshold(
        "kl",
        "KL (nats)",
        "mean KL divergence of the guided distribution in a phase, in nats",
        at_most=True,
        fp32=1e-8,
        fp16=1e-3,
        bf16=2e-2,
        int8=5e-2,
        reason="in a single phase of few cells, so wider than sequence_kl",
    ),
    Threshold(
        "top_1",
        "top-1 agreement",
        "share of cells of a phase whose most probable token is the same, after guidance",
        at_most=False,
        fp32=0.99,
        fp16=0.9,
        bf16=0.8,
        int8=0.7,
        reason="a phase holds few cells, and each near tie is a large share of them; "
        "sequence_top_1 is the stricter one",
    ),
    Threshold(
        "image_psnr",
        "image PSNR (dB)",
        "PSNR of decoded images in dB, the signal's range being 2",
        at_most=False,
        fp32=105.0,
        fp16=50.0,
        bf16=35.0,
        int8=30.0,
        reason="FP32's own noise is at 120 dB, and norms of another epsilon are below 105; 8-bit "
        "pixels are 59 dB from the exact value; 35 dB is a good JPEG; 30 dB is where one starts "
        "to see it",
    ),
    Threshold(
        "index_agreement",
        "index agreement",
        "share of equal token indices when images are encoded",
        at_most=False,
        fp32=0.999,
        fp16=0.99,
        bf16=0.9,
        int8=0.9,
        reason="cells between two codebook rows may fall to either side",
    ),
    Threshold(
        "sequence_kl",
        "KL over all steps (nats)",
        "mean KL divergence over all steps, each on its own earlier caches, in nats",
        at_most=True,
        fp32=1e-8,
        fp16=5e-4,
        bf16=1e-2,
        int8=2e-2,
        reason="0.02 nats change the odds of a token by about 20 %",
    ),
    Threshold(
        "sequence_top_1",
        "top-1 agreement over all steps",
        "share of all cells whose most probable token is the same, each on its own caches",
        at_most=False,
        fp32=0.999,
        fp16=0.985,
        bf16=0.96,
        int8=0.94,
        reason="a little below the 99, 97 and 95 % that are promised of many images: few images "
        "scatter by half a percent",
    ),
    Threshold(
        "token_agreement",
        "token agreement",
        "share of equal tokens in whole images drawn with the same uniform numbers",
        at_most=False,
        fp32=NO_LOWER_LIMIT,
        fp16=NO_LOWER_LIMIT,
        bf16=NO_LOWER_LIMIT,
        int8=NO_LOWER_LIMIT,
        reason="told, not judged: in FP32 one draw in 100,000 is moved over a border by rounding, "
        "more where all tokens are about as probable, in a lower precision one in most images; "
        "what follows is another image, equally good. unexplained_draws judges every draw",
    ),
    Threshold(
        "unexplained_draws",
        "draws not explained by rounding",
        "tokens that the reference's sampler would not draw from the bundle's own logits",
        at_most=True,
        fp32=0.0,
        fp16=0.0,
        bf16=0.0,
        int8=0.0,
        reason="images may part through rounding of the logits alone; guidance and sampling are "
        "in FP32 in every precision",
    ),
    Threshold(
        "generation_psnr",
        "PSNR of images of equal tokens (dB)",
        "PSNR in dB of the 8-bit pixels of images all of whose tokens are equal",
        at_most=False,
        fp32=50.0,
        fp16=45.0,
        bf16=35.0,
        int8=30.0,
        reason="as image_psnr, with pixels that may be rounded to either side",
    ),
)
"""Every metric, judged or told. Metrics that say the same of different things share a line."""

HIGHER_IS_BETTER = frozenset(threshold.metric for threshold in THRESHOLDS if not threshold.at_most)


@dataclass(frozen=True)
class Limits:
    """The thresholds of one verification."""

    by_metric: dict[str, tuple[Threshold, float]]

    @classmethod
    def of(cls, precisions: Iterable[str], overrides: Iterable[str] = ()) -> Limits:
        """The limits for what is compared, the loosest of its precisions, with the user's own.

        Args:
            precisions: of both sides; the reference is fp32.
            overrides: texts METRIC=LIMIT.

        Raises:
            UserError: for an unknown metric or a limit that is not a number.
        """
        precisions = list(precisions)
        chosen = {}
        for threshold in THRESHOLDS:
            limits = [threshold.limit(precision) for precision in precisions]
            chosen[threshold.metric] = (
                threshold,
                max(limits) if threshold.at_most else min(limits),
            )
        for text in overrides:
            metric, limit = _parse(text)
            chosen[metric] = (chosen[metric][0], limit)
        return cls(chosen)

    def limit(self, metric: str) -> float:
        """The limit of a metric."""
        return self.by_metric[metric][1]

    def met(self, metric: str, value: float) -> bool:
        """Whether a value of a metric keeps its limit; NaN never does."""
        threshold, limit = self.by_metric[metric]
        return threshold.met(value, limit)

    def at_most(self, metric: str) -> bool:
        """Whether the metric's values must be at most its limit."""
        return self.by_metric[metric][0].at_most


def _parse(text: str) -> tuple[str, float]:
    metric, equals, number = text.partition("=")
    known = [threshold.metric for threshold in THRESHOLDS]
    if metric not in known or not equals:
        raise UserError(
            f"--threshold {text} is not METRIC=LIMIT with one of the metrics {', '.join(known)}"
        )
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if math.isnan(limit):
        raise UserError(f"--threshold {text}: {number!r} is not a number")
    return metric, limit
