"""ONNX Runtime: graphs run from their ONNX files, on the CPU or through CUDA.

Tensors are bound by address through IOBinding; on a GPU, ONNX Runtime launches on the stream that
torch's operations use, so that nothing has to wait in between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from lpd_export.errors import GraphError, UserError
from lpd_export.runtime.executor import Run
from lpd_export.runtime.onnxruntime_session import PROVIDERS, load_session, session_options

ELEMENT_TYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}
OUT_OF_MEMORY = ("Failed to allocate memory", "bad_alloc", "out of memory")
"""What of its errors' words tells that memory does not suffice; they have no type that does."""


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Inside, torch's operations on a CPU take so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
        begun: sessions on the CPU, with these threads, that are being loaded already.

    Raises:
        UserError: if ONNX Runtime has no provider for the device here.
    """

    records = False

    def __init__(
        self,
        files: Mapping[str, Path],
        float_type: torch.dtype = torch.float32,
        device: str = "cpu",
        threads: int | None = None,
        profiles: Path | None = None,
        weights_verified: Callable[[], None] = lambda: None,
        begun: Mapping[str, Future[onnxruntime.InferenceSession]] | None = None,
    ) -> None:
        self._profiles = profiles
        self._weights_verified = weights_verified
        self._begun = dict(begun or {})
        self.float_type = float_type
        self.device = torch.device(device)
        self._files = dict(files)
        self._threads = threads  # None leaves the operators' to ONNX Runtime
        self.threads = threads or torch.get_num_threads()
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        provider = PROVIDERS[self.device.type]
        if provider not in onnxruntime.get_available_providers():
            raise UserError(
                f"ONNX Runtime has no {provider} here: install onnxruntime-gpu, or use the CPU"
            )
        if self.device.type == "cuda" and (self.device.index or 0) >= torch.cuda.device_count():
            number = f" {self.device.index}" if self.device.index else ""
            raise UserError(
                f"torch sees no CUDA GPU{number} here: use the CPU, or check the driver"
            )

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        if self._side_stream is None:
            # Operations between graphs are small, and after each torch's other threads would spin
            # for a while, on the cores that the graph's next operators need.
            with torch_threads(1):
                yield
            return
        with torch.cuda.stream(self._side_stream):
            yield

    @cached_property
    def _side_stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def record(self, work: Run) -> Run:
        return work

    @cached_property
    def _provider(self) -> tuple[str, dict[str, Any]]:
        stream = self._side_stream
        options = {}
        if stream is not None:
            options = cuda_options(stream.device.index or 0, stream.cuda_stream)
        return PROVIDERS[self.device.type], options

    def load(self, graph: str) -> onnxruntime.InferenceSession:
        """The session of a graph.

        Raises:
            UserError: if this version of ONNX Runtime cannot run the file, or it is damaged.
        """
        if graph not in self._sessions:
            try:
                session = self._session(graph)
            finally:
                # Of damaged weights nothing is used, nor is another reason given.
                self._weights_verified()
            self._sessions[graph] = session
        return self._sessions[graph]

    def _session(self, graph: str) -> onnxruntime.InferenceSession:
        if graph in self._begun:
            return self._begun[graph].result()
        profile = self._profiles / graph if self._profiles is not None else None
        float_type = np.dtype(ELEMENT_TYPES[self.float_type]).name
        options = session_options(float_type, self._threads, profile)
        return load_session(self._files[graph], options, self._provider)

    def take_profiles(self) -> dict[str, Path]:
        """Ends profiling: by graph, the file that ONNX Runtime's profiler wrote."""
        return {graph: Path(run.end_profiling()) for graph, run in self._sessions.items()}

    def bind(self, graph: str, tensors: Mapping[str, Tensor]) -> Run:
        session = self.load(graph)
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
                assert tensor.is_contiguous(), value.name
                bind(
                    value.name,
                    self.device.type,
                    tensor.device.index or 0,
                    ELEMENT_TYPES[tensor.dtype],
                    tuple(tensor.shape),
                    tensor.data_ptr(),
                )
        options = onnxruntime.RunOptions()
        if self.device.type == "cuda":
            # Both sides launch on one stream; waiting for it after each graph would idle the GPU.
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return partial(_run, self._files[graph], session, binding, options, dict(tensors))


def _run(
    file: Path,
    session: onnxruntime.InferenceSession,
    binding: onnxruntime.IOBinding,
    options: onnxruntime.RunOptions,
    bound: Mapping[str, Tensor],  # referred to by address alone, and so kept alive here
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
