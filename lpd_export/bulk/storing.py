"""Images go to the disk while the next ones are made.

Knows threads and batches: encoding takes all cores that are free, and one thread stores, in order.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from lpd_export.bulk.folder import ImageFolder, Made
from lpd_export.files import uninterrupted

ENCODERS = min(os.cpu_count() or 1, 8)
"""Threads: at a GPU's pace, one cannot compress PNGs of 256 pixels fast enough."""
BATCHES_BEHIND = 2
"""So many may wait for the disk; then the making of images waits, so that memory stays flat."""


class Storing:
    """Stores images in a folder, a batch at a time; at the end of the block all are recorded.

    Whatever ends the block: what was put before is stored. Once something could not be written,
    nothing more is.
    """

    def __init__(self, folder: ImageFolder, batch: int) -> None:
        self._folder, self._batch = folder, batch
        self._chunk: list[Future[Made]] = []
        self._waiting: deque[Future[None]] = deque()
        self._broken = False
        self._encoders = ThreadPoolExecutor(ENCODERS)
        self._writer = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with uninterrupted(), self._writer, self._encoders:
            self.flush()

    def put(self, image: Made) -> None:
        """Takes an image, its content encoded or still pixels; raises what storing raised."""
        self._chunk.append(self._encoders.submit(self._folder.encoded, image))
        if len(self._chunk) == self._batch:
            self._store()
            while len(self._waiting) > BATCHES_BEHIND:
                self._waiting.popleft().result()

    def flush(self) -> None:
        """Waits until all are stored."""
        self._store()
        while self._waiting:
            self._waiting.popleft().result()

    def _store(self) -> None:
        if self._chunk:
            self._waiting.append(self._writer.submit(self._add, self._chunk))
            self._chunk = []

    def _add(self, chunk: list[Future[Made]]) -> None:
        if self._broken:
            return
        try:
            self._folder.add([image.result() for image in chunk])
        except BaseException:
            self._broken = True
            raise
