"""What ONNX Runtime is told; how it then computes is tested through the generator."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from lpd_export import Pipeline, UserError
from lpd_export.runtime import onnxruntime_session
from lpd_export.runtime.onnxruntime_executor import OnnxRuntimeExecutor, cuda_options
from lpd_export.runtime.onnxruntime_session import allowed_cores


def test_cuda_computes_fp32_in_fp32() -> None:
    """TF32 is its default. How a GPU then computes is in test_gpu.py."""
    options = cuda_options(1, 4711)
    assert options == {"device_id": "1", "user_compute_stream": "4711", "use_tf32": "0"}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux alone confines processes")
def test_a_confined_process_starts_no_thread_for_other_cores() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert allowed_cores() == (0 if os.cpu_count() == 1 else 1)
    finally:
        os.sched_setaffinity(0, before)


def test_graphs_are_loaded_together_and_once(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    together = threading.Barrier(2, timeout=60)
    session = onnxruntime_session.onnxruntime.InferenceSession

    def load(file: Path, *arguments: Any, **options: Any) -> Any:
        loaded.append(file.stem)
        together.wait()
        return session(file, *arguments, **options)

    monkeypatch.setattr(onnxruntime_session.onnxruntime, "InferenceSession", load)
    graphs = ("decode", "detokenize")
    executor = OnnxRuntimeExecutor({name: small_bundle / f"onnx/{name}.onnx" for name in graphs})
    executor.load(*graphs)
    executor.load(*graphs)
    assert sorted(loaded) == [*graphs]


@pytest.mark.parametrize("device", ["gpu", "CPU", "cuda:x", "cuda:-1", ""])
def test_a_device_that_there_is_not_is_refused(small_bundle: Path, device: str) -> None:
    with pytest.raises(UserError, match=f"such as cuda:1, not {device!r}"):
        Pipeline.open(small_bundle, device=device)
