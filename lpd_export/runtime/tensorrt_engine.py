"""An engine's file: how it is loaded, which shapes it takes, and what is wrong with it.

Knows the part of TensorRT's and TensorRT-RTX's API that loads engines, which the two share, and
what their words mean for a user. Does not run anything.
"""

from __future__ import annotations

import importlib
import re
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lpd_export.errors import UserError
from lpd_export.formats import BACKENDS

PROBLEMS = (
    (
        r"MALFORMED_ENGINE|magicTag|header\.size|bufferSize|empty memory buffer",
        "the file is truncated or not an engine; build the bundle again",
    ),
    (
        r"UNSUPPORTED_CC|incompatible device",
        "it was built for another GPU architecture; build the bundle again for this one",
    ),
    (
        r"INSUFFICIENT_GPU_MEMORY|out of memory|OutOfMemory",
        "the GPU has too little free memory; use a smaller --batch, or end what else runs on it",
    ),
    (
        r"OLD_CUDA|CUDA_ERROR|driver|CUDA initialization",
        "the GPU driver is too old or does not run; update it, and see that nvidia-smi works",
    ),
    (
        r"VERSION_MISMATCH|version",
        "it was built with another version; install that version, or build the bundle again",
    ),
)
"""What TensorRT's own words mean for the user, the first that matches."""


class ShapeRange(NamedTuple):
    """The shapes of one input that an optimization profile takes, axis by axis."""

    least: Sequence[int]
    optimum: Sequence[int]
    most: Sequence[int]

    def holds(self, shape: Sequence[int], first_axis: int = 0) -> bool:
        """Whether it takes a shape, axes before `first_axis` aside."""
        axes = list(zip(self.least, shape, self.most, strict=True))[first_axis:]
        return all(least <= size <= most for least, size, most in axes)

    def distance(self, shape: Sequence[int]) -> int:
        """How far a shape is from the one that the engine is tuned for."""
        return sum(abs(a - b) for a, b in zip(self.optimum, shape, strict=True))


def choose_profile(
    graph: str,
    profiles: Sequence[Mapping[str, ShapeRange]],
    shapes: Mapping[str, Sequence[int]],
) -> int:
    """The index of the profile that takes all shapes and is tuned for the nearest ones.

    Args:
        graph: the engine's name, for the error.
        profiles: for each the range of every input.
        shapes: of every input.

    Raises:
        UserError: if no profile takes them.
    """
    misfits = [[n for n, s in shapes.items() if not profile[n].holds(s)] for profile in profiles]
    distances = [sum(profile[n].distance(s) for n, s in shapes.items()) for profile in profiles]
    best = min(range(len(profiles)), key=lambda i: (len(misfits[i]), distances[i]))
    if not misfits[best]:
        return best
    ranges, name = profiles[best], misfits[best][0]
    rows, most = shapes[name][0], ranges[name].most[0]
    # The batch alone is to blame if every other axis fits.
    if rows > most and all(ranges[n].holds(shapes[n], first_axis=1) for n in misfits[best]):
        raise UserError(
            f"the {graph} engine takes {most} rows at most (an image has 1, or 2 with guidance "
            f"in decode), not {rows}: use a smaller --batch, or build the bundle with a "
            f"--max-batch for {rows} rows"
        )
    raise UserError(
        f"the {graph} engine takes {name} of {list(ranges[name].least)} to "
        f"{list(ranges[name].most)}, not {list(shapes[name])}: use the bundle's own schedule, or "
        "build a bundle with this one (--schedule)"
    )


# ---------------------------------------------------------------------------- module and files


def import_tensorrt(backend: str) -> Any:
    """The Python module of a backend.

    Raises:
        UserError: if it is not installed.
    """
    name = BACKENDS[backend].module
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.replace("_", "-")
        raise UserError(
            f"this bundle needs {package}, which does not load here ({first_line(error)}): "
            f"install it with `pip install {package}`"
        ) from error


def find_gpu(device: str) -> torch.device:
    """The torch device with its index.

    Raises:
        UserError: if torch cannot use it.
    """
    try:
        torch.cuda.init()
        index = torch.device(device).index
        found = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        torch.cuda.get_device_properties(found)
    except (AssertionError, RuntimeError) as error:
        raise UserError(
            f"TensorRT needs an NVIDIA GPU, but torch cannot use {device} here "
            f"({first_line(error)}): see that nvidia-smi lists it and that torch is a CUDA build, "
            "or use a bundle built with --backend onnxruntime"
        ) from error
    return found


def make_logger(trt: Any) -> Any:
    """An ILogger that prints nothing and keeps the last errors for `take()`."""

    class ErrorKeeper(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: deque[str] = deque(maxlen=10)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self._errors.append(msg)

        def take(self) -> str:
            """The errors since the last call, the oldest first."""
            errors = "\n".join(self._errors)
            self._errors.clear()
            return errors

    return ErrorKeeper()


def open_runtime(trt: Any, logger: Any) -> Any:
    """A TensorRT runtime on the current GPU.

    Raises:
        UserError: if TensorRT does not run with this driver.
    """
    try:
        return trt.Runtime(logger)
    except (RuntimeError, TypeError) as error:  # what its constructor makes of a null pointer
        raise UserError(
            f"{trt.__name__} {trt.__version__} does not start here: "
            f"{explain(logger.take() or first_line(error))}"
        ) from error


def deserialize(trt: Any, runtime: Any, logger: Any, path: Path, gpu: str) -> Any:
    """The engine in a file.

    Raises:
        UserError: if it is damaged, or not for this version and GPU, or too large; `gpu` is the
            GPU's name, for the error.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    logger.take()
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        reason = logger.take()
        if hasattr(trt, "EngineInvalidityDiagnostics"):
            _, flags = runtime.get_engine_validity(content)
            known = trt.EngineInvalidityDiagnostics.__members__.items()
            reason = " ".join(name for name, flag in known if flags & flag.value) or reason
        raise UserError(
            f"{path} does not load with {trt.__name__} {trt.__version__} on {gpu}: "
            f"{explain(reason)}"
        )
    return engine


# ----------------------------------------------------------------------------- what went wrong


def explain(reason: str) -> str:
    """What TensorRT's errors mean and what to do, or their first line where that is unknown."""
    for pattern, meaning in PROBLEMS:
        if re.search(pattern, reason, re.IGNORECASE):
            return meaning
    line = reason.splitlines()[0] if reason else "TensorRT gives no reason"
    return f"{line}; build the bundle again"


def first_line(error: BaseException) -> str:
    """An error's first line, without a full stop."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].rstrip(". ")
