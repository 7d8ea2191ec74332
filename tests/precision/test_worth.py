"""What each layer is worth to the graph, and how many are kept back for it."""

from __future__ import annotations

import math
from pathlib import Path

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpd_export import Pipeline
from lpd_export.bundle.manifest import Bundle
from lpd_export.graphs import export
from lpd_export.precision.quantization import quantizable_layers, quantize, simulate_layer
from lpd_export.precision.sensitivity import MOST_KEPT, mean_kl, next_trial
from lpd_export.precision.worth import log_probabilities_of, worth_of_layers
from lpd_export.runtime.onnxruntime_executor import OnnxRuntimeExecutor


def test_a_layers_worth_is_the_kl_of_a_graph_with_it_alone_quantized(
    small_bundle: Path, tmp_path: Path
) -> None:
    bundle, exact = Bundle.open(small_bundle), Pipeline.open(small_bundle)
    images = exact.generate([0, 1, 2], seed=3)
    expected = log_probabilities_of(exact, images)
    graph = ir.load(small_bundle / "onnx" / "decode.onnx")
    # Levels so coarse that a difference in which layer it is cannot be overlooked.
    ranges = {layer.node: 20.0 + i for i, layer in enumerate(quantizable_layers(graph))}
    worth = worth_of_layers(
        small_bundle / "onnx",
        tmp_path,
        bundle.manifest,
        bundle.schedule(),
        ranges,
        lambda model, layer: simulate_layer(model, layer, ranges[layer.node], weight=True)[0],
        images,
        expected,
    )
    assert list(worth) == list(ranges)
    assert list(tmp_path.iterdir()) == []
    for node in ("blocks.0.value/MatMul", "blocks.1.fc2/MatMul", "head/MatMul"):
        alone = ir.load(small_bundle / "onnx" / "decode.onnx")
        quantize(alone, {node: ranges[node]}, unsigned=True)
        export.write_models({"decode": alone}, tmp_path)
        executor = OnnxRuntimeExecutor({"decode": tmp_path / "decode.onnx"})
        pipeline = Pipeline(bundle.manifest, bundle.schedule(), executor)
        actual = log_probabilities_of(pipeline, images)
        assert worth[node] == pytest.approx(mean_kl(expected, actual), rel=0.02, abs=1e-9), node


@given(
    st.lists(st.floats(1e-6, 1), min_size=2, max_size=40).map(lambda w: sorted(w, reverse=True)),
    st.floats(1.01, 100) | st.just(math.nan) | st.just(math.inf),
    st.data(),
)
def test_as_few_layers_are_kept_as_should_be_enough(
    worth: list[float], factor: float, data: st.DataObject
) -> None:
    most = math.ceil(MOST_KEPT * len(worth))
    kept = data.draw(st.integers(0, most - 1))
    value = factor * 0.01
    count = next_trial(worth, kept, value, 0.01)
    assert kept < count <= most
    enough = sum(worth[kept:]) / factor
    if math.isnan(factor):
        assert count == most
    elif count < most:
        assert sum(worth[count:]) <= enough * 1.000001
        assert count == kept + 1 or sum(worth[count - 1 :]) >= enough * 0.999999
