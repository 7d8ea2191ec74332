"""Sessions of ONNX Runtime: how a graph is loaded, without torch.

Knows their settings. What is bound to a session is the executor's, which is in
`onnxruntime_executor`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import onnxruntime

from lpd_export.errors import UserError
from lpd_export.runtime.arrays import HOST

PROVIDERS = {HOST: "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
QUANTIZED = b"QuantizeLinear"
"""What the file of a graph has in it whose products are computed in INT8."""
FOLDER = "session.model_external_initializers_file_folder_path"
"""The setting that says where the weights of a graph are that is not loaded from a file."""


def allowed_cores() -> int:
    """The cores that this process is confined to; 0, ONNX Runtime's own choice, if to none."""
    if not hasattr(os, "sched_getaffinity"):  # Linux alone has it
        return 0
    allowed = len(os.sched_getaffinity(0))
    # ONNX Runtime does not ask: in a container with one core of 64 it would start 32 threads.
    return 0 if allowed == os.cpu_count() else allowed


def session_options(
    float_type: str, threads: int | None, profile: Path | None = None
) -> onnxruntime.SessionOptions:
    """The settings of a session.

    Args:
        float_type: of the graph, "float32" or "float16".
        threads: for the operators on a CPU; by default those of `allowed_cores`.
        profile: how the files begin that ONNX Runtime's profiler is to write.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or allowed_cores()
    # Every phase has shapes of its own: a remembered allocation pattern would only hold memory.
    options.enable_mem_pattern = False
    # In an FP32 graph a product with few-bit weights is computed on 8-bit activations, which is
    # what makes it fast; in an FP16 graph, as an engine has it, on the activations as they are.
    level = "4" if float_type == "float32" else "0"
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    # The next operator comes soon, and to wake a thread for it takes long; but one that spins until
    # the next graph comes takes the core from whoever has work.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    options.log_severity_level = 4  # what it would log as errors, it raises too
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return options


def load_session(
    file: Path, options: onnxruntime.SessionOptions, provider: tuple[str, dict[str, Any]]
) -> onnxruntime.InferenceSession:
    """Loads a graph.

    Args:
        file: the ONNX file.
        options: of the session.
        provider: where it runs, and the provider's own options.

    Raises:
        UserError: if this version of ONNX Runtime cannot run the file, or it is damaged.
    """
    try:
        graph: Path | bytes = file
        if provider[0] == PROVIDERS[HOST] and QUANTIZED in (content := file.read_bytes()):
            # Imports onnx, for which other graphs need not wait.
            from lpd_export.runtime.onnxruntime_fusion import fuse_biases

            graph = fuse_biases(content)
            options.add_session_config_entry(FOLDER, str(file.parent))
        session = onnxruntime.InferenceSession(graph, options, providers=[provider])
    except Exception as error:  # its errors have no common base but Exception
        reason = str(error).splitlines()[0]
        raise UserError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {file}: {reason}"
        ) from error
    return_freed_memory()
    return session


def return_freed_memory() -> None:
    """Gives the system back what was freed, where the C library can.

    Weights of few bits are packed anew when they are loaded: their first copies would stay.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
        if trim:
            trim(0)
