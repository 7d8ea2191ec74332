"""Compares what two Polygraphy runners gave, with Polygraphy's comparator.

Knows the metrics: Polygraphy's own error statistics and cosine, and beside them, in its form, the
relative error, KL divergence and agreement that matter for sampling. Does not know where outputs
come from; limits are handed in.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.comparator import (
    BaseCompareFunc,
    Comparator,
    CompareResult,
    CosineSimilarityCompareFunc,
    IterationResult,
    RunResults,
    SimpleCompareFunc,
    Threshold,
)
from polygraphy.logger import G_LOGGER

from lpd_export.accuracy.results import Measurement
from lpd_export.accuracy.thresholds import Limits
from lpd_export.precision.sensitivity import mean_kl
from lpd_export.schedule.phases import Phase

LEFT_ALONE = "rows_left_alone"
"""The output made of a phase's caches that says how far it changed rows it must not write."""
MEANS = frozenset({"kl", "top_1", "index_agreement", "sequence_kl", "sequence_top_1"})
"""Metrics whose mean over the images counts; of the others the worst."""
GUIDED, LOGITS, IMAGE, INDICES = "guided_logits", "logits", "image", "indices"


class MetricThreshold(Threshold):
    """A limit of `thresholds` in Polygraphy's form."""

    def __init__(self, metric: str, limits: Limits) -> None:
        self.metric = metric
        self._limits = limits

    def passed(self, metric_values: Mapping[str, float]) -> bool:
        return self._limits.met(self.metric, metric_values[self.metric])

    def describe(self, metric_values: Mapping[str, float]) -> tuple[str, bool]:
        value, passed = metric_values[self.metric], self.passed(metric_values)
        return f"{self.metric}: {value:.5g} (limit {self._limits.limit(self.metric):g})", passed


class MetricResult(CompareResult):
    """A metric of one output."""

    def __init__(self, value: float, threshold: MetricThreshold) -> None:
        super().__init__(thresholds=threshold)
        self.value = value

    def metric_values(self) -> OrderedDict[str, float]:
        return OrderedDict({self.thresholds.metric: self.value})


class MetricCompareFunc(BaseCompareFunc):
    """A Polygraphy comparison function of one metric over the outputs that it concerns.

    Args:
        metric: of `thresholds.THRESHOLDS`.
        measure: from the expected and the actual array to the metric.
        outputs: whether an output is concerned, by its name.
        limits: of this verification.
    """

    def __init__(
        self,
        metric: str,
        measure: Callable[[NDArray[Any], NDArray[Any]], float],
        outputs: Callable[[str], bool],
        limits: Limits,
    ) -> None:
        self.metric = metric
        self._measure = measure
        self._outputs = outputs
        self._threshold = MetricThreshold(metric, limits)

    def __call__(
        self, iter_result0: IterationResult, iter_result1: IterationResult
    ) -> OrderedDict[str, MetricResult]:
        results = OrderedDict()
        for name, expected in iter_result0.items():
            if self._outputs(name):
                value = self._measure(expected, iter_result1[name])
                results[name] = MetricResult(value, self._threshold)
        return results

    def thresholds_for(self, output_name: str) -> Threshold:
        return self._threshold


# --------------------------------------------------------------------------------- the metrics


def relative_error(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """Length of the error over the length of what was expected (L2)."""
    error = np.linalg.norm((actual.astype(np.float64) - expected).ravel())
    length = np.linalg.norm(expected.astype(np.float64).ravel())
    return float(error / length) if length else float(error)


def kl_divergence(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """Mean Kullback-Leibler divergence, in nats, of logits [..., V]."""
    one, other = (
        torch.from_numpy(logits).double().log_softmax(-1) for logits in (expected, actual)
    )
    return mean_kl(one, other)


def top_1_agreement(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """Share of equal most probable tokens of logits [..., V]; NaN if a logit is not finite."""
    if not np.isfinite(actual).all():
        return math.nan
    return float(np.mean(expected.argmax(-1) == actual.argmax(-1)))


def agreement(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """Share of equal entries."""
    return float(np.mean(expected == actual))


def index_agreement(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """Share of equal token indices; NaN if one is below 0, which is none."""
    if min(expected.min(), actual.min()) < 0:
        return math.nan
    return agreement(expected, actual)


def psnr(expected: NDArray[Any], actual: NDArray[Any], peak: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal images.

    peak: the range of the signal, 2 for images in [-1, 1], 255 for pixels.
    """
    error = float(np.mean((expected.astype(np.float64) - actual) ** 2))
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def image_psnr(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """PSNR in dB of images in [-1, 1], clipped to that range as they are when pixels are made."""
    return psnr(np.clip(expected, -1, 1), np.clip(actual, -1, 1))


def largest_change(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """The largest magnitude of what should be zero."""
    return float(np.abs(actual).max(initial=0.0))


def _is_cache(name: str) -> bool:
    return name.startswith("present_")


# ------------------------------------------------------------------------------ the comparison


def comparable(
    outputs: Mapping[str, NDArray[Any]], feed: Mapping[str, NDArray[Any]], phase: Phase
) -> OrderedDict[str, NDArray[Any]]:
    """A decode phase's outputs as they are compared: of the caches only the rows it writes.

    What the other rows have changed by, which must be nothing, is gathered in LEFT_ALONE [n], an
    entry a cache.
    """
    written = slice(phase.write_index, phase.write_index + phase.tokens)
    compared: OrderedDict[str, NDArray[Any]] = OrderedDict()
    changes = []
    for name, values in outputs.items():
        if not _is_cache(name):
            continue
        past = feed[name.replace("present", "past", 1)]
        compared[name] = values[:, :, written]
        changed = np.abs(values - past.astype(values.dtype))
        changed[:, :, written] = 0
        changes.append(changed.max())
    ordered = OrderedDict({LEFT_ALONE: np.array(changes)})
    # In the order of computation, so that the first failure is where to look.
    layers = len(compared) // 2
    for i in range(layers):
        for kind in ("key", "value"):
            name = f"present_{kind}_{i}"
            ordered[name] = compared[name]
    ordered[LOGITS], ordered[GUIDED] = outputs[LOGITS], outputs[GUIDED]
    return ordered


def compare_functions(expected: Mapping[str, NDArray[Any]], limits: Limits) -> list[Any]:
    """Polygraphy's comparison functions for these outputs, its own and those of this module."""
    functions: list[Any] = [
        MetricCompareFunc("rows_left_alone", largest_change, LEFT_ALONE.__eq__, limits),
        MetricCompareFunc("cache_error", relative_error, _is_cache, limits),
        MetricCompareFunc("logits_error", relative_error, LOGITS.__eq__, limits),
        MetricCompareFunc("kl", kl_divergence, GUIDED.__eq__, limits),
        MetricCompareFunc("top_1", top_1_agreement, GUIDED.__eq__, limits),
        MetricCompareFunc("image_psnr", image_psnr, IMAGE.__eq__, limits),
        MetricCompareFunc("index_agreement", index_agreement, INDICES.__eq__, limits),
    ]
    if LOGITS in expected:
        largest = float(np.abs(expected[LOGITS]).max())
        # Only the logits are judged by these two; of other outputs they are told.
        tolerance = {LOGITS: limits.limit("logits_largest_error") * largest, "": math.inf}
        cosine = {LOGITS: limits.limit("logits_cosine"), "": -math.inf}
        functions.append(SimpleCompareFunc(check_error_stat="max", atol=tolerance, rtol=0.0))
        functions.append(CosineSimilarityCompareFunc(cosine_similarity_threshold=cosine))
    if IMAGE in expected:
        functions.append(SimpleCompareFunc(check_error_stat="max", atol=math.inf, rtol=0.0))
    return functions


class Comparison:
    """Compares outputs iteration by iteration, and gathers the metrics of each phase.

    comparison = Comparison(limits)
    comparison.add("phase_07", expected, actual)
    comparison.measurements()
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._values: dict[tuple[str, str, str], list[float]] = {}

    def add(
        self,
        phase: str,
        expected: Mapping[str, NDArray[Any]],
        actual: Mapping[str, NDArray[Any]],
    ) -> None:
        """Compares one iteration of a phase: the same outputs of the two sides, by name."""
        runs = RunResults()
        for name, outputs in (("expected", expected), ("actual", actual)):
            # Polygraphy compares contiguous arrays alone.
            arrays = OrderedDict((key, np.ascontiguousarray(a)) for key, a in outputs.items())
            runs.append((name, [IterationResult(arrays, runner_name=name)]))
        functions = compare_functions(expected, self.limits)
        with quiet():
            accuracy = Comparator.compare_accuracy(runs, compare_func=functions)
        for function, result in zip(functions, accuracy, strict=True):
            for tensor, outcome in result["expected", "actual"][0].items():
                for metric, value in _metrics(function, tensor, outcome, expected):
                    self.note(phase, tensor, metric, value)

    def note(self, phase: str, tensor: str, metric: str, value: float) -> None:
        """Adds one value of a metric, measured elsewhere."""
        self._values.setdefault((phase, tensor, metric), []).append(value)

    def measurements(self) -> list[Measurement]:
        """Every metric over all iterations, in the order of computation."""
        found = []
        for (phase, tensor, metric), values in self._values.items():
            value = self._over_images(metric, values)
            limit = self.limits.limit(metric)
            passed = self.limits.met(metric, value)
            found.append(Measurement(phase, tensor, metric, value, limit, passed))
        order = {phase: number for number, phase in enumerate(phases_of(found))}
        tensors = {name: number for number, (_, name, _) in enumerate(self._values)}
        return sorted(found, key=lambda entry: (order[entry.phase], tensors[entry.tensor]))

    def _over_images(self, metric: str, values: list[float]) -> float:
        if metric in MEANS:
            return float(np.mean(values))
        # NaN is worse than anything: NumPy hands it on.
        return float(np.max(values) if self.limits.at_most(metric) else np.min(values))


def phases_of(measurements: list[Measurement]) -> list[str]:
    """Names of the phases in the order they appear."""
    return list(dict.fromkeys(measurement.phase for measurement in measurements))


def _metrics(
    function: Any, tensor: str, outcome: Any, expected: Mapping[str, NDArray[Any]]
) -> Iterator[tuple[str, float]]:
    """The metrics in the result of a comparison function."""
    if isinstance(function, MetricCompareFunc):
        yield function.metric, outcome.value
    elif isinstance(function, SimpleCompareFunc):
        if tensor == LOGITS:
            largest = float(np.abs(expected[LOGITS]).max())
            yield "logits_largest_error", outcome.max_absdiff / largest
        if tensor in (LOGITS, IMAGE) or _is_cache(tensor):
            yield "absolute_error", outcome.max_absdiff
    elif tensor == LOGITS and isinstance(function, CosineSimilarityCompareFunc):
        yield "logits_cosine", outcome.cosine_similarity


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Polygraphy's own lines, and NumPy's about values that are not finite, off the terminal.

    What is found is told by the report.
    """
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(all="ignore"):
        yield
