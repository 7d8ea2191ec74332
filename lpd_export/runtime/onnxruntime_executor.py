"""ONNX Runtime: graphs run from their ONNX files, tensors bound through IOBinding."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from lpd_export.errors import UserError
from lpd_export.runtime.executor import Run

ELEMENT_TYPES = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.int64: np.int64,
}


class OnnxRuntimeExecutor:
    """An executor over `NAME.onnx` files, each loaded when it is first bound.

    Args:
        files: the ONNX file of each graph.
        threads: for the operators; None leaves the choice to ONNX Runtime (the physical cores).
    """

    device = torch.device("cpu")
    float_type = torch.float32

    def __init__(self, files: Mapping[str, Path], threads: int | None = None) -> None:
        self._files = dict(files)
        self._threads = threads
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    @cached_property
    def _options(self) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads or 0
        # Every phase has shapes of its own: a remembered allocation pattern would only hold memory.
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        return options

    def session(self, graph: str) -> onnxruntime.InferenceSession:
        """The session of a graph.

        Raises:
            UserError: if this version of ONNX Runtime cannot run the file.
        """
        if graph not in self._sessions:
            try:
                self._sessions[graph] = onnxruntime.InferenceSession(
                    self._files[graph], self._options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # its errors have no common base but Exception
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"ONNX Runtime {onnxruntime.__version__} cannot load {self._files[graph]}: "
                    f"{reason}"
                ) from error
        return self._sessions[graph]

    def bind(self, graph: str, tensors: Mapping[str, Tensor]) -> Run:
        session = self.session(graph)
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
                    0,
                    ELEMENT_TYPES[tensor.dtype],
                    tuple(tensor.shape),
                    tensor.data_ptr(),
                )
        return partial(_run, session, binding, dict(tensors))


def _run(
    session: onnxruntime.InferenceSession,
    binding: onnxruntime.IOBinding,
    bound: Mapping[str, Tensor],  # referred to by address alone, and so kept alive here
) -> None:
    session.run_with_iobinding(binding)
