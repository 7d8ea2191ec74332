"""What each image of a run is made from, by its position in the run, worked out when asked.

Knows classes, settings and names, and which positions are a shard's. Makes no image and no file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lpd_export.bounds import Seed, checked
from lpd_export.bulk.edits import Edits
from lpd_export.bulk.requests_file import Asked, RequestLine, read_requests
from lpd_export.bundle.classes import display_name, resolve_classes
from lpd_export.bundle.manifest import MANIFEST, Bundle, Manifest
from lpd_export.edit_request import EditRequest
from lpd_export.files import sha256
from lpd_export.run_request import RunRequest
from lpd_export.runtime.randomness import image_randomness
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
    edit: EditRequest | None = None
    """What the images keep of another one, if they do."""
    where: str = ""
    """Which line of a file asks for them."""

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self.labels) * self.count

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
    manifest_sha256: str
    """Of the file."""

    @cached_property
    def edits(self) -> Edits:
        """What images keep of others."""
        return Edits(self.manifest)

    @cached_property
    def _ends(self) -> Positions:
        return np.cumsum([group.images for group in self.groups])

    @property
    def images(self) -> int:
        """How many there are."""
        return int(self._ends[-1])

    @property
    def guided(self) -> bool:
        """Whether any of them is."""
        return any(group.sampling.guided for group in self.groups)

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
        group = self._place(position)[0]
        label, index = self.label(position), self._index(position)
        if group.edit is None:
            return ImageRequest(label, group.seed, index, group.sampling)
        (request,) = self.edits.edit(group.edit).requests(
            [label], group.seed, group.sampling, self.schedule, group.edit.order, index
        )
        return request

    def _index(self, position: int) -> int:
        group, place, first = self._place(position)
        return (first if group.index is None else group.index) + place

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
        group, index = self._place(position)[0], self._index(position)
        of_edit: Record = {}
        own = False
        if group.edit is not None:
            selection = self.edits.selection(group.edit)
            own = bool(selection.kept.any())
            of_edit = {
                "image": group.edit.image,
                "image_sha256": selection.sha256,
                "outpaint": selection.outpaint,
                "kept": np.packbits(selection.kept).tobytes().hex(),
                "edit_order": group.edit.order,
                "paste": group.edit.paste,
            }
        chance = image_randomness(group.seed, index, self.schedule.cells, self.schedule.count)
        return {
            "position": position,
            "index": index,
            "class_id": self.label(position),
            "class_name": self.class_name(position),
            "order": None if own else chance.order_index,
            **group.settings,
            **self._common,
            **of_edit,
        }

    @cached_property
    def _common(self) -> Record:
        """What all images of the run share."""
        content = self.schedule.group_sizes.tobytes() + self.schedule.orders.tobytes()
        return {
            "steps": self.schedule.steps,
            "schedule_sha256": hashlib.sha256(content).hexdigest(),
            "bundle": str(self.bundle),
            "manifest_sha256": self.manifest_sha256,
        }

    def finish(self, position: int, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Pixels as they are saved: of an edit, the original's where it is kept."""
        edit = self._place(position)[0].edit
        return self.edits.edit(edit).paste(pixels) if edit and edit.paste else pixels

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


def make_plan(request: RunRequest, bundle: Bundle, edit: EditRequest | None = None) -> Plan:
    """What each image is made from, all of it checked but pictures; `edit` is of all of them.

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
    lines = (
        read_requests(request.requests)
        if request.requests
        else [Asked("", RequestLine(count=request.count, index=0), edit)]
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

    def group(asked: Asked) -> Group:
        line = asked.line
        classes = [line["class_"]] if "class_" in line else request.classes
        labels = resolve_classes(classes, manifest.class_names, manifest.model.num_classes)
        group = Group(
            labels,
            line.get("count", 1),
            line.get("seed", request.seed),
            line.get("index"),
            sampling(line),
            asked.edit,
            asked.where,
        )
        checked("the image's index", (group.index or 0) + group.images - 1, Seed)
        return group

    return Plan(
        [group(line) for line in lines],
        manifest,
        bundle.schedule() if schedule is None else schedule,
        request.bundle,
        sha256(request.bundle / MANIFEST),
    )
