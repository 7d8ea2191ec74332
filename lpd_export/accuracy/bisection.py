"""Finds the fewest layers that must stay in higher precision for the thresholds to hold.

Halves the layers again and again: what is kept in higher precision on trial is quantized, run and
judged like any bundle. Knows the search and the trials; what is measured of a trial is known to
`phases` and `end_to_end`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from lpd_export.accuracy.bundle_side import BundleSide
from lpd_export.accuracy.comparison import Comparison
from lpd_export.accuracy.context import Context
from lpd_export.accuracy.end_to_end import compare_sequence
from lpd_export.accuracy.phases import decode_runs, detokenize_run, tokenize_run
from lpd_export.accuracy.reference_side import Reference
from lpd_export.accuracy.results import Bisection
from lpd_export.accuracy.sides import Task
from lpd_export.build.build import write_exact_graphs
from lpd_export.build.settings import Source
from lpd_export.bundle.manifest import GRAPH_NAMES
from lpd_export.files import write_atomically
from lpd_export.formats import BACKENDS, PRECISIONS, FloatType, Precision
from lpd_export.graphs import export
from lpd_export.precision.calibration import LayerMeasurement
from lpd_export.precision.casting import lower
from lpd_export.precision.convolutions import Spans
from lpd_export.precision.quantized_graph import quantize_graph
from lpd_export.precision.writer import EXACT, calibrate, spans_for
from lpd_export.progress import Report
from lpd_export.runtime.onnxruntime_executor import OnnxRuntimeExecutor
from lpd_export.runtime.pipeline import Pipeline

Element = TypeVar("Element")
Judge = Callable[[str, Path, bool], bool]
"""From a graph's name, its trial file and whether all is compared to whether its thresholds hold.

Not all is what takes little time: what fails there fails as a whole.
"""


def smallest_sufficient(
    candidates: Sequence[Element],
    suffices: Callable[[frozenset[Element]], bool],
    decided: Callable[[int], None] = lambda count: None,
) -> frozenset[Element] | None:
    """A set of candidates that suffices and of which none can be left out.

    Divide and conquer (Junker, QuickXplain, AAAI 2004): a few trials for each element of the
    answer and each halving of the candidates. Where more elements spoil what suffices, which
    rounding can bring about, the set still suffices, but some of it may be more than is needed.

    Args:
        candidates: the ones to prefer first.
        suffices: whether a set does; asked once of each set.
        decided: called with how many more candidates are known to be needed or not.

    Returns:
        The set, or None if not even all candidates suffice.
    """
    answers: dict[frozenset[Element], bool] = {}

    def enough(elements: frozenset[Element]) -> bool:
        if elements not in answers:
            answers[elements] = suffices(elements)
        return answers[elements]

    def needed_of(part: Sequence[Element], given: frozenset[Element]) -> frozenset[Element]:
        """What of `part` is needed beside `given`, all of it together being known to be enough.

        What is returned is known to be enough beside `given` too.
        """
        if enough(given):
            decided(len(part))
            return frozenset()
        if len(part) == 1:
            decided(1)
            return frozenset(part)
        first, second = part[: len(part) // 2], part[len(part) // 2 :]
        of_second = needed_of(second, given | frozenset(first))
        return of_second | needed_of(first, given | of_second)

    if enough(frozenset()):
        return frozenset()
    if not candidates or not enough(frozenset(candidates)):
        return None
    return needed_of(candidates, frozenset())


class Bisector:
    """Searches the graphs of one model.

    Args:
        exact: a folder with the FP32 ONNX files.
        scratch: a folder for trials; made here.
        precision: says how each graph is quantized.
        float_type: of what is not quantized.
        judge: tells whether a trial's graph keeps the limits.
        report: called with a line for each trial.
        spans: for each graph, of what convolutions read and give, where that is rounded too.
    """

    def __init__(
        self,
        exact: Path,
        scratch: Path,
        precision: Precision,
        float_type: FloatType,
        judge: Judge,
        report: Report,
        spans: Mapping[str, Spans] | None = None,
    ) -> None:
        self._spans = spans or {}
        self._exact = exact
        self._scratch = scratch
        self._precision = precision
        self._float_type = float_type
        self._judge = judge
        self._report = report

    def search(self, graph: str, layers: Mapping[str, LayerMeasurement]) -> Bisection:
        """The fewest layers of a graph to keep, the noisiest preferred.

        layers: what was measured of each, by node.
        """
        noisiest = sorted(layers, key=lambda node: layers[node].noise, reverse=True)
        trials = 0

        def holds(kept: frozenset[str], whole: bool, left: int) -> bool:
            nonlocal trials
            trials += 1
            ranges = {n: m.activation_range for n, m in layers.items() if n not in kept}
            held = self._try(graph, ranges, whole)
            self._report(
                f"{graph}, trial {trials}, {left} undecided: "
                f"{len(ranges)} of {len(layers)} layers in {self._precision.name}: "
                f"{'the thresholds hold' if held else 'a threshold fails'}"
                f"{'' if whole else ' over whole sequences'}"
            )
            return held

        def find(whole: bool) -> frozenset[str] | None:
            left = len(layers)

            def decided(count: int) -> None:
                nonlocal left
                left -= count

            return smallest_sufficient(noisiest, lambda kept: holds(kept, whole, left), decided)

        if graph == "decode":
            # Without one of these a threshold fails: all that is open is whether they suffice.
            kept = find(whole=False)
            if kept is not None and not holds(kept, whole=True, left=0):
                kept = find(whole=True)
        else:
            kept = find(whole=True)
        in_order = None if kept is None else [node for node in layers if node in kept]
        return Bisection(graph, len(layers), in_order, trials)

    def _try(self, graph: str, ranges: Mapping[str, float], whole: bool) -> bool:
        """Whether a graph with these layers quantized keeps the limits."""
        model = ir.load(self._exact / f"{graph}.onnx")
        lower(model, self._float_type)
        quantize_graph(
            model, graph, self._precision, ranges, self._spans, unsigned=True, kept_as=None
        )
        self._scratch.mkdir(parents=True, exist_ok=True)
        export.write_models({graph: model}, self._scratch)
        held = self._judge(graph, self._scratch / f"{graph}.onnx", whole)
        for file in self._scratch.iterdir():
            file.unlink()
        return held


def save_kept_layers(found: Sequence[Bisection], path: Path) -> None:
    """Writes what `lpd-export build --keep-layers` takes: a list of layers for each graph.

    Their weights stay as they are, as on trial: the limits were the user's, not the build's.
    """
    kept: dict[str, Any] = {each.graph: each.kept for each in found if each.kept is not None}
    assert set(kept) <= set(GRAPH_NAMES)
    content = json.dumps(kept | {EXACT: True}, indent=1)
    write_atomically(path, (content + "\n").encode())


# ---------------------------------------------------------------------------- in a verification


class RememberingReference(Reference):
    """A reference that is asked for the same sequences again and again, and computes them once."""

    def __init__(self, reference: Reference) -> None:
        super().__init__(reference.model, reference.tokenizer)
        self._logits: dict[tuple[int, ...], torch.Tensor] = {}

    def sequence_logits(self, task: Task, token_ids: NDArray[np.int64]) -> torch.Tensor:
        key = (*task.labels, *task.order_indices, *token_ids.ravel().tolist())
        if key not in self._logits:
            self._logits[key] = super().sequence_logits(task, token_ids)
        return self._logits[key]


def find_kept_layers(context: Context) -> list[Bisection]:
    """For each graph of a quantized bundle, the fewest layers that must not be quantized."""
    manifest, schedule = context.bundle.manifest, context.task.schedule
    assert isinstance(context.expected, Reference)
    reference = RememberingReference(context.expected)
    exact, trials = context.scratch / "exact", context.scratch / "trials"
    source = Source(reference.model, reference.tokenizer, None, None)
    write_exact_graphs(exact, source, BACKENDS[manifest.backend], context.report)
    trials.mkdir()
    calibration = calibrate(exact, trials, manifest, schedule, context.report)
    precision = PRECISIONS[manifest.precision]
    float_type = precision.float_type(manifest.backend)

    def judge(graph: str, file: Path, whole: bool) -> bool:
        executor = OnnxRuntimeExecutor(
            {graph: file}, float_type.torch, threads=context.request.threads
        )
        trial = BundleSide("trial", Pipeline(manifest, schedule, executor), "")
        return holds(graph, replace(context, expected=reference, actual=trial), whole)

    spans = spans_for(manifest.backend, calibration)
    bisector = Bisector(exact, trials, precision, float_type, judge, context.report, spans)
    return [bisector.search(graph, layers) for graph, layers in calibration.layers.items()]


def holds(graph: str, context: Context, whole: bool) -> bool:
    """Whether every threshold that concerns one graph holds for all images.

    whole: whether the decode graph's single phases are compared too, or whole sequences alone.
    """
    comparison = Comparison(context.limits)
    images = range(context.task.images)
    if graph == "decode":
        for i in images:
            compare_sequence(context, i, comparison)
        if not whole or not all(entry.passed for entry in comparison.measurements()):
            return all(entry.passed for entry in comparison.measurements())
    for i in images:
        if graph == "decode":
            runs = list(decode_runs(context, i))
        else:
            runs = [(detokenize_run if graph == "detokenize" else tokenize_run)(context, i)]
        for run in runs:
            comparison.add(run.name, *run.compared)
    return all(entry.passed for entry in comparison.measurements())
