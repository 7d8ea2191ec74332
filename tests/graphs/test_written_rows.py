"""On ONNX Runtime, attention reads the rows of the cache that are written, and no others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from golden import step_inputs
from lpd_export.accuracy.reference_side import architecture
from lpd_export.bundle.manifest import Bundle
from lpd_export.graphs import contract
from lpd_export.graphs.static import make_static
from lpd_export.graphs.written_rows import fix_written_rows, is_cut
from lpd_reference import LPD

pytestmark = pytest.mark.model


def logits(file: Path, inputs: dict[str, NDArray[np.generic]]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (values,) = session.run([contract.LOGITS], inputs)
    return values


@pytest.mark.parametrize("number", [0, 1, 7, 19])
def test_rows_that_later_steps_write_are_not_read(demo_bundle: Path, number: int) -> None:
    """A mask does not hide a NaN."""
    manifest = Bundle.open(demo_bundle).manifest
    sizes = [phase.queries for phase in manifest.phases]
    phase = manifest.phases[number]
    tensors = step_inputs(
        LPD(architecture(manifest)[0]), sizes, rows=2, number=number, fused_attention=False
    )
    inputs = {name: tensor.numpy() for name, tensor in tensors.items()}
    caches = [values for name, values in inputs.items() if contract.is_past(name)]
    files = [demo_bundle / "onnx" / f"{name}.onnx" for name in ("decode", phase.name)]
    expected = [logits(file, inputs) for file in files]
    for cache in caches:
        cache[:, phase.write_index + phase.tokens :] = np.nan
    for file, before in zip(files, expected, strict=True):
        assert np.array_equal(logits(file, inputs), before)
    if number:
        for cache in caches:
            cache[:, phase.write_index - 1] = np.nan
        assert not np.isfinite(logits(files[0], inputs)).any()


def test_the_row_that_is_written_furthest_decides(demo_bundle: Path) -> None:
    manifest = Bundle.open(demo_bundle).manifest
    sizes = [phase.queries for phase in manifest.phases]
    tensors = step_inputs(
        LPD(architecture(manifest)[0]), sizes, rows=2, number=3, fused_attention=False
    )
    inputs = {name: tensor.numpy() for name, tensor in tensors.items()}
    inputs[contract.ATTENTION_MASK] = np.zeros_like(inputs[contract.ATTENTION_MASK])  # sees all
    file, index = demo_bundle / "onnx" / "decode.onnx", inputs[contract.WRITE_INDEX]
    both = logits(file, inputs | {contract.WRITE_INDEX: index + 50})
    one = logits(file, inputs | {contract.WRITE_INDEX: index + np.array([0, 50])})
    assert np.array_equal(one[1], both[1])


def test_a_count_of_rows_gives_every_value_its_shape(demo_bundle: Path) -> None:
    model = ir.load(demo_bundle / "onnx" / "decode.onnx")
    fix_written_rows(model, 17)
    make_static(model, {contract.ROWS: 2, contract.CONTEXT_TOKENS: 5, contract.TOKENS: 9})
    cuts = [node for node in model.graph if is_cut(node)]
    counts = Counter(node.op_type for node in model.graph)
    assert len(cuts) == 2 * counts["Attention"] + 1
    read = [
        node.inputs[place]
        for node in model.graph.all_nodes()
        for place in (1, 2, 3)
        if node.op_type == "Attention"
    ]
    for value in read:
        assert value is not None
        assert value.shape is not None
        assert 17 in value.shape.numpy()
