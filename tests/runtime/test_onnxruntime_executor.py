"""What ONNX Runtime is told; how it then computes is tested through the generator."""

from __future__ import annotations

import os

import pytest
import torch

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


def test_torch_leaves_the_cores_to_the_graphs_and_gets_its_threads_back() -> None:
    """Its idle threads spin: on two cores they doubled the time of an image."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with OnnxRuntimeExecutor({}).stream():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
