"""What happens inside the graphs while the model does its own work.

A graph is given one more output, a vector of measurements; a `Recorder` around the executor binds
it and combines what it gets over all runs. The generator then runs as always, so that what is
measured is real decode phases, both guidance rows, several classes, and images that the model
made. Knows how to measure; what follows from it is decided in `casting`, `equalization` and
`sensitivity`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpd_export.bundle.manifest import GRAPH_NAMES, Manifest
from lpd_export.formats import Quantization
from lpd_export.graphs import export
from lpd_export.graphs.contract import LOGITS
from lpd_export.graphs.written_rows import is_cut
from lpd_export.precision.convolutions import Span, best_span, convolution_values, samples_of
from lpd_export.precision.equalization import balances, best_scale
from lpd_export.precision.quantization import CLIPPING, Layer, quantizable_layers, simulate_layer
from lpd_export.runtime.arrays import Array
from lpd_export.runtime.executor import Executor, ExecutorAround, Run
from lpd_export.runtime.onnxruntime_executor import OnnxRuntimeExecutor
from lpd_export.runtime.pipeline import Pipeline
from lpd_export.schedule.schedule_file import Schedule

MEASUREMENTS = "measurements"
FEWEST_IMAGES, MOST_IMAGES = 4, 16
"""Generated in each measuring pass; the fewest are enough from FULL_RESOLUTION on."""
FULL_RESOLUTION = 256
BATCH = 2
ROWS_KEPT = 16
"""Of each normalization's output, in each step of a batch."""
SEED = 2**63
"""Of these images: far from the seeds that users choose."""

Measured = dict[str, dict[str, float]]
"""A number for each name, for each graph."""


@dataclass
class Instruments:
    """What a graph gives besides its own outputs."""

    scalars: dict[str, ir.Value]
    """Combined over all runs."""
    matrices: dict[str, ir.Value] = field(default_factory=dict)
    """Each [rows, columns], of which the rows of all runs are kept."""


class Recorder(ExecutorAround):
    """An executor that also combines the measurements of all runs, and keeps matrices.

    Args:
        executor: of graphs with the output MEASUREMENTS.
        names: of the entries, for each graph.
        combine: np.maximum or np.add; both hand on NaN, so that it is never forgotten.
        matrices: [rows, columns] of the outputs to keep by name, for each graph.
    """

    def __init__(
        self,
        executor: Executor,
        names: Mapping[str, Sequence[str]],
        combine: np.ufunc,
        matrices: Mapping[str, Mapping[str, tuple[int, ...]]],
    ) -> None:
        super().__init__(executor)
        self._names = names
        self._matrices = matrices
        self._kept: dict[str, list[NDArray[np.float32]]] = {}
        self._combine = combine
        self._values = {
            graph: np.zeros(len(entries), np.float32) for graph, entries in names.items()
        }

    def bind(self, graph: str, tensors: Mapping[str, Array]) -> Run:
        if graph not in self._names:
            return self._executor.bind(graph, tensors)
        now = np.zeros_like(self._values[graph])
        matrices = {
            name: np.zeros(shape, np.float32) for name, shape in self._matrices[graph].items()
        }
        run = self._executor.bind(graph, {**tensors, MEASUREMENTS: now, **matrices})
        return partial(self._run, graph, run, now, matrices)

    def _run(self, graph: str, run: Run, now: Array, matrices: Mapping[str, Array]) -> None:
        run()
        self._values[graph] = self._combine(self._values[graph], now)
        for name, matrix in matrices.items():
            self._kept.setdefault(name, []).append(matrix.copy())

    def measured(self) -> Measured:
        """Everything so far."""
        return {
            graph: dict(zip(names, self._values[graph].tolist(), strict=True))
            for graph, names in self._names.items()
        }

    def kept(self) -> dict[str, Tensor]:
        """Each matrix, the rows of all runs one below the other."""
        return {
            name: torch.from_numpy(np.concatenate(matrices))
            for name, matrices in self._kept.items()
        }


def add_measurements(model: ir.Model, scalars: Mapping[str, ir.Value]) -> list[str]:
    """Gathers float scalars of a graph as its output MEASUREMENTS [n]; returns their names."""
    graph = model.graph
    axis = ir.Value(name="measurements/axis", const_value=ir.tensor([0], name="measurements/axis"))
    graph.register_initializer(axis)
    entries = [ir.node("Unsqueeze", [scalar, axis]) for scalar in scalars.values()]
    together = ir.node("Concat", [entry.outputs[0] for entry in entries], {"axis": 0})
    graph.extend([*entries, together])
    result = together.outputs[0]
    result.name, result.dtype = MEASUREMENTS, ir.DataType.FLOAT
    result.shape = ir.Shape([len(scalars)])
    graph.outputs.append(result)
    return list(scalars)


def add_outputs(model: ir.Model, matrices: Mapping[str, ir.Value]) -> dict[str, tuple[int, ...]]:
    """Gives matrices out under their names; returns their shapes."""
    for name, value in matrices.items():
        value.name, value.dtype = name, ir.DataType.FLOAT
        model.graph.outputs.append(value)
    return {name: value.shape.numpy() for name, value in matrices.items() if value.shape}


def largest_magnitudes(model: ir.Model) -> dict[str, ir.Value]:
    """For each float value that a node computes, nodes for its largest magnitude.

    Inputs are not among them, nor what is cut of them: caches come back as outputs, and a mask is
    as large as its type allows.
    """
    graph, scalars = model.graph, {}
    nodes = [node for node in graph if node.op_type != "Slice" and not is_cut(node)]
    values = [value for node in nodes for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    for value in values:
        magnitude = ir.node("Abs", [value])
        largest = ir.node("ReduceMax", magnitude.outputs, {"keepdims": 0})
        graph.extend([magnitude, largest])
        scalars[str(value.name)] = largest.outputs[0]
    return scalars


def largest_of_channels(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """[1, channels] of a value [..., channels]: the largest magnitude of each."""
    magnitude = ir.node("Abs", [_as_rows(graph, value)])
    axes = _constant(graph, "largest_of_channels/axes", [0])
    largest = ir.node("ReduceMax", [magnitude.outputs[0], axes], {"keepdims": 1})
    graph.extend([magnitude, largest])
    largest.outputs[0].shape = ir.Shape([1, _channels(value)])
    return largest.outputs[0]


def some_rows(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """[ROWS_KEPT, channels] of a value [..., channels]: rows at equal distances."""
    rows = _as_rows(graph, value)
    count = ir.node("Shape", [rows], {"start": 0, "end": 1})
    number = ir.node("Cast", count.outputs, {"to": int(ir.DataType.FLOAT)})
    places = [(i + 0.5) / ROWS_KEPT for i in range(ROWS_KEPT)]
    place = ir.node("Mul", [number.outputs[0], _constant(graph, "some_rows/places", places)])
    index = ir.node("Cast", place.outputs, {"to": int(ir.DataType.INT64)})
    chosen = ir.node("Gather", [rows, index.outputs[0]], {"axis": 0})
    graph.extend([count, number, place, index, chosen])
    chosen.outputs[0].shape = ir.Shape([ROWS_KEPT, _channels(value)])
    return chosen.outputs[0]


def _as_rows(graph: ir.Graph, value: ir.Value) -> ir.Value:
    shape = [-1, _channels(value)]
    rows = ir.node("Reshape", [value, _constant(graph, f"rows_of_{shape[1]}/shape", shape)])
    graph.append(rows)
    return rows.outputs[0]


def _channels(value: ir.Value) -> int:
    assert value.shape is not None
    return int(value.shape[-1])  # type: ignore[arg-type]


def _constant(graph: ir.Graph, name: str, content: Sequence[int] | Sequence[float]) -> ir.Value:
    if name not in graph.initializers:
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(content, name=name)))
    return graph.initializers[name]


def sum_of_squares(graph: ir.Graph, value: ir.Value) -> ir.Value:
    reduced = ir.node("ReduceSumSquare", [value], {"keepdims": 0})
    graph.append(reduced)
    return reduced.outputs[0]


def difference(graph: ir.Graph, first: ir.Value, second: ir.Value) -> ir.Value:
    node = ir.node("Sub", [first, second])
    graph.append(node)
    return node.outputs[0]


def spread_labels(num_classes: int, count: int) -> list[int]:
    """Class ids as far apart as possible, repeated if there are too few."""
    spread = np.linspace(0, num_classes - 1, min(count, num_classes)).round().astype(int)
    return [int(label) for label in np.resize(spread, count)]


def calibration_images(resolution: int) -> int:
    """How many images are generated in each measuring pass, of as many classes.

    Small images hold few activations each and cost little: there are as many more of them as make
    up for the pixels, up to MOST_IMAGES.
    """
    pixels = (FULL_RESOLUTION / resolution) ** 2
    return int(min(MOST_IMAGES, max(FEWEST_IMAGES, FEWEST_IMAGES * pixels)))


@dataclass(frozen=True)
class LayerMeasurement:
    """What quantizing one layer would do."""

    activation_range: float
    """Where the activation is cut off: the choice of least squared error."""
    noise: float
    """Squared error of the layer's output over its squared magnitude, with weight and activation
    quantized."""


@dataclass(frozen=True)
class Calibration:
    """Everything that was measured of a model."""

    ranges: Measured
    """The largest magnitude of each value, for each graph."""
    channels: dict[str, list[float]]
    """The largest magnitude of each channel of what the decode graph's normalizations give."""
    scales: dict[str, list[float]] = field(default_factory=dict)
    """What they are divided by before quantization; `ranges` and `channels` are from before."""
    layers: dict[str, dict[str, LayerMeasurement]] = field(default_factory=dict)
    """For each layer's node of the graphs whose products are computed on levels."""
    spans: dict[str, dict[str, Span]] = field(default_factory=dict)
    """For these graphs, of what convolutions read and give, by name."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        values = json.loads(text)
        layers = {
            graph: {node: LayerMeasurement(**entry) for node, entry in entries.items()}
            for graph, entries in values["layers"].items()
        }
        spans = {
            graph: {name: Span(*ends) for name, ends in entries.items()}
            for graph, entries in values["spans"].items()
        }
        return cls(values["ranges"], values["channels"], values["scales"], layers, spans)


class Calibrator:
    """Measures FP32 graphs at work.

    Args:
        graphs: a folder with the FP32 ONNX files.
        scratch: a folder for instrumented copies, which take as much disk again.
        manifest, schedule: of the bundle in the making.
    """

    def __init__(self, graphs: Path, scratch: Path, manifest: Manifest, schedule: Schedule) -> None:
        self._graphs = graphs
        self._scratch = scratch
        # These graphs take any batch, whatever engines are to take.
        self._manifest = dataclasses.replace(manifest, max_batch=None)
        self._schedule = schedule
        self._labels = spread_labels(
            manifest.model.num_classes, calibration_images(manifest.resolution)
        )

    def survey(self, kind: Quantization | None) -> Calibration:
        """The largest magnitude of every value and channel; not those of layers.

        kind: of levels that the decode graph's channels are to be scaled for, if any.
        """

        def instrument(graph: str, model: ir.Model) -> Instruments:
            found = balances(model)  # while nothing else reads what they give
            instruments = Instruments(largest_magnitudes(model))
            values = {value.name: value for node in model.graph for value in node.outputs}
            for balance in found:
                output = values[balance.output]
                instruments.matrices[f"{balance.name}/largest"] = largest_of_channels(
                    model.graph, output
                )
                if kind:
                    instruments.matrices[f"{balance.name}/rows"] = some_rows(model.graph, output)
            return instruments

        recorder = self._measure(instrument, np.maximum)
        kept = recorder.kept()
        model = ir.load(self._graphs / "decode.onnx")
        found = balances(model)
        largest = {b.name: kept[f"{b.name}/largest"].amax(dim=0) for b in found}
        scales: dict[str, list[float]] = {}
        if kind:
            for balance in found:
                rows = kept[f"{balance.name}/rows"]
                scale = best_scale(rows, largest[balance.name], balance.weights(), kind)
                scales[balance.name] = scale.tolist()
        channels = {norm: values.tolist() for norm, values in largest.items()}
        return Calibration(recorder.measured(), channels, scales)

    def layers(
        self, ranges: Measured, kinds: Mapping[str, Quantization]
    ) -> tuple[dict[str, dict[str, LayerMeasurement]], dict[str, dict[str, Span]]]:
        """Activation ranges and noise of every layer that could be quantized.

        And the spans of what convolutions read and give.

        Args:
            ranges: the largest magnitude of each value.
            kinds: of levels, for each graph to measure.
        """
        recorder = self._measure(
            partial(self._clipping_errors, ranges=ranges, kinds=kinds), np.add, [*kinds]
        )
        tried = recorder.measured()
        spans: dict[str, dict[str, Span]] = {graph: {} for graph in kinds}
        for name, samples in recorder.kept().items():
            graph, value = name.split(":", 1)
            spans[graph][value] = best_span(samples)
        chosen: Measured = {}
        for graph, errors in tried.items():
            best: dict[str, tuple[float, float]] = {}
            for name, error in errors.items():
                node, clipping = name.rsplit("@", 1)
                best[node] = min(best.get(node, (float("inf"), 1.0)), (error, float(clipping)))
            activations = {layer.node: layer.activation for layer in self._layers(graph)}
            chosen[graph] = {
                node: clipping * ranges[graph].get(activations[node], 1.0)
                for node, (_, clipping) in best.items()
            }
        noise = self._measure(
            partial(self._noise, ranges=chosen, kinds=kinds), np.add, [*kinds]
        ).measured()
        layers = {
            graph: {
                node: LayerMeasurement(
                    activation_range=activation_range,
                    noise=noise[graph][f"{node}@error"] / (noise[graph][f"{node}@signal"] or 1.0),
                )
                for node, activation_range in entries.items()
            }
            for graph, entries in chosen.items()
        }
        return layers, spans

    def moments(self) -> dict[str, Tensor]:
        """Second moments [in, in] of what each product of the decode graph reads, by its name."""

        def instrument(graph: str, model: ir.Model) -> Instruments:
            read = {layer.activation for layer in quantizable_layers(model)}
            values = [v for node in list(model.graph) for v in node.outputs if v.name in read]
            rows = {f"{v.name}/rows": some_rows(model.graph, v) for v in values}
            logits = sum_of_squares(model.graph, model.graph.outputs[0])
            return Instruments({LOGITS: logits}, rows)

        kept = self._measure(instrument, np.add, ("decode",)).kept()
        return {name.removesuffix("/rows"): rows.T @ rows for name, rows in kept.items()}

    def _layers(self, graph: str) -> list[Layer]:
        return quantizable_layers(ir.load(self._graphs / f"{graph}.onnx"))

    @staticmethod
    def _clipping_errors(
        graph: str, model: ir.Model, ranges: Measured, kinds: Mapping[str, Quantization]
    ) -> Instruments:
        """Squared error of each layer's activation, for each place to cut it off.

        And samples of what convolutions read and give.
        """
        scalars = {}
        matrices = {
            f"{graph}:{name}": samples_of(model.graph, value)
            for name, value in convolution_values(model).items()
        }
        for layer in quantizable_layers(model):
            largest = ranges[graph].get(layer.activation, 1.0)
            # Cutting off gives levels closer together, which floats need not.
            for clipping in CLIPPING if kinds[graph].integer else (1.0,):
                rounded, exact = simulate_layer(
                    model, layer, clipping * largest, weight=False, kind=kinds[graph]
                )
                error = difference(model.graph, rounded, exact)
                scalars[f"{layer.node}@{clipping}"] = sum_of_squares(model.graph, error)
        return Instruments(scalars, matrices)

    @staticmethod
    def _noise(
        graph: str, model: ir.Model, ranges: Measured, kinds: Mapping[str, Quantization]
    ) -> Instruments:
        """Squared error and squared magnitude of each layer's output."""
        scalars = {}
        for layer in quantizable_layers(model):
            rounded, exact = simulate_layer(
                model, layer, ranges[graph][layer.node], weight=True, kind=kinds[graph]
            )
            error = difference(model.graph, rounded, exact)
            scalars[f"{layer.node}@error"] = sum_of_squares(model.graph, error)
            scalars[f"{layer.node}@signal"] = sum_of_squares(model.graph, exact)
        return Instruments(scalars)

    def _measure(
        self,
        instrument: Callable[[str, ir.Model], Instruments],
        combine: np.ufunc,
        graphs: Sequence[str] = GRAPH_NAMES,
    ) -> Recorder:
        """Generates images with instrumented graphs; decodes and encodes them, if it is all."""
        models, names, matrices = {}, {}, {}
        for graph in graphs:
            models[graph] = ir.load(self._graphs / f"{graph}.onnx")
            instruments = instrument(graph, models[graph])
            names[graph] = add_measurements(models[graph], instruments.scalars)
            matrices[graph] = add_outputs(models[graph], instruments.matrices)
        export.write_models(models, self._scratch)
        files = {
            graph: (self._scratch if graph in models else self._graphs) / f"{graph}.onnx"
            for graph in GRAPH_NAMES
        }
        recorder = Recorder(OnnxRuntimeExecutor(files), names, combine, matrices)
        pipeline = Pipeline(self._manifest, self._schedule, recorder)
        images = pipeline.generate(self._labels, seed=SEED, batch=BATCH)
        for image in images if "detokenize" in models else ():
            pixels = pipeline.detokenize(image.token_ids[None])
            pipeline.tokenize(np.clip(pixels, -1, 1))
        for file in self._scratch.iterdir():
            file.unlink()
        return recorder
