"""What each image of a run is made from, by its position in the run, worked out when asked.

Knows classes, settings and names, and which positions are a shard's. Makes no image and no file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lpd_export.bulk.requests_file import RequestLine, read_requests
from lpd_export.bundle.classes import display_name, resolve_classes
from lpd_export.bundle.manifest import MANIFEST, Bundle, Manifest
from lpd_export.edit_request import EditRequest
from lpd_export.files import sha256
from lpd_export.run_request import RunRequest
from lpd_export.runtime.editing import Edit
from lpd_export.runtime.requests import GeneratedImage, ImageRequest
from lpd_export.runtime.sampler import Sampling
from lpd_export.schedule.schedule_file import Schedule

Record = dict[str, Any]
Positions = NDArray[np.int64]
"""[n], ascending: images by their place in the run, counted from 0."""


@dataclass(frozen=True)
class Group:
    """Images that follow one another in a run, and share all but the class."""

    labels: list[int | None]
    """Images go round them: more images (a greater count) leave the first ones as they are."""
    count: int
    """Of each label."""
    seed: int
    index: int | None
    """Of the first image; its position if None."""
    sampling: Sampling

    @cached_property
    def settings(self) -> Record:
        """What a record says of them."""
        return {
            "seed": self.seed,
            "cfg": self.sampling.cfg,
            "guidance": self.sampling.guidance,
            "temperature": self.sampling.temperature,
            "top_k": self.sampling.top_k,
            "top_p": self.sampling.top_p,
        }


@dataclass(frozen=True)
class Plan:
    """What each image of a run is made from."""

    groups: list[Group]
    manifest: Manifest
    schedule: Schedule
    bundle: Path
    edit: Edit | None = None
    edit_request: EditRequest | None = None

    @cached_property
    def _ends(self) -> Positions:
        return np.cumsum([len(group.labels) * group.count for group in self.groups])

    @property
    def images(self) -> int:
        """How many there are."""
        return int(self._ends[-1])

    def _place(self, position: int) -> tuple[Group, int, int]:
        """An image's group, its place in that, and the position of the group's first image."""
        number = int(np.searchsorted(self._ends, position, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        return self.groups[number], position - first, first

    def label(self, position: int) -> int | None:
        """The class of an image."""
        group, place, _ = self._place(position)
        return group.labels[place % len(group.labels)]

    def class_name(self, position: int) -> str:
        """As it is shown."""
        return display_name(self.manifest.class_names, self.label(position))

    def request(self, position: int) -> ImageRequest:
        """An image as the pipeline takes it."""
        if self._edits is not None:
            return self._edits[position]
        group, place, first = self._place(position)
        index = (first if group.index is None else group.index) + place
        return ImageRequest(self.label(position), group.seed, index, group.sampling)

    @cached_property
    def _edits(self) -> list[ImageRequest] | None:
        if not self.edit or not self.edit_request:
            return None
        (group,) = self.groups
        labels = group.labels * group.count
        order = self.edit_request.order
        return self.edit.requests(labels, group.seed, group.sampling, self.schedule, order)

    def stem(self, position: int) -> str:
        """What an image's file is called: position and class, as in 00003_red-panda."""
        return stem(position, self.class_name(position), self.label(position))

    def takes(self, position: int, token_ids: Any) -> bool:
        """Whether these can be the token ids of an image."""
        vocabulary = self.manifest.model.vocab_size
        if not isinstance(token_ids, list) or len(token_ids) != self.schedule.cells:
            return False
        return all(type(token) is int and 0 <= token < vocabulary for token in token_ids)

    def record(self, position: int) -> Record:
        """How an image is made: its line in images.jsonl, but for its file and token ids."""
        request = self.request(position)
        own = request.order is not None
        return {
            "position": position,
            "index": request.index,
            "class_id": request.label,
            "class_name": self.class_name(position),
            "order": None if own else request.chance(self.schedule).order_index,
            **self._place(position)[0].settings,
            **self._common,
        }

    @cached_property
    def _common(self) -> Record:
        """What all images of the run share."""
        content = self.schedule.group_sizes.tobytes() + self.schedule.orders.tobytes()
        return {
            "steps": self.schedule.steps,
            "schedule_sha256": hashlib.sha256(content).hexdigest(),
            "bundle": str(self.bundle),
            "manifest_sha256": sha256(self.bundle / MANIFEST),
            **self._of_edit,
        }

    @cached_property
    def _of_edit(self) -> Record:
        """What all images of an edit share beside; empty for a run."""
        if not self.edit or not self.edit_request:
            return {}
        taken = self.edit.original.tobytes() + self.edit.token_ids.tobytes()
        return {
            "image": self.edit_request.image,
            "image_sha256": hashlib.sha256(taken).hexdigest(),
            "kept": np.packbits(self.edit.kept).tobytes().hex(),
            "edit_order": self.edit_request.order,
            "paste": self.edit_request.paste,
        }

    def finish(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Pixels as they are saved: of an edit, the original's where it is kept."""
        if not self.edit or not self.edit_request or not self.edit_request.paste:
            return pixels
        return self.edit.paste(pixels)

    def image(
        self, position: int, pixels: NDArray[np.uint8], token_ids: NDArray[np.int64]
    ) -> GeneratedImage:
        """An image as the pipeline gave it, of what is on disk."""
        request, name = self.request(position), self.class_name(position)
        return GeneratedImage(pixels, token_ids, request, name, self.schedule)


def stem(position: int, class_name: str, label: int | None) -> str:
    """Position and class, as in 00003_red-panda."""
    slug = re.sub(r"[\W_]+", "-", class_name.casefold())[:60].strip("-")
    return f"{position:05d}_{slug or label}"


class Requests(Sequence[ImageRequest]):
    """The requests of some images of a plan, made when they are looked at."""

    def __init__(self, plan: Plan, positions: Positions) -> None:
        self._plan, self._positions = plan, positions

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, place: int) -> ImageRequest: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[ImageRequest]: ...
    def __getitem__(self, place: int | slice) -> ImageRequest | Sequence[ImageRequest]:
        if isinstance(place, slice):
            return Requests(self._plan, self._positions[place])
        return self._plan.request(int(self._positions[place]))


def make_plan(request: RunRequest, bundle: Bundle) -> Plan:
    """What each image is made from, all of it checked.

    Raises:
        UserError: for an unknown class, a value out of its range, or a schedule that cannot be
            read.
    """
    manifest = bundle.manifest
    steps = request.steps
    if request.schedule and steps is None and Path(request.schedule).suffix == ".json":
        steps = len(manifest.phases)
    schedule = Schedule.load(request.schedule, steps=steps) if request.schedule else None
    if schedule is not None:
        schedule.check_grid(manifest.model.grid)
    lines: list[RequestLine] = (
        read_requests(request.requests)
        if request.requests
        else [RequestLine(count=request.count, index=0)]
    )
    samplings: dict[tuple[object, ...], Sampling] = {}

    def sampling(line: RequestLine) -> Sampling:
        default = (
            manifest.cfg if request.cfg is None else request.cfg,
            request.guidance or manifest.guidance,
            request.temperature,
            request.top_k,
            request.top_p,
        )
        names = ("cfg", "guidance", "temperature", "top_k", "top_p")
        values = tuple(line.get(name, value) for name, value in zip(names, default, strict=True))
        if values not in samplings:
            samplings[values] = Sampling(**dict(zip(names, values, strict=True)))  # type: ignore[arg-type]
        return samplings[values]

    def group(line: RequestLine) -> Group:
        classes = [line["class_"]] if "class_" in line else request.classes
        labels = resolve_classes(classes, manifest.class_names, manifest.model.num_classes)
        return Group(
            labels,
            line.get("count", 1),
            line.get("seed", request.seed),
            line.get("index"),
            sampling(line),
        )

    return Plan(
        [group(line) for line in lines],
        manifest,
        bundle.schedule() if schedule is None else schedule,
        request.bundle,
    )


def with_edit(plan: Plan, edit: Edit, request: EditRequest) -> Plan:
    """The plan of a run whose images keep a part of another one."""
    return replace(plan, edit=edit, edit_request=request)
