"""Which operators of each graph take the time, as ONNX Runtime or TensorRT tell it.

Knows the two profilers. With one at work all takes longer: shares are right, sums are not.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpd_export.bench.timing import TimedExecutor
from lpd_export.bundle.manifest import Bundle
from lpd_export.formats import BACKENDS
from lpd_export.runtime.arrays import Array
from lpd_export.runtime.backends import open_executor
from lpd_export.runtime.executor import Run
from lpd_export.runtime.onnxruntime_executor import OnnxRuntimeExecutor
from lpd_export.runtime.pipeline import Pipeline


@dataclass(frozen=True)
class OperatorTime:
    """An operator of a graph, or of an engine a layer, in one generation of a batch."""

    operator: str
    seconds: float
    calls: int


def profile(
    bundle: Bundle, batch: int, device: str | None, threads: int | None
) -> dict[str, list[OperatorTime]]:
    """By graph, its operators in one generation after a warm one, the slowest first.

    Raises:
        UserError: if a file is damaged, or this machine has not what the backend needs.
    """
    labels = [0] * batch
    with tempfile.TemporaryDirectory(prefix="lpd-export-") as folder:
        executor = open_executor(bundle, device, threads, Path(folder))
        if BACKENDS[bundle.manifest.backend].compiles:
            listener = ListeningExecutor(executor)
            with Pipeline(bundle.manifest, bundle.schedule(), listener) as pipeline:
                pipeline.generate(labels, batch=batch)
                listener.times.clear()
                pipeline.generate(labels, batch=batch)
            return {graph: slowest(times) for graph, times in listener.times.items()}
        with Pipeline(bundle.manifest, bundle.schedule(), executor) as pipeline:
            for _ in range(2):
                pipeline.generate(labels, batch=batch)
        assert isinstance(executor, OnnxRuntimeExecutor)
        files = executor.take_profiles()
        return {
            graph: slowest(second_half(json.loads(file.read_bytes())))
            for graph, file in files.items()
        }


class ListeningExecutor(TimedExecutor):
    """An executor of engines whose layers tell how long they take."""

    def __init__(self, executor: Any) -> None:
        super().__init__(executor)
        self.times: dict[str, list[tuple[str, float]]] = defaultdict(list)
        """By graph, names and seconds of layers as they ran."""

    def bind(self, graph: str, tensors: Mapping[str, Array]) -> Run:
        binding: Any = self._executor.bind(graph, tensors)
        binding.profile(lambda name, ms: self.times[graph].append((name, ms / 1e3)))
        return binding


def second_half(events: list[dict[str, Any]]) -> Iterable[tuple[str, float]]:
    """Operators and seconds of the second half of a session's runs, in ONNX Runtime's profile."""
    runs = sorted(event["ts"] for event in events if event["name"] == "model_run")
    middle = runs[len(runs) // 2]
    for event in events:
        kernel = event["cat"] == "Node" and event["name"].endswith("_kernel_time")
        if kernel and event["ts"] >= middle:
            yield event["args"]["op_name"], event["dur"] / 1e6


def slowest(times: Iterable[tuple[str, float]]) -> list[OperatorTime]:
    """Summed by operator."""
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for name, took in times:
        seconds[name] += took  # type: ignore[assignment]
        calls[name] += 1
    return [OperatorTime(name, took, calls[name]) for name, took in seconds.most_common()]
