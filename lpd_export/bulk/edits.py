"""What images of a run keep of others: read when it is asked for, and kept for a while.

A run may have an edit an image, so that not all can be in memory. Does not know which images have
which.
"""

from __future__ import annotations

import functools

from lpd_export.bundle.manifest import Manifest
from lpd_export.edit_request import EditRequest
from lpd_export.runtime.editing import Edit, Selection
from lpd_export.runtime.pipeline import Pipeline

KEPT = 128
"""So many of each, that hold a picture: of 512 pixels 100 MB. More than a batch, and what waits for
the disk behind it."""


class Edits:
    """Edits by their requests; without a pipeline, what of them needs no model."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self.pipeline: Pipeline | None = None
        """Whose tokenizer reads pictures."""
        self.selection = functools.lru_cache(KEPT)(self._selection)
        self.edit = functools.lru_cache(KEPT)(self._edit)

    def _selection(self, request: EditRequest) -> Selection:
        return request.selection(self._manifest)

    def _edit(self, request: EditRequest) -> Edit:
        assert self.pipeline is not None
        return self.selection(request).edit(self.pipeline.tokenize, self.pipeline.detokenize)
