"""From pixels to token ids and back: a bundle's tokenizer graphs, run on host arrays.

Knows the executor and a bundle's sizes, not files or pictures.
"""

from __future__ import annotations

import numpy as np
import torch
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
    image = torch.zeros((len(token_ids), 3, side, side), dtype=executor.float_type)
    _run(executor, "detokenize", (INDICES, torch.from_numpy(token_ids)), (IMAGE, image))
    return image.float().numpy()


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
    indices = torch.zeros((len(images), manifest.model.cells), dtype=torch.int64)
    image = torch.from_numpy(images).to(executor.float_type)
    _run(executor, "tokenize", (IMAGE, image), (INDICES, indices))
    return indices.numpy()


def _run(
    executor: Executor, graph: str, given: tuple[str, torch.Tensor], out: tuple[str, torch.Tensor]
) -> None:
    """Runs a graph from host memory to host memory."""
    (given_name, values), (out_name, host) = given, out
    with executor.stream():
        result = host.to(executor.device)
        tensors = {given_name: values.contiguous().to(executor.device), out_name: result}
        run = executor.bind(graph, tensors)
        run()
        # Waits for the run, whose context must live until then.
        host.copy_(result)
