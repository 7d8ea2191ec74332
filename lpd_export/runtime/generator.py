"""The generation loop: the same for every backend, batch size and guidance.

Knows phases, caches and token ids. Does not know class names, files, seeds or how a backend runs
a graph. All buffers are allocated once a batch size, and the loop neither allocates on purpose
nor waits for the device, so that it can be captured as one CUDA graph.

Shapes: B images, R rows (B, or 2B with guidance: conditional rows, then null rows), S cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lpd_export.bundle.manifest import ModelDescription
from lpd_export.errors import NumericalError, UserError
from lpd_export.formats import FLOAT_TYPES
from lpd_export.graphs import contract
from lpd_export.runtime.arrays import HOST, Array
from lpd_export.runtime.executor import Executor, Run
from lpd_export.runtime.sampler import Sampling, SamplingRows, StepCells, choose_draw_step
from lpd_export.schedule.phases import Phase, attention_mask

OnStep = Callable[[int, Array], None]


def conditions(
    model: ModelDescription,
    labels: Sequence[int | None],
    samplings: Sequence[Sampling],
    guided: bool,
) -> NDArray[np.int64]:
    """The condition ids [R, 1] int64 of images: one each, and if guided the null one.

    An image of cfg 1 among guided ones has its own condition twice: its guided logits are
    then those of the condition, as they are alone.
    """
    ids = [model.condition_id(label) for label in labels]
    if guided:
        null = model.condition_id(None)
        ids += [null if s.guided else own for s, own in zip(samplings, ids, strict=True)]
    return np.array(ids)[:, None]


class Step(NamedTuple):
    """One decode phase with its arrays, bound."""

    phase: Phase
    token_ids: Array
    positions: Array
    logits: Array
    run: Run


class Generator:
    """Generates batches of images with one schedule of group sizes.

    Args:
        executor: of the bundle's graphs.
        model: whose graphs they are.
        cache_shape: of one row's keys or values in them.
        resolution: pixels of an image's side.
        phases: one a step (`schedule.phase_table`).
        mutual_visibility: whether the queries of a step see one another.
    """

    def __init__(
        self,
        executor: Executor,
        model: ModelDescription,
        cache_shape: Sequence[int],
        resolution: int,
        phases: Sequence[Phase],
        mutual_visibility: bool = True,
    ) -> None:
        self._executor = executor
        self._mutual_visibility = mutual_visibility
        self._model, self._cache_shape, self._resolution = model, cache_shape, resolution
        self._phases = phases
        self._batch: Batch | None = None
        # Not the batch's own: a recording holds the batch, and the two would outlive their use.
        self._recordings: dict[bool, Run] = {}  # with filters, and without
        self._finished = True

    @property
    def held_bytes(self) -> int:
        """Bytes of the buffers that it holds, to be used again or freed by the next batch."""
        return 0 if self._batch is None else self._batch.nbytes

    def free(self) -> None:
        """Gives back buffers and recordings; the next generation makes them anew."""
        self._recordings.clear()
        self._batch = None

    def generate(
        self,
        labels: Sequence[int | None],
        orders: NDArray[np.int64],
        uniform: NDArray[np.float64],
        samplings: Sequence[Sampling],
        given: NDArray[np.int64] | None = None,
        on_step: OnStep = lambda step, token_ids: None,
        size: int | None = None,
        guided: bool | None = None,
    ) -> tuple[Array, Array]:
        """Token ids [B, S] int64 in raster order, and images [B, 3, height, width] in [-1, 1].

        Args:
            labels: a class id for each image, or None for no condition.
            orders: [B, S] int64, the order each image follows.
            uniform: [B, S] float64 in [0, 1), in generation order.
            samplings: guidance and filters of each image.
            given: [B, S] int64 in raster order: tokens to be taken instead of draws, -1 where
                there is none.
            on_step: called after each step with how many are done, and the token ids so far [B, S]
                int64 in raster order: the generator's own buffer, of which cells of later steps
                hold anything. Where generations are recorded, once after the last.
            size: of the buffers, if there may be more images than labels; rows without one repeat
                the last image, and are not returned.
            guided: whether the buffers have null rows, if other batches may need them.

        The returned arrays, on the device, are the generator's own buffers: the next call
        overwrites them.

        Raises:
            UserError: if the logits of a step are not finite, or memory does not suffice.
        """
        images, size = len(labels), size or len(labels)
        guided = any(s.guided for s in samplings) if guided is None else guided
        given = np.full_like(orders, -1) if given is None else given
        try:
            batch = self._bound(size, guided)
            repeated = [*range(images), *[images - 1] * (size - images)]
            samplings = [samplings[image] for image in repeated]
            filtered = any(sampling.filtered for sampling in samplings)
            with self._executor.stream():
                if not self._finished:
                    batch.clear_caches()
                self._finished = False
                batch.load(
                    [labels[image] for image in repeated],
                    orders[repeated],
                    uniform[repeated],
                    samplings,
                    given[repeated],
                )
                self._run(batch, filtered, on_step)
                # The only look at the device, after everything has been launched.
                finite = self._executor.arrays.take(batch.finite)
        except self._executor.arrays.out_of_memory as error:
            self.free()
            raise UserError(
                f"a batch of {images} does not fit in memory: use a smaller batch"
            ) from error
        for cell, image in np.argwhere(~finite.T)[:1].tolist():
            step = next(p.index for p in self._phases if cell < p.first_cell + p.queries)
            broken = NumericalError(
                f"the logits of step {step + 1} (phase {step}, {'decode' if step else 'prefill'}) "
                f"are NaN or infinite: cfg {samplings[image].cfg:g} is too large, or the weights "
                "or the precision of this bundle are broken"
            )
            broken.step = step + 1
            raise broken
        self._finished = True
        return batch.token_ids[:images], batch.images[:images]

    def _bound(self, size: int, guided: bool) -> Batch:
        """The buffers of this size, everything bound; those of another are freed."""
        if self._batch is None or (self._batch.size, self._batch.guided) != (size, guided):
            self.free()  # before there are other caches
            self._batch = Batch(
                self._executor,
                self._model,
                self._cache_shape,
                self._phases,
                size,
                guided,
                self._mutual_visibility,
            )
            # Before anything runs: a graph bound later may move the memory that all work in.
            self._batch.bind_detokenize(self._resolution)
        return self._batch

    def _run(self, batch: Batch, filtered: bool, on_step: OnStep) -> None:
        if not self._executor.records:
            batch.launch(filtered, on_step)
            return
        # All settings are in buffers: only whether there is anything to filter is launched or not.
        if filtered not in self._recordings:
            work = partial(batch.launch, filtered)
            self._recordings[filtered] = self._executor.record(work)
        self._recordings[filtered]()
        on_step(len(self._phases), batch.token_ids)


class Batch:
    """The buffers of one batch size, every graph bound to them."""

    def __init__(
        self,
        executor: Executor,
        model: ModelDescription,
        cache_shape: Sequence[int],
        phases: Sequence[Phase],
        size: int,
        guided: bool,
        mutual_visibility: bool = True,
    ) -> None:
        self.size, self.guided = size, guided
        self._mutual_visibility = mutual_visibility
        self._model = model
        self._executor = executor
        rows = 2 * size if guided else size
        arrays, cells = executor.arrays, model.cells

        def integers(*shape: int) -> Array:
            return arrays.zeros(shape, "int64")

        self.orders = integers(size, cells)
        # Where a token of an image belongs: [B, 1] beside orders [B, S].
        self._images = arrays.put(np.arange(size)[:, None])
        self.uniform = arrays.zeros((size, cells), "float64")
        self.sampling = SamplingRows.of([Sampling()] * size, cells, model.vocab_size).on(arrays)
        self.given = integers(size, cells)  # in generation order, below 0 where a token is drawn
        self._drawn = integers(size, cells)  # likewise
        self.finite = arrays.zeros((size, cells), "bool")  # likewise
        self.token_ids = integers(size, cells)
        self._caches = {
            f"{kind}_{layer}": arrays.zeros((rows, *cache_shape), executor.float_type)
            for kind in ("key", "value")
            for layer in range(model.depth)
        }
        # One buffer for all steps' logits: only the current step's are ever needed.
        most_queries = max(phase.queries for phase in phases)
        all_logits = arrays.zeros((rows * most_queries * model.vocab_size,), "float32")
        self.steps = [
            self._bind_step(phase, rows, self._caches, all_logits, integers) for phase in phases
        ]
        self.images = arrays.zeros((0,), executor.float_type)  # until the decoder is bound
        self._detokenize: list[Run] = []
        self.nbytes = all_logits.nbytes + sum(cache.nbytes for cache in self._caches.values())
        """Of caches and logits; what else there is is small."""

    def _bind_step(
        self,
        phase: Phase,
        rows: int,
        caches: dict[str, Array],
        all_logits: Array,
        integers: Callable[..., Array],
    ) -> Step:
        shape = (rows, phase.queries, self._model.vocab_size)
        logits = all_logits[: shape[0] * shape[1] * shape[2]].reshape(shape)
        token_ids = integers(rows, phase.context)
        positions = integers(rows, phase.tokens)
        arrays, float_type = self._executor.arrays, self._executor.float_type
        masked = -FLOAT_TYPES[float_type].largest
        mask = attention_mask(phase, self._model.cells, masked, self._mutual_visibility)
        tensors = {
            contract.TOKEN_IDS: token_ids,
            contract.POSITIONS: positions,
            contract.ATTENTION_MASK: arrays.put(mask, float_type),
            contract.WRITE_INDEX: integers(rows) + phase.write_index,
            contract.LOGITS: logits,
        }
        for name, cache in caches.items():
            tensors[f"{contract.PAST}_{name}"] = tensors[f"{contract.PRESENT}_{name}"] = cache
        run = self._executor.bind("decode", tensors)
        return Step(phase, token_ids, positions, logits, run)

    def clear_caches(self) -> None:
        """Forgets keys and values: no mask hides a NaN that a failed generation left there."""
        for cache in self._caches.values():
            cache[...] = 0

    def bind_detokenize(self, resolution: int) -> None:
        """Binds the decoder from `token_ids` to `images`; single steps do without."""
        shape = (self.size, 3, resolution, resolution)
        self.images = self._executor.arrays.zeros(shape, self._executor.float_type)
        # A CPU gains nothing from decoding images together, and would hold all their activations.
        chunk = 1 if self._executor.device == HOST else self.size
        parts = [slice(first, first + chunk) for first in range(0, self.size, chunk)]
        self._detokenize = [
            self._executor.bind(
                "detokenize",
                {contract.INDICES: self.token_ids[part], contract.IMAGE: self.images[part]},
            )
            for part in parts
        ]

    def load(
        self,
        labels: Sequence[int | None],
        orders: NDArray[np.int64],
        uniform: NDArray[np.float64],
        samplings: Sequence[Sampling],
        given: NDArray[np.int64],
    ) -> None:
        """Copies the inputs of a generation into the buffers."""
        model, put = self._model, self._executor.arrays.put
        self.orders[...] = put(orders)
        self.uniform[...] = put(uniform)
        self.given[...] = put(np.take_along_axis(given, orders, axis=1))
        rows = SamplingRows.of(samplings, model.cells, model.vocab_size)
        for buffer, values in zip(self.sampling, rows.on(self._executor.arrays), strict=True):
            buffer[...] = values
        self.steps[0].token_ids[...] = put(conditions(model, labels, samplings, self.guided))
        positions = put(np.pad(orders + 1, [(0, 0), (1, 0)]))
        for step in self.steps:
            first = step.phase.write_index
            self._copy_to_rows(step.positions, positions[:, first : first + step.phase.tokens])

    def launch(self, filtered: bool, on_step: OnStep | None = None) -> None:
        """Generates `token_ids` and `images` from the loaded inputs."""
        draw_step = choose_draw_step(self._executor.device)
        for number, step in enumerate(self.steps):
            step.run()
            views = (self.uniform, self.sampling.scale, self.given, self._drawn, self.finite)
            first = step.phase.first_cell
            cells = StepCells(*(view[:, first : first + step.phase.queries] for view in views))
            draw_step(step.logits, cells, self.sampling, self.guided, filtered)
            if number + 1 < len(self.steps):
                self._copy_to_rows(self.steps[number + 1].token_ids, cells.tokens)
            if on_step is not None:
                of_step = self.orders[:, first : first + step.phase.queries]
                self.token_ids[self._images, of_step] = cells.tokens
                on_step(number + 1, self.token_ids)
        self.token_ids[self._images, self.orders] = self._drawn
        for run in self._detokenize:
            run()

    def _copy_to_rows(self, rows: Array, images: Array) -> None:
        """Copies [B, n] into the rows of each image, conditional and null."""
        rows.reshape(-1, self.size, images.shape[1])[...] = images
