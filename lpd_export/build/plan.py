"""What a build would make: `build --dry-run`.

Knows a request's outcome as far as it can be told without making or fetching anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lpd_export.build.refusals import check_request
from lpd_export.build.request import BuildRequest
from lpd_export.build.settings import (
    Source,
    check_room,
    load,
    model_name,
    needed_room,
    published_architecture,
    settle,
    weight_sources,
)
from lpd_export.bundle.manifest import GRAPH_NAMES, MANIFEST, SCHEDULE, check_destination
from lpd_export.errors import UserError
from lpd_export.formats import BACKENDS, PRECISIONS
from lpd_export.precision.writer import read_kept_layers
from lpd_export.progress import Report
from lpd_reference.checkpoint import CheckpointError, is_here
from lpd_reference.lpd import LPD
from lpd_reference.vq import VQTokenizer


@dataclass(frozen=True)
class Plan:
    """What a build would make, and of what."""

    bundle: str
    model: str
    weights: dict[str, bool]
    """The files it is built from by source, and whether each is on this machine."""
    steps: int
    orders: int
    schedule: str
    precision: str
    backend: str
    max_batch: int | None
    cfg: float
    guidance: str
    files: list[str]
    weight_bytes: int
    """Of the weights in the graphs, if no layer is left out of quantization."""
    memory_bytes: int
    """What the build needs besides the loaded model."""
    disk_bytes: int
    """What the build needs while it is at work."""

    def lines(self) -> Iterator[str]:
        """The plan for a reader."""
        yield f"would build {self.bundle} (nothing is made or fetched)"
        yield f"  model      {self.model}"
        for source, here in self.weights.items():
            yield f"  from       {source}{'' if here else ', which would be fetched'}"
        yield f"  schedule   {self.steps} steps, {self.orders} orders, {self.schedule}"
        batches = f", batches of up to {self.max_batch}" if self.max_batch else ""
        yield f"  precision  {self.precision}, for {self.backend}{batches}"
        yield f"  guidance   {self.cfg:g}, {self.guidance}"
        yield f"  weights    about {self.weight_bytes / 1e6:.0f} MB"
        phases = [name for name in self.files if name.startswith("onnx/phase_")]
        others = [name for name in self.files if name not in phases]
        yield f"  files      {', '.join(others)}, and {len(phases)} static phases"
        yield (
            f"  needs      {self.disk_bytes / 1e6:.0f} MB on the disk and "
            f"{self.memory_bytes / 1e6:.0f} MB of memory besides the model's"
        )


def plan(request: BuildRequest, report: Report = lambda stage: None) -> Plan:
    """What `build` would make of a request; reads files that are here, fetches and writes nothing.

    Raises:
        UserError: as `build`, or if the weights are not here and of no published model.
    """
    check_request(request)
    if request.keep_layers:
        read_kept_layers(Path(request.keep_layers))
    here = {} if request.random_weights else find(weight_sources(request))
    source = load(request, report) if here and all(here.values()) else unfilled(request, here)
    settings = settle(request, source)
    check_destination(settings.out, request.force)
    check_room(request, settings.out, source)
    config, parameters = source.model.config, [source.model, source.tokenizer]
    memory, disk = needed_room(request, source)
    graphs = GRAPH_NAMES if BACKENDS[request.backend].compiles else ()
    engines = [f"engines/{graph}.{kind}" for graph in graphs for kind in ("engine", "log")]
    return Plan(
        bundle=str(settings.out),
        model=(
            f"{model_name(config) or 'a model of its own'}: width {config.dim}, {config.depth} "
            f"blocks, {config.heads} heads, {config.num_classes} classes; {source.resolution} px, "
            f"a grid of {config.grid}x{config.grid}"
        ),
        weights=here,
        steps=settings.schedule.steps,
        orders=settings.schedule.count,
        schedule=settings.schedule.kind,
        precision=request.precision,
        backend=request.backend,
        max_batch=settings.max_batch,
        cfg=settings.cfg,
        guidance=request.guidance,
        files=[
            *(MANIFEST, SCHEDULE, "onnx/weights.data"),
            *(f"onnx/{graph}.onnx" for graph in GRAPH_NAMES),
            *(f"onnx/{phase.name}.onnx" for phase in settings.phases),
            *engines,
        ],
        weight_bytes=weight_bytes(parameters, request),
        memory_bytes=memory,
        disk_bytes=disk,
    )


def weight_bytes(models: Sequence[nn.Module], request: BuildRequest) -> int:
    """What the weights take as they are stored."""
    precision = PRECISIONS[request.precision]
    size = precision.float_type(request.backend).size
    total = size * sum(weight.numel() for model in models for weight in model.parameters())
    if precision.quantization:
        layers = (layer for model in models for layer in model.modules())
        count = sum(
            layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear | nn.Conv2d)
        )
        total -= int(count * (size - precision.quantization.bits / 8))
    return total


def find(sources: Sequence[str]) -> dict[str, bool]:
    """Whether each source is on this machine; raises UserError for a path that is not there."""
    try:
        return {source: is_here(source) for source in sources}
    except CheckpointError as error:
        raise UserError(str(error)) from error


def unfilled(request: BuildRequest, here: dict[str, bool]) -> Source:
    """A published model without its weights."""
    if request.checkpoint:
        away = " and ".join(source for source, found in here.items() if not found)
        raise UserError(
            f"a dry run fetches nothing, and what is built is read off the weights: fetch {away} "
            "first (`hf download`), or build"
        )
    config, vq_config = published_architecture(request)
    with torch.device("meta"):
        return Source(LPD(config), VQTokenizer(vq_config), checkpoint=None, tokenizer_file=None)
