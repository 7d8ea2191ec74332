"""Channels are balanced without a change of the function, and outliers cost nothing any more."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpd_export import Pipeline
from lpd_export.build.build import build
from lpd_export.build.request import BuildRequest
from lpd_export.bundle.manifest import GRAPH_NAMES, Bundle
from lpd_export.graphs import export
from lpd_export.precision.equalization import (
    balances,
    balancing_scale,
    best_scale,
    equalize,
)
from lpd_export.precision.sensitivity import Chooser
from lpd_export.precision.writer import calibrate
from lpd_export.runtime.onnxruntime_executor import OnnxRuntimeExecutor


def decode_of(bundle: Path) -> ir.Model:
    return ir.load(bundle / "onnx" / "decode.onnx")


def add_outliers(model: ir.Model, factor: float, channels: int = 4) -> None:
    """Multiplies channels of each normalization that can be balanced, and divides what reads them.

    A function that is the same, as a trained transformer may have it.
    """
    rng = np.random.default_rng(0)
    scales = {}
    for balance in balances(model):
        scale = np.ones(len(balance.weights()[0]))
        scale[rng.permutation(len(scale))[:channels]] /= factor
        scales[balance.name] = scale.tolist()
    equalize(model, scales)


@pytest.mark.model
def test_what_is_balanced_is_every_normalization_before_products(small_bundle: Path) -> None:
    found = {
        balance.name: sorted(str(product.name) for product in balance.products)
        for balance in balances(decode_of(small_bundle))
    }
    expected = {"norm/LayerNormalization": ["head/MatMul"]}
    for block in ("blocks.0", "blocks.1"):
        attention = [f"{block}.{name}/MatMul" for name in ("key", "query", "value")]
        expected[f"{block}.norm1/LayerNormalization"] = attention
        expected[f"{block}.norm2/LayerNormalization"] = [f"{block}.fc1/MatMul"]
    assert found == expected


def test_the_function_stays_the_same(small_bundle: Path, tmp_path: Path) -> None:
    model = decode_of(small_bundle)
    rng = np.random.default_rng(0)
    equalize(
        model,
        {
            balance.name: np.exp(rng.normal(size=len(balance.weights()[0]))).tolist()
            for balance in balances(model)
        },
    )
    export.write_models({"decode": model}, tmp_path)
    export.check_model(tmp_path / "decode.onnx")
    bundle = Bundle.open(small_bundle)
    exact = Pipeline.open(small_bundle)
    executor = OnnxRuntimeExecutor({"decode": tmp_path / "decode.onnx"})
    other = Pipeline(bundle.manifest, bundle.schedule(), executor)
    images = exact.generate([0, 1], seed=1)
    expected, actual = (pipeline.teacher_forced_logits(images) for pipeline in (exact, other))
    assert np.linalg.norm(expected - actual) / np.linalg.norm(expected) < 1e-5
    assert not np.array_equal(expected, actual), "nothing was changed"


@given(st.integers(0, 2**31), st.floats(0, 1))
def test_a_scale_is_a_matter_of_proportion_and_leaves_dead_channels_alone(
    seed: int, strength: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    largest = torch.rand(6, generator=generator) + 0.1
    weight = torch.randn(6, 3, generator=generator)
    largest[2], weight[4] = 0, 0
    scale = balancing_scale(largest, [weight], strength)
    assert scale[2] == scale[4] == 1
    assert float(scale.log().sum()) == pytest.approx(0, abs=1e-4)
    if strength == 1:
        balanced = (largest / scale)[[0, 1, 3, 5]]
        torch.testing.assert_close(balanced, balanced[:1].expand(4))


def test_the_best_scale_undoes_an_outlier() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(64, 16, generator=generator), torch.randn(16, 8, generator=generator)
    factor = torch.ones(16)
    factor[3] = 200
    rows, weight = rows * factor, weight / factor[:, None]
    scale = best_scale(rows, rows.abs().amax(dim=0), [weight[:, :4], weight[:, 4:]])
    assert float(scale[3] / scale[torch.arange(16) != 3].mean()) > 20


@pytest.mark.parametrize("factor", [10, 50, 200])
def test_outliers_cost_int8_nothing(small_bundle: Path, tmp_path: Path, factor: float) -> None:
    """As they are, they take the levels from all other channels."""
    bundle = Bundle.open(small_bundle)
    manifest = dataclasses.replace(bundle.manifest, precision="int8")

    def kl(outliers: float) -> float:
        exact, scratch = tmp_path / f"{outliers}", tmp_path / "scratch"
        scratch.mkdir(exist_ok=True)
        exact.mkdir()
        models = {graph: ir.load(small_bundle / "onnx" / f"{graph}.onnx") for graph in GRAPH_NAMES}
        add_outliers(models["decode"], outliers)
        export.write_models(models, exact)
        measured = calibrate(exact, scratch, manifest, bundle.schedule(), lambda line: None)
        chooser = Chooser(exact, scratch, manifest, bundle.schedule())
        return chooser.keep("decode", measured.layers["decode"], [])[1].value

    assert kl(factor) < 1.2 * kl(1)


def outlier_checkpoint(small_weights: Path, folder: Path, factor: float) -> Path:
    """Weights of the same function with a channel of a normalization `factor` times as large."""
    content = torch.load(small_weights / "lpd.pth")
    weights = content["model"]
    for name in ("weight", "bias"):
        weights[f"blocks.1.norm2.{name}"][3] *= factor
    weights["blocks.1.mlp.fc1.weight"][:, 3] /= factor
    torch.save(content, folder / "lpd.pth")
    return folder / "lpd.pth"


def request(small_weights: Path, checkpoint: Path, precision: str) -> BuildRequest:
    return BuildRequest(
        checkpoint=str(checkpoint),
        tokenizer=str(small_weights / "vq.pt"),
        steps=4,
        out=str(checkpoint.with_name(precision)),
        precision=precision,
    )


@pytest.mark.model
def test_fp16_takes_a_model_whose_large_channel_can_be_balanced(
    small_weights: Path, tmp_path: Path
) -> None:
    """The build compares what it writes with the reference."""
    checkpoint = outlier_checkpoint(small_weights, tmp_path, factor=1e6)
    told: list[str] = []
    bundle = build(request(small_weights, checkpoint, "fp16"), report=told.append)
    assert "equalizing the channels of 1 normalizations" in told
    largest = Bundle.open(bundle).manifest.calibration["largest_values"]["decode"]
    assert largest["magnitude"] < 1e4
