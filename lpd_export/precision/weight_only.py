"""Weights of a few bits beside activations in the graph's float type.

Each step of a small batch reads every weight once and does little with it, so that bytes are what
it costs. A weight becomes levels with a scale for each block of inputs and each output, and a
DequantizeLinear before the product; TensorRT and ONNX Runtime fuse the two (MatMulNBits on the
CPU, which rounds activations to 8 bits within a block). Which layers, and with how many bits, is
decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lpd_export.errors import UserError
from lpd_export.formats import Quantization
from lpd_export.precision.quantization import quantizable_layers
from lpd_export.precision.rounding import Levels, round_weight

STORED = {"INT8": np.dtype(np.int8), "INT4": np.dtype(ml_dtypes.int4)}


def quantize_weights(
    model: ir.Model, layers: Mapping[str, Quantization], moments: Mapping[str, Tensor]
) -> None:
    """Stores the weights of matrix products as levels, in place.

    Products that read the same value with weights of the same kind become one and a Split:
    TensorRT does not merge them behind a DequantizeLinear.

    Args:
        model: a decode graph in any float type, which the DequantizeLinears give back.
        layers: how each weight is stored, by the product's node name.
        moments: [in, in] of what a product reads, by the value's name; without, weights are
            rounded to the nearest.

    Raises:
        UserError: if a block does not divide a layer's inputs.
    """
    graph = model.graph
    nodes = {node.name: node for node in graph}
    together: dict[tuple[str, Quantization], list[ir.Node]] = {}
    for layer in quantizable_layers(model):
        if layer.node in layers:
            key = (layer.activation, layers[layer.node])
            together.setdefault(key, []).append(nodes[layer.node])
    for (activation, quantization), products in together.items():
        _quantize_products(graph, products, quantization, moments.get(activation))


def _quantize_products(
    graph: ir.Graph, products: list[ir.Node], quantization: Quantization, moments: Tensor | None
) -> None:
    first = products[0]
    weights = [value for node in products if (value := node.inputs[1]) is not None]
    contents = [value.const_value.numpy() for value in weights if value.const_value is not None]
    float_type, name = weights[0].dtype, str(first.name)
    assert float_type is not None
    inputs = contents[0].shape[0]
    if inputs % quantization.block:
        raise UserError(
            f"{name} has {inputs} inputs, which are not whole blocks of {quantization.block}: this "
            "model is too narrow for weights of this kind; use --precision fp16 or int8"
        )
    levels, scales = round_weight(
        torch.from_numpy(np.concatenate(contents, axis=1).astype(np.float32)),
        Levels(
            -(2 ** (quantization.bits - 1)),
            2 ** (quantization.bits - 1) - 1,
            quantization.block,
            torch.float32 if float_type == ir.DataType.FLOAT else torch.float16,
        ),
        moments,
    )
    stored = _constant(
        graph,
        f"{name}/weight/levels",
        ir.Tensor(
            levels.numpy().astype(STORED[quantization.weights]),
            dtype=ir.DataType[quantization.weights],
        ),
    )
    steps = _constant(graph, f"{name}/weight/scales", ir.tensor(scales.numpy(), dtype=float_type))
    back = ir.node(
        "DequantizeLinear",
        [stored, steps],
        {"axis": 0, "block_size": quantization.block},
        name=f"{name}/weight/DequantizeLinear",
    )
    back.outputs[0].name, back.outputs[0].dtype = back.name, float_type
    back.outputs[0].shape = stored.shape
    graph.insert_before(first, back)
    if len(products) == 1:
        first.replace_input_with(1, back.outputs[0])
    else:
        _merge(graph, products, back.outputs[0], [content.shape[1] for content in contents])
    for value in weights:
        del graph.initializers[str(value.name)]


def _merge(graph: ir.Graph, products: list[ir.Node], weight: ir.Value, widths: list[int]) -> None:
    """Replaces products of one value by a product with `weight` [in, sum of widths] and a Split."""
    name, float_type = str(products[0].name), weight.dtype
    assert float_type is not None
    together = ir.node("MatMul", [products[0].inputs[0], weight], name=f"{name}/together")
    together.outputs[0].name, together.outputs[0].dtype = together.name, float_type
    sizes = _constant(graph, f"{name}/widths", ir.tensor(widths))
    split = ir.node(
        "Split",
        [together.outputs[0], sizes],
        {"axis": -1},
        num_outputs=len(products),
        name=f"{name}/Split",
    )
    graph.insert_before(products[0], [together, split])
    for node, part in zip(products, split.outputs, strict=True):
        whole = node.outputs[0]
        part.dtype, part.shape = float_type, whole.shape
        ir.convenience.replace_all_uses_with(whole, part)
        graph.remove(node, safe=True)
        part.name = whole.name


def _constant(graph: ir.Graph, name: str, content: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(name=name, const_value=content, type=ir.TensorType(content.dtype))
    value.shape = ir.Shape(content.shape.numpy())
    content.name = name
    graph.register_initializer(value)
    return value
