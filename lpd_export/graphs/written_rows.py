"""Attention over the rows of the cache that are written, for a backend that would read them all.

A step masks what later steps will write: half of the cache over an image. Knows the decode graph;
no backend.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lpd_export.graphs import contract

END = "written_rows"
"""The scalar int64 that says how many rows are written once a step's are."""
CUT = "/written"
"""How the names of nodes end that give what is written of a value."""


def cut_to_written_rows(decode: ir.Model) -> None:
    """Has attention read keys, values and mask up to the last row that the step writes.

    Caches are [R, S + 1, D]. What is cut off was masked: nothing changes but the order of sums in
    kernels that split rows.
    """
    graph = decode.graph
    inputs = {value.name: value for value in graph.inputs}
    zero, one = (_constant(graph, name, number) for name, number in (("start", 0), ("step", 1)))
    first = ir.node("ReduceMax", [inputs[contract.WRITE_INDEX]], {"keepdims": 0})
    shape = ir.node("Shape", [inputs[contract.POSITIONS]], {"start": 1, "end": 2})
    tokens = ir.node("Squeeze", shape.outputs)
    end = ir.node("Add", [first.outputs[0], tokens.outputs[0]])
    end.outputs[0].name = END
    _describe(end.outputs[0], ir.DataType.INT64, [])
    rows = ir.node("Range", [zero, end.outputs[0], one])
    _describe(rows.outputs[0], ir.DataType.INT64, [None])
    made = [first, shape, tokens, end, rows]
    for node in made:
        node.name = f"{END}/{node.op_type}"
    graph.insert_before(graph[0], made)
    mask = inputs[contract.ATTENTION_MASK]
    uses = list(mask.uses())
    cut = _cut(mask, rows.outputs[0])
    graph.insert_after(rows, cut)
    for node, place in uses:
        node.replace_input_with(place, cut.outputs[0])
    for node in [node for node in graph if node.op_type == "Attention"]:
        for place in (1, 2):
            cache = node.inputs[place]
            assert cache is not None
            cut = _cut(cache, rows.outputs[0])
            graph.insert_before(node, cut)
            node.replace_input_with(place, cut.outputs[0])


def is_cut(node: ir.Node) -> bool:
    """Whether a node gives what is written of a value."""
    return str(node.name).endswith(CUT)


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


def _cut(value: ir.Value, rows: ir.Value) -> ir.Node:
    """A node that gives rows of a value, on its axis 1."""
    # A Slice would give the same, but one thread of ONNX Runtime's would copy.
    cut = ir.node("Gather", [value, rows], {"axis": 1})
    cut.name = cut.outputs[0].name = f"{value.name}{CUT}"
    assert value.shape is not None
    _describe(cut.outputs[0], value.dtype, [value.shape[0], None, *value.shape[2:]])
    return cut


def _describe(
    value: ir.Value, dtype: ir.DataType | None, shape: Sequence[int | ir.SymbolicDim | None]
) -> None:
    assert dtype is not None
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)


def _constant(graph: ir.Graph, name: str, number: int) -> ir.Value:
    """The scalar initializer, int64, of this name and value."""
    name = f"{END}/{name}"
    if name not in graph.initializers:
        tensor = ir.tensor(number, dtype=ir.DataType.INT64, name=name)
        value = ir.Value(name=name, const_value=tensor)
        _describe(value, tensor.dtype, [])
        graph.register_initializer(value)
    return graph.initializers[name]
