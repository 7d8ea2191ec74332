"""What quantizing each layer alone changes of the whole graph.

A layer's own noise does not say what becomes of it further on. So the decode graph is given both
products of every layer, the exact one and the quantized one, and gates that choose between them row
by row: one session computes an image many times at once, each time with another layer quantized.
Knows the graph and its run; what follows from it is decided in `sensitivity`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lpd_export.bundle.manifest import Manifest
from lpd_export.graphs import contract, export
from lpd_export.precision.quantization import Layer, quantizable_layers
from lpd_export.runtime.arrays import Array
from lpd_export.runtime.executor import Executor, ExecutorAround, Run
from lpd_export.runtime.onnxruntime_executor import OnnxRuntimeExecutor
from lpd_export.runtime.pipeline import Pipeline
from lpd_export.runtime.requests import GeneratedImage
from lpd_export.schedule.schedule_file import Schedule

Simulation = Callable[[ir.Model, Layer], ir.Value]
"""Adds nodes for what a layer gives once it is quantized, beside the graph; returns that value."""
GATES = "gates"
"""Input [rows, layers] of a gated graph: 1 where a row has a layer quantized, else 0."""
TOGETHER = 8
"""Layers that are tried in one run, each in rows of its own."""
FEWEST_CELLS = 256
"""Compared of each layer: enough to rank them, all of them being tried on the same cells."""


class GatedExecutor(ExecutorAround):
    """An executor whose gated decode graph has one layer quantized in the rows of each image.

    Attributes:
        chosen: the layer of each image of the batch, by its number.
    """

    def __init__(self, executor: Executor, layers: int) -> None:
        super().__init__(executor)
        self._layers = layers
        self.chosen: Sequence[int] = ()

    def bind(self, graph: str, tensors: Mapping[str, Array]) -> Run:
        rows = tensors[contract.TOKEN_IDS].shape[0]
        gates = np.eye(self._layers, dtype=np.float32)[list(self.chosen)]
        # Rows with a condition come first, then those without: an image has one of each.
        gates = np.tile(gates, (rows // len(self.chosen), 1))
        return self._executor.bind(graph, {**tensors, GATES: gates})


def add_gates(model: ir.Model, nodes: Collection[str], simulate: Simulation) -> list[str]:
    """Gives a graph the input GATES, in place; returns its layers in the order of the gates.

    Args:
        model: an FP32 decode graph.
        nodes: of the layers to try.
        simulate: one of them.
    """
    graph = model.graph
    layers = [layer for layer in quantizable_layers(model) if layer.node in nodes]
    gates = ir.Value(name=GATES, type=ir.TensorType(ir.DataType.FLOAT))
    gates.shape = ir.Shape([contract.ROWS, len(layers)])
    graph.inputs.append(gates)

    def constant(name: str, number: int) -> ir.Value:
        value = ir.Value(name=f"{GATES}/{name}", const_value=ir.tensor([number]))
        graph.register_initializer(value)
        return value

    last = constant("last", 2)
    for number, layer in enumerate(layers):
        product = next(node for node in graph if node.name == layer.node)
        exact = product.outputs[0]
        users, name, is_output = list(exact.uses()), exact.name, exact.is_graph_output()
        rounded = simulate(model, layer)
        gate = ir.node("Gather", [gates, constant(layer.node, number)], {"axis": 1})
        gate_of_row = ir.node("Unsqueeze", [gate.outputs[0], last])
        change = ir.node("Sub", [rounded, exact])
        gated = ir.node("Mul", [change.outputs[0], gate_of_row.outputs[0]])
        result = ir.node("Add", [exact, gated.outputs[0]])
        producer = rounded.producer()
        assert producer is not None
        graph.insert_after(producer, [gate, gate_of_row, change, gated, result])
        result.outputs[0].type, result.outputs[0].shape = exact.type, exact.shape
        for user, at in users:
            user.replace_input_with(at, result.outputs[0])
        if is_output:
            graph.outputs[list(graph.outputs).index(exact)] = result.outputs[0]
            exact.name, result.outputs[0].name = f"{name}/exact", name
    return [layer.node for layer in layers]


def log_probabilities_of(pipeline: Pipeline, images: Sequence[GeneratedImage]) -> Tensor:
    """[B, S, V], guided, of each token that images are made of, in generation order."""
    return torch.from_numpy(pipeline.teacher_forced_logits(images)).log_softmax(dim=-1)


def worth_of_layers(
    graphs: Path,
    scratch: Path,
    manifest: Manifest,
    schedule: Schedule,
    nodes: Collection[str],
    simulate: Simulation,
    images: Sequence[GeneratedImage],
    log_probabilities: Tensor,
) -> dict[str, float]:
    """The mean KL divergence that quantizing each layer of the decode graph alone brings about.

    Args:
        graphs: a folder with the FP32 ONNX files.
        scratch: an empty folder.
        manifest, schedule: of the bundle in the making.
        nodes: of the layers to try.
        simulate: one of them.
        images: some are compared, the first ones.
        log_probabilities: [images, S, V] as the exact graphs have them.
    """
    model = ir.load(graphs / "decode.onnx")
    layers = add_gates(model, nodes, simulate)
    export.write_models({"decode": model}, scratch)
    executor = GatedExecutor(OnnxRuntimeExecutor({"decode": scratch / "decode.onnx"}), len(layers))
    pipeline = Pipeline(manifest, schedule, executor)
    count = min(len(images), math.ceil(FEWEST_CELLS / log_probabilities.shape[1]))
    worth = torch.zeros(len(layers))
    for first in range(0, len(layers), TOGETHER):
        executor.chosen = range(first, min(first + TOGETHER, len(layers)))
        for image, exact in zip(images[:count], log_probabilities[:count], strict=True):
            rounded = log_probabilities_of(pipeline, [image] * len(executor.chosen))
            divergence = (exact.exp() * (exact - rounded)).sum(dim=-1)
            worth[first : first + TOGETHER] += divergence.mean(dim=-1) / count
    for file in scratch.iterdir():
        file.unlink()
    return dict(zip(layers, worth.tolist(), strict=True))
