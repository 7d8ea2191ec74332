"""INT8 convolutions are integer ones in what ONNX Runtime makes of a graph, and close to FP32."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lpd_export.bundle.manifest import Bundle
from lpd_export.graphs import export
from lpd_export.graphs.modules import with_channel_norms
from lpd_export.precision.calibration import LayerMeasurement
from lpd_export.precision.convolutions import (
    HIGHEST_LEVEL,
    Span,
    best_span,
    convolution_values,
    quantize_convolutions,
    samples_of,
    shares_of_work,
)
from lpd_export.precision.quantization import quantizable_layers
from lpd_export.precision.sensitivity import LARGE, TARGETS, Chooser
from lpd_reference.vq import Level

pytestmark = pytest.mark.model

SHARE_OF_INTEGER_CONVOLUTIONS = 0.9


def optimized_operators(file: Path, folder: Path) -> Counter[str]:
    """What ONNX Runtime's CPU runs of a graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3  # past the remark that the file is for this machine alone
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(folder / "optimized.onnx", load_external_data=False)
    return Counter(node.op_type for node in optimized.graph.node)


def run(file: Path, x: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x.numpy()}))


class Picture(nn.Module):
    """Every kind of convolution that the tokenizer has, the last of which gives the output."""

    def __init__(self) -> None:
        super().__init__()
        level = Level(32, 64, blocks=1, attention=True)
        level.upsample = nn.Upsample(scale_factor=2)
        self.level = with_channel_norms(level)
        self.enlarged = nn.Conv2d(64, 32, 3, padding=1)
        self.last = nn.Conv2d(32, 3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(F.silu(self.enlarged(self.level(x))))
        return result


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`Picture` as an ONNX file."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exact")
    program = torch.onnx.export(
        Picture().eval(),
        (torch.zeros(1, 32, 12, 12),),
        dynamo=True,
        opset_version=export.OPSET,
        input_names=["x"],
        output_names=["y"],
        verbose=False,
    )
    assert program is not None
    export.write_models({"exact": program.model}, folder)
    return folder / "exact.onnx"


def spans_of(exact: Path, folder: Path, x: Tensor) -> dict[str, Span]:
    """Measured as a build does it."""
    model = ir.load(exact)
    values = {name: samples_of(model.graph, v) for name, v in convolution_values(model).items()}
    for name, value in values.items():
        value.name, value.dtype = f"{name}/samples", ir.DataType.FLOAT
        model.graph.outputs.append(value)
    export.write_models({"sampled": model}, folder)
    _, *samples = run(folder / "sampled.onnx", x)
    return {n: best_span(torch.from_numpy(s)) for n, s in zip(values, samples, strict=True)}


def test_every_convolution_becomes_an_integer_one(exact: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    seen, other = torch.randn(2, 1, 32, 12, 12, generator=generator)
    model = ir.load(exact)
    layers = {layer.node for layer in quantizable_layers(model)}
    quantize_convolutions(model, layers, spans_of(exact, tmp_path, seen))
    export.write_models({"quantized": model}, tmp_path)
    export.check_model(tmp_path / "quantized.onnx")
    operators = optimized_operators(tmp_path / "quantized.onnx", tmp_path)
    assert (operators["QLinearConv"], operators["Conv"]) == (len(layers), 0)
    (expected,), (actual,) = run(exact, other), run(tmp_path / "quantized.onnx", other)
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.05


def test_what_is_not_quantized_stays(exact: Path, tmp_path: Path) -> None:
    x = torch.randn(1, 32, 12, 12)
    spans = spans_of(exact, tmp_path, x)
    model = ir.load(exact)
    layers = [layer.node for layer in quantizable_layers(model)]
    quantize_convolutions(model, layers[:2], spans)
    export.write_models({"quantized": model}, tmp_path)
    operators = optimized_operators(tmp_path / "quantized.onnx", tmp_path)
    integers, floats = operators["QLinearConv"], operators["Conv"] + operators["FusedConv"]
    assert (integers, floats) == (2, len(layers) - 2)
    quantize_convolutions(untouched := ir.load(exact), [], spans)
    export.write_models({"untouched": untouched}, tmp_path)
    np.testing.assert_array_equal(run(tmp_path / "untouched.onnx", x), run(exact, x))


@pytest.mark.parametrize("outliers", [0, 1])
def test_a_span_is_where_the_values_are(outliers: int) -> None:
    """Of SiLU, never below -0.28, no level is lost to negative numbers; few large values are."""
    values = F.silu(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    values[:outliers] = 40.0
    span = best_span(values)
    assert -0.3 < span.low < -0.2
    assert span.high < values.max() if outliers else span.high > 3
    levels = (values / span.step).round() + span.zero_point
    rounded = (levels.clamp(0, HIGHEST_LEVEL) - span.zero_point) * span.step
    symmetric = (values / values.abs().max() * 127).round() / 127 * values.abs().max()
    assert (rounded - values).square().sum() < (symmetric - values).square().sum() / 3


def test_a_value_that_was_always_0_has_a_span() -> None:
    span = best_span(torch.zeros(5))
    assert (span.step > 0, span.zero_point) == (True, 0)


def test_the_last_convolution_is_spared_first_and_large_ones_last(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(small_bundle)
    out_of_reach = dataclasses.replace(TARGETS["detokenize"], limit=math.inf)
    monkeypatch.setitem(TARGETS, "detokenize", out_of_reach)
    manifest = dataclasses.replace(bundle.manifest, precision="int8")
    chooser = Chooser(small_bundle / "onnx", tmp_path, manifest, bundle.schedule())
    model = ir.load(small_bundle / "onnx/detokenize.onnx")
    work = shares_of_work(model)
    assert sum(work.values()) == pytest.approx(1)
    layers = {node: LayerMeasurement(activation_range=4.0, noise=0.0) for node in work}
    ranges, decision = chooser.choose("detokenize", layers)
    assert (ranges, decision.value) == ({}, math.inf)
    first, *others = decision.kept
    assert first == "decoder.conv_out/Conv"
    large = [work[node] > LARGE for node in others]
    assert large == sorted(large)
    assert 1 < sum(large) < len(large)


@pytest.mark.parametrize("graph", ["detokenize", "tokenize"])
def test_convolutions_of_a_bundle_are_integer_ones(
    emoji_int8_bundle: Path, tmp_path: Path, graph: str
) -> None:
    bundle = Bundle.open(emoji_int8_bundle)
    decided = bundle.manifest.calibration["quantization"][graph]
    quantized = decided["layers"] - len(decided["kept"])
    operators = optimized_operators(bundle.file(f"onnx/{graph}.onnx"), tmp_path)
    assert operators["QLinearConv"] >= SHARE_OF_INTEGER_CONVOLUTIONS * quantized > 0
