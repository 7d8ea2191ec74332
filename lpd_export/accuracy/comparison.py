"""Compares what two Polygraphy runners gave, with Polygraphy's comparator.

Knows the metrics, as comparison functions of Polygraphy: the relative error, KL divergence and
agreement that matter for sampling. Does not know where outputs come from; limits are handed in.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.comparator import Comparator, IterationResult, RunResults
from polygraphy.logger import G_LOGGER

from lpd_export.accuracy.results import Figure, Measurement
from lpd_export.accuracy.thresholds import METRICS, Limits
from lpd_export.precision.sensitivity import mean_kl
from lpd_export.schedule.phases import Phase

LEFT_ALONE = "rows_left_alone"
"""The output made of a phase's caches that says how far it changed rows it must not write."""
MEANS = frozenset({"kl", "index_agreement", "sequence_kl", "sequence_top_1", "equal_images"})
"""Metrics whose mean over the images counts; of the others the worst."""
GUIDED, LOGITS, IMAGE, INDICES = "guided_logits", "logits", "image", "indices"
PRESENT = "present_"


class Outcome(NamedTuple):
    """A metric of one output; true if it keeps its limit, as Polygraphy asks."""

    value: float
    passed: bool

    def __bool__(self) -> bool:
        return self.passed


# --------------------------------------------------------------------------------- the metrics


def relative_error(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """Length of the error over the length of what was expected (L2)."""
    error = np.linalg.norm((actual.astype(np.float64) - expected).ravel())
    length = np.linalg.norm(expected.astype(np.float64).ravel())
    return float(error / length) if length else float(error)


def largest_error(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """The largest error, over the largest magnitude of what was expected."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


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


MEASURES: dict[str, tuple[str, Callable[[NDArray[Any], NDArray[Any]], float]]] = {
    "rows_left_alone": (LEFT_ALONE, largest_change),
    "cache_error": (PRESENT, relative_error),
    "logits_error": (LOGITS, relative_error),
    "logits_largest_error": (LOGITS, largest_error),
    "kl": (GUIDED, kl_divergence),
    "image_psnr": (IMAGE, image_psnr),
    "index_agreement": (INDICES, index_agreement),
}
"""Of single phases: how the names of the outputs begin that a metric is of, and its measure."""


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
        if not name.startswith(PRESENT):
            continue
        past = feed[name.replace("present", "past", 1)]
        compared[name] = values[..., written, :]
        changed = np.abs(values - past.astype(values.dtype))
        changed[..., written, :] = 0
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


def compare_function(
    metric: str, limits: Limits
) -> Callable[[IterationResult, IterationResult], dict[str, Outcome]]:
    """A comparison function of Polygraphy: one metric of the outputs that it concerns, by name."""
    outputs, measure = MEASURES[metric]

    def compare(expected: IterationResult, actual: IterationResult) -> dict[str, Outcome]:
        values = {
            name: measure(array, actual[name])
            for name, array in expected.items()
            if name.startswith(outputs)
        }
        return {name: Outcome(value, limits.met(metric, value)) for name, value in values.items()}

    return compare


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
        functions = [compare_function(metric, self.limits) for metric in MEASURES]
        with quiet():
            accuracy = Comparator.compare_accuracy(runs, compare_func=functions)
        for metric, result in zip(MEASURES, accuracy, strict=True):
            for tensor, outcome in result["expected", "actual"][0].items():
                self.note(phase, tensor, metric, outcome.value)

    def note(self, phase: str, tensor: str, metric: str, value: float) -> None:
        """Adds one value of a metric, measured elsewhere."""
        self._values.setdefault((phase, tensor, metric), []).append(value)

    def measurements(self) -> list[Measurement]:
        """Every judged metric over all iterations, in the order of computation."""
        tensors = {tensor: number for number, (_, tensor, _) in enumerate(self._values)}
        phases = list(dict.fromkeys(phase for phase, _, _ in self._values))
        found = [
            Measurement(
                *place,
                value := self._over_images(place[2], values),
                self.limits.limit(place[2]),
                self.limits.met(place[2], value),
            )
            for place, values in self._values.items()
            if place[2] in self.limits.by_metric
        ]
        return sorted(found, key=lambda entry: (phases.index(entry.phase), tensors[entry.tensor]))

    def figures(self) -> list[Figure]:
        """What was noted that is reported alone."""
        return [
            Figure(*place, self._over_images(place[2], values))
            for place, values in self._values.items()
            if place[2] not in self.limits.by_metric
        ]

    def _over_images(self, metric: str, values: list[float]) -> float:
        if metric in MEANS:
            return float(np.mean(values))
        # NaN is worse than anything: NumPy hands it on.
        return float(np.min(values) if METRICS[metric].higher_is_better else np.max(values))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Polygraphy's own lines, and NumPy's about values that are not finite, off the terminal.

    What is found is in the report.
    """
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(all="ignore"):
        yield
