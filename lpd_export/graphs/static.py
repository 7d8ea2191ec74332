"""A graph of dynamic axes as one of given sizes. Knows ONNX alone, not what a graph computes."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common as passes

EMBEDDED_BYTES = 256
"""Initializers up to this size stay in the ONNX file, where shape inference can read them."""


def make_static(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Gives the dynamic axes of a model's inputs their sizes, and folds all that follows."""
    for value in model.graph.inputs:
        assert value.shape is not None
        value.shape = ir.Shape(
            [
                sizes[str(axis.value)] if isinstance(axis, ir.SymbolicDim) else axis
                for axis in value.shape
            ]
        )
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    # Folds shapes alone: a folded Expand of `mask_token` would be another copy of a weight.
    # The optimizer's rewriting did its work at the export, and takes four times as long as this.
    onnxscript.optimizer.fold_constants(
        model, onnx_shape_inference=True, output_size_limit=EMBEDDED_BYTES // 8
    )
    passes.RemoveUnusedNodesPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
