"""Weights of a few bits: what the decode graph says, and what ONNX Runtime makes of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import golden
from commandline import answer
from lpd_export.bench.work import graph_work
from lpd_export.bundle import inspection
from lpd_export.bundle.manifest import Bundle
from lpd_export.errors import UserError
from lpd_export.formats import (
    FLOAT16,
    FLOAT32,
    INT4_WEIGHTS,
    INT8_WEIGHTS,
    PRECISIONS,
    FloatType,
    Quantization,
)
from lpd_export.graphs import export
from lpd_export.graphs.contract import CONTEXT_TOKENS, ROWS, TOKENS
from lpd_export.graphs.static import make_static
from lpd_export.precision.block_weights import (
    WeightRounder,
    quantize_embedding,
    quantize_weights,
    simulate_weight,
)
from lpd_export.precision.casting import lower
from lpd_export.precision.quantization import quantizable_layers
from lpd_export.precision.sensitivity import Chooser, Target
from lpd_export.precision.weight_only import choose_weights
from lpd_export.precision.worth import Simulation

KINDS = {
    "int4": Quantization("", "INT4", "", bits=4, largest=7, roundoff=1 / 14, block=32),
    "int8": Quantization("", "INT8", "", bits=8, largest=127, roundoff=1 / 254, block=64),
}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exact")
    export.write_models(
        {"decode": export.export_decode(golden.lpd(golden.read("lpd_grid4")))}, folder
    )
    return folder / "decode.onnx"


def session(file: Path, accuracy_level: int, optimized: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
    options.optimized_model_filepath = str(optimized)
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def dequantized(model: ir.Model) -> dict[str, np.ndarray]:
    """The weights [in, out] that levels and scales stand for, by the layer they are named after."""
    arrays = {name: value.const_value for name, value in model.graph.initializers.items()}
    weights = {}
    for name in arrays:
        if name.endswith("/weight/levels"):
            stem = name.removesuffix("/levels")
            levels = arrays[name].numpy().astype(np.float32)
            scales = arrays[f"{stem}/scales"].numpy()
            weights[stem] = levels * scales.repeat(len(levels) // len(scales), axis=0)
    return weights


@pytest.mark.model
@pytest.mark.parametrize("kind", KINDS)
def test_the_cpu_runs_every_product_on_its_levels(kind: str, exact: Path, tmp_path: Path) -> None:
    """As integers (MatMulNBits), with the numbers of a graph whose weights are those levels'."""
    model = ir.load(exact)
    layers = quantizable_layers(model)
    quantize_weights(model, {layer.node: KINDS[kind] for layer in layers}, WeightRounder({}))
    export.write_models({"decode": model}, tmp_path)
    export.check_model(tmp_path / "decode.onnx")

    weights = dequantized(ir.load(tmp_path / "decode.onnx"))
    plain = ir.load(exact)
    left: dict[str, np.ndarray] = {}
    for layer in layers:  # products of one value stand side by side in the first one's weight
        content = weights.get(f"{layer.node}/weight")
        content = left[layer.activation] if content is None else content
        initializer = plain.graph.initializers[layer.weight]
        columns = initializer.shape[1]
        initializer.const_value = ir.tensor(np.ascontiguousarray(content[:, :columns]))
        left[layer.activation] = content[:, columns:]
    assert not any(content.size for content in left.values())
    (tmp_path / "plain").mkdir()
    export.write_models({"decode": plain}, tmp_path / "plain")

    inputs = {
        name: array.numpy()
        for name, array in golden.step_inputs(
            golden.lpd(golden.read("lpd_grid4")), [1, 2, 5, 8], 2, 2
        ).items()
    }
    expected = session(tmp_path / "plain/decode.onnx", 0, tmp_path / "p.onnx").run(None, inputs)
    optimized = tmp_path / "o.onnx"
    for level, tolerance in ((0, 1e-5), (4, 5e-2)):
        outputs = session(tmp_path / "decode.onnx", level, optimized).run(None, inputs)
        for actual, wanted in zip(outputs, expected, strict=True):
            assert np.linalg.norm(actual - wanted) <= tolerance * np.linalg.norm(wanted)
    operators = [n.op_type for n in onnx.load(optimized, load_external_data=False).graph.node]
    assert "MatMul" not in operators
    assert "DequantizeLinear" not in operators
    # Queries, keys and values are one product.
    assert operators.count("MatMulNBits") == len({layer.activation for layer in layers})


@pytest.mark.model
def test_a_product_of_another_kind_stays_apart(exact: Path) -> None:
    model = ir.load(exact)
    layers = [layer.node for layer in quantizable_layers(model)]
    kinds = {
        node: KINDS["int8" if "key" in node else "int4"] for node in layers if node != layers[-1]
    }
    quantize_weights(model, kinds, WeightRounder({}))
    products = [node for node in model.graph if node.op_type == "MatMul"]
    blocks = sum("key" in node for node in layers)
    assert len(products) == len(layers) - blocks
    assert products[-1].inputs[1].name in model.graph.initializers
    stored = [value.dtype for value in model.graph.initializers.values()]
    assert stored.count(ir.DataType.INT8) == blocks
    assert stored.count(ir.DataType.INT4) == len(products) - blocks - 1


@pytest.mark.model
def test_blocks_that_do_not_divide_a_layer_are_told(exact: Path) -> None:
    model = ir.load(exact)
    layer = quantizable_layers(model)[0]
    wide = Quantization("", "INT4", "", bits=4, largest=7, roundoff=1 / 14, block=96)
    with pytest.raises(UserError, match="not whole blocks of 96: this model is too narrow"):
        quantize_weights(model, {layer.node: wide}, WeightRounder({}))


class Trials:
    """Of a graph that is close enough once few weights are left in 4 bits."""

    def __init__(self, exact: Path, enough: int) -> None:
        self.targets = {"decode": Target("distance", float(enough), at_most=True)}
        self._exact = exact

    def model(self, graph: str) -> ir.Model:
        return ir.load(self._exact)

    def measure(self, graph: str, model: ir.Model) -> float:
        stored = [value.dtype for value in model.graph.initializers.values()]
        return float(stored.count(ir.DataType.INT4))

    def worth(self, nodes: list[str], simulate: Simulation) -> dict[str, float]:
        """The last are worth most."""
        return {node: 1.0 + i for i, node in reversed([*enumerate(nodes)])}


@pytest.mark.model
def test_what_changes_a_graph_most_is_stored_in_more_bits_until_it_is_enough(exact: Path) -> None:
    model = ir.load(exact)
    layers = quantizable_layers(model)
    moments = {
        layer.activation: torch.eye(len(model.graph.initializers[layer.weight].const_value.numpy()))
        for layer in layers
    }
    rounder, precision = WeightRounder(moments), PRECISIONS["int4-weights"]
    lines: list[str] = []
    chosen, decision = choose_weights(
        cast(Chooser, Trials(exact, 8)), precision, rounder, None, lines.append
    )
    assert decision.layers == len(layers) == len(chosen)
    assert 0 < len(decision.kept) < len(layers)
    last = [layer.node for layer in layers][-len(decision.kept) :]
    assert set(decision.kept) == set(last)
    assert all(0 < noise < 0.1 for noise in decision.kept.values())
    assert {node for node, kind in chosen.items() if kind == INT8_WEIGHTS} == set(last)
    assert [value for _, value in decision.trials] == sorted(
        (value for _, value in decision.trials), reverse=True
    )
    assert len(lines) == len(decision.trials)
    # Kept exactly, they are left out.
    trials = cast(Chooser, Trials(exact, 8))
    chosen, _ = choose_weights(trials, precision, rounder, last, lines.append, exact=True)
    assert set(chosen) == {layer.node for layer in layers} - set(last)
    with pytest.raises(UserError, match="int4-weights changes this model too much"):
        choose_weights(cast(Chooser, Trials(exact, 0)), precision, rounder, None, lines.append)


@pytest.mark.model
def test_a_weights_worth_is_found_with_its_levels(exact: Path, tmp_path: Path) -> None:
    """What is gated into the graph gives what the graph gives with that weight alone on levels."""
    model, rounder = ir.load(exact), WeightRounder({})
    layer = quantizable_layers(model)[-1]
    rounded = simulate_weight(rounder, INT4_WEIGHTS, model, layer)
    exact_value = next(node for node in model.graph if node.name == layer.node).outputs[0]
    rounded.type, rounded.shape = exact_value.type, exact_value.shape
    model.graph.outputs.append(rounded)
    rounded.name = "rounded"
    export.write_models({"decode": model}, tmp_path)
    alone = ir.load(exact)
    quantize_weights(alone, {layer.node: INT4_WEIGHTS}, rounder)
    (tmp_path / "alone").mkdir()
    export.write_models({"decode": alone}, tmp_path / "alone")
    tensors = golden.step_inputs(golden.lpd(golden.read("lpd_grid4")), [1, 2, 5, 8], 2, 2)
    inputs = {name: array.numpy() for name, array in tensors.items()}
    actual = session(tmp_path / "decode.onnx", 0, tmp_path / "o.onnx").run(["rounded"], inputs)[0]
    expected = session(tmp_path / "alone/decode.onnx", 0, tmp_path / "p.onnx").run(None, inputs)[0]
    assert np.linalg.norm(actual - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("float_type", [FLOAT32, FLOAT16])
def test_each_row_of_embeddings_has_a_scale(exact: Path, float_type: FloatType) -> None:
    model = ir.load(exact)
    lower(model, float_type)
    table = model.graph.initializers["embedding"].const_value
    assert table is not None
    before = table.numpy().astype(np.float64)
    whole = graph_work(sized(model)).weights
    quantize_embedding(model)
    assert "embedding" not in model.graph.initializers
    levels, scales = (
        model.graph.initializers[f"embedding/{name}"].const_value for name in ("levels", "scales")
    )
    assert levels is not None
    assert scales is not None
    assert levels.numpy().dtype == np.int8
    assert scales.numpy().dtype == float_type.torch
    step = scales.numpy().astype(np.float64)[:, None]
    error = np.abs(levels.numpy() * step - before)
    assert (error <= 0.51 * step).all()
    assert (step <= 1.001 * np.abs(before).max(axis=1, keepdims=True) / 127).all()
    # A step reads the rows of its tokens, with their scales, and no others.
    rows, width = 2 * 3, before.shape[1]
    saved = rows * (width * (float_type.size - 1) - float_type.size)
    assert whole - graph_work(sized(model)).weights == saved


def sized(model: ir.Model) -> ir.Model:
    """A copy for 2 rows of 3 context tokens and 2 queries."""
    copied = ir.from_proto(ir.to_proto(model))
    make_static(copied, {ROWS: 2, CONTEXT_TOKENS: 3, TOKENS: 5})
    return copied


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8-weights", "int4-weights"])
def test_a_bundle_is_built_run_and_verified(
    precision: str, lifelike_bundle: Callable[..., Path], lifelike_weights: Path, tmp_path: Path
) -> None:
    """Every product but the one left out runs on levels, and every threshold holds."""
    kept = str(lifelike_weights / "kept_but_tokenize.json")
    folder = lifelike_bundle(precision, keep_layers=kept)
    bundle = Bundle.open(folder)
    decided = bundle.manifest.calibration["quantization"]["decode"]
    assert list(decided["kept"]) == ["head/MatMul"]
    share = f"decode: {decided['layers'] - 1} of {decided['layers']} layers"
    line = inspection.quantized_line(bundle.manifest)
    assert line.startswith(f"{share} {precision[:4].upper()} weights")
    embedding = ir.load(folder / "onnx/decode.onnx").graph.initializers["embedding"]
    assert embedding.dtype == ir.DataType.FLOAT16
    answer("verify", folder, "--images", 1, "--out", tmp_path / "report")


@pytest.mark.engine
def test_engines_take_blocks_of_four_bits(
    lifelike_bundle: Callable[..., Path], lifelike_weights: Path, tmp_path: Path
) -> None:
    """Attention stays fused, and the same graphs verify on the CPU with float activations."""
    pytest.importorskip("tensorrt_rtx")
    kept = str(lifelike_weights / "kept_but_tokenize.json")
    folder = lifelike_bundle("int4-weights", "tensorrt-rtx", keep_layers=kept)
    engine = Bundle.open(folder).manifest.engines["decode"]
    assert engine["decomposable_attentions"] == 0
    assert engine["cache_updates"] == 2 * engine["attentions"]
    # Of embeddings the rows that are looked up become floats, in the kernel that looks them up.
    levels = re.findall(
        r"LayerType.*embedding/levels.*", (folder / "engines/decode.log").read_text()
    )
    assert levels
    assert all("[ONNX Layer: Gather]" in kernel for kernel in levels)
    answer("verify", folder, "--onnx", "--images", 1, "--out", tmp_path / "report")
