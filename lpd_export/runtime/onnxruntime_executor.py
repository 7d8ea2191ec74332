"""ONNX Runtime: graphs run from their ONNX files, on the CPU or through CUDA.

Arrays are bound by address through IOBinding; on a GPU, ONNX Runtime launches on the stream that
torch's operations use, so that nothing has to wait in between. On the CPU there is no torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from lpd_export.errors import GraphError, UserError
from lpd_export.runtime.arrays import (
    HOST,
    Array,
    address_of,
    arrays_of,
    dtype_name,
    is_contiguous,
)
from lpd_export.runtime.executor import Run
from lpd_export.runtime.onnxruntime_session import (
    PROVIDERS,
    load_session,
    session_options,
)

if TYPE_CHECKING:
    import torch

OUT_OF_MEMORY = ("Failed to allocate memory", "bad_alloc", "out of memory")
"""What of its errors' words tells that memory does not suffice; they have no type that does."""


def cuda_options(device_index: int, stream: int) -> dict[str, str]:
    """What ONNX Runtime's CUDA provider is told: the GPU, the stream, and exact FP32."""
    return {
        "device_id": str(device_index),
        "user_compute_stream": str(stream),
        # Its default computes FP32 products in TF32, with 10 bits of mantissa.
        "use_tf32": "0",
    }


class OnnxRuntimeExecutor:
    """An executor over `NAME.onnx` files, each loaded when it is first bound.

    Args:
        files: the ONNX file of each graph.
        float_type: of the graphs.
        device: "cpu" or "cuda".
        threads: for the operators on a CPU; by default ONNX Runtime's choice, the physical cores,
            or the cores that this process is confined to.
        profiles: a folder for what ONNX Runtime's profiler finds (see `take_profiles`).
        weights_verified: waits until the weights that the files refer to are verified, and raises
            UserError if they are damaged; no graph is loaded for use before.

    Raises:
        UserError: if ONNX Runtime has no provider for the device here.
    """

    records = False

    def __init__(
        self,
        files: Mapping[str, Path],
        float_type: str = "float32",
        device: str = HOST,
        threads: int | None = None,
        profiles: Path | None = None,
        weights_verified: Callable[[], None] = lambda: None,
    ) -> None:
        self._profiles = profiles
        self._weights_verified = weights_verified
        self.float_type = float_type
        self._kind, _, number = device.partition(":")
        self._device_index = int(number or 0)
        self._files = dict(files)
        self._threads = threads  # None leaves the operators' to ONNX Runtime
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        provider = PROVIDERS[self._kind]
        if provider not in onnxruntime.get_available_providers():
            raise UserError(
                f"ONNX Runtime has no {provider} here: install onnxruntime-gpu, or use the CPU"
            )
        self.device, self.arrays = device, arrays_of(device)
        if device == HOST:
            return
        import torch

        if self._device_index >= torch.cuda.device_count():
            which = f" {self._device_index}" if self._device_index else ""
            raise UserError(f"torch sees no CUDA GPU{which} here: use the CPU, or check the driver")

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        if self._side_stream is None:
            yield
            return
        import torch

        with torch.cuda.stream(self._side_stream):
            yield

    @cached_property
    def _side_stream(self) -> torch.cuda.Stream | None:
        if self.device == HOST:
            return None
        import torch

        return torch.cuda.Stream(self.device)

    def record(self, work: Run) -> Run:
        return work

    @cached_property
    def _provider(self) -> tuple[str, dict[str, Any]]:
        stream = self._side_stream
        options = {}
        if stream is not None:
            options = cuda_options(self._device_index, stream.cuda_stream)
        return PROVIDERS[self._kind], options

    def load(self, *graphs: str) -> None:
        """Loads graphs, each in a thread.

        Raises:
            UserError: if this version of ONNX Runtime cannot run a file, or it is damaged.
        """
        new = [graph for graph in graphs if graph not in self._sessions]
        if not new:
            return
        try:
            with ThreadPoolExecutor(len(new), "load") as pool:
                sessions = [*pool.map(self._new_session, new)]
        finally:
            # Of damaged weights nothing is used, nor is another reason given.
            self._weights_verified()
        self._sessions |= zip(new, sessions, strict=True)

    def _new_session(self, graph: str) -> onnxruntime.InferenceSession:
        profile = self._profiles / graph if self._profiles is not None else None
        options = session_options(self.float_type, self._threads, profile)
        return load_session(self._files[graph], options, self._provider)

    def take_profiles(self) -> dict[str, Path]:
        """Ends profiling: by graph, the file that ONNX Runtime's profiler wrote."""
        return {graph: Path(run.end_profiling()) for graph, run in self._sessions.items()}

    def bind(self, graph: str, tensors: Mapping[str, Array]) -> Run:
        self.load(graph)
        session = self._sessions[graph]
        names = {value.name for value in (*session.get_inputs(), *session.get_outputs())}
        if strange := names ^ set(tensors):
            raise GraphError(
                f"{self._files[graph]} is no {graph} graph of this model, whose inputs and outputs "
                f"are others ({', '.join(sorted(strange)[:3])}): build the bundle again"
            )
        binding = session.io_binding()
        for values, bind in (
            (session.get_inputs(), binding.bind_input),
            (session.get_outputs(), binding.bind_output),
        ):
            for value in values:
                tensor = tensors[value.name]
                assert is_contiguous(tensor), value.name
                bind(
                    value.name,
                    self._kind,
                    self._device_index,
                    np.dtype(dtype_name(tensor)),
                    tuple(tensor.shape),
                    address_of(tensor),
                )
        options = onnxruntime.RunOptions()
        if self.device != HOST:
            # Both sides launch on one stream; waiting for it after each graph would idle the GPU.
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return partial(_run, self._files[graph], session, binding, options, dict(tensors))


def _run(
    file: Path,
    session: onnxruntime.InferenceSession,
    binding: onnxruntime.IOBinding,
    options: onnxruntime.RunOptions,
    bound: Mapping[str, Array],  # referred to by address alone, and so kept alive here
) -> None:
    try:
        session.run_with_iobinding(binding, options)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rstrip(" .")
        if any(words in reason for words in OUT_OF_MEMORY):
            raise UserError(
                f"there is too little memory to run {file} ({reason}): end what else runs here, or "
                "use a smaller --batch"
            ) from error
        raise GraphError(
            f"ONNX Runtime {onnxruntime.__version__} cannot run {file}: {reason}: build the bundle "
            "again"
        ) from error
