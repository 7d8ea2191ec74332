"""From pixels to token ids and back: a bundle's tokenizer graphs, run on host arrays.

Knows the executor and a bundle's sizes, not files or pictures.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpd_export.bundle.manifest import Manifest
from lpd_export.errors import UserError
from lpd_export.graphs.contract import IMAGE, INDICES
from lpd_export.runtime.executor import Executor
from lpd_export.runtime.requests import check_vocabulary


def detokenize(
    executor: Executor, manifest: Manifest, token_ids: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Images [B, 3, height, width], in [-1, 1] up to overshoot, of token ids [B, S].

    Raises:
        UserError: if the ids are not of this model's grid and codebook.
    """
    cells, side = manifest.model.cells, manifest.resolution
    if token_ids.ndim != 2 or token_ids.shape[1] != cells:
        raise UserError(f"token ids must be [B, {cells}], but they are {list(token_ids.shape)}")
    check_vocabulary(token_ids, manifest.model.vocab_size)
    out = IMAGE, (len(token_ids), 3, side, side)
    return _run(executor, "detokenize", (INDICES, token_ids), out, "float32")


def tokenize(
    executor: Executor, manifest: Manifest, images: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Token ids [B, S] of images [B, 3, height, width] in [-1, 1].

    Raises:
        UserError: if the images are not of this model's resolution.
    """
    side = manifest.resolution
    if images.ndim != 4 or images.shape[1:] != (3, side, side):
        raise UserError(f"images must be [B, 3, {side}, {side}], but they are {list(images.shape)}")
    out = INDICES, (len(images), manifest.model.cells)
    return _run(executor, "tokenize", (IMAGE, images), out, "int64")


def _run(
    executor: Executor,
    graph: str,
    given: tuple[str, NDArray[Any]],
    out: tuple[str, tuple[int, ...]],
    result: str,
) -> NDArray[Any]:
    """Runs a graph on a host array; returns its output, of this type."""
    (given_name, values), (out_name, shape) = given, out
    arrays = executor.arrays
    floating = values.dtype.kind == "f"
    with executor.stream():
        one = arrays.put(values, executor.float_type if floating else "int64")
        other = arrays.zeros(shape, "int64" if floating else executor.float_type)
        run = executor.bind(graph, {given_name: one, out_name: other})
        run()
        # Waits for the run, whose context must live until then.
        return arrays.take(other, result)
