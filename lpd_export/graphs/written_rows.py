"""Attention over the rows of the cache that are written, for a backend that would read them all.

A step masks what later steps will write: half of the cache over an image. Knows the decode graph;
no backend.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lpd_export.graphs import contract

END = "written_rows"
"""The value [1] int64 that says how many rows are written once a step's are."""


def cut_to_written_rows(decode: ir.Model) -> None:
    """Has attention read keys, values and mask up to the last row that the step writes.

    What is cut off was masked: nothing changes but the order of sums in kernels that split rows.
    """
    graph = decode.graph
    inputs = {value.name: value for value in graph.inputs}
    first = ir.node("ReduceMax", [inputs[contract.WRITE_INDEX]], {"keepdims": 1})
    tokens = ir.node("Shape", [inputs[contract.POSITIONS]], {"start": 1, "end": 2})
    end = ir.node("Add", [first.outputs[0], tokens.outputs[0]])
    end.outputs[0].name = END
    _describe(end.outputs[0], ir.DataType.INT64, [1])
    for node in (first, tokens, end):
        node.name = f"{END}/{node.op_type}"
    graph.insert_before(graph[0], [first, tokens, end])
    cuts: dict[ir.Value, ir.Value] = {}
    for node in [node for node in graph if node.op_type == "Attention"]:
        for place, axis in ((1, 2), (2, 2), (3, 1)):
            value = node.inputs[place]
            assert value is not None
            if value not in cuts:
                cut = _slice(graph, value, axis, end.outputs[0])
                graph.insert_before(node, cut)
                cuts[value] = cut.outputs[0]
            node.replace_input_with(place, cuts[value])


def fix_written_rows(decode: ir.Model, rows: int) -> None:
    """Has a graph take so many rows as written, whatever its inputs say; nothing if none are cut.

    The shapes of a static phase follow from it.
    """
    graph = decode.graph
    ends = [value for node in graph for value in node.outputs if value.name == END]
    for value in ends:
        fixed = _constant(graph, "fixed", rows)
        for node, place in list(value.uses()):
            node.replace_input_with(place, fixed)


def _slice(graph: ir.Graph, value: ir.Value, axis: int, end: ir.Value) -> ir.Node:
    """A node that gives a value up to an end on an axis."""
    cut = ir.node(
        "Slice", [value, _constant(graph, "start", 0), end, _constant(graph, f"axis_{axis}", axis)]
    )
    cut.name = cut.outputs[0].name = f"{value.name}/written"
    assert value.shape is not None
    _describe(cut.outputs[0], value.dtype, [*value.shape[:axis], None, *value.shape[axis + 1 :]])
    return cut


def _describe(
    value: ir.Value, dtype: ir.DataType | None, shape: Sequence[int | ir.SymbolicDim | None]
) -> None:
    assert dtype is not None
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)


def _constant(graph: ir.Graph, name: str, number: int) -> ir.Value:
    """The initializer [1] int64 of this name and value."""
    name = f"{END}/{name}"
    if name not in graph.initializers:
        tensor = ir.tensor([number], dtype=ir.DataType.INT64, name=name)
        value = ir.Value(name=name, const_value=tensor)
        _describe(value, tensor.dtype, [1])
        graph.register_initializer(value)
    return graph.initializers[name]
