"""Sets the precision of exported graphs: FP32 as they are, FP16 or BF16 throughout.

TensorRT is strongly typed, so precision is what the graph says: weights, activations, inputs and
caches take the compute type. What is delicate stays in FP32: statistics of the normalizations
(their `stash_type`), the softmax of attention that is not fused (between casts), and the logits
that guidance and sampling work on. Fused attention is the backend's: in FP16 it may sum its
products and its softmax in FP16. Does not know which values are too large for a type, beyond saying
so when it is told the ranges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lpd_export.errors import UserError
from lpd_export.formats import PRECISIONS, FloatType
from lpd_export.graphs.contract import LOGITS

FLOAT = ir.DataType.FLOAT
HEADROOM = 2
"""How much larger than measured a value may become: only some images were measured."""
NUMPY_TYPES = {ir.DataType.FLOAT16: np.float16, ir.DataType.BFLOAT16: ml_dtypes.bfloat16}
WIDEST_FUSED_HEAD = 256
"""Wider heads, as the tokenizer's, have no fused attention: their softmax is spelled out."""
FLOAT_INPUTS = {"Resize": (1, 2)}
"""Inputs that an operator takes in FP32 whatever its data's type: roi and scales of Resize."""


def lower(model: ir.Model, float_type: FloatType) -> None:
    """Changes an FP32 graph to compute in `float_type`, in place.

    `logits` stay an FP32 output.
    """
    compute = ir.DataType[float_type.onnx]
    if compute == FLOAT:
        return
    graph = model.graph
    kept = {
        value.name
        for node in graph
        for index in FLOAT_INPUTS.get(node.op_type, ())
        if index < len(node.inputs) and (value := node.inputs[index]) is not None
    }
    for value in graph.initializers.values():
        if value.dtype == FLOAT and value.name not in kept:
            assert value.const_value is not None
            content = value.const_value.numpy().astype(NUMPY_TYPES[compute])
            value.const_value = ir.Tensor(content, dtype=compute, name=value.name)
            value.dtype = compute
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.dtype == FLOAT:
            value.dtype = compute
    for node in list(graph):
        if node.op_type == "LayerNormalization":
            node.attributes["stash_type"] = ir.AttrInt64("stash_type", int(FLOAT))
        # An attention with a mask is the transformer's: it is fused, or refused by the backend.
        masked = len(node.inputs) > 3
        if node.op_type == "Attention" and not masked and _width(node) > WIDEST_FUSED_HEAD:
            _compute_in_float(graph, _spell_out(graph, node, compute), compute)
    for value in list(graph.outputs):
        if value.name == LOGITS:
            _output_in_float(graph, value)


def _width(attention: ir.Node) -> int:
    """Width of an attention's heads: the last axis of its queries [B, H, N, d]."""
    assert attention.inputs[0] is not None
    assert attention.inputs[0].shape is not None
    return int(attention.inputs[0].shape[3])  # type: ignore[arg-type]


def _spell_out(graph: ir.Graph, attention: ir.Node, compute: ir.DataType) -> ir.Node:
    """Replaces an attention without mask by its products and softmax; returns the softmax."""
    query, key, value = attention.inputs
    assert query is not None
    stem, result = attention.name, attention.outputs[0]
    scale = NUMPY_TYPES[compute](_width(attention) ** -0.5)
    factor = ir.Value(
        name=f"{stem}/scale",
        const_value=ir.Tensor(np.asarray(scale), dtype=compute, name=f"{stem}/scale"),
        type=ir.TensorType(compute),
        shape=ir.Shape([]),
    )
    graph.register_initializer(factor)
    # The queries are scaled first: unscaled scores of a wide head may leave FP16's range.
    scaled = ir.node("Mul", [query, factor], name=f"{stem}/Mul")
    turned = ir.node("Transpose", [key], {"perm": [0, 1, 3, 2]}, name=f"{stem}/Transpose")
    scores = ir.node("MatMul", [scaled.outputs[0], turned.outputs[0]], name=f"{stem}/scores")
    softmax = ir.node("Softmax", scores.outputs, {"axis": -1}, name=f"{stem}/Softmax")
    mixed = ir.node("MatMul", [softmax.outputs[0], value], name=f"{stem}/mix")
    for node in (scaled, turned, scores, softmax, mixed):
        node.outputs[0].name, node.outputs[0].dtype = node.name, compute
        graph.insert_before(attention, node)
    mixed.outputs[0].shape = result.shape
    ir.convenience.replace_all_uses_with(result, mixed.outputs[0], replace_graph_outputs=True)
    graph.remove(attention, safe=True)
    mixed.outputs[0].name = result.name
    return softmax


def _compute_in_float(graph: ir.Graph, node: ir.Node, compute: ir.DataType) -> None:
    """Puts casts to and from FP32 around a node of one input and one output."""
    before = ir.node("Cast", [node.inputs[0]], {"to": int(FLOAT)}, name=f"{node.name}/CastIn")
    before.outputs[0].dtype, before.outputs[0].shape = FLOAT, node.outputs[0].shape
    after = ir.node("Cast", node.outputs, {"to": int(compute)}, name=f"{node.name}/CastOut")
    after.outputs[0].dtype, after.outputs[0].shape = compute, node.outputs[0].shape
    ir.convenience.replace_all_uses_with(node.outputs[0], after.outputs[0])
    after.replace_input_with(0, node.outputs[0])
    node.replace_input_with(0, before.outputs[0])
    node.outputs[0].dtype = FLOAT
    graph.insert_before(node, before)
    graph.insert_after(node, after)


def _output_in_float(graph: ir.Graph, value: ir.Value) -> None:
    """Casts a graph output to FP32 under its own name."""
    name, producer = value.name, value.producer()
    assert producer is not None
    value.name = f"{name}/compute_type"
    cast = ir.node("Cast", [value], {"to": int(FLOAT)}, name=f"{name}/Cast")
    cast.outputs[0].name, cast.outputs[0].dtype = name, FLOAT
    cast.outputs[0].shape = value.shape
    graph.insert_after(producer, cast)
    graph.outputs[list(graph.outputs).index(value)] = cast.outputs[0]


def check_ranges(ranges: Mapping[str, Mapping[str, float]], float_type: FloatType) -> None:
    """Refuses a type in which some value comes within HEADROOM of becoming infinite.

    Args:
        ranges: the largest magnitude of each value by name, for each graph, computed in FP32.
        float_type: of the graphs.

    Raises:
        UserError: naming the worst value, where it is computed, and its range.
    """
    limit = float_type.largest
    too_large = [
        (magnitude, graph, name)
        for graph, values in ranges.items()
        for name, magnitude in values.items()
        if not HEADROOM * magnitude <= limit
    ]
    if not too_large:
        return
    magnitude, graph, name = max(too_large, key=lambda entry: (math.isnan(entry[0]), entry[0]))
    count = len(too_large)
    others = f" ({count - 1} other values as well)" if count > 1 else ""
    wider = [
        name
        for name, row in PRECISIONS.items()
        if row.throughout and row.throughout.largest > limit
    ]
    raise UserError(
        f"{float_type.name} cannot hold this model: {name} of {graph}.onnx reaches "
        f"{magnitude:.4g}, the type ends at {limit:.5g}, and room for {HEADROOM} times as much is "
        f"wanted, as other images may have larger values{others}; use --precision "
        f"{' or '.join(wider)}"
    )
