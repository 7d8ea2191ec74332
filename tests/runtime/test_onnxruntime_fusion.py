"""INT8 products that add their biases themselves give what they gave before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from golden import step_inputs
from lpd_export.accuracy.reference_side import architecture
from lpd_export.bundle.manifest import Bundle
from lpd_export.runtime.onnxruntime_fusion import fuse_biases
from lpd_export.runtime.onnxruntime_session import PROVIDERS, load_session, session_options
from lpd_reference import LPD

ROWS, IN, OUT = 5, 16, 24
Arrays = dict[str, NDArray[Any]]


def constants(seed: int, scales: tuple[int, ...] = (OUT,)) -> Arrays:
    generator = np.random.default_rng(seed)
    return {
        "x_scale": np.float32(0.02),
        "x_zero": np.uint8(generator.integers(256)),
        "w": generator.integers(-127, 128, (IN, OUT)).astype(np.int8),
        "w_scale": generator.uniform(1e-3, 1e-2, scales).astype(np.float32),
        "w_zero": np.zeros(scales, np.int8),
        "bias": generator.standard_normal(OUT).astype(np.float32),
    }


def product(values: Arrays, swapped: bool = False, axis: int = 1, also: str = "") -> bytes:
    """y = dequantized(quantized(x)) @ dequantized(w) + bias, and `also` as an output."""
    bias = ["bias", "product"] if swapped else ["product", "bias"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["levels"]),
        helper.make_node("DequantizeLinear", ["levels", "x_scale", "x_zero"], ["left"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["right"], axis=axis),
        helper.make_node("MatMul", ["left", "right"], ["product"], name="layer/MatMul"),
        helper.make_node("Add", bias, ["y"]),
    ]

    def float_of(name: str, *shape: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    outputs = [float_of(name, 2, ROWS, OUT) for name in ("y", *also.split())]
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in values.items()]
    graph = helper.make_graph(nodes, "g", [float_of("x", 2, ROWS, IN)], outputs, initializers)
    opsets = [helper.make_opsetid("", 21)]
    content: bytes = helper.make_model(
        graph, opset_imports=opsets, ir_version=10
    ).SerializeToString()
    return content


def run(content: bytes, inputs: Arrays) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def operators(content: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_model_from_string(content).graph.node)


@given(
    st.integers(0, 10**6),
    st.sampled_from([(OUT,), ()]),
    st.booleans(),
    st.sampled_from([1, -1]),
)
@settings(max_examples=50)
def test_a_product_with_its_bias_is_one_operator(
    seed: int, scales: tuple[int, ...], swapped: bool, axis: int
) -> None:
    content = product(constants(seed, scales), swapped, axis)
    fused = fuse_biases(content)
    assert operators(fused) == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1}
    assert fuse_biases(fused) == fused
    x = np.random.default_rng(seed).uniform(-3, 3, (2, ROWS, IN)).astype(np.float32)
    (expected,), (actual,) = run(content, {"x": x}), run(fused, {"x": x})
    # Sums of this size are rounded to 2e-6, in two orders; a bias is some tenths.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def bias_of_rows(values: Arrays) -> bytes:
    return product(values | {"bias": np.ones((ROWS, OUT), np.float32)})


def product_used_twice(values: Arrays) -> bytes:
    return product(values, also="product")


def scales_of_rows(values: Arrays) -> bytes:
    scales = {"w_scale": np.ones(IN, np.float32), "w_zero": np.zeros(IN, np.int8)}
    return product(values | scales, axis=0)


def levels_of_float8(values: Arrays) -> bytes:
    model = onnx.load_model_from_string(product(values))
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            tensor.data_type = onnx.TensorProto.FLOAT8E4M3FN
    content: bytes = model.SerializeToString()
    return content


def weights_that_come_in(values: Arrays) -> bytes:
    model = onnx.load_model_from_string(product(values))
    (w,) = (tensor for tensor in model.graph.initializer if tensor.name == "w")
    model.graph.initializer.remove(w)
    model.graph.input.append(helper.make_tensor_value_info("w", onnx.TensorProto.INT8, [IN, OUT]))
    content: bytes = model.SerializeToString()
    return content


@pytest.mark.parametrize(
    "make",
    [bias_of_rows, product_used_twice, scales_of_rows, levels_of_float8, weights_that_come_in],
)
def test_what_is_no_such_product_stays(make: Callable[[Arrays], bytes]) -> None:
    content = make(constants(0))
    assert operators(fuse_biases(content)) == operators(content)


def test_the_demo_in_int8_is_loaded_with_its_biases_in_products(
    demo_int8_bundle: Path, tmp_path: Path
) -> None:
    """What ONNX Runtime runs in the end, and that it computes the same."""
    bundle = Bundle.open(demo_int8_bundle)
    manifest, file = bundle.manifest, bundle.graph("onnx/decode.onnx")
    decided = manifest.calibration["quantization"]["decode"]
    options = session_options(manifest.float_type, threads=1)
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    loaded = load_session(file, options, (PROVIDERS["cpu"], {}))
    nodes = onnx.load(tmp_path / "run.onnx", load_external_data=False).graph.node
    biases = [len(node.input) == 7 for node in nodes if node.op_type == "MatMulIntegerToFloat"]
    assert all(biases)
    assert len(biases) == decided["layers"] - len(decided["kept"]) > 30

    sizes = [phase.queries for phase in manifest.phases]
    model = LPD(architecture(manifest)[0])
    tensors = step_inputs(model, sizes, 2, 12, fused_attention=False)
    inputs = {name: tensor.numpy() for name, tensor in tensors.items()}
    plain = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for one, other in zip(plain.run(None, inputs), loaded.run(None, inputs), strict=True):
        # A rounding may move a value by a level of 8 bits, here and there.
        assert np.linalg.norm(other - one) <= 5e-3 * np.linalg.norm(one)
