"""Arrays where an executor computes: NumPy's on the host, torch's on a GPU.

The runtime is written once over both, in the words of the array API standard. For the host alone
torch is not imported, which would take a second and 200 MB.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import is_numpy_array, to_device
from numpy.typing import NDArray

Array = Any
"""`numpy.ndarray` or `torch.Tensor`; its types are named alike, as in `dtype_name`."""
HOST = "cpu"


class Arrays(NamedTuple):
    """Makes arrays on one device, and brings them back."""

    xp: Any
    """The library's functions, as array-api-compat has them."""
    device: str
    """"cpu", "cuda" or "cuda:1"."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Zeros of a type such as "float32"."""
        return self.xp.zeros(shape, dtype=getattr(self.xp, dtype), device=self.device)

    def put(self, values: NDArray[Any], dtype: str | None = None) -> Array:
        """An array of the host on the device, contiguous, in its own type or another.

        On the host it may be the array itself.
        """
        kind = None if dtype is None else getattr(self.xp, dtype)
        return self.xp.asarray(np.ascontiguousarray(values), dtype=kind, device=self.device)

    def take(self, array: Array, dtype: str | None = None) -> NDArray[Any]:
        """An array of the device on the host, once all that was launched before has run.

        On the host it is the array itself, unless it has another type.
        """
        if dtype is not None:
            array = self.xp.astype(array, getattr(self.xp, dtype), copy=False)
        return np.asarray(to_device(array, HOST))

    @property
    def out_of_memory(self) -> type[Exception]:
        """What it raises if the device's memory does not suffice."""
        if self.device == HOST:
            return MemoryError
        import torch

        return torch.OutOfMemoryError


def arrays_of(device: str) -> Arrays:
    """NumPy's arrays on the CPU, torch's elsewhere."""
    library = "numpy" if device == HOST else "torch"
    return Arrays(import_module(f"array_api_compat.{library}"), device)


def on_host(array: Array) -> bool:
    """Whether it is NumPy's."""
    return is_numpy_array(array)


def look_up(array: Array, places: Array) -> Array:
    """The values [..., n] at places [..., n] of the last axis of an array [..., N]."""
    # array-api-compat's way starts four more kernels on a GPU, to count from the end as well.
    return np.take_along_axis(array, places, -1) if on_host(array) else array.gather(-1, places)


def address_of(array: Array) -> int:
    """Where its values lie."""
    return array.ctypes.data if on_host(array) else array.data_ptr()


def is_contiguous(array: Array) -> bool:
    """Whether its values lie one after another, in order."""
    return array.flags.c_contiguous if on_host(array) else array.is_contiguous()


def dtype_name(array: Array) -> str:
    """Of its values, such as "float32"."""
    return str(array.dtype).removeprefix("torch.")
