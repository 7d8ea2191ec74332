"""The logits of given images: every step is given their tokens, whatever it would have drawn.

Keys and values are the graphs' own, step after step. Knows what the generator knows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lpd_export.bundle.manifest import ModelDescription
from lpd_export.runtime.executor import Executor
from lpd_export.runtime.generator import Batch, conditions
from lpd_export.runtime.sampler import Sampling, SamplingRows, guide
from lpd_export.schedule.phases import Phase


def forced_logits(
    executor: Executor,
    model: ModelDescription,
    cache_shape: Sequence[int],
    phases: Sequence[Phase],
    token_ids: NDArray[np.int64],
    labels: Sequence[int | None],
    orders: NDArray[np.int64],
    samplings: Sequence[Sampling],
    mutual_visibility: bool,
) -> NDArray[np.float32]:
    """Guided logits [B, S, V] float32, in generation order; see `Pipeline.forced_logits`."""
    guided = any(sampling.guided for sampling in samplings)
    drawn = np.take_along_axis(token_ids, orders, axis=1)
    repeats = (2 if guided else 1, 1)
    first_ids = conditions(model, labels, samplings, guided)
    context = np.concatenate([first_ids, np.tile(drawn, repeats)], axis=1)
    positions = np.pad(np.tile(orders + 1, repeats), [(0, 0), (1, 0)])
    scale = SamplingRows.of(samplings, model.cells, model.vocab_size).scale
    arrays, logits = executor.arrays, []
    with executor.stream():
        batch = Batch(executor, model, cache_shape, phases, len(labels), guided, mutual_visibility)
        for step in batch.steps:
            first, last = step.phase.write_index, step.phase.write_index + step.phase.tokens
            step.token_ids[...] = arrays.put(context[:, first : first + step.phase.context])
            step.positions[...] = arrays.put(positions[:, first:last])
            step.run()
            start = step.phase.first_cell
            of_step = arrays.put(scale[:, start : start + step.phase.queries])
            raw = guide(step.logits, of_step) if guided else step.logits
            logits.append(arrays.take(raw).copy())
    return np.concatenate(logits, axis=1)
