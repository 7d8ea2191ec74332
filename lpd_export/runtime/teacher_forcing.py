"""The logits of given images: every step is given their tokens, whatever it would have drawn.

Keys and values are the graphs' own, step after step. Knows what the generator knows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lpd_export.bundle.manifest import ModelDescription
from lpd_export.runtime.executor import Executor
from lpd_export.runtime.generator import Batch, conditions
from lpd_export.runtime.sampler import Sampling, SamplingRows, guide
from lpd_export.schedule.phases import Phase


@torch.inference_mode()
def forced_logits(
    executor: Executor,
    model: ModelDescription,
    phases: Sequence[Phase],
    token_ids: NDArray[np.int64],
    labels: Sequence[int | None],
    orders: NDArray[np.int64],
    samplings: Sequence[Sampling],
    mutual_visibility: bool,
) -> torch.Tensor:
    """Guided logits [B, S, V] float32, in generation order; see `Pipeline.forced_logits`."""
    guided = any(sampling.guided for sampling in samplings)
    drawn = torch.from_numpy(np.take_along_axis(token_ids, orders, axis=1))
    rows = 2 if guided else 1
    first_ids = conditions(model, labels, samplings, guided)
    context = torch.cat([first_ids, drawn.repeat(rows, 1)], dim=1)
    cells = torch.from_numpy(orders).repeat(rows, 1)
    positions = torch.cat([torch.zeros_like(first_ids), cells + 1], dim=1)
    scale = SamplingRows.of(samplings, model.cells, model.vocab_size).scale
    scale = scale.to(executor.device)
    logits = []
    with executor.stream():
        batch = Batch(executor, model, phases, len(labels), guided, mutual_visibility)
        for step in batch.steps:
            first, last = step.phase.write_index, step.phase.write_index + step.phase.tokens
            step.token_ids.copy_(context[:, first : first + step.phase.context])
            step.positions.copy_(positions[:, first:last])
            step.run()
            start = step.phase.first_cell
            of_step = scale[:, start : start + step.phase.queries]
            raw = guide(step.logits, of_step) if guided else step.logits
            logits.append(raw.float().cpu().clone())
    return torch.cat(logits, dim=1)
