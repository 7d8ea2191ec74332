"""INT8 and FP8 as explicit QuantizeLinear and DequantizeLinear pairs around matrix products.

Knows how a layer is quantized: weights symmetric and per output channel, activations per tensor,
symmetric but for what GELU gives, which is never far below 0 and would waste half of INT8's levels.
Which layers, and with which activation ranges, is decided elsewhere and handed in. Biases,
normalizations, attention and everything between stay in the graph's float type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lpd_export.formats import INT8, Quantization
from lpd_export.precision.casting import NUMPY_TYPES

STORED = {
    "INT8": np.dtype(np.int8),
    "INT4": np.dtype(ml_dtypes.int4),
    "FLOAT8E4M3FN": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""What holds levels, by their ONNX type."""
CLIPPING = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of the largest magnitude at which cutting off an activation is tried."""
LOWEST = {"Gelu": -0.17}
"""The least that an operator gives, whatever goes in."""
OUTPUT_AXIS = {"MatMul": 1, "Conv": 0}
"""The axis of output channels in the weight of each operator that is quantized."""


@dataclass(frozen=True)
class Layer:
    """A matrix product or convolution with a constant weight."""

    node: str
    operator: str
    activation: str
    """Name of the value that is multiplied with the weight."""
    weight: str


def quantizable_layers(model: ir.Model) -> list[Layer]:
    """All layers of a graph that could be quantized, in the graph's order."""
    return [
        Layer(node.name or "", node.op_type, node.inputs[0].name or "", node.inputs[1].name or "")
        for node in model.graph
        if node.op_type in OUTPUT_AXIS
        and node.inputs[0] is not None
        and node.inputs[1] is not None
        and node.inputs[1].name in model.graph.initializers
    ]


def step_of(activation_range: float, kind: Quantization = INT8) -> float:
    """What a level of 1 stands for; any will do for an activation that was always 0."""
    return (activation_range or 1.0) / kind.largest


def nearest_levels(numbers: NDArray[np.float64], kind: Quantization) -> NDArray[Any]:
    """The levels nearest to numbers in steps, cut off at the largest."""
    numbers = np.clip(numbers, -kind.largest, kind.largest)
    stored = STORED[kind.weights]
    return (np.rint(numbers) if kind.integer else numbers).astype(stored)


@dataclass(frozen=True)
class Grid:
    """The values that an activation is rounded to: levels times a step."""

    step: float
    """What a level of 1 stands for."""
    zero: int
    """The level of 0; 0 if they are symmetric."""

    @property
    def center(self) -> float:
        """The value of level 0."""
        return -self.zero * self.step


def grid_of(activation: ir.Value, largest: float, kind: Quantization = INT8) -> Grid:
    """The grid of an activation that is cut off at the magnitude `largest`."""
    producer = activation.producer()
    lowest = LOWEST.get(producer.op_type if producer else "", -np.inf)
    # Of floats half of the levels are below 1: those that nothing reaches are no loss.
    if largest <= -lowest or not kind.integer:
        return Grid(step_of(largest, kind), 0)
    step = (largest - lowest) / 255
    return Grid(step, round(-lowest / step) - 128)


def simulate_layer(
    model: ir.Model, layer: Layer, activation_range: float, weight: bool, kind: Quantization = INT8
) -> tuple[ir.Value, ir.Value]:
    """Adds nodes for what quantizing a layer gives, beside the graph, which stays as it is.

    Returns the quantized value and the exact one: of the layer's output if `weight`, else of its
    activation alone.
    """
    graph = model.graph
    node = next(node for node in graph if node.name == layer.node)
    activation, exact_weight = node.inputs[0], node.inputs[1]
    assert activation is not None
    assert exact_weight is not None
    assert exact_weight.dtype is not None
    grid = grid_of(activation, activation_range, kind)
    zero = zero_point(grid, kind, unsigned=True)
    levels_of_activation = _quantized(graph, node, activation, grid, zero, exact_weight.dtype)
    rounded = _dequantized(graph, node, levels_of_activation)
    if not weight:
        return rounded, activation
    levels = (
        _dequantized_weight(graph, node, exact_weight, layer.operator, kind)
        if kind.integer
        else _rounded_weight(graph, exact_weight, layer.operator, kind)
    )
    again = ir.node(node.op_type, [rounded, levels, *node.inputs[2:]], dict(node.attributes))
    graph.insert_after(node, again)
    return again.outputs[0], node.outputs[0]


def representable(steps: NDArray[np.float64], float_type: ir.DataType) -> NDArray[Any]:
    """Steps in a graph's float type, each the next number that is not smaller.

    The nearest number may be a quarter smaller among FP16's smallest ones, or 0, and the largest
    values would be cut off.
    """
    rounded = steps.astype(NUMPY_TYPES.get(float_type, np.float32))
    above = np.nextafter(rounded, rounded.dtype.type(np.inf))
    return np.where(rounded.astype(np.float64) < steps, above, rounded)


def quantize_weight(
    weight: NDArray[np.floating],
    axis: int,
    float_type: ir.DataType = ir.DataType.FLOAT,
    kind: Quantization = INT8,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Levels [like weight] and the scale of each channel along `axis` [channels] in `float_type`.

    Scales are by the largest magnitude; levels are of the scales as the graph has them.
    """
    weight = weight.astype(np.float64)
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight).max(axis=others, keepdims=True)
    scale = representable(np.where(largest > 0, largest, 1) / kind.largest, float_type)
    return nearest_levels(weight / scale.astype(np.float64), kind), scale.reshape(-1)


def quantize(
    model: ir.Model,
    layers: Mapping[str, float],
    unsigned: bool = False,
    kind: Quantization = INT8,
) -> None:
    """Puts Q/DQ pairs around the weights and activations of layers, in place.

    Args:
        model: a graph in any float type, which the DequantizeLinears give back.
        layers: the largest magnitude of a layer's activation, by the layer's node name.
        unsigned: let activations be uint8 around 128, which ONNX Runtime's CPU kernels want;
            TensorRT takes int8 around 0 alone: there, an activation whose levels are not symmetric
            is moved by their center, and what that is worth goes into the layer's bias.
        kind: of levels, and of what they stand for.
    """
    graph = model.graph
    quantized: dict[tuple[str, float], Levels] = {}
    for layer in quantizable_layers(model):
        if layer.node not in layers:
            continue
        node = next(node for node in graph if node.name == layer.node)
        activation, weight = node.inputs[0], node.inputs[1]
        assert activation is not None
        assert weight is not None
        float_type = weight.dtype
        assert float_type is not None
        grid = grid_of(activation, layers[layer.node], kind)
        if grid.zero and not unsigned:
            activation, grid = _centered(graph, node, activation, grid), Grid(grid.step, 0)
        key = (str(activation.name), grid.step)
        if key not in quantized:
            zero = zero_point(grid, kind, unsigned)
            quantized[key] = _quantized(graph, node, activation, grid, zero, float_type)
        node.replace_input_with(0, _dequantized(graph, node, quantized[key]))
        node.replace_input_with(1, _dequantized_weight(graph, node, weight, layer.operator, kind))
        if not weight.uses():
            del graph.initializers[layer.weight]


class Levels(NamedTuple):
    """A value as integers, with what turns them back."""

    value: ir.Value
    step: ir.Value
    zero: ir.Value
    scale: float


def _centered(graph: ir.Graph, node: ir.Node, activation: ir.Value, grid: Grid) -> ir.Value:
    """An activation less the center of its grid; the bias after the layer makes up for it."""
    weight, (use,) = node.inputs[1], node.outputs[0].uses()
    assert weight is not None
    assert weight.dtype is not None
    assert weight.const_value is not None
    assert use.node.op_type == "Add"
    number_type = NUMPY_TYPES.get(weight.dtype, np.float32)
    center = np.asarray(grid.center, number_type)
    levels, scales = quantize_weight(weight.const_value.numpy(), 1, weight.dtype)
    worth = float(center) * levels.sum(axis=0, dtype=np.int64) * scales.astype(np.float64)
    bias = use.node.inputs[1 - use.idx]
    assert bias is not None
    assert bias.const_value is not None
    changed = _constant(
        graph,
        f"{node.name}/bias",
        (bias.const_value.numpy().astype(np.float64) + worth).astype(number_type),
        weight.dtype,
    )
    use.node.replace_input_with(1 - use.idx, changed)
    if not bias.uses():
        del graph.initializers[str(bias.name)]
    moved = ir.node(
        "Sub",
        [activation, _constant(graph, f"{node.name}/center", center, weight.dtype)],
        name=f"{node.name}/activation/Sub",
    )
    moved.outputs[0].name, moved.outputs[0].type = moved.name, activation.type
    moved.outputs[0].shape = activation.shape
    graph.insert_before(node, moved)
    return moved.outputs[0]


def zero_point(grid: Grid, kind: Quantization, unsigned: bool) -> NDArray[Any]:
    """The level of 0, in the type of what activations are rounded to."""
    if not kind.integer:
        return np.zeros((), STORED[kind.activations])
    return np.asarray(np.uint8(128 + grid.zero) if unsigned else np.int8(grid.zero))


def _quantized(
    graph: ir.Graph,
    before: ir.Node,
    activation: ir.Value,
    grid: Grid,
    zero_level: NDArray[Any],
    float_type: ir.DataType,
) -> Levels:
    """An activation as its nearest levels."""
    # The step is part of the name: one activation may be tried with several.
    scale = grid.step
    stem = f"{before.name}/activation/{scale:.6g}"
    step = _constant(graph, f"{stem}_scale", representable(np.array(scale), float_type), float_type)
    level_type = ir.DataType.from_numpy(zero_level.dtype)
    zero = _constant(graph, f"{stem}_zero_point", zero_level, level_type)
    levels = ir.node("QuantizeLinear", [activation, step, zero], name=f"{stem}/QuantizeLinear")
    levels.outputs[0].dtype, levels.outputs[0].shape = level_type, activation.shape
    levels.outputs[0].name = levels.name
    graph.insert_before(before, levels)
    return Levels(levels.outputs[0], step, zero, scale)


def _dequantized(graph: ir.Graph, before: ir.Node, levels: Levels) -> ir.Value:
    """Levels back in the float type, for one layer alone.

    ONNX Runtime makes an integer product only of a layer whose DequantizeLinear is its own.
    """
    back = ir.node(
        "DequantizeLinear",
        [levels.value, levels.step, levels.zero],
        name=f"{before.name}/activation/{levels.scale:.6g}/DequantizeLinear",
    )
    back.outputs[0].name = back.name
    back.outputs[0].type = levels.step.type
    back.outputs[0].shape = levels.value.shape
    graph.insert_before(before, back)
    return back.outputs[0]


def _rounded_weight(
    graph: ir.Graph, weight: ir.Value, operator: str, kind: Quantization
) -> ir.Value:
    """A weight as the numbers that its levels stand for.

    Of an FP32 product of levels ONNX Runtime makes one of integers, whatever levels are.
    """
    assert weight.const_value is not None
    assert weight.dtype is not None
    axis = OUTPUT_AXIS[operator]
    levels, scales = quantize_weight(weight.const_value.numpy(), axis, weight.dtype, kind)
    channels = np.moveaxis(levels.astype(scales.dtype), axis, -1) * scales
    rounded = np.moveaxis(channels, -1, axis)
    return _constant(graph, f"{weight.name}/rounded", rounded, weight.dtype)


def _dequantized_weight(
    graph: ir.Graph, before: ir.Node, weight: ir.Value, operator: str, kind: Quantization
) -> ir.Value:
    """A weight stored as levels and scales, back in its float type."""
    assert weight.const_value is not None
    assert weight.dtype is not None
    axis = OUTPUT_AXIS[operator]
    level_type = ir.DataType[kind.weights]
    levels, scales = quantize_weight(weight.const_value.numpy(), axis, weight.dtype, kind)
    stored = _constant(graph, f"{weight.name}/levels", levels, level_type)
    steps = _constant(graph, f"{weight.name}/scales", scales, weight.dtype)
    zeros = np.zeros(len(scales), levels.dtype)
    zero = _constant(graph, f"{weight.name}/zero_points", zeros, level_type)
    back = ir.node(
        "DequantizeLinear",
        [stored, steps, zero],
        {"axis": axis},
        name=f"{before.name}/weight/DequantizeLinear",
    )
    back.outputs[0].name = back.name
    back.outputs[0].dtype, back.outputs[0].shape = weight.dtype, weight.shape
    graph.insert_before(before, back)
    return back.outputs[0]


def _constant(
    graph: ir.Graph,
    name: str,
    content: NDArray[Any],
    dtype: ir.DataType,
) -> ir.Value:
    """An initializer, made once a name."""
    if name not in graph.initializers:
        tensor = ir.Tensor(content, dtype=dtype, name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(dtype))
        value.shape = ir.Shape(content.shape)
        graph.register_initializer(value)
    return graph.initializers[name]
