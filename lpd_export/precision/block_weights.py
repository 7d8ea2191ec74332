"""Weights as levels in blocks, beside activations in the graph's float type.

Each step of a small batch reads every weight once and does little with it, so that bytes are what
it costs. A weight becomes levels with a scale for each block of inputs and each output, and a
DequantizeLinear before the product; TensorRT and ONNX Runtime fuse the two (MatMulNBits on the
CPU, which rounds activations to 8 bits within a block). Which layers, and with how many bits, is
decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lpd_export.errors import UserError
from lpd_export.formats import INT8_WEIGHTS, Backend, Quantization
from lpd_export.graphs import contract
from lpd_export.precision.quantization import STORED, Layer, quantizable_layers
from lpd_export.precision.rounding import Levels, round_weight


def levels_of(quantization: Quantization, scale_type: torch.dtype) -> Levels:
    """The levels that weights of a kind may take."""
    highest = int(quantization.largest)
    return Levels(-highest - 1, highest, quantization.block, scale_type)


def check_blocks(layer: str, inputs: int, quantization: Quantization) -> None:
    """Raises UserError unless the inputs of a layer are whole blocks."""
    if inputs % quantization.block:
        raise UserError(
            f"{layer} has {inputs} inputs, which are not whole blocks of {quantization.block}: "
            f"this model is too narrow for {quantization.title}; use --precision fp16 or int8"
        )


def simulate_weight(
    rounder: WeightRounder, quantization: Quantization, model: ir.Model, layer: Layer
) -> ir.Value:
    """Adds the product with a layer's rounded weight to an FP32 graph, beside it."""
    graph = model.graph
    node = next(node for node in graph if node.name == layer.node)
    weight = graph.initializers[layer.weight]
    levels, scales = rounder.round(layer, weight, quantization)
    content = levels * scales.repeat_interleave(quantization.block, dim=0)
    rounded = _constant(graph, f"{layer.node}/rounded", ir.tensor(content.numpy()))
    product = ir.node("MatMul", [node.inputs[0], rounded])
    graph.insert_after(node, product)
    return product.outputs[0]


def store_embedding(model: ir.Model, backend: Backend) -> None:
    """Stores the embeddings of a decode graph in fewer bytes, as the backend reads them best."""
    if backend.compiles:
        quantize_embedding(model)
    else:
        halve_embedding(model)


def halve_embedding(model: ir.Model) -> None:
    """Stores the table that an FP32 decode graph gathers embeddings from in FP16, in place.

    A row of it is read a token: the bytes count on the disk and in memory alone.
    """
    graph = model.graph
    for node in list(graph):
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is None or table.dtype != ir.DataType.FLOAT or not table.is_initializer():
            continue
        assert table.const_value is not None
        content = table.const_value.numpy().astype(np.float16)
        name, rows = str(table.name), node.outputs[0]
        if len(table.uses()) > 1 or not np.isfinite(content).all():
            continue
        table.const_value = ir.Tensor(content, dtype=ir.DataType.FLOAT16, name=name)
        table.dtype = ir.DataType.FLOAT16
        back = ir.node("Cast", [rows], {"to": int(ir.DataType.FLOAT)}, name=f"{name}/Cast")
        back.outputs[0].name, back.outputs[0].dtype = back.name, ir.DataType.FLOAT
        back.outputs[0].shape, rows.dtype = rows.shape, ir.DataType.FLOAT16
        ir.convenience.replace_all_uses_with(rows, back.outputs[0])
        back.replace_input_with(0, rows)
        graph.insert_after(node, back)


def quantize_embedding(model: ir.Model) -> None:
    """Stores the table of token embeddings as INT8, each row with a scale, in place.

    For TensorRT, which fuses the DequantizeLinear with what looks rows up and so reads no others;
    ONNX Runtime would compute the whole table in every step.
    """
    graph = model.graph
    for node in list(graph):
        table = node.inputs[0]
        if node.op_type != "Gather" or table is None or table.const_value is None:
            continue
        indices = node.inputs[1]
        if indices is None or indices.name != contract.TOKEN_IDS:
            continue
        content, float_type = table.const_value.numpy(), table.dtype
        assert float_type is not None
        weight = torch.from_numpy(content.astype(np.float32)).T  # a row is an output
        half = content.dtype == np.float16
        levels = levels_of(INT8_WEIGHTS, torch.float16 if half else torch.float32)
        scales = levels.scales(weight)
        rows = levels.round(weight, scales).T.contiguous().to(torch.int8)
        stored = _constant(graph, f"{table.name}/levels", ir.tensor(rows.numpy()))
        steps = ir.tensor(scales.numpy().astype(content.dtype), dtype=float_type)
        name = f"{table.name}/DequantizeLinear"
        back = ir.node(
            "DequantizeLinear",
            [stored, _constant(graph, f"{table.name}/scales", steps)],
            {"axis": 0},
            name=name,
        )
        back.outputs[0].name, back.outputs[0].dtype = name, float_type
        back.outputs[0].shape = table.shape
        graph.insert_before(node, back)
        node.replace_input_with(0, back.outputs[0])
        if not table.uses():
            del graph.initializers[str(table.name)]


class WeightRounder:
    """Rounds the weights of a graph's layers, each once a kind, however often it is asked.

    Args:
        moments: [in, in] of what a product reads, by the value's name; where there is none,
            weights are rounded to the nearest.
    """

    def __init__(self, moments: Mapping[str, Tensor]) -> None:
        self.moments = moments
        self._rounded: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def round(
        self, layer: Layer, weight: ir.Value, quantization: Quantization
    ) -> tuple[Tensor, Tensor]:
        """Levels [in, out] int8 and scales [in / block, out] in the weight's float type.

        Raises:
            UserError: if a block does not divide the layer's inputs.
        """
        assert weight.const_value is not None
        content = weight.const_value.numpy()
        check_blocks(layer.node, len(content), quantization)
        key = (layer.node, quantization, content.dtype)
        if key not in self._rounded:
            half = content.dtype == np.float16
            self._rounded[key] = round_weight(
                torch.from_numpy(content.astype(np.float32)),
                levels_of(quantization, torch.float16 if half else torch.float32),
                self.moments.get(layer.activation),
            )
        return self._rounded[key]


def quantize_weights(
    model: ir.Model, layers: Mapping[str, Quantization], rounder: WeightRounder
) -> None:
    """Stores the weights of matrix products as levels, in place.

    Products that read the same value with weights of the same kind become one and a Split:
    TensorRT does not merge them behind a DequantizeLinear.

    Args:
        model: a decode graph in any float type, which the DequantizeLinears give back.
        layers: how each weight is stored, by the product's node name.
        rounder: of this graph's weights.

    Raises:
        UserError: if a block does not divide a layer's inputs.
    """
    together: dict[tuple[str, Quantization], list[Layer]] = {}
    for layer in quantizable_layers(model):
        if layer.node in layers:
            together.setdefault((layer.activation, layers[layer.node]), []).append(layer)
    for (_, quantization), group in together.items():
        _quantize_products(model.graph, group, quantization, rounder)


def _quantize_products(
    graph: ir.Graph, layers: list[Layer], quantization: Quantization, rounder: WeightRounder
) -> None:
    nodes = {node.name: node for node in graph}
    products = [nodes[layer.node] for layer in layers]
    first, weights = products[0], [graph.initializers[layer.weight] for layer in layers]
    float_type, name = weights[0].dtype, str(first.name)
    assert float_type is not None
    parts = [
        rounder.round(layer, weight, quantization)
        for layer, weight in zip(layers, weights, strict=True)
    ]
    levels, scales = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
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
        _merge(graph, products, back.outputs[0], [part[0].shape[1] for part in parts])
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
