"""Images from a bundle, in Python: `Pipeline.open(bundle).generate(["red panda"], seed=0)`.

Puts the parts together: a bundle's files, its classes and schedule, an executor, and the generator
that makes batches of image requests. Does not write files or know the command line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from lpd_export.bounds import Positive, checked
from lpd_export.bundle.classes import display_name, resolve_classes
from lpd_export.bundle.manifest import Bundle, Manifest
from lpd_export.errors import NumericalError, UserError
from lpd_export.images import BLANK, to_uint8
from lpd_export.pictures import Fit, Picture, fit_picture, read_picture
from lpd_export.runtime import teacher_forcing, tokenizer
from lpd_export.runtime.arrays import Array
from lpd_export.runtime.backends import open_executor
from lpd_export.runtime.editing import Box, Edit, Source, select
from lpd_export.runtime.executor import Executor
from lpd_export.runtime.generator import Batch, Generator, Step
from lpd_export.runtime.memory import check_memory
from lpd_export.runtime.requests import GeneratedImage, ImageRequest
from lpd_export.runtime.sampler import GuidanceSchedule, Sampling
from lpd_export.runtime.trace import (
    blank_unfilled,
    filled_after_steps,
    given_first,
    tokens_after_steps,
)
from lpd_export.schedule.phases import phase_table
from lpd_export.schedule.schedule_file import Schedule

OTHER_NAMES = {"guidance_scale": "cfg", "cfg_scale": "cfg", "batch_size": "batch"}
"""What other libraries call them."""

GENERATING = ("decode", "detokenize")
"""The graphs that every image needs."""

Watch = Callable[[int, NDArray[np.int64]], None]


class Progress(NamedTuple):
    """Where a generation is."""

    first_image: int
    images: int
    """How many are generated together, from `first_image` on."""
    step: int
    steps: int


class Pipeline:
    """A bundle, loaded and ready to generate.

        pipeline = Pipeline.open("engines/lpd-l-256-fp32")
        images = pipeline.generate([207, "red panda"], seed=0)
        images[0].picture().save("dog.png")

    As a context manager it gives back its buffers at the end of the block. Use `open`; the
    constructor takes the parts.
    """

    def __init__(
        self,
        manifest: Manifest,
        schedule: Schedule,
        executor: Executor,
        mutual_visibility: bool = True,
    ) -> None:
        self.manifest = manifest
        self._mutual_visibility = mutual_visibility
        self._schedule = schedule
        self._executor = executor
        self._generators: dict[bytes, Generator] = {}
        self._closed = False

    def __repr__(self) -> str:
        manifest = self.manifest
        return (
            f"<Pipeline {manifest.name}: {manifest.resolution} px in {self._schedule.steps} steps, "
            f"{manifest.precision}, {manifest.backend} on {self._executor.device}>"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives back caches and recordings; nothing can be generated afterwards.

        The loaded graphs go with the pipeline itself.
        """
        for generator in self._generators.values():
            generator.free()
        self._generators.clear()
        self._closed = True

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str],
        *,
        device: str | None = None,
        threads: int | None = None,
        mutual_visibility: bool = True,
    ) -> Pipeline:
        """Verifies what a bundle holds and loads it.

        Args:
            bundle: the folder that `lpd-export build` made.
            device: "cpu", "cuda" or "cuda:1"; by default the CPU for ONNX Runtime, a GPU for
                TensorRT.
            threads: for the operators on a CPU; by default the physical cores, or those that this
                process is confined to.
            mutual_visibility: whether the cells that a step fills see one another, as they do in
                training; without, one sees what this is good for.

        Raises:
            UserError: if the bundle is missing or damaged, or this machine cannot run it.
        """
        opened = Bundle.open(bundle)
        schedule = opened.schedule()
        executor = open_executor(opened, device, threads)
        # Loaded now, so that the first image is not slower than the rest.
        executor.load(*GENERATING)
        return cls(opened.manifest, schedule, executor, mutual_visibility)

    def generate(
        self,
        classes: Sequence[int | str | None],
        *,
        seed: int = 0,
        cfg: float | None = None,
        guidance: GuidanceSchedule | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        batch: int = 1,
        schedule: Schedule | str | os.PathLike[str] | None = None,
        progress: Callable[[Progress], None] | None = None,
        **unknown: object,
    ) -> list[GeneratedImage]:
        """An image for each class: ids, names, or None for no class.

        Args:
            classes: one for each image.
            seed: the same seed gives an image the same order and random numbers, whatever the
                batch size; where kernels round otherwise in another batch, tokens may differ.
            cfg: guidance scale; by default the one recommended for the model.
            guidance: "linear" or "constant"; by default the one recommended for the model.
            temperature, top_k, top_p: as in `Sampling`.
            batch: how many images are generated together.
            schedule: instead of the bundle's: a schedule or the file of one.
            progress: called after each step.
            unknown: nothing; here to answer other libraries' names with ours.

        Raises:
            UserError: if an argument is out of range or a class unknown.
        """
        for name in unknown:
            meant = OTHER_NAMES.get(name)
            hint = f"here it is called {meant}" if meant else "see help(Pipeline.generate)"
            raise UserError(f"generate takes no {name!r}: {hint}")
        if isinstance(classes, str | int | None):
            raise UserError(f"classes must be a list, but it is one class: give [{classes!r}]")
        labels = resolve_classes(
            classes, self.manifest.class_names, self.manifest.model.num_classes
        )
        sampling = self.sampling(
            cfg=cfg, guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p
        )
        requests = [ImageRequest(label, seed, i, sampling) for i, label in enumerate(labels)]
        return list(self.stream(requests, batch=batch, schedule=schedule, progress=progress))

    def edit(
        self,
        image: Source,
        mask: Picture | None = None,
        classes: Sequence[int | str | None] = (None,),
        *,
        box: Box | None = None,
        outpaint: int | None = None,
        fit: Fit = "crop",
        order: str = "locality",
        paste: bool = True,
        seed: int = 0,
        cfg: float | None = None,
        guidance: GuidanceSchedule | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        batch: int = 1,
        schedule: Schedule | str | os.PathLike[str] | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> list[GeneratedImage]:
        """Images that keep a part of one, the rest made anew, for each class.

            pipeline.edit("face.png", box=(32, 0, 64, 64), classes=["heart", None])

        Args:
            image, mask, box, outpaint, fit: as `prepare_edit` takes them.
            classes: one for each image: ids, names, or None for no class.
            order: in which the new cells come: "locality", grown from what is kept, or "random".
            paste: whether kept pixels are the image's own, not the decoder's.
            seed, cfg, guidance, temperature, top_k, top_p, batch, schedule, progress: as `generate`
                takes them.

        Raises:
            UserError: if an argument is out of range, a class unknown, or the image unreadable.
        """
        labels = resolve_classes(
            classes, self.manifest.class_names, self.manifest.model.num_classes
        )
        sampling = self.sampling(
            cfg=cfg, guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p
        )
        edit = self.prepare_edit(image, mask, box=box, outpaint=outpaint, fit=fit)
        schedule = self.choose_schedule(schedule)
        requests = edit.requests(labels, seed, sampling, schedule, order)
        images = self.stream(requests, batch=batch, schedule=schedule, progress=progress)
        if not paste:
            return list(images)
        return [replace(image, pixels=edit.paste(image.pixels)) for image in images]

    def prepare_edit(
        self,
        image: Source,
        mask: Picture | None = None,
        *,
        box: Box | None = None,
        outpaint: int | None = None,
        fit: Fit = "crop",
    ) -> Edit:
        """What is kept of an image, as requests can be made of it: `edit.requests(...)`.

        Args:
            image: a file or a Pillow image of any size and mode, pixels uint8; a generated image,
                token ids [S] or a `.npy` of them, whose tokens are exact.
            mask: white where the image is made anew; a cell is if any of its pixels is.
            box: instead of a mask: left, top, right, bottom in pixels of the image.
            outpaint: instead of a mask: the image becomes smaller by so many of the model's pixels
                on each side, and what surrounds it is new.
            fit: how image and mask become the model's square: "crop", "pad" or "stretch".

        Raises:
            UserError: if nothing says what is new, all is kept, or something cannot be read.
        """
        selection = select(image, self.manifest, mask, box, outpaint, fit)
        return selection.edit(self.tokenize, self.detokenize)

    def sampling(
        self,
        *,
        cfg: float | None = None,
        guidance: GuidanceSchedule | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Sampling:
        """Settings for `stream`, the bundle's recommended guidance where none is given.

        Raises:
            UserError: for a value out of its range, or of a wrong type.
        """
        return Sampling(
            cfg=self.manifest.cfg if cfg is None else cfg,
            guidance=self.manifest.guidance if guidance is None else guidance,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )

    def stream(
        self,
        requests: Sequence[ImageRequest],
        *,
        batch: int = 1,
        schedule: Schedule | str | os.PathLike[str] | None = None,
        progress: Callable[[Progress], None] | None = None,
        watch: Watch | None = None,
        of_run: tuple[int, bool] | None = None,
        failed: Callable[[ImageRequest, NumericalError], None] | None = None,
    ) -> Iterator[GeneratedImage]:
        """Images as they are made, one for each request, in their order.

        Args:
            requests: may make its requests when it is asked for them; a batch at a time is kept.
            batch: how many images are generated together.
            schedule: instead of the bundle's: a schedule or the file of one.
            progress: called after each step.
            watch: called after each step with how many are done, and the token ids so far
                [images, S] int64 of the batch, which the next step overwrites: what
                `picture_after` draws. Where generations are recorded, once after the last.
            of_run: of a run of which these are a part, and which was checked, how many images it
                has and whether any of them is guided: buffers are as for all.
            failed: called in the place of an image whose logits are not finite; without, the
                error is raised, once the images before it are given.

        Raises:
            UserError: before the first image, if an argument is out of range.
            NumericalError: if the logits of an image are not finite.
        """
        self.check_batch(batch)
        if of_run is None:
            for request in requests:
                request.check(self.manifest.model)
            of_run = len(requests), any(request.sampling.guided for request in requests)
        count, guided = of_run
        size = min(batch, count)
        schedule = self.choose_schedule(schedule)

        def generated(chunk: Sequence[ImageRequest]) -> list[GeneratedImage]:
            return self._generate(chunk, size, guided, schedule, progress, watch)

        return self._stream(requests, batch, generated, failed)

    def check_batch(self, batch: int) -> None:
        """Raises UserError unless the bundle takes batches of this size."""
        if self._closed:
            raise UserError("this pipeline is closed: open the bundle again")
        checked("the batch size", batch, Positive)
        limit = self.manifest.max_batch
        if limit is not None and batch > limit:
            raise UserError(
                f"the bundle takes batches of up to {limit} images, not {batch}: build it with "
                f"--max-batch {batch}"
            )
        held = sum(generator.held_bytes for generator in self._generators.values())
        check_memory(batch, self.manifest.buffer_bytes(batch), held, self._executor.device)

    def choose_schedule(self, schedule: Schedule | str | os.PathLike[str] | None) -> Schedule:
        """The given schedule, checked against the model's grid, or the bundle's own."""
        if schedule is None:
            return self._schedule
        if not isinstance(schedule, Schedule):
            # The authors' files hold orders alone; group sizes are then the bundle's.
            steps = self._schedule.steps if Path(schedule).suffix == ".json" else None
            schedule = Schedule.load(schedule, steps=steps)
        schedule.check_grid(self.manifest.model.grid)
        return schedule

    def _stream(
        self,
        requests: Sequence[ImageRequest],
        batch: int,
        generated: Callable[[Sequence[ImageRequest]], list[GeneratedImage]],
        failed: Callable[[ImageRequest, NumericalError], None] | None,
    ) -> Iterator[GeneratedImage]:
        for start in range(0, len(requests), batch):
            chunk = list(requests[start : start + batch])
            try:
                images = generated(chunk)
            except NumericalError:
                images = None
            if images is not None:
                yield from images
                continue
            # Each alone: what an image is, and whether it fails, is not its batch's.
            for request in chunk:
                try:
                    (image,) = generated([request])
                except NumericalError as error:
                    if failed is None:
                        raise
                    failed(request, error)
                else:
                    yield image

    def _generate(
        self,
        chunk: Sequence[ImageRequest],
        size: int,
        guided: bool,
        schedule: Schedule,
        progress: Callable[[Progress], None] | None,
        watch: Watch | None,
    ) -> list[GeneratedImage]:
        """The images of a batch; `size` is of the buffers, that nothing is bound anew."""

        arrays = self._executor.arrays

        def on_step(step: int, token_ids: Array) -> None:
            if progress is not None:
                progress(Progress(chunk[0].index, len(chunk), step, schedule.steps))
            if watch is not None:
                watch(step, arrays.take(token_ids[: len(chunk)]))

        nothing = np.full(schedule.cells, -1)
        given = [nothing if r.given is None else r.given for r in chunk]
        buffer, images = self._generator(schedule).generate(
            [request.label for request in chunk],
            np.stack([r.order_of(schedule) for r in chunk]),
            np.stack([r.chance(schedule).uniform for r in chunk]),
            [request.sampling for request in chunk],
            np.stack(given),
            on_step,
            size,
            guided,
        )
        # Copied: the caller may generate others between two images.
        token_ids = arrays.take(buffer).copy()
        pixels = to_uint8(arrays.take(images, "float32"))
        names = [display_name(self.manifest.class_names, request.label) for request in chunk]
        return [
            GeneratedImage(pixels[row], token_ids[row], request, names[row], schedule)
            for row, request in enumerate(chunk)
        ]

    def _generator(self, schedule: Schedule) -> Generator:
        key = schedule.group_sizes.tobytes()
        if key not in self._generators:
            self._generators.clear()  # one set of caches at a time
            phases = phase_table(schedule.group_sizes)
            self._generators[key] = Generator(
                self._executor,
                self.manifest.model,
                self.manifest.cache_shape,
                self.manifest.resolution,
                phases,
                self._mutual_visibility,
            )
        return self._generators[key]

    def bind_steps(self, images: int, guided: bool, schedule: Schedule | None = None) -> list[Step]:
        """Every decode phase of a schedule with its own buffers, to run one by one.

        For comparisons: fill a step's token_ids and positions, call its run, read its logits. By
        default the schedule is the bundle's.
        """
        phases = phase_table((schedule or self._schedule).group_sizes)
        return Batch(
            self._executor,
            self.manifest.model,
            self.manifest.cache_shape,
            phases,
            images,
            guided,
            self._mutual_visibility,
        ).steps

    def teacher_forced_logits(self, images: Sequence[GeneratedImage]) -> NDArray[np.float32]:
        """Guided logits [B, S, V] float32 of each token of images, in generation order.

        As `forced_logits`, each image along its own order.

        Raises:
            UserError: if there are none, or they differ in their steps' sizes.
        """
        if not images:
            raise UserError("there are no images to compute logits of: give at least one")
        first, sizes = images[0], images[0].schedule.group_sizes
        for image in images:
            if not np.array_equal(image.schedule.group_sizes, sizes):
                raise UserError(
                    f"images {first.index} and {image.index} differ in the sizes of their steps: "
                    "ask for the logits of each alone"
                )
        return self.forced_logits(
            np.stack([image.token_ids for image in images]),
            [image.class_id for image in images],
            np.stack([image.order for image in images]),
            [image.sampling for image in images],
            first.schedule,
        )

    def forced_logits(
        self,
        token_ids: NDArray[np.int64],
        labels: Sequence[int | None],
        orders: NDArray[np.int64],
        sampling: Sampling | Sequence[Sampling],
        schedule: Schedule | None = None,
    ) -> NDArray[np.float32]:
        """Guided logits [B, S, V] float32, in generation order, of given images.

        Every step is given the images' tokens, whatever it would have drawn; keys and values are
        its own.

        Args:
            token_ids: [B, S], raster order.
            labels: a class id for each image, or None for no class.
            orders: [B, S], the order each image follows.
            sampling: of all images, or of each; its guidance is applied.
            schedule: whose group sizes are used; by default the bundle's.
        """
        return teacher_forcing.forced_logits(
            self._executor,
            self.manifest.model,
            self.manifest.cache_shape,
            phase_table((schedule or self._schedule).group_sizes),
            token_ids,
            labels,
            orders,
            [sampling] * len(labels) if isinstance(sampling, Sampling) else sampling,
            self._mutual_visibility,
        )

    @property
    def executor(self) -> Executor:
        """What runs the graphs."""
        return self._executor

    def detokenize(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Images [B, 3, height, width], in [-1, 1] up to overshoot, of token ids [B, S].

        Raises:
            UserError: if the ids are not of this model's grid and codebook.
        """
        return tokenizer.detokenize(self._executor, self.manifest, token_ids)

    def trace(self, image: GeneratedImage) -> NDArray[np.uint8]:
        """An image of this bundle after each step of its generation: [K, height, width, 3] uint8.

        Cells that are not filled yet are blank (`images.BLANK`). What is shown after a step
        follows from the tokens of that step and earlier ones alone; what the decoder is given for
        the other cells says `trace.tokens_after_steps`; given cells are there from the first step
        on. The last picture is the image itself.

        Raises:
            UserError: if the image is not of this model's grid and codebook.
        """
        order, sizes = shown_order(image.request, image.schedule)
        *unfinished, _ = tokens_after_steps(image.token_ids, order, sizes)
        # The last is not decoded again: alone, a GPU may round otherwise than in a batch.
        pictures = [to_uint8(self.detokenize(ids[None]))[0] for ids in unfinished]
        filled = filled_after_steps(order, sizes)
        return blank_unfilled(np.stack([*pictures, image.pixels]), filled, BLANK)

    def picture_after(
        self, step: int, token_ids: NDArray[np.int64], request: ImageRequest, schedule: Schedule
    ) -> NDArray[np.uint8]:
        """One picture of `trace`, of an image that need not be finished: [height, width, 3] uint8.

        Args:
            step: how many steps are done, from 1 on.
            token_ids: [S], raster order; of cells of later steps any.
            request, schedule: what the image is made from.
        """
        order, sizes = shown_order(request, schedule)
        ids = tokens_after_steps(token_ids, order, sizes)[step - 1]
        filled = filled_after_steps(order, sizes)[step - 1 : step]
        return blank_unfilled(to_uint8(self.detokenize(ids[None])), filled, BLANK)[0]

    def tokenize(self, images: NDArray[np.float32] | Sequence[Picture]) -> NDArray[np.int64]:
        """Token ids [B, S] of images [B, 3, height, width] in [-1, 1], or of a list of pictures.

        Raises:
            UserError: if arrays are not of this model's resolution; pictures are cropped to it.
        """
        if not isinstance(images, np.ndarray):
            side = self.manifest.resolution
            pixels = np.stack([fit_picture(read_picture(image), side, "crop") for image in images])
            images = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        return tokenizer.tokenize(self._executor, self.manifest, images)


def shown_order(
    request: ImageRequest, schedule: Schedule
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The order and group sizes in which an image's cells are there: given ones at once."""
    order, sizes = request.order_of(schedule), schedule.group_sizes
    if request.given is None:
        return order, sizes
    return given_first(order, sizes, request.given >= 0)
