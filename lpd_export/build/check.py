"""Whether written graphs compute what the reference does: asked before a bundle is.

Knows how to run them on the CPU, whatever they are for, and how far off a precision may be. Says
whether they were written right; how close they are is for `accuracy` to say.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpd_export.build.settings import Settings, Source
from lpd_export.bundle.manifest import GRAPH_NAMES, Manifest
from lpd_export.errors import UserError
from lpd_export.formats import FLOAT16, FLOAT32, PRECISIONS
from lpd_export.precision.portable import portable_graphs
from lpd_export.progress import Report
from lpd_export.runtime.onnxruntime_executor import OnnxRuntimeExecutor
from lpd_export.runtime.pipeline import Pipeline


class CheckStep(NamedTuple):
    """One decode step, teacher-forced, as the reference computes it."""

    token_ids: Tensor
    """[2, C], of the first class and of no class."""
    positions: Tensor
    """[2, T]."""
    logits: Tensor
    """[2, Q, V]."""


class Check(NamedTuple):
    """What the written graphs are compared with."""

    steps: list[CheckStep]
    indices: Tensor
    """[1, S] int64."""
    image: Tensor
    """[1, 3, height, width] of these indices."""


@torch.inference_mode()
def reference_check(source: Source, settings: Settings) -> Check:
    """The reference's prefill, first decode step and one decoded image."""
    model, tokenizer, cells = source.model, source.tokenizer, source.model.config.cells
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(tokenizer.config.codebook_size, (1, cells), generator=generator)
    order = torch.from_numpy(settings.schedule.orders[0].astype(np.int64))
    context = torch.cat([model.condition(torch.tensor([0]), 1), model.condition(None, 1)])
    vocab_size = model.config.vocab_size
    token_ids = torch.tensor([[vocab_size], [vocab_size + model.config.num_classes]])
    sequence = torch.cat([torch.zeros(1, dtype=torch.int64), order + 1])
    cache, steps = model.new_cache(), []
    for phase in settings.phases[:2]:
        rows = sequence[phase.write_index : phase.write_index + phase.tokens].repeat(2, 1)
        logits = model.decode_step(context, rows, cache)
        steps.append(CheckStep(token_ids, rows, logits))
        token_ids = indices[:, : phase.queries].repeat(2, 1)
        context = model.token_emb(token_ids)
    return Check(steps, indices, tokenizer.decode(indices))


def compare_with_reference(
    folder: Path, manifest: Manifest, settings: Settings, check: Check, report: Report
) -> None:
    """Runs written graphs and raises UserError if they compute something else.

    ONNX Runtime's CPU runs them, whatever backend they are for, as `portable` makes them.
    """
    tolerance = PRECISIONS[manifest.precision].check_tolerance
    report("comparing the graphs with the reference")
    files = {graph: folder / f"{graph}.onnx" for graph in GRAPH_NAMES}
    scratch = folder.with_name("portable")
    files, note = portable_graphs(files, manifest, scratch)
    float_type = FLOAT16 if manifest.float_type == FLOAT16.torch else FLOAT32
    executor = OnnxRuntimeExecutor(files, float_type.torch)
    pipeline = Pipeline(manifest, settings.schedule, executor)
    steps = pipeline.bind_steps(images=1, guided=True)
    for number, (step, expected) in enumerate(zip(steps, check.steps, strict=False), 1):
        step.token_ids[...] = expected.token_ids.numpy()
        step.positions[...] = expected.positions.numpy()
        step.run()
        logits = torch.from_numpy(step.logits)
        check_close(f"the logits of step {number}", logits, expected.logits, tolerance)
    image = torch.from_numpy(pipeline.detokenize(check.indices.numpy()))
    check_close("the decoded image", image, check.image, tolerance)
    if note:
        shutil.rmtree(scratch)


def check_close(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    # The norm, not the largest error: a single pixel at an edge of an image of random indices says
    # little of INT8, and a graph that is wrong is wrong in many places.
    error, norm = (actual - expected).norm().item(), expected.norm().item()
    if not error <= tolerance * norm:
        raise UserError(
            f"the bundle was not written: {what} differ from the reference's by {error:.2g}, and "
            f"{tolerance * norm:.2g} is allowed (L2 norm); please report this with your versions "
            "of torch and onnxruntime"
        )
