"""When memory runs out during a build: how each library says so, told as one sentence.

Knows the words of torch, onnx and ONNX Runtime; each wraps the system's error in its own way.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import traceback
from collections.abc import Iterator

from lpd_export.errors import UserError

OUT_OF_MEMORY = (
    "allocate memory",
    "bad_alloc",
    "not enough memory",
    "out of memory",
    "OutOfMemory",
    "Resource temporarily unavailable",  # no thread can be started
)
SHORTAGE_ADVICE = (
    "end other programs, use a larger machine, or build a smaller model, --res or --max-batch"
)


def tells_of_shortage(text: str) -> bool:
    """Whether the words of a library say that memory did not suffice."""
    return any(words in text for words in OUT_OF_MEMORY)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it comes from, is that memory did not suffice."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or getattr(cause, "errno", None) == errno.ENOMEM:
            return True
        if tells_of_shortage(str(cause)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


@contextlib.contextmanager
def memory_shortage_told() -> Iterator[None]:
    """Raises UserError in the place of whatever the block raises when memory runs out."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_out_of_memory(error):
            raise
        # What failed lets go of what it holds: cleaning up needs memory too.
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        raise UserError(f"memory ran out during the build: {SHORTAGE_ADVICE}") from error
