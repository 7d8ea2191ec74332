"""Attention over the rows of the cache that are written, for a backend that would read them all.

A step masks what later steps will write: half of the cache over an image. Knows the decode graph;
no backend.
"""

from __future__ import annotations

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
    start, axes = (
        _constant(graph, "start", 0),
        {n: _constant(graph, f"axis_{n}", n) for n in (1, 2)},
    )
    first = ir.node("ReduceMax", [inputs[contract.WRITE_INDEX]], {"keepdims": 1})
    tokens = ir.node("Shape", [inputs[contract.POSITIONS]], {"start": 1, "end": 2})
    end = ir.node("Add", [first.outputs[0], tokens.outputs[0]])
    end.outputs[0].name = END
    _describe(end.outputs[0], ir.DataType.INT64, ir.Shape([1]))
    added = [first, tokens, end]

    def written(value: ir.Value, axis: int) -> ir.Value:
        cut = ir.node("Slice", [value, start, end.outputs[0], axes[axis]])
        assert value.shape is not None
        sizes = list(value.shape)
        sizes[axis] = ir.SymbolicDim(END)
        _describe(cut.outputs[0], value.dtype, ir.Shape(sizes))
        cut.outputs[0].name = f"{value.name}/written"
        added.append(cut)
        return cut.outputs[0]

    mask = written(inputs[contract.ATTENTION_MASK], axis=1)
    for number, node in enumerate(added):
        node.name = f"{END}/{node.op_type}" + (f"_{number}" if number else "")
    graph.insert_before(graph[0], added)
    for node in [node for node in graph if node.op_type == "Attention"]:
        _, key, value, _ = node.inputs[:4]
        assert key is not None
        assert value is not None
        added.clear()
        for place, cache in ((1, key), (2, value)):
            node.replace_input_with(place, written(cache, axis=2))
            added[-1].name = f"{node.name}/{added[-1].op_type}_{place}"
        node.replace_input_with(3, mask)
        graph.insert_before(node, added)


def fix_written_rows(decode: ir.Model, rows: int) -> None:
    """Has a graph take so many rows as written, whatever its inputs say; nothing if none are cut.

    The shapes of a static phase follow from it.
    """
    graph = decode.graph
    ends = [value for node in graph for value in node.outputs if value.name == END]
    for value in ends:
        fixed = _constant(graph, f"{END}/fixed", rows)
        for node, place in list(value.uses()):
            node.replace_input_with(place, fixed)


def _describe(value: ir.Value, dtype: ir.DataType | None, shape: ir.Shape) -> None:
    assert dtype is not None
    value.type, value.shape = ir.TensorType(dtype), shape


def _constant(graph: ir.Graph, name: str, number: int) -> ir.Value:
    name = name if name.startswith(END) else f"{END}/{name}"
    tensor = ir.tensor([number], dtype=ir.DataType.INT64, name=name)
    value = ir.Value(
        name=name, const_value=tensor, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1])
    )
    graph.register_initializer(value)
    return value
