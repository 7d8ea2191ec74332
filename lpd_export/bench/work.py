"""What a phase has to do, counted from its ONNX graph: operations and bytes of memory.

Knows ONNX operators, and weights in every form in which they are stored. Does not know how long
anything takes, which is in `floor`. `docs/speed.md` derives what is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

import onnx_ir as ir

from lpd_export.bundle.manifest import Bundle
from lpd_export.errors import UserError
from lpd_export.graphs.contract import CONTEXT_TOKENS, ROWS, TOKENS
from lpd_export.graphs.static import make_static
from lpd_export.graphs.written_rows import is_cut
from lpd_export.schedule.phases import Phase

PREFILL, SAMPLING, DETOKENIZE, PIXELS = "prefill", "sampling", "detokenize", "pixels"
"""The parts of a generation beside its steps, which are called `step 2` and so on."""

LOOKED_UP = ("Gather",)
"""Operators that read of a table, of floats or of levels, only the rows that they give."""


@dataclass(frozen=True)
class Work:
    """Of one image, or of several that are computed together.

    Attributes:
        operations: of products, by the type that they are computed in (see `product_type`); a
            multiplication and an addition are two.
        weights: bytes read of them, as they are stored; however many images share them.
        caches: bytes of keys and values read and written.
        activations: bytes of what products read, each written and read once, and of the results.
    """

    operations: Counter[str] = field(default_factory=Counter)
    weights: int = 0
    caches: int = 0
    activations: int = 0

    @property
    def bytes(self) -> int:
        """All that must go to or come from memory."""
        return self.weights + self.caches + self.activations

    def of(self, images: int) -> Work:
        """The same for several images: all but the weights grows with them."""
        operations = Counter({kind: images * n for kind, n in self.operations.items()})
        return Work(operations, self.weights, images * self.caches, images * self.activations)

    def __add__(self, other: Work) -> Work:
        return Work(
            self.operations + other.operations,
            self.weights + other.weights,
            self.caches + other.caches,
            self.activations + other.activations,
        )


# ------------------------------------------------------------------------------------ a bundle


def step_title(phase: Phase) -> str:
    """A phase as people count: the first is the prefill, which is step 1."""
    return f"step {phase.index + 1}" if phase.index else PREFILL


def generation_work(bundle: Bundle, phases: Sequence[Phase] | None = None) -> dict[str, Work]:
    """The work of one image by part: every step, all sampling, detokenize, pixels.

    Args:
        bundle: whose graphs are counted, verified.
        phases: of another schedule than the bundle's.

    Raises:
        UserError: if a file is damaged.
    """
    manifest = bundle.manifest
    own = phases is None
    phases = manifest.phases if phases is None else phases
    rows = 2 if manifest.cfg != 1 else 1
    parts: dict[str, Work] = {}
    # Of one token a step, nearly all phases are alike but for the rows written.
    models: dict[tuple[int, int], ir.Model] = {}
    for phase in phases:
        sizes_of_phase = (phase.context, phase.queries)
        if sizes_of_phase not in models:
            if own and manifest.phase_rows == rows:
                model = ir.load(bundle.graph(f"onnx/{phase.name}.onnx"))
            else:
                model = ir.load(bundle.graph("onnx/decode.onnx"))
                sizes = {ROWS: rows, CONTEXT_TOKENS: phase.context, TOKENS: phase.tokens}
                make_static(model, sizes)
            models[sizes_of_phase] = model
        written = phase.write_index + phase.tokens
        parts[step_title(phase)] = graph_work(models[sizes_of_phase], written)
    cells = sum(phase.queries for phase in phases)
    # The logits of all rows are read once: guidance and the draw in one pass.
    parts[SAMPLING] = Work(activations=rows * cells * manifest.model.vocab_size * 4)
    model = ir.load(bundle.graph("onnx/detokenize.onnx"))
    make_static(model, {"batch": 1})
    parts[DETOKENIZE] = graph_work(model)
    image = model.graph.outputs[0]
    values = prod(_sizes(image))
    parts[PIXELS] = Work(activations=_bytes(image) + values)  # floats are read, bytes written
    return parts


# ------------------------------------------------------------------------------------- a graph


def graph_work(model: ir.Model, written_rows: int = 0) -> Work:
    """The work of a graph with static shapes.

    Args:
        model: the graph.
        written_rows: of a cache, where attention reads no others.

    Raises:
        UserError: if the shapes of products do not follow from those of the inputs.
    """
    graph = model.graph
    work = Work(activations=sum(_bytes(v) for v in graph.outputs if not _is_cache(v)))
    operations, caches, activations = work.operations, 0, work.activations
    weights = _weight_bytes(graph)
    read: set[ir.Value] = set()
    for node in graph:
        if node.op_type == "TensorScatter":
            caches += _bytes(_input(node, 1))
        elif node.op_type == "Attention":
            query, *key_and_value = (_input(node, place) for place in range(3))
            for cache in key_and_value:
                rows, size = _read_of_cache(cache, written_rows)
                operations[product_type(node)] += 2 * prod(_sizes(query)) * rows
                caches += size
            activations += 2 * _bytes(query)
        elif node.op_type in PRODUCTS:
            operations[product_type(node)] += PRODUCTS[node.op_type](node)
            for value in _inputs(node)[:2]:
                stored = _stored(value)
                if not _is_constant(stored) and stored not in read:
                    read.add(stored)
                    activations += 2 * _bytes(stored)
    return Work(operations, weights, caches, activations)


def product_type(node: ir.Node) -> str:
    """What a product is computed in, as torch names types: `float16`, `int8`.

    `float16 x int4` has weights of another type than what they are multiplied with. Attention
    is computed in the type of its caches.
    """
    left, right = (_type_name(_stored(_input(node, place))) for place in (0, 1))
    return left if left == right or node.op_type == "Attention" else f"{left} x {right}"


def _weight_bytes(graph: ir.Graph) -> int:
    """Of all initializers, as they are stored; of a table the rows that are looked up."""
    total = 0
    for value in graph.initializers.values():
        users = [use.node for use in value.uses()]
        if len(users) == 1 and users[0].op_type == "DequantizeLinear":
            users = [use.node for use in users[0].outputs[0].uses()]
        if all(node.op_type in LOOKED_UP and value not in node.inputs[1:] for node in users):
            rows = sum(prod(_sizes(_input(node, 1))) for node in users)
            total += rows * _bytes(value) // _sizes(value)[0]
        else:
            total += _bytes(value)
    return total


def _matmul(node: ir.Node) -> int:
    return 2 * prod(_sizes(node.outputs[0])) * _sizes(_input(node, 0))[-1]


def _conv(node: ir.Node) -> int:
    # A weight is [out, in / groups, kernel...]: each output takes all but the first axis.
    return 2 * prod(_sizes(node.outputs[0])) * prod(_sizes(_input(node, 1))[1:])


PRODUCTS = {"MatMul": _matmul, "Conv": _conv}


# ------------------------------------------------------------------------------------- values


def _stored(value: ir.Value) -> ir.Value:
    """What lies in memory of a value that a DequantizeLinear gives: its levels."""
    producer = value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        return _input(producer, 0)
    return value


def _is_constant(value: ir.Value) -> bool:
    return value.const_value is not None


def _read_of_cache(value: ir.Value, written_rows: int) -> tuple[int, int]:
    """Rows and bytes that attention reads of keys or values [..., N, d], cut or whole."""
    producer = value.producer()
    assert producer is not None
    cut = is_cut(producer)
    cache = _input(producer, 0) if cut else value
    held = _sizes(cache)[-2]
    rows = written_rows if cut else held
    return rows, _bytes(cache) // held * rows


def _is_cache(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "TensorScatter"


def _type_name(value: ir.Value) -> str:
    """As torch names it; signed and unsigned levels are one type."""
    assert value.dtype is not None
    name = value.dtype.name
    names = {"FLOAT": "float32", "UINT8": "int8", "UINT4": "int4"}
    return names.get(name) or ("float8" if name.startswith("FLOAT8") else name.lower())


def _inputs(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]


def _input(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place]
    assert value is not None
    return value


def _sizes(value: ir.Value) -> tuple[int, ...]:
    if value.shape is None or not value.shape.is_static():
        raise UserError(
            f"the shape of {value.name} does not follow from those of the graph's inputs: build "
            "the bundle again"
        )
    return tuple(value.shape.numpy())


def _bytes(value: ir.Value) -> int:
    assert value.dtype is not None
    return -(-prod(_sizes(value)) * value.dtype.bitwidth // 8)


def total(parts: Iterable[Work]) -> Work:
    """The sum of several phases."""
    return sum(parts, Work())
