"""The static ONNX file of each phase computes what decode.onnx computes at its shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from golden import step_inputs
from lpd_export.accuracy.reference_side import architecture
from lpd_export.bundle.manifest import Bundle
from lpd_reference import LPD


def test_each_phase_of_the_demo_runs_alone(demo_bundle: Path) -> None:
    manifest = Bundle.open(demo_bundle).manifest
    sizes = [phase.queries for phase in manifest.phases]
    config, _ = architecture(manifest)
    model = LPD(config)  # for its shapes alone

    def run(name: str, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        session = onnxruntime.InferenceSession(
            demo_bundle / "onnx" / f"{name}.onnx", providers=["CPUExecutionProvider"]
        )
        return session.run(None, inputs)

    for phase in manifest.phases:
        tensors = step_inputs(model, sizes, 2, phase.index, fused_attention=False)
        inputs = {name: tensor.numpy() for name, tensor in tensors.items()}
        for dynamic, static in zip(run("decode", inputs), run(phase.name, inputs), strict=True):
            assert np.isfinite(static).all()
            np.testing.assert_allclose(static, dynamic, atol=2e-4)
