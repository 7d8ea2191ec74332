"""A bundle inside NVIDIA's Triton Inference Server: what its Python backend calls.

Knows tensors as Triton hands them over, a row an image, and which image requests they mean. The
batch is Triton's; buffers and faults are `batching`'s. Tensors cross by DLPack, which needs no
NumPy of the server's age.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # the server's own

from lpd_export.bundle.manifest import Bundle
from lpd_export.errors import UserError
from lpd_export.runtime.pipeline import Pipeline
from lpd_export.runtime.requests import ImageRequest
from lpd_export.runtime.sampler import Sampling
from lpd_export.serving.batching import Client, Event, Finished, Job, Maker, ModelQueue
from lpd_export.serving.making import PipelineMaker
from lpd_export.serving.triton_repository import BUNDLE


class TritonPythonModel:
    """One instance of a model, in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the bundle.

        Args:
            args: as Triton documents them: where the model is, its configuration, and the device.

        Raises:
            UserError: if the bundle is damaged or cannot be run here; Triton says it.
        """
        config = json.loads(args["model_config"])
        threads = config["parameters"].get("threads")
        on_cpu = args["model_instance_kind"] == "CPU"
        batch = config["max_batch_size"]
        bundle = Bundle.open(Path(args["model_repository"]) / args["model_version"] / BUNDLE)

        def load() -> Maker:
            pipeline = Pipeline.open(
                bundle.path,
                device=None if on_cpu else f"cuda:{args['model_instance_device_id']}",
                threads=threads and int(threads["string_value"]),
            )
            return PipelineMaker(pipeline, batch)

        self._queue = ModelQueue(load, batch=batch, max_queue=batch, max_wait=0)
        self._queue.start()
        self._queue.opened.result()
        self._manifest, self._schedule = bundle.manifest, bundle.schedule()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers a batch: a response to each request, with its images or why there are none."""
        events: SimpleQueue[tuple[int, int, Event]] = SimpleQueue()
        answers: list[dict[int, Event]] = [{} for _ in requests]
        jobs = []
        for number, request in enumerate(requests):
            try:
                asked = self._read(request)
            except UserError as error:
                answers[number][0] = error
                continue
            for row, image in enumerate(asked):
                deliver = partial(self._deliver, events, number, row)
                jobs.append(Job(image, self._schedule, Client(), deliver))
        self._queue.submit(jobs)
        for _ in jobs:
            number, row, event = events.get()
            answers[number][row] = event
        return [respond([rows[row] for row in sorted(rows)]) for rows in answers]

    def finalize(self) -> None:
        """Gives the bundle's memory back."""
        self._queue.stop()
        self._queue.join()

    @staticmethod
    def _deliver(
        events: SimpleQueue[tuple[int, int, Event]], number: int, row: int, event: Event
    ) -> None:
        events.put((number, row, event))

    def _read(self, request: Any) -> list[ImageRequest]:
        """The images that a request asks for.

        Raises:
            UserError: for a value out of its range.
        """
        classes = tensor(request, "class")
        assert classes is not None  # Triton refuses a request without
        columns = {
            name: [None] * len(classes) if given is None else given[:, 0].tolist()
            for name in ("seed", "index", "cfg", "temperature", "top_k", "top_p")
            for given in [tensor(request, name)]
        }
        given = tensor(request, "given")
        images = []
        for row, label in enumerate(classes[:, 0].tolist()):
            one = {name: column[row] for name, column in columns.items()}
            image = ImageRequest(
                None if label == -1 else label,
                one["seed"] or 0,
                one["index"] or 0,
                Sampling(
                    cfg=self._manifest.cfg if one["cfg"] is None else one["cfg"],
                    guidance=self._manifest.guidance,
                    temperature=1.0 if one["temperature"] is None else one["temperature"],
                    top_k=one["top_k"] or None,
                    top_p=one["top_p"],
                ),
                given=None if given is None else given[row],
            )
            image.check(self._manifest.model)
            images.append(image)
        return images


def tensor(request: Any, name: str) -> np.ndarray[Any, Any] | None:
    """An input, [rows, ...]; None if the client left it out."""
    found = pb_utils.get_input_tensor_by_name(request, name)
    return None if found is None else np.from_dlpack(found)


def respond(events: Sequence[Event]) -> Any:
    """Triton's response: all images of a request, or the first reason why one is missing."""
    for event in events:
        if isinstance(event, Exception):
            mistake = isinstance(event, UserError)
            code = pb_utils.TritonError.INVALID_ARG if mistake else pb_utils.TritonError.INTERNAL
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(event), code))
    images = [event.image for event in events if isinstance(event, Finished)]
    outputs = {
        "images": np.stack([image.pixels for image in images]),
        "token_ids": np.stack([image.token_ids for image in images]),
    }
    return pb_utils.InferenceResponse(
        [
            pb_utils.Tensor.from_dlpack(name, np.ascontiguousarray(rows))
            for name, rows in outputs.items()
        ]
    )
