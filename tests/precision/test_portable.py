"""Graphs that no CPU runs, in a form that one does: BF16 rounded value by value, INT8 unsigned."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

import golden
from commandline import answer, entries
from lpd_export.accuracy.bundle_side import round_to_bf16 as rounded
from lpd_export.accuracy.comparison import relative_error
from lpd_export.accuracy.sides import in_shape
from lpd_export.accuracy.thresholds import LIMITS
from lpd_export.bundle.manifest import GRAPH_NAMES, Bundle
from lpd_export.errors import UserError
from lpd_export.formats import FLOAT16, FLOAT32, FP8, INT8, PRECISIONS, FloatType
from lpd_export.graphs import export
from lpd_export.graphs.contract import is_past, is_present
from lpd_export.precision.casting import lower
from lpd_export.precision.portable import make_activations_unsigned, portable_files, round_to_bf16
from lpd_export.precision.quantization import (
    quantizable_layers,
    quantize,
    quantize_weight,
    simulate_layer,
)
from lpd_export.precision.writer import check_kept_layers
from lpd_export.schedule.schedule_file import Schedule
from lpd_reference.checkpoint import load_lpd

pytestmark = pytest.mark.model

FLOAT, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.BFLOAT16
OPTIMIZATIONS = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
COARSE = {"sequence_top_1": 0.9, "index_agreement": 0.8}
"""Limits of untrained weights: a cell may be a near tie, and there are 32 of them in all."""
Arrays = dict[str, NDArray[Any]]
LifelikeBundle = Callable[..., Path]


@pytest.fixture
def weights(lifelike_weights: Path) -> Path:
    return lifelike_weights


@pytest.fixture
def fp16(lifelike_bundle: LifelikeBundle) -> Bundle:
    return Bundle.open(lifelike_bundle("fp16"))


@pytest.fixture(scope="session")
def bf16(lifelike_bundle: LifelikeBundle) -> Bundle:
    """Really compiled; no GPU is needed for that."""
    pytest.importorskip("tensorrt_rtx")
    return Bundle.open(lifelike_bundle("bf16", "tensorrt-rtx"))


@pytest.fixture
def int8(lifelike_bundle: LifelikeBundle) -> Bundle:
    pytest.importorskip("tensorrt_rtx")
    return Bundle.open(lifelike_bundle("int8", "tensorrt-rtx"))


@pytest.fixture
def exact(lifelike_bundle: LifelikeBundle) -> Path:
    """The folder of the FP32 graphs that the bundles were made from."""
    return lifelike_bundle() / "onnx"


def session(file: Path, optimizations: str = "all") -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = OPTIMIZATIONS[optimizations]
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def run_file(file: Path, inputs: Arrays, optimizations: str = "all") -> Arrays:
    loaded = session(file, optimizations)
    names = [output.name for output in loaded.get_outputs()]
    return dict(zip(names, loaded.run(names, inputs), strict=True))


def run_model(model: ir.Model, folder: Path, inputs: Arrays, optimizations: str = "all") -> Arrays:
    """Writes a model, and runs it."""
    folder.mkdir()
    export.write_models({"model": model}, folder)
    export.check_model(folder / "model.onnx")
    return run_file(folder / "model.onnx", inputs, optimizations)


def value(name: str, dtype: ir.DataType, shape: list[int], content: Any = None) -> ir.Value:
    """An input, or with a content an initializer."""
    tensor = None if content is None else ir.Tensor(content, dtype=dtype, name=name)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(dtype), shape=ir.Shape(shape))


# ------------------------------------------------------------------------------- BF16, by hand


def bf16_model(weight: NDArray[Any], bias: NDArray[Any], factor: NDArray[Any]) -> ir.Model:
    """logits = FLOAT((x @ weight + bias) * factor + BF16(y)), and `sum` before the cast."""
    x, y = value("x", BFLOAT16, [3, 8]), value("y", FLOAT, [3, 5])
    constants = [
        value(name, BFLOAT16, list(content.shape), content.astype(ml_dtypes.bfloat16))
        for name, content in (("weight", weight), ("bias", bias), ("factor", factor))
    ]
    product = ir.node("MatMul", [x, constants[0]], name="product")
    biased = ir.node("Add", [product.outputs[0], constants[1]], name="biased")
    scaled = ir.node("Mul", [biased.outputs[0], constants[2]], name="scaled")
    cast = ir.node("Cast", [y], {"to": int(BFLOAT16)}, name="cast")
    added = ir.node("Add", [scaled.outputs[0], cast.outputs[0]], name="sum")
    logits = ir.node("Cast", [added.outputs[0]], {"to": int(FLOAT)}, name="logits")
    nodes = [product, biased, scaled, cast, added, logits]
    for node in nodes:
        node.outputs[0].name, node.outputs[0].shape = node.name, ir.Shape([3, 5])
        node.outputs[0].dtype = FLOAT if node is logits else BFLOAT16
    outputs = [added.outputs[0], logits.outputs[0]]
    graph = ir.Graph(
        [x, y],
        outputs,
        nodes=nodes,
        initializers=constants,
        opset_imports={"": 24},
        name="test",
    )
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("optimizations", OPTIMIZATIONS)
def test_every_operation_is_in_fp32_and_rounded(
    tmp_path: Path, seed: int, optimizations: str
) -> None:
    """As torch does it; the optimizer of ONNX Runtime does not take the rounding for idle casts."""
    generator = np.random.default_rng(seed)
    # Whole numbers, whose products FP32 adds exactly, in whatever order.
    x, weight = (
        generator.integers(-127, 128, shape).astype(np.float32) for shape in ((3, 8), (8, 5))
    )
    bias, factor = generator.normal(size=(2, 5)).astype(np.float32)
    y = generator.normal(size=(3, 5)).astype(np.float32)
    model = bf16_model(weight, bias, factor)
    round_to_bf16(model)
    off_grid = x + np.float32(1e-3)
    assert not np.array_equal(off_grid, rounded(off_grid))
    found = run_model(model, tmp_path / "a", {"x": off_grid, "y": y}, optimizations)

    def nearest(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(torch.bfloat16).float()

    tensors = [nearest(torch.from_numpy(array)) for array in (weight, bias, factor, y)]
    exact_weight, exact_bias, exact_factor, exact_y = tensors
    product = nearest(torch.from_numpy(rounded(off_grid)) @ exact_weight)
    expected = nearest(nearest(nearest(product + exact_bias) * exact_factor) + exact_y)
    assert {name: array.dtype for name, array in found.items()} == {
        "sum": np.float32,
        "logits": np.float32,
    }
    np.testing.assert_array_equal(found["sum"], expected.numpy())
    np.testing.assert_array_equal(found["logits"], expected.numpy())
    whole = (off_grid.astype(np.float64) @ weight + bias) * factor + y
    assert relative_error(whole, found["logits"]) > 1e-3


def test_torch_in_bf16_gives_the_same(tmp_path: Path) -> None:
    """Its own BF16 operators, which add up in FP32 as hardware does."""
    generator = np.random.default_rng(0)
    x, weight = (
        generator.integers(-15, 16, shape).astype(np.float32) for shape in ((3, 8), (8, 5))
    )
    bias, factor = generator.normal(size=(2, 5)).astype(np.float32)
    y = generator.normal(size=(3, 5)).astype(np.float32)
    model = bf16_model(weight, bias, factor)
    round_to_bf16(model)
    found = run_model(model, tmp_path / "a", {"x": x, "y": y})
    half = [torch.from_numpy(array).bfloat16() for array in (x, weight, bias, factor, y)]
    expected = (half[0] @ half[1] + half[2]) * half[3] + half[4]
    np.testing.assert_array_equal(found["logits"], expected.float().numpy())


def test_rounding_is_to_nearest_even() -> None:
    floats = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -0.1], np.float32)
    nearest = torch.tensor(-0.1).bfloat16().item()
    assert rounded(floats).tolist() == [1, 1, 1 + 2**-6, 1 + 2**-7, nearest]
    assert rounded(floats).dtype == np.float32
    np.testing.assert_array_equal(rounded(rounded(floats)), rounded(floats))


# --------------------------------------------------------------------------- BF16, of a bundle


@pytest.fixture(scope="module")
def portable_bf16(bf16: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    files, note = portable_files(bf16, tmp_path_factory.mktemp("portable") / "new")
    assert note == ", every value rounded to BF16"
    return files


def decode_inputs(weights: Path, fused_attention: bool) -> Arrays:
    model = load_lpd(weights / "lpd.pth", grid=4, heads=2)
    sizes = Schedule.make(4, 4, count=1).group_sizes.tolist()
    return {
        name: tensor.numpy()
        for name, tensor in golden.step_inputs(model, sizes, 2, 2, fused_attention).items()
    }


def graph_inputs(graph: str, weights: Path, fused_attention: bool) -> Arrays:
    generator = np.random.default_rng(0)
    if graph == "decode":
        return decode_inputs(weights, fused_attention)
    if graph == "detokenize":
        return {"indices": generator.integers(64, size=(2, 16))}
    return {"image": generator.uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)}


@pytest.mark.parametrize("graph", GRAPH_NAMES)
def test_every_bf16_value_of_a_bundle_is_one_on_the_cpu(
    bf16: Bundle, portable_bf16: dict[str, Path], weights: Path, tmp_path: Path, graph: str
) -> None:
    inputs = graph_inputs(graph, weights, fused_attention=True)
    original = ir.load(bf16.file(f"onnx/{graph}.onnx")).graph
    values = [output for node in original for output in node.outputs]
    wanted = [str(output.name) for output in values if output.dtype == BFLOAT16]
    assert len(wanted) > 30
    model = ir.load(portable_bf16[graph])
    assert not [v for v in model.graph.initializers.values() if v.dtype == BFLOAT16]
    for name, initializer in model.graph.initializers.items():
        if initializer.dtype == FLOAT and original.initializers[name].dtype == BFLOAT16:
            content = initializer.const_value.numpy()  # type: ignore[union-attr]
            np.testing.assert_array_equal(content, rounded(content))
    assert {v.dtype for v in model.graph.inputs} <= {FLOAT, ir.DataType.INT64}
    plain = run_file(portable_bf16[graph], inputs)
    by_name = {output.name: output for node in model.graph for output in node.outputs}
    known = {output.name for output in model.graph.outputs}
    model.graph.outputs.extend(by_name[name] for name in wanted if name not in known)
    marked = run_model(model, tmp_path / "marked", inputs)
    for name in wanted:
        assert marked[name].dtype == np.float32
        np.testing.assert_array_equal(marked[name], rounded(marked[name]), err_msg=name)
    # What is marked is what is computed when it is not.
    for name, array in plain.items():
        np.testing.assert_allclose(array, marked[name], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("optimizations", OPTIMIZATIONS)
def test_bf16_is_as_far_from_fp32_as_its_roundings_are(
    exact: Path,
    portable_bf16: dict[str, Path],
    weights: Path,
    optimizations: str,
) -> None:
    """Whether ONNX Runtime optimizes or not: else it would drop the casts."""
    inputs = decode_inputs(weights, fused_attention=True)
    found = run_file(portable_bf16["decode"], inputs, optimizations)
    of_row = (1 + 4 * 4, inputs["past_key_0"].shape[1] * inputs["past_key_0"].shape[3])
    by_rows = {k: in_shape(v, of_row) if is_past(k) else v for k, v in inputs.items()}
    expected = run_file(exact / "decode.onnx", by_rows)
    for name in filter(is_present, expected):
        expected[name] = in_shape(expected[name], found[name].shape[1:])
    assert list(found) == list(expected)
    errors = {name: relative_error(expected[name], found[name]) for name in expected}
    assert 1e-3 < errors["logits"] < LIMITS["bf16"]["logits_error"]
    assert min(errors.values()) > 1e-3


def verified(bundle: Bundle, out: Path, *options: object) -> dict[str, Any]:
    usual: list[object] = ["--images", 2, "--threads", 1, "--json", "--save-phases", "phase_01"]
    for metric, limit in COARSE.items():
        usual += ["--threshold", f"{metric}={limit}"]
    said = answer("verify", bundle.path, "--out", out, *usual, *options)
    assert said.code == 0, said
    return cast(dict[str, Any], json.loads(said.out))


def of(result: dict[str, Any], metric: str) -> float:
    """The largest value of a metric."""
    return max(m["value"] for m in result["measurements"] if m["metric"] == metric)


def test_a_bf16_bundle_is_verified_without_a_gpu(
    bf16: Bundle, fp16: Bundle, tmp_path: Path
) -> None:
    """Its graphs are, and they are coarser than FP16's."""
    result = verified(bf16, tmp_path / "out", "--onnx", "--by-layer")
    assert result["precision"] == "bf16"
    assert result["ran"].startswith("its ONNX graphs on ONNX Runtime ")
    assert result["ran"].endswith(", cpu, every value rounded to BF16")
    limits = {measured["metric"]: measured["limit"] for measured in result["measurements"]}
    assert limits.items() <= (LIMITS["bf16"] | COARSE).items()
    layers = {layer["layer"]: layer["relative_error"] for layer in result["layers"]}
    assert {"blocks.0.fc1", "blocks.1", "head", "decoder.conv_out"} <= set(layers)
    assert all(1e-4 < error < 0.1 for error in layers.values()), layers
    finer = verified(fp16, tmp_path / "finer")
    for metric in ("sequence_kl", "logits_error", "cache_error"):
        assert of(result, metric) > 4 * of(finer, metric) > 0
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy run " in page


# ------------------------------------------------------------------------------- INT8, by hand


def product_model(weight: NDArray[np.float32], dtype: ir.DataType = FLOAT) -> ir.Model:
    """y = x @ weight."""
    x = value("x", FLOAT, [3, weight.shape[0]])
    w = value("w", FLOAT, list(weight.shape), weight)
    node = ir.node("MatMul", [x, w], name="layer/MatMul")
    node.outputs[0].name, node.outputs[0].dtype = "y", dtype
    node.outputs[0].shape = ir.Shape([3, weight.shape[1]])
    graph = ir.Graph(
        [x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 24}, name="test"
    )
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("optimizations", OPTIMIZATIONS)
def test_an_unsigned_product_is_what_signed_integers_give(
    tmp_path: Path, optimizations: str
) -> None:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(8, 5)).astype(np.float32)
    model = product_model(weight)
    quantize(model, {"layer/MatMul": 2.0})
    make_activations_unsigned(model)
    x = generator.normal(size=(3, 8)).astype(np.float32)
    x[0, :3] = [-9, 9, 0]  # beyond both ends, and in the middle
    (out,) = run_model(model, tmp_path / "m", {"x": x}, optimizations).values()
    step = 2.0 / INT8.largest
    levels, scales = quantize_weight(weight, 1)
    integers = np.clip(np.rint(x / step), -128, 127) @ levels.astype(np.float64)
    np.testing.assert_allclose(out, integers * step * scales, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("around", [FLOAT32, FLOAT16])
@pytest.mark.parametrize("graph", GRAPH_NAMES)
def test_unsigned_activations_have_the_levels_of_signed_ones(
    exact: Path, weights: Path, tmp_path: Path, graph: str, around: FloatType
) -> None:
    """In every layer of a graph: the outputs are the same, and those of a build for the CPU."""
    inputs = graph_inputs(graph, weights, fused_attention=False)
    if around == FLOAT16:
        lowest = np.finfo(np.float16).min  # the mask's is FP32's
        inputs |= {
            name: np.maximum(array, lowest).astype(np.float16)
            for name, array in inputs.items()
            if array.dtype == np.float32
        }
    models = {}
    for kind in ("signed", "changed", "unsigned"):
        models[kind] = model = ir.load(exact / f"{graph}.onnx")
        lower(model, around)
        ranges = {
            layer.node: 1.0 + i
            for i, layer in enumerate(quantizable_layers(model))
            # What FP16 makes of the center of GELU's levels may move values to the next one.
            if around == FLOAT32 or "Gelu" not in layer.activation
        }
        quantize(model, ranges, unsigned=kind == "unsigned")
        if kind == "changed":
            make_activations_unsigned(model)
    levels = [
        {n.outputs[0].dtype for n in model.graph if n.op_type == "QuantizeLinear"}
        for model in models.values()
    ]
    assert levels == [{ir.DataType.INT8}, {ir.DataType.UINT8}, {ir.DataType.UINT8}]
    stored = {
        name: {key: v.dtype for key, v in model.graph.initializers.items() if "/levels" in key}
        for name, model in models.items()
    }
    assert set(stored["changed"].values()) == {ir.DataType.INT8}
    assert stored["changed"] == stored["signed"]
    plain = {
        kind: run_model(model, tmp_path / kind, inputs, "none") for kind, model in models.items()
    }
    for name, array in plain["signed"].items():
        np.testing.assert_array_equal(plain["changed"][name], array)
    # And by the integer kernels of the CPU.
    fast = {
        kind: run_file(tmp_path / kind / "model.onnx", inputs) for kind in ("changed", "unsigned")
    }
    for name, array in fast["unsigned"].items():
        np.testing.assert_array_equal(fast["changed"][name], array)


def test_an_int8_bundle_of_engines_is_verified_without_a_gpu(int8: Bundle, tmp_path: Path) -> None:
    result = verified(int8, tmp_path / "out", "--onnx")
    assert result["ran"].endswith(", cpu, INT8 activations made unsigned")
    kl = of(result, "sequence_kl")
    assert 1e-7 < kl < LIMITS["int8"]["sequence_kl"]


# ------------------------------------------------------------------------------------------ FP8


def eight_bits(numbers: NDArray[Any]) -> NDArray[np.float64]:
    """The nearest numbers of E4M3, none of them beyond 448."""
    cut = np.clip(numbers.astype(np.float64), -448, 448)
    return cut.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


@pytest.mark.parametrize("optimizations", OPTIMIZATIONS)
@pytest.mark.parametrize("around", [FLOAT32, FLOAT16])
def test_an_fp8_product_is_what_its_numbers_give(
    tmp_path: Path, around: FloatType, optimizations: str
) -> None:
    """As bundles have it around in FP16, and as layers are simulated in FP32."""
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(8, 5)).astype(np.float32)
    x = generator.normal(size=(3, 8)).astype(np.float32)
    x[0, :4] = [-9, 9, 0, 1e-5]  # beyond both ends, in the middle, and among the smallest numbers
    model = product_model(weight)
    lower(model, around)
    if around == FLOAT16:
        quantize(model, {"layer/MatMul": 2.0}, kind=FP8)
        types = [value.dtype for value in model.graph.initializers.values()]
        assert types.count(ir.DataType.FLOAT8E4M3FN) == 3, "levels, and what they are 0 at"
    else:
        rounded, _ = simulate_layer(model, quantizable_layers(model)[0], 2.0, True, FP8)
        model.graph.outputs[0].name, rounded.name = "exact", "y"
        rounded.type, rounded.shape = model.graph.outputs[0].type, model.graph.outputs[0].shape
        model.graph.outputs[0] = rounded
    number_type = np.dtype(around.torch)
    (out,) = run_model(model, tmp_path / "m", {"x": x.astype(number_type)}, optimizations).values()
    step = number_type.type(2.0 / 448)
    step = step if float(step) >= 2.0 / 448 else np.nextafter(step, number_type.type(1))
    levels, scales = quantize_weight(
        weight.astype(number_type), 1, ir.DataType[around.onnx], kind=FP8
    )
    assert np.abs(levels.astype(np.float32)).max(axis=0) == pytest.approx(448, rel=0.04)
    wanted = eight_bits(x.astype(number_type) / step) @ levels.astype(np.float64) * step * scales
    np.testing.assert_allclose(out, wanted, rtol=0.005, atol=0.005)


@pytest.mark.engine
def test_an_fp8_bundle_is_compiled_for_gpus_that_have_it_and_verified(
    lifelike_bundle: LifelikeBundle, weights: Path, tmp_path: Path
) -> None:
    """Every product but the one left out is an FP8 kernel, in every profile."""
    pytest.importorskip("tensorrt_rtx")
    kept = str(weights / "kept.json")
    bundle = Bundle.open(lifelike_bundle("fp8", "tensorrt-rtx", keep_layers=kept))
    manifest = bundle.manifest
    assert manifest.target_compute_capabilities == ["8.9", "12.0", "12.1"]
    assert manifest.calibration["quantization"].keys() == {"decode"}
    layers = manifest.calibration["quantization"]["decode"]["layers"]
    engine, log = manifest.engines["decode"], bundle.file("engines/decode.log").read_text()
    kernels = re.findall(r"Name: [^,]*MatMul[^,]*, LayerType: gemm, Inputs: (.*?), Constants", log)
    assert sum("Datatype: FP8" in read for read in kernels) == (layers - 1) * engine["profiles"]
    assert engine["decomposable_attentions"] == 0
    result = verified(bundle, tmp_path / "out", "--onnx")
    assert result["quantized"] == f"decode: {layers - 1} of {layers} layers FP8"
    assert 1e-5 < of(result, "sequence_kl") < LIMITS["fp8"]["sequence_kl"]


def test_layers_of_what_fp8_leaves_alone_are_not_to_be_named(
    weights: Path, exact: Path, tmp_path: Path
) -> None:
    kept = {"decode": ["head/MatMul"], "detokenize": ["decoder.conv_out/Conv"]}
    with pytest.raises(
        UserError, match=r"'decoder.conv_out/Conv' of detokenize.onnx, of which fp8"
    ):
        check_kept_layers(kept, exact, PRECISIONS["fp8"])


# -------------------------------------------------------------------------------------- bundles


def test_what_the_cpu_runs_anyway_is_left_as_it_is(fp16: Bundle, tmp_path: Path) -> None:
    files, note = portable_files(fp16, tmp_path / "scratch")
    assert files == {graph: fp16.path / f"onnx/{graph}.onnx" for graph in GRAPH_NAMES}
    assert note == ""
    assert entries(tmp_path) == []


@pytest.mark.parametrize("damaged", ["onnx/weights.data", "onnx/detokenize.onnx"])
def test_damaged_graphs_are_not_run(bf16: Bundle, tmp_path: Path, damaged: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bf16.path, copy)
    content = bytearray((copy / damaged).read_bytes())
    content[-1] ^= 1
    (copy / damaged).write_bytes(content)
    with pytest.raises(UserError, match=f"{damaged} was altered"):
        portable_files(Bundle.open(copy), tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()
