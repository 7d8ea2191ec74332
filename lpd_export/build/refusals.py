"""Which requests contradict themselves or cannot be met on this machine.

Knows what can be told without looking into a model: no torch is loaded, so that a slip is told at
once. What the weights decide is in `settings`.
"""

from __future__ import annotations

from pathlib import Path

from lpd_export.build.published import PUBLISHED, PublishedSettings, published_settings
from lpd_export.build.request import ENGINE_FIELDS, HUB_PREFIX, BuildRequest, option
from lpd_export.bundle.manifest import check_destination
from lpd_export.errors import UserError
from lpd_export.formats import (
    BACKENDS,
    CUDA,
    ENGINE_BACKENDS,
    PRECISIONS,
    QUANTIZED,
    TENSORRT_RTX,
    reaches,
)
from lpd_export.machine.doctor import can_build
from lpd_export.machine.facts import look
from lpd_export.schedule.schedule_file import Schedule

DEFAULT_MODEL = "lpd-l"
DEFAULT_RESOLUTION = 256
AMPERE = "8.0"
"""The compute capability from which on engines run that are for no GPU alone."""


def check_request(request: BuildRequest) -> None:
    """Raises UserError for what contradicts itself or cannot be built by this version, here."""
    backend = BACKENDS[request.backend]
    for name in ENGINE_FIELDS:
        if getattr(request, name) and not backend.compiles:
            raise UserError(
                f"{option(name)} is for engines: it needs --backend {' or '.join(ENGINE_BACKENDS)}"
            )
        if getattr(request, name) and name in backend.not_taken:
            raise UserError(backend.not_taken[name])
    if request.keep_layers and not PRECISIONS[request.precision].quantization:
        raise UserError(
            "--keep-layers says which layers are not quantized: it needs --precision "
            f"{' or '.join(QUANTIZED)}, not {request.precision}"
        )
    least = least_capability(request)
    if request.hardware_compatible and not reaches(AMPERE, least):
        raise UserError(
            f"--hardware-compatible is for all GPUs from compute capability {AMPERE} on, and "
            f"{request.precision} needs {least}: leave it out, or use another --precision"
        )
    if request.schedule:
        for name in ("orders", "repulsion"):
            if getattr(request, name) is not None:
                raise UserError(f"--{name} is for making a schedule, and --schedule gives one")
        Schedule.load(request.schedule, steps=request.steps)  # whether it can be
    check_source(request)
    if request.out:
        check_destination(Path(request.out), request.force)
    # At last, because looking at the machine takes a second.
    if why_not := can_build(request.precision, request.backend):
        raise UserError(f"cannot build {request.precision} for {request.backend} here: {why_not}")
    check_capabilities(request)


def least_capability(request: BuildRequest) -> str:
    """The least compute capability of a GPU that runs what is asked for."""
    return PRECISIONS[request.precision].support[request.backend, CUDA[1]].capability


def capabilities(request: BuildRequest) -> tuple[str, ...]:
    """The compute capabilities to compile for: the request's, or all that have the precision.

    None stands for Ampere's and all later ones.
    """
    least, portable = least_capability(request), BACKENDS[request.backend].portable
    if request.compute_capability or not portable or reaches(AMPERE, least):
        return request.compute_capability
    known = look({TENSORRT_RTX.module}).rtx_capabilities
    return tuple(value for value in known if reaches(value, least))


def check_capabilities(request: BuildRequest) -> None:
    """Raises UserError for compute capabilities that cannot be compiled for in this precision."""
    capabilities, least = request.compute_capability, least_capability(request)
    known = look({TENSORRT_RTX.module}).rtx_capabilities if capabilities else ()
    for value in capabilities:
        if value not in known:
            raise UserError(
                f"tensorrt-rtx compiles for compute capability {', '.join(known)}, not for "
                f"{value!r}"
            )
        if not reaches(value, least):
            raise UserError(
                f"{request.precision} needs compute capability {least}: leave out {value}, or use "
                "another --precision"
            )
        if capabilities.count(value) > 1:
            raise UserError(f"compute capability {value} is given twice")


def check_source(request: BuildRequest) -> None:
    """Raises UserError unless a request says which weights to take, and they may be there."""
    models = list(dict.fromkeys(row.model for row in PUBLISHED))
    if request.model is not None and request.model not in models:
        raise UserError(
            f"there is no model {request.model!r}: the published ones are {', '.join(models)}"
        )
    if request.heads is not None and not request.checkpoint:
        raise UserError("--heads needs --checkpoint, the model that has them")
    if request.random_weights and (request.checkpoint or request.tokenizer):
        raise UserError("--random-weights goes with neither --checkpoint nor --tokenizer")
    if request.tokenizer and not request.checkpoint:
        raise UserError("--tokenizer needs --checkpoint, the model whose tokens it decodes")
    if not (request.random_weights or request.checkpoint or request.model or request.res):
        raise UserError(
            "say what to build: --res 256 (the published lpd-l), --checkpoint FILE --tokenizer "
            "FILE, or a recipe such as engines/demo.toml"
        )
    for file in filter(None, (request.tokenizer, request.checkpoint)):
        if not file.startswith(HUB_PREFIX) and not Path(file).exists():
            raise UserError(f"there is no checkpoint {file}")
    if not (request.random_weights or request.checkpoint):
        published(request)


def published(request: BuildRequest) -> PublishedSettings:
    """The published model that a request without a checkpoint means."""
    name, res = request.model or DEFAULT_MODEL, request.res or DEFAULT_RESOLUTION
    settings = published_settings(name, res, request.steps)
    if settings is None:
        raise UserError(
            f"{name} was not published at {res} px: give a --checkpoint, or --random-weights"
        )
    return settings
