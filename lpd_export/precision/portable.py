"""A bundle's ONNX graphs in a form that ONNX Runtime's CPU can run, with the same numerics.

BF16, which it does not have, is computed in FP32 with every value rounded to BF16, which is what
hardware that accumulates in FP32 does. Signed INT8 activations become unsigned ones with the same
levels. Does not know what the graphs are for.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from lpd_export.bundle.manifest import GRAPH_NAMES, Bundle, Manifest
from lpd_export.formats import BACKENDS, BFLOAT16, PRECISIONS
from lpd_export.graphs import export
from lpd_export.runtime.backends import WEIGHTS

FLOAT, BF16 = ir.DataType.FLOAT, ir.DataType.BFLOAT16
MIDDLE = 128
"""The unsigned level of a signed 0."""


def portable_files(bundle: Bundle, scratch: Path) -> tuple[dict[str, Path], str]:
    """The files of a bundle's graphs, changed where the CPU needs it, and in words how.

    Args:
        bundle: of any backend and precision.
        scratch: a folder to make, for changed graphs.

    Raises:
        UserError: if a file is damaged.
    """
    bundle.file(WEIGHTS)
    files = {graph: bundle.graph(f"onnx/{graph}.onnx") for graph in GRAPH_NAMES}
    return portable_graphs(files, bundle.manifest, scratch)


def portable_graphs(
    files: dict[str, Path], manifest: Manifest, scratch: Path
) -> tuple[dict[str, Path], str]:
    """As `portable_files`, of graphs that are no bundle yet: `files` by graph, as in `manifest`."""
    bf16 = manifest.float_type == BFLOAT16.torch
    quantization = PRECISIONS[manifest.precision].tokenizer
    signed = (
        quantization is not None
        and quantization.activations == "INT8"
        and not BACKENDS[manifest.backend].unsigned
    )
    if not bf16 and not signed:
        return files, ""
    models = {graph: ir.load(file) for graph, file in files.items()}
    for model in models.values():
        if bf16:
            round_to_bf16(model)
        if signed:
            make_activations_unsigned(model)
    scratch.mkdir(parents=True)
    export.write_models(models, scratch)
    note = ", every value rounded to BF16" if bf16 else ", INT8 activations made unsigned"
    return {graph: scratch / f"{graph}.onnx" for graph in models}, note


def round_to_bf16(model: ir.Model) -> None:
    """Changes a BF16 graph to FP32 whose every value is rounded to BF16, in place.

    Its inputs and outputs become FP32.
    """
    graph = model.graph
    for value in graph.initializers.values():
        if value.dtype == BF16:
            assert value.const_value is not None
            content = value.const_value.numpy().astype(np.float32)
            value.const_value = ir.Tensor(content, dtype=FLOAT, name=value.name)
            value.dtype = FLOAT
    for node in list(graph):
        if node.op_type == "Cast" and node.attributes["to"].as_int() == BF16:
            node.attributes["to"] = ir.AttrInt64("to", int(FLOAT))
        for output in node.outputs:
            if output.dtype == BF16:
                output.dtype = FLOAT
                _round(graph, output, node)
    for value in graph.inputs:
        if value.dtype == BF16:
            value.dtype = FLOAT
            _round(graph, value, None)


def _round(graph: ir.Graph, value: ir.Value, producer: ir.Node | None) -> None:
    """Lets everything that uses a value use it rounded to BF16."""
    down = ir.node("Cast", [value], {"to": int(BF16)}, name=f"{value.name}/ToBF16")
    up = ir.node("Cast", down.outputs, {"to": int(FLOAT)}, name=f"{value.name}/FromBF16")
    down.outputs[0].dtype, up.outputs[0].dtype = BF16, FLOAT
    down.outputs[0].shape = up.outputs[0].shape = value.shape
    name, rounded = value.name, up.outputs[0]
    ir.convenience.replace_all_uses_with(value, rounded, replace_graph_outputs=producer is not None)
    down.replace_input_with(0, value)
    if producer is None:
        graph.insert_before(graph[0], [down, up])
        return
    graph.insert_after(producer, [down, up])
    value.name, rounded.name = f"{name}/exact", name


def make_activations_unsigned(model: ir.Model) -> None:
    """Moves signed activation levels by MIDDLE to unsigned ones, in place; weights stay signed."""
    graph = model.graph
    for node in list(graph):
        if node.op_type != "QuantizeLinear":
            continue
        zero_point, levels = node.inputs[2], node.outputs[0]
        assert zero_point is not None
        users = [use.node for use in levels.uses()]
        for user in (node, *users):
            user.replace_input_with(2, _unsigned(graph, zero_point))
        levels.dtype = ir.DataType.UINT8


def _unsigned(graph: ir.Graph, zero_point: ir.Value) -> ir.Value:
    """The zero point of the same levels as unsigned integers."""
    name = f"{zero_point.name}/unsigned"
    if name not in graph.initializers:
        assert zero_point.const_value is not None
        content = (zero_point.const_value.numpy().astype(np.int16) + MIDDLE).astype(np.uint8)
        tensor = ir.Tensor(content, dtype=ir.DataType.UINT8, name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(ir.DataType.UINT8))
        value.shape = ir.Shape(content.shape)
        graph.register_initializer(value)
    return graph.initializers[name]
