"""Standard error that outlives its reader: lost lines of progress do not lose the work."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any


class LossyFile(io.FileIO):
    """A file that drops what cannot be written to it: its disk is full, its reader is gone."""

    def write(self, content: Any) -> int:
        with contextlib.suppress(OSError):
            super().write(content)
        return memoryview(content).nbytes


@contextlib.contextmanager
def lossy_stderr(descriptor: int) -> Iterator[None]:
    """In the block sys.stderr writes to this file descriptor, and never fails."""
    file = LossyFile(descriptor, "w", closefd=False)
    encoding = sys.stderr.encoding
    with (
        io.TextIOWrapper(file, encoding, "backslashreplace", write_through=True) as stream,
        contextlib.redirect_stderr(stream),
    ):
        yield
