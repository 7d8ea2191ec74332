"""Convolutions as ONNX Runtime's CPU computes them in integers: what they give is rounded too.

There a Conv becomes a QLinearConv only if it reads levels from 0 to 255 and its output is levels
again. Such levels need not lie around 0, as SiLU gives nothing below -0.28: a span says where they
begin and end, chosen on samples of the values at work for the least squared error. Residual sums
stay in float. TensorRT wants neither: its convolutions are `quantization`'s, like all products.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpd_export.precision.quantization import quantizable_layers, quantize_weight

HIGHEST_LEVEL = 255
SHARES = tuple(1 - 0.05 * i for i in range(11))
"""Shares of the least and the largest sample at which cutting off is tried."""
BINS = 2048
SAMPLES = 1024
"""Places of a picture, at equal distances, whose channels are looked at."""
UINT8 = ir.DataType.UINT8

Spans = Mapping[str, "Span"]
"""By the name of a value."""


class Span(NamedTuple):
    """Between which numbers the levels of a value lie; 0 is one of them."""

    low: float
    high: float

    @property
    def step(self) -> float:
        """The distance of two levels; any will do for a value that was always 0."""
        return ((self.high - self.low) or 1.0) / HIGHEST_LEVEL

    @property
    def zero_point(self) -> int:
        """The level of 0."""
        return round(-self.low / self.step)


def best_span(samples: Tensor) -> Span:
    """The span whose levels have the least squared error."""
    low, high = min(float(samples.min()), 0.0), max(float(samples.max()), 0.0)
    if low == high:
        return Span(0.0, 0.0)
    counts = torch.histc(samples.float(), BINS, low, high).double()
    values = low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * ((high - low) / BINS)
    shares = torch.tensor(SHARES, dtype=torch.float64)
    ends = torch.cartesian_prod(low * shares, high * shares)
    steps = (ends[:, 1] - ends[:, 0]) / HIGHEST_LEVEL
    zero_points = (-ends[:, 0] / steps).round()
    levels = (values / steps[:, None]).round() + zero_points[:, None]
    rounded = (levels.clamp(0, HIGHEST_LEVEL) - zero_points[:, None]) * steps[:, None]
    best = ((rounded - values).square() @ counts).argmin()
    return Span(*ends[best].tolist())


def convolution_values(model: ir.Model) -> dict[str, ir.Value]:
    """What the convolutions of a graph read and give, by name."""
    values = {}
    for node in model.graph:
        if node.op_type == "Conv":
            for value in (node.inputs[0], node.outputs[0]):
                assert value is not None
                values[str(value.name)] = value
    return values


def shares_of_work(model: ir.Model) -> dict[str, float]:
    """The share of a graph's multiplications that each convolution has, by node."""
    work = {}
    for node in model.graph:
        if node.op_type == "Conv":
            weight, (_, _, height, width) = _content(node.inputs[1]), _shape(node.outputs[0])
            work[str(node.name)] = weight.size * height * width
    return {node: count / sum(work.values()) for node, count in work.items()}


def samples_of(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """[channels, about SAMPLES] of a value [1, channels, height, width]."""
    _, channels, height, width = _shape(value)
    # Odd, so that rows are not all looked at in the same columns.
    distance = max(1, height * width // SAMPLES) | 1
    stem = f"{value.name}/samples"
    sizes = _constant(graph, f"{stem}/sizes", np.array([channels, height * width]))
    flat = ir.node("Reshape", [value, sizes])
    ends = {"first": 0, "end": height * width, "axis": 1, "distance": distance}
    numbers = [_constant(graph, f"{stem}/{name}", np.array([n])) for name, n in ends.items()]
    chosen = ir.node("Slice", [flat.outputs[0], *numbers])
    graph.extend([flat, chosen])
    chosen.outputs[0].shape = ir.Shape([channels, -(-height * width // distance)])
    return chosen.outputs[0]


class Levels(NamedTuple):
    """A value as levels, with what turns them back."""

    value: ir.Value
    step: ir.Value
    zero_point: ir.Value

    def back(self, stem: str, axis: int = 1) -> ir.Node:
        """The node that gives the float value; `axis` is that of the steps, if there are many."""
        name = f"{stem}/DequantizeLinear"
        node = ir.node("DequantizeLinear", list(self), {"axis": axis}, name=name)
        node.outputs[0].name, node.outputs[0].type = name, self.step.type
        node.outputs[0].shape = self.value.shape
        return node


def quantize_convolutions(model: ir.Model, layers: Container[str], spans: Spans) -> None:
    """Puts Q/DQ pairs around the convolutions among layers, in place.

    Args:
        model: an FP32 graph.
        layers: nodes; those that are no convolutions are left alone.
        spans: of what each of the convolutions reads and gives.
    """
    graph = model.graph
    read: dict[str, Levels] = {}
    nodes = {node.name: node for node in graph}
    for layer in quantizable_layers(model):
        if layer.operator != "Conv" or layer.node not in layers:
            continue
        node, span = nodes[layer.node], spans[layer.activation]
        if layer.activation not in read:
            read[layer.activation] = _levels_read(graph, node, span)
        # Each convolution turns them back by itself, or it would not become an integer one.
        back = read[layer.activation].back(f"{node.name}/activation")
        graph.insert_before(node, back)
        node.replace_input_with(0, back.outputs[0])
        _store_weights(graph, node, span.step)
        _round_output(graph, node, spans[str(node.outputs[0].name)])


def _levels_read(graph: ir.Graph, node: ir.Node, span: Span) -> Levels:
    """What a convolution reads as levels; of what is enlarged before it, the small value's."""
    activation = node.inputs[0]
    assert activation is not None
    enlarging = activation.producer()
    enlarged = enlarging is not None and enlarging.op_type == "Resize"
    if not enlarged or len(activation.uses()) > 1:
        rounding, levels = _rounding(graph, activation, span, f"{node.name}/activation")
        graph.insert_before(node, rounding)
        return levels
    assert enlarging is not None
    assert enlarging.inputs[0] is not None
    rounding, levels = _rounding(graph, enlarging.inputs[0], span, f"{node.name}/activation")
    graph.insert_before(enlarging, rounding)
    enlarging.replace_input_with(0, levels.value)
    activation.dtype = UINT8
    return levels._replace(value=activation)


def _rounding(graph: ir.Graph, value: ir.Value, span: Span, stem: str) -> tuple[ir.Node, Levels]:
    """The node that gives a value's levels."""
    step = _constant(graph, f"{stem}/step", np.array(span.step, np.float32))
    zero_point = _constant(graph, f"{stem}/zero_point", np.array(span.zero_point, np.uint8))
    name = f"{stem}/QuantizeLinear"
    node = ir.node("QuantizeLinear", [value, step, zero_point], name=name)
    node.outputs[0].name, node.outputs[0].dtype = name, UINT8
    node.outputs[0].shape = value.shape
    return node, Levels(node.outputs[0], step, zero_point)


def _store_weights(graph: ir.Graph, node: ir.Node, step: float) -> None:
    """A convolution's weight and bias as levels; the steps of a bias are those of the sums."""
    weight, *rest = node.inputs[1:]
    assert weight is not None
    levels, scales = quantize_weight(_content(weight), 0)
    # Its name says whose a weight is; equal biases are one constant of many layers.
    stored: list[tuple[ir.Value, str, str, NDArray[Any], NDArray[Any]]] = [
        (weight, "weight", str(weight.name), levels, scales)
    ]
    for bias in rest:  # which exporting leaves out where all of it is 0
        assert bias is not None
        steps = np.float32(step) * scales
        sums = np.rint(_content(bias) / steps.astype(np.float64)).astype(np.int32)
        stored.append((bias, "bias", f"{node.name}/bias", sums, steps))
    for number, (exact, part, stem, content, steps) in enumerate(stored, start=1):
        parts = Levels(
            _constant(graph, f"{stem}/levels", content),
            _constant(graph, f"{stem}/scales", steps),
            _constant(graph, f"{stem}/zero_points", np.zeros(len(steps), content.dtype)),
        )
        back = parts.back(f"{node.name}/{part}", axis=0)
        graph.insert_before(node, back)
        node.replace_input_with(number, back.outputs[0])
        if not exact.uses():
            del graph.initializers[str(exact.name)]


def _round_output(graph: ir.Graph, node: ir.Node, span: Span) -> None:
    """Lets everything that uses what a convolution gives use it rounded, under the same name."""
    value, name = node.outputs[0], node.outputs[0].name
    rounding, levels = _rounding(graph, value, span, f"{node.name}/output")
    back = levels.back(f"{node.name}/output")
    rounded = back.outputs[0]
    ir.convenience.replace_all_uses_with(value, rounded, replace_graph_outputs=True)
    rounding.replace_input_with(0, value)
    graph.insert_after(node, [rounding, back])
    value.name, rounded.name = f"{name}/exact", name


def _shape(picture: ir.Value) -> tuple[Any, int, int, int]:
    """Of a value [B, channels, height, width], whose batch may have any size."""
    assert picture.shape is not None
    batch, channels, height, width = picture.shape
    return batch, int(channels), int(height), int(width)  # type: ignore[arg-type]


def _content(value: ir.Value | None) -> NDArray[np.float32]:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _constant(graph: ir.Graph, name: str, content: NDArray[Any]) -> ir.Value:
    """An initializer, made once a name."""
    if name not in graph.initializers:
        tensor = ir.tensor(content, name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype))
        value.shape = ir.Shape(content.shape)
        graph.register_initializer(value)
    return graph.initializers[name]
