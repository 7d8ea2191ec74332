"""A graph as a precision with levels has it, once it is decided which of its layers are on them.

Knows the order of what is done. How is in `convolutions`, `quantization` and `block_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from lpd_export.formats import Precision, Quantization
from lpd_export.precision.block_weights import WeightRounder, quantize_weights
from lpd_export.precision.convolutions import Spans, quantize_convolutions
from lpd_export.precision.quantization import Layer, quantizable_layers, quantize


def quantize_graph(
    model: ir.Model,
    graph: str,
    precision: Precision,
    ranges: Mapping[str, float],
    spans: Mapping[str, Spans],
    unsigned: bool,
    kept_as: Quantization | None,
) -> None:
    """Puts layers on levels, in place.

    Args:
        model: in the float type of the bundle.
        graph: which one it is.
        precision: one that rounds activations in this graph.
        ranges: of what each layer reads that is put on levels, by node.
        spans: for each graph, of what convolutions read and give, where that is rounded too.
        unsigned: whether activations have levels from 0.
        kept_as: how the weights of the other layers are stored that are whole blocks; None leaves
            all of them as they are.
    """
    quantization = precision.quantization_of(graph)
    assert quantization is not None
    if graph in spans:
        quantize_convolutions(model, ranges, spans[graph])
    quantize(model, ranges, unsigned, quantization)
    if kept_as:
        layers = [layer for layer in quantizable_layers(model) if is_whole(model, layer, kept_as)]
        quantize_weights(model, {layer.node: kept_as for layer in layers}, WeightRounder({}))


def is_whole(model: ir.Model, layer: Layer, quantization: Quantization) -> bool:
    """Whether the inputs of a product are whole blocks."""
    weight = model.graph.initializers[layer.weight].const_value
    assert weight is not None
    return len(weight.numpy()) % quantization.block == 0
