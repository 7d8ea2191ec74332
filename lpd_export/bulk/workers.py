"""The images of a plan, made by worker processes on Ray Data, on one machine or a cluster.

A worker is an actor with a pipeline of its own, on a GPU, or on its part of a CPU's cores. Images
come back encoded, in the order of their positions; those of a worker that was lost, Ray has made
by another. Nothing is scheduled here, and nothing is stored.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpd_export.bulk.containers import container
from lpd_export.bulk.folder import Made
from lpd_export.bulk.making import make_images
from lpd_export.bulk.plan import Positions, make_plan
from lpd_export.bundle.manifest import Bundle, Manifest
from lpd_export.errors import NumericalError, UserError
from lpd_export.formats import BACKENDS
from lpd_export.machine.cluster import cores, import_ray, ray_session
from lpd_export.run_request import RunRequest
from lpd_export.runtime.pipeline import Pipeline

PARTS = 64
"""A worker's share comes in about so many parts, that all of them end at about the same time."""
MOST_BATCHES = 16
"""Of a part: what is made again when a worker is lost."""
THREAD_SECONDS = 5

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Work:
    """What every worker is told."""

    request: RunRequest
    manifest: Manifest
    batch: int
    positions: bytes
    """int64, of all images that are to be made."""


class Worker:
    """Makes images, in a process of its own."""

    def __init__(self, work: Work) -> None:
        request, bundle = work.request, Bundle.open(work.request.bundle)
        bundle.check_is(work.manifest)
        self._batch, self._plan = work.batch, make_plan(request, bundle)
        self._positions = np.frombuffer(work.positions, np.int64)
        self._container = container(
            request.format,
            request.folder,
            bundle.manifest.resolution,
            self._plan.images,
            request.per_file,
        )
        self._pipeline = Pipeline.open(
            request.bundle, device=request.device, threads=request.threads
        )

    def __call__(self, rows: Columns) -> Columns:
        """The images whose numbers among all that are to be made are in column `number`."""
        positions = self._positions[rows["number"]]
        made = list(make_images(self._pipeline, self._plan, positions, self._batch, True))
        content = np.empty(len(made), object)
        tokens = np.zeros((len(made), self._plan.schedule.cells), np.int64)
        for row, image in enumerate(made):
            content[row] = b""
            if isinstance(image.content, np.ndarray):
                content[row] = self._container.encode(image.content)
                tokens[row] = image.token_ids
        failures = np.array([json.dumps(image.failure) for image in made])
        return {"position": positions, "content": content, "tokens": tokens, "failure": failures}


def made_by_workers(
    request: RunRequest, workers: int, bundle: Bundle, positions: Positions, batch: int
) -> Iterator[Made]:
    """An image for each position, encoded, or if `request.keep_going` why there is none.

    Raises:
        UserError: if Ray is missing, has too little for so many workers, or one cannot start.
        NumericalError: naming the image whose logits are not finite.
    """
    ray = import_ray("data", "--workers needs Ray: pip install 'lpd-export[ray]', or use --shard")
    on_gpus = BACKENDS[bundle.manifest.backend].compiles or request.device == "cuda"
    threads = None if on_gpus else request.threads or max(1, cores() // workers)
    told = replace(
        request,
        bundle=request.bundle.absolute(),
        requests=request.requests and str(Path(request.requests).absolute()),
        schedule=request.schedule and str(Path(request.schedule).absolute()),
        threads=threads,
    )
    with ray_session(ray, None if on_gpus else workers * (threads or 1)):
        check_resources(ray.cluster_resources(), workers, threads)
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        parts = max(
            -(-len(positions) // (batch * MOST_BATCHES)),
            min(-(-len(positions) // batch), workers * PARTS),
        )
        numbers = [{"number": number} for number in range(len(positions))]
        images = ray.data.from_items(numbers, override_num_blocks=parts).map_batches(
            Worker,
            batch_size=None,
            fn_constructor_args=(Work(told, bundle.manifest, batch, positions.tobytes()),),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=threads or 1,
            num_gpus=1 if on_gpus else 0,
        )
        made = iter(images.iter_batches(batch_size=None, prefetch_batches=0))
        try:
            with ended_threads(), contextlib.closing(made):
                for part in made:
                    yield from received(part, request.keep_going)
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines()
            raise UserError(f"a worker failed: {lines[-1].strip()}") from error


@contextlib.contextmanager
def ended_threads() -> Iterator[None]:
    """Waits at its end for the threads in the background that began inside.

    Ray Data's ask for more while they end, and Ray ends a process that asks once it is shut down.
    """
    before = {*threading.enumerate()}
    try:
        yield
    finally:
        for thread in {*threading.enumerate()} - before:
            if thread.daemon:
                thread.join(THREAD_SECONDS)


def received(part: Columns, keep_going: bool) -> Iterator[Made]:
    """What workers sent."""
    columns = (part[name] for name in ("position", "content", "tokens", "failure"))
    for position, content, tokens, failure in zip(*columns, strict=True):
        failed = json.loads(failure)
        if failed and not keep_going:
            raise NumericalError(failed["error"])
        yield Made(int(position), content, tokens.tolist(), failed)


def check_resources(found: dict[str, float], workers: int, threads: int | None) -> None:
    """Raises UserError if Ray would wait for ever for what it has not."""
    what, wanted = ("GPU", workers) if threads is None else ("CPU", workers * threads)
    if found.get(what, 0) < wanted:
        raise UserError(
            f"--workers {workers} needs {wanted} {what}s, but Ray has {found.get(what, 0):g}: use "
            "fewer workers"
        )
