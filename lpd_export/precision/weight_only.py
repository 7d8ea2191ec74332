"""Decides how the transformer's weights are stored where weights alone are rounded.

Layers are tried on levels first, and kept in a finer form those that change the graph most, until
it is close enough to FP32. How a weight is stored is in `block_weights`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir
import torch

from lpd_export.errors import UserError
from lpd_export.formats import Precision, Quantization
from lpd_export.precision.block_weights import WeightRounder, quantize_weights, simulate_weight
from lpd_export.precision.quantization import quantizable_layers
from lpd_export.precision.sensitivity import MOST_KEPT, Chooser, GraphDecision, next_trial
from lpd_export.progress import Report


def choose_weights(
    chooser: Chooser,
    precision: Precision,
    rounder: WeightRounder,
    kept_layers: Sequence[str] | None,
    report: Report,
    exact: bool = False,
) -> tuple[dict[str, Quantization], GraphDecision]:
    """How the weight of each layer of the decode graph is stored, and the decision.

    Args:
        chooser: of the bundle in the making.
        precision: of the bundle.
        rounder: of the decode graph's weights.
        kept_layers: decided elsewhere; None to keep those first that change the graph most.
        report: called with a line a trial.
        exact: whether the weights of `kept_layers` stay as they are, not in more bits.

    Raises:
        UserError: if half of the layers kept are not enough.
    """
    quantization = precision.quantization
    assert quantization is not None
    graph = chooser.model("decode")
    nodes = [layer.node for layer in quantizable_layers(graph)]
    target = chooser.targets["decode"]
    kept = kept_layers or []
    worth: dict[str, float] = {}
    tried: list[tuple[int, float]] = []
    while True:
        layers = {node: quantization for node in nodes if node not in kept}
        if quantization.kept and not exact:
            layers |= dict.fromkeys(kept, quantization.kept)
        model = chooser.model("decode")
        quantize_weights(model, layers, rounder)
        value = chooser.measure("decode", model)
        share = f"{len(nodes) - len(kept)} of {len(nodes)} layers {quantization.title}"
        report(f"decode: {share}, {target.measure} {value:.4g}")
        tried.append((len(kept), value))
        if target.met(value) or kept_layers is not None:
            noise = layer_noise(graph, kept, quantization, rounder)
            decision = GraphDecision(len(nodes), noise, target.measure, value, target.limit, tried)
            return layers, decision
        if len(kept) >= MOST_KEPT * len(nodes):
            break
        worth = worth or chooser.worth(nodes, partial(simulate_weight, rounder, quantization))
        kept = [*worth][: next_trial([*worth.values()], len(kept), value, target.limit)]
    raise UserError(
        f"{precision.name} changes this model too much: with half of its layers kept the "
        f"{target.measure} is {value:.3g}, above {target.limit}; use --precision fp16"
    )


def layer_noise(
    model: ir.Model, nodes: Collection[str], quantization: Quantization, rounder: WeightRounder
) -> dict[str, float]:
    """Squared error over squared signal of the output of some products, by node."""
    noise = {}
    for layer in quantizable_layers(model):
        if layer.node not in nodes:
            continue
        value = model.graph.initializers[layer.weight]
        assert value.const_value is not None
        weight = torch.from_numpy(value.const_value.numpy().astype(np.float32))
        levels, scales = rounder.round(layer, value, quantization)
        error = levels * scales.float().repeat_interleave(quantization.block, dim=0) - weight
        seen = rounder.moments[layer.activation]
        signal = float((weight * (seen @ weight)).sum())
        noise[layer.node] = float((error * (seen @ error)).sum()) / (signal or 1.0)
    return noise
