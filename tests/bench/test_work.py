"""What is counted from graphs, against what follows from an architecture's sizes alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import golden
from lpd_export.bench.work import Work, generation_work, graph_work, total
from lpd_export.bundle.manifest import Bundle
from lpd_export.graphs.contract import CONTEXT_TOKENS, ROWS, TOKENS
from lpd_export.graphs.export import export_decode
from lpd_export.graphs.static import make_static
from lpd_export.schedule.phases import group_sizes, phase_table
from lpd_reference import PUBLISHED_MODELS, LPDConfig


def decode_operations(
    dim: int, depth: int, read: int, vocab: int, rows: int, tokens: int, queries: int, cut: bool
) -> int:
    """Of one phase: 12 D^2 weights a block, attention over rows of the cache, and the head.

    If cut, the last block makes keys, values and queries of the context, 3 of the 12, and no more.
    """
    context = tokens - queries if cut else 0
    blocks = 2 * rows * (12 * tokens * depth - 9 * context) * dim * dim
    attention = 4 * rows * (tokens * depth - context) * read * dim
    return blocks + attention + 2 * rows * queries * dim * vocab


def test_the_closed_form_of_lpd_l() -> None:
    """612 GFLOP an image in weights, with guidance, in 20 steps at 256 px; 26 in attention.

    In a graph that is cut it is 1.5 % less.
    """
    model = LPDConfig(**PUBLISHED_MODELS["lpd-l"], grid=16)
    whole, cut = (
        sum(
            decode_operations(
                model.dim, model.depth, 257, model.vocab_size, 2, p.tokens, p.queries, cut
            )
            for p in phase_table(group_sizes(256, 20))
        )
        for cut in (False, True)
    )
    assert whole == pytest.approx(611.7e9 + 25.9e9, rel=1e-3)
    assert cut / whole == pytest.approx(0.985, abs=1e-3)


@pytest.mark.parametrize("bundle", ["small_bundle", "emoji_bundle"])
def test_decode_is_its_closed_form(bundle: str, request: pytest.FixtureRequest) -> None:
    opened = Bundle.open(request.getfixturevalue(bundle))
    model = opened.manifest.model
    cells, size = model.grid**2, 4
    for phases in (None, phase_table([1] * cells)):  # its own schedule, and raster order
        work = generation_work(opened, phases)
        for phase in phases or opened.manifest.phases:
            part = work[f"step {phase.index + 1}" if phase.index else "prefill"]
            written = phase.write_index + phase.tokens
            assert part.operations == Counter(
                float32=decode_operations(
                    model.dim,
                    model.depth,
                    written,
                    model.vocab_size,
                    2,
                    phase.tokens,
                    phase.queries,
                    cut=True,
                )
            )
            # Every layer's keys and values are read as far as they are written.
            rows = 2 * 2 * model.depth * model.dim * size
            assert part.caches == rows * (written + phase.tokens)
            # Into each of 5 products and the head, and the logits.
            read = model.depth * phase.tokens * (4 * model.dim + model.mlp_dim)
            read -= phase.context * (3 * model.dim + model.mlp_dim)
            read += phase.queries * model.dim
            logits = phase.queries * model.vocab_size
            assert part.activations == 2 * size * (2 * read + logits)
            # The few rows of embeddings, biases and norms are the rest.
            products = model.depth * 12 * model.dim**2 + model.dim * model.vocab_size
            assert 1 < part.weights / (products * size) < 1.05


def test_a_cache_that_is_not_cut_is_read_whole() -> None:
    """As engines read it."""
    model = golden.lpd(golden.read(golden.LPD_NAMES[0]))
    config, tokens, queries = model.config, 5, 3
    graph = export_decode(model)
    make_static(graph, {ROWS: 2, CONTEXT_TOKENS: tokens - queries, TOKENS: tokens})
    work = graph_work(graph, written_rows=tokens)
    read = config.cells + 1
    assert work.operations.total() == decode_operations(
        config.dim, config.depth, read, config.vocab_size, 2, tokens, queries, cut=False
    )
    assert work.caches == 2 * 2 * config.depth * config.dim * 4 * (read + tokens)


def test_quantized_layers_count_as_what_they_are(
    emoji_bundle: Path, emoji_int8_bundle: Path
) -> None:
    exact, quantized = (
        total(generation_work(Bundle.open(b)).values()) for b in (emoji_bundle, emoji_int8_bundle)
    )
    assert set(exact.operations) == {"float32"}
    assert set(quantized.operations) <= {"float32", "int8"}
    assert quantized.operations.total() == exact.operations.total()
    assert quantized.operations["int8"] > 0.8 * exact.operations["float32"]
    assert quantized.weights < 0.4 * exact.weights
    assert quantized.activations < exact.activations
    assert quantized.caches == exact.caches


def product(weight: ir.DataType, block: int) -> ir.Model:
    """[3, 64] x [64, 8] with weights of some type in blocks that share a scale."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([3, 64]))
    levels = ir.tensor(np.zeros((64, 8), np.int8), name="levels")
    stored = ir.Value(name="levels", type=ir.TensorType(weight), shape=ir.Shape([64, 8]))
    stored.const_value = levels
    scales = ir.Value(
        name="scales", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([64 // block, 8])
    )
    scales.const_value = ir.tensor(np.ones((64 // block, 8), np.float16), name="scales")
    back = ir.node("DequantizeLinear", [stored, scales], {"axis": 0, "block_size": block})
    node = ir.node("MatMul", [x, back.outputs[0]])
    for value, shape in ((back.outputs[0], [64, 8]), (node.outputs[0], [3, 8])):
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT16), ir.Shape(shape)
    graph = ir.Graph(
        [x], node.outputs, nodes=[back, node], initializers=[stored, scales], name="product"
    )
    return ir.Model(graph, ir_version=11)


@pytest.mark.parametrize(("weight", "size"), [("INT4", 64 * 8 // 2), ("INT8", 64 * 8)])
def test_weights_of_few_bits_are_counted_as_stored(weight: str, size: int) -> None:
    work = graph_work(product(ir.DataType[weight], block=32))
    assert work == Work(
        operations=Counter({f"float16 x {weight.lower()}": 2 * 3 * 64 * 8}),
        weights=size + 2 * 8 * 2,  # two blocks of 64 inputs
        activations=2 * (3 * 64 * 2) + 3 * 8 * 2,
    )
    several = work.of(5)
    assert several.weights == work.weights
    assert several.activations == 5 * work.activations
    assert several.operations.total() == 5 * work.operations.total()
