"""From a bundle to the executor of its backend: which files it takes, verified.

Knows the files of a bundle; a backend is imported when a bundle needs it.
"""

from __future__ import annotations

from pathlib import Path

from lpd_export.bounds import DEVICE
from lpd_export.bundle.manifest import GRAPH_NAMES, MANIFEST, Bundle
from lpd_export.errors import UserError
from lpd_export.files import cache_folder, sha256
from lpd_export.formats import BACKENDS
from lpd_export.runtime.arrays import HOST
from lpd_export.runtime.executor import Executor
from lpd_export.runtime.onnxruntime_executor import OnnxRuntimeExecutor

WEIGHTS = "onnx/weights.data"
"""The file that the ONNX graphs of a bundle share."""


def open_executor(
    bundle: Bundle, device: str | None, threads: int | None, profiles: Path | None = None
) -> Executor:
    """The executor of a bundle's backend over its files, verified when a graph is loaded.

    profiles: a folder for what ONNX Runtime's profiler finds, where that runs the graphs.

    Raises:
        UserError: if a file is damaged, or this machine has not what the backend needs. Whether
            ONNX weights were altered is known when a graph is loaded.
    """
    if device is not None and not DEVICE.fullmatch(device):
        raise UserError(
            f"the device must be cpu, cuda, or a GPU by its number such as cuda:1, not {device!r}"
        )
    manifest = bundle.manifest
    graphs = {graph: f"onnx/{graph}.onnx" for graph in GRAPH_NAMES}
    if not BACKENDS[manifest.backend].compiles:
        return OnnxRuntimeExecutor(
            {graph: bundle.file(name) for graph, name in graphs.items()},
            manifest.float_type,
            device or HOST,
            threads,
            profiles,
            # While graphs are loaded: reading and packing them takes as long as their checksum.
            bundle.verify_meanwhile(WEIGHTS),
        )
    if device == HOST or threads is not None:
        raise UserError(
            f"{bundle.path} holds {manifest.backend} engines, which run on a GPU: leave out the "
            "CPU's settings, or build a bundle with --backend onnxruntime"
        )
    from lpd_export.runtime.tensorrt_executor import TensorRTExecutor

    cache = cache_folder() / f"kernels-{sha256(bundle.path / MANIFEST)[:32]}.bin"
    return TensorRTExecutor(
        {graph: bundle.file(f"engines/{graph}.engine") for graph in graphs},
        manifest.float_type,
        manifest.backend,
        device or "cuda",
        cache if BACKENDS[manifest.backend].portable else None,
    )
