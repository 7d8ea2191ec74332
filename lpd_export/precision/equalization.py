"""Balances the channels between a normalization and the products that read it.

What a normalization multiplies a channel with, the products' rows can be divided by: the function
stays, up to rounding, and nothing is added to a graph. A channel far larger than the others, as
trained transformers have them, no longer takes the levels of INT8, or the range of FP16, from the
rest (SmoothQuant, arXiv 2211.10438). How far a channel's size moves into the weights is the
strength, tried for each normalization on rows that it gave while the model was at work. Knows
nothing of how they are gathered, nor which layers are quantized.

The way from values to the output projection is left alone: its channels would be balanced in the
caches, which would no longer be the reference's, and measured it gains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpd_export.bundle.manifest import GRAPH_NAMES
from lpd_export.formats import INT8, Quantization
from lpd_export.graphs import export

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Tried: 0 leaves the channels as they are, 1 makes all activations equally large."""
RANGE_STRENGTH = 0.5
"""Where the range of a float type is all that is wanted: halfway, so that weights keep theirs."""


@dataclass(frozen=True)
class Balance:
    """A LayerNormalization, and the MatMuls that alone read it."""

    norm: ir.Node
    products: list[ir.Node]

    @property
    def name(self) -> str:
        """Of the normalization's node."""
        return str(self.norm.name)

    @property
    def output(self) -> str:
        """Of the value that it gives, [..., channels]."""
        return str(self.norm.outputs[0].name)

    def weights(self) -> list[Tensor]:
        """Of the products, each [channels, out]."""
        return [torch.from_numpy(content(product.inputs[1])) for product in self.products]


def balances(model: ir.Model) -> list[Balance]:
    """The normalizations of a graph whose output goes into products with constants alone."""
    found = []
    for node in model.graph:
        if node.op_type != "LayerNormalization" or not all(map(is_constant, node.inputs[1:])):
            continue
        output = node.outputs[0]
        users = [(use.node, use.idx) for use in output.uses()]
        if not users or output.is_graph_output():
            continue
        if all(n.op_type == "MatMul" and i == 0 and is_constant(n.inputs[1]) for n, i in users):
            found.append(Balance(node, [user for user, _ in users]))
    return found


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer."""
    return value is not None and value.is_initializer()


def content(value: ir.Value | None) -> NDArray[np.float32]:
    """Of an initializer, to be changed."""
    assert value is not None
    assert value.const_value is not None
    return np.array(value.const_value.numpy())


def balancing_scale(largest: Tensor, weights: Sequence[Tensor], strength: float) -> Tensor:
    """What each channel is divided by [channels], 1 in the geometric mean.

    Args:
        largest: the largest magnitude of each channel [channels]; 0 is left alone.
        weights: of the products, each [channels, out].
        strength: 0 leaves the channels as they are, 1 makes them equally large.
    """
    if strength == 0:
        return torch.ones_like(largest)
    of_weights = torch.stack([weight.abs().amax(dim=1) for weight in weights]).amax(dim=0)
    alive = (largest > 0) & (of_weights > 0)
    logarithm = strength * largest.log() - (1 - strength) * of_weights.log()
    logarithm = torch.where(alive, logarithm - logarithm[alive].mean(), 0.0)
    return logarithm.exp()


def best_scale(
    rows: Tensor, largest: Tensor, weights: Sequence[Tensor], kind: Quantization = INT8
) -> Tensor:
    """The balancing scale [channels] with which quantization changes the products least.

    Args:
        rows: of the normalization's output [n, channels].
        largest: the largest magnitude of each channel in all of its output [channels].
        weights: of the products, each [channels, out].
        kind: of levels.
    """
    weight = torch.cat(list(weights), dim=1)
    exact = rows @ weight
    errors = {}
    for strength in STRENGTHS:
        scale = balancing_scale(largest, weights, strength)
        rounded = rounded_to_levels(rows / scale, (largest / scale).amax(), kind)
        scaled = weight * scale[:, None]
        levels = rounded_to_levels(scaled, scaled.abs().amax(dim=0), kind)
        errors[strength] = float((rounded @ levels - exact).norm())
    return balancing_scale(largest, weights, min(errors, key=errors.__getitem__))


def rounded_to_levels(values: Tensor, largest: Tensor, kind: Quantization) -> Tensor:
    """Values as levels of which the largest stands for `largest`."""
    steps = largest.clamp(min=torch.finfo(torch.float32).tiny) / kind.largest
    numbers = values / steps
    if kind.integer:
        return numbers.round() * steps
    return numbers.clamp(-kind.largest, kind.largest).to(torch.float8_e4m3fn).float() * steps


def equalize(model: ir.Model, scales: Mapping[str, Sequence[float]]) -> None:
    """Divides the channels of normalizations, and multiplies the rows of what reads them, in place.

    Args:
        model: an FP32 graph.
        scales: [channels] of a normalization's node, one of `balances`.
    """
    for balance in balances(model):
        if balance.name not in scales:
            continue
        scale = np.asarray(scales[balance.name], np.float64)
        for number in range(1, len(balance.norm.inputs)):
            _multiply(model.graph, balance.norm, number, 1 / scale)
        for product in balance.products:
            _multiply(model.graph, product, 1, scale[:, None])


def _multiply(graph: ir.Graph, node: ir.Node, number: int, factor: NDArray[np.float64]) -> None:
    """Multiplies the constant that is an input of a node, for this node alone."""
    value = node.inputs[number]
    assert value is not None
    changed = (content(value) * factor).astype(np.float32)
    if len(value.uses()) == 1:
        value.const_value = ir.tensor(changed, name=value.name)
        return
    # Equal constants of several nodes are exported as one.
    name = f"{node.name}/input_{number}"
    own = ir.Value(name=name, const_value=ir.tensor(changed, name=name), type=value.type)
    own.shape = value.shape
    graph.register_initializer(own)
    node.replace_input_with(number, own)


def equalize_graphs(folder: Path, scales: Mapping[str, Sequence[float]]) -> None:
    """Equalizes the decode graph of a folder of FP32 graphs, in place."""
    models = {graph: ir.load(folder / f"{graph}.onnx") for graph in GRAPH_NAMES}
    equalize(models["decode"], scales)
    # Not over the weights that the models are read from.
    written = folder / "equalized"
    written.mkdir()
    export.write_models(models, written)
    for file in written.iterdir():
        file.replace(folder / file.name)
    written.rmdir()


def range_scales(
    model: ir.Model, channels: Mapping[str, Sequence[float]], limit: float
) -> dict[str, list[float]]:
    """For each normalization with a channel above `limit`, what to divide its channels by."""
    scales = {}
    for balance in balances(model):
        largest = torch.tensor(channels[balance.name])
        if not largest.amax() <= limit:
            scale = balancing_scale(largest, balance.weights(), RANGE_STRENGTH)
            scales[balance.name] = scale.tolist()
    return scales


def equalized_ranges(
    model: ir.Model,
    ranges: Mapping[str, float],
    channels: Mapping[str, Sequence[float]],
    scales: Mapping[str, Sequence[float]],
) -> dict[str, float]:
    """The largest magnitude of each value of the decode graph, once it is equalized."""
    changed = {
        balance.output: float(np.max(np.divide(channels[balance.name], scales[balance.name])))
        for balance in balances(model)
        if balance.name in scales
    }
    return {**ranges, **changed}
