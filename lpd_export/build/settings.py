"""What a build is made from: a request becomes models and settings.

Knows what follows from what the user left out, and which builds need more room than there is.
Writes nothing. What can be told without a model is in `refusals`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lpd_export.build.published import (
    NUM_CLASSES,
    TOKENIZER,
    VOCAB_SIZE,
    PublishedSettings,
    published_settings,
)
from lpd_export.build.refusals import DEFAULT_MODEL, DEFAULT_RESOLUTION, published
from lpd_export.build.request import BuildRequest
from lpd_export.bundle import classes
from lpd_export.errors import UserError
from lpd_export.formats import BACKENDS, PRECISIONS
from lpd_export.machine.facts import read_memory
from lpd_export.progress import Report
from lpd_export.schedule.phases import Phase, phase_table
from lpd_export.schedule.schedule_file import Schedule
from lpd_reference.checkpoint import CheckpointError, load_lpd, load_tokenizer, locate_all
from lpd_reference.lpd import LPD, PUBLISHED_MODELS, LPDConfig
from lpd_reference.vq import VQConfig, VQTokenizer

DEFAULT_ORDERS = 64
DEFAULT_MAX_BATCH = 8
"""The largest batch that engines are built for, unless --max-batch says otherwise."""
DEFAULT_CFG = 3.0
"""Guidance recommended for a model without published settings, unless --cfg says otherwise."""
EXTRA_MEMORY_FP32, EXTRA_MEMORY = 1.5, 3.5
"""What a build takes besides the loaded model, in sizes of its weights: lpd-l, 256 px, measured."""
EXTRA_DISK_FP32, EXTRA_DISK = 1.1, 3.2
"""What it takes of the disk while it is at work, in sizes of the weights."""


class Source(NamedTuple):
    """The two models and the files that they came from, if any."""

    model: LPD
    tokenizer: VQTokenizer
    checkpoint: Path | None
    tokenizer_file: Path | None

    @property
    def resolution(self) -> int:
        """Pixels of an image's side."""
        return self.model.config.grid * self.tokenizer.config.stride


@dataclass(frozen=True)
class Settings:
    """What the request says, or what follows where it is silent."""

    name: str
    schedule: Schedule
    phases: tuple[Phase, ...]
    cfg: float
    class_names: classes.ClassNames
    out: Path
    max_batch: int | None
    """Images of the largest batch; None is any."""

    @property
    def phase_rows(self) -> int:
        """Rows of the static phase graphs: one image, with its null row if there is guidance."""
        return 1 if self.cfg == 1.0 else 2


def load(request: BuildRequest, report: Report) -> Source:
    """The models of a request.

    Raises:
        UserError: if they cannot be read or do not belong together.
    """
    if request.random_weights:
        return draw_random_weights(request, report)
    checkpoint, tokenizer = weight_sources(request)
    try:
        report(f"looking for {tokenizer} and {checkpoint}")
        tokenizer_file, checkpoint_file = locate_all([tokenizer, checkpoint])
        report(f"reading {tokenizer}")
        vq = load_tokenizer(tokenizer_file)
        report(f"reading {checkpoint}")
        grid = grid_for(request.res, vq.config.stride) if request.res else None
        model = load_lpd(checkpoint_file, grid=grid, heads=request.heads)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    if model.config.vocab_size != vq.config.codebook_size:
        raise UserError(
            f"{checkpoint} and {tokenizer} do not belong together: the model's vocabulary has "
            f"{model.config.vocab_size} tokens, the tokenizer's codebook "
            f"{vq.config.codebook_size}"
        )
    if request.model and model_name(model.config) != request.model:
        raise UserError(
            f"{checkpoint} is not {request.model}: it has width {model.config.dim}, "
            f"{model.config.depth} blocks and {model.config.heads} heads"
        )
    return Source(model, vq, checkpoint_file, tokenizer_file)


def weight_sources(request: BuildRequest) -> tuple[str, str]:
    """Where the weights of a request are: of the model, and of the tokenizer."""
    return request.checkpoint or published(request).checkpoint, request.tokenizer or TOKENIZER


def draw_random_weights(request: BuildRequest, report: Report) -> Source:
    """A published architecture, its weights drawn from the seed."""
    report(f"drawing random weights for {request.model or DEFAULT_MODEL}")
    config, vq_config = published_architecture(request)
    models = LPD(config).initialize(request.seed), VQTokenizer(vq_config).initialize(request.seed)
    for model in models:
        model.requires_grad_(False).eval()
    return Source(*models, checkpoint=None, tokenizer_file=None)


def published_architecture(request: BuildRequest) -> tuple[LPDConfig, VQConfig]:
    """The published architectures that a request without a checkpoint means."""
    vq_config = VQConfig()
    config = LPDConfig(
        **PUBLISHED_MODELS[request.model or DEFAULT_MODEL],
        grid=grid_for(request.res or DEFAULT_RESOLUTION, vq_config.stride),
        num_classes=NUM_CLASSES,
        vocab_size=VOCAB_SIZE,
    )
    return config, vq_config


def grid_for(resolution: int, stride: int) -> int:
    """Cells of a side at a resolution."""
    if resolution < stride or resolution % stride:
        raise UserError(
            f"--res {resolution} is not a multiple of the tokenizer's stride of {stride} pixels"
        )
    return resolution // stride


def model_name(config: LPDConfig) -> str | None:
    """The published name of an architecture, if it has one."""
    shape = {"dim": config.dim, "depth": config.depth, "heads": config.heads}
    return next((name for name, known in PUBLISHED_MODELS.items() if known == shape), None)


def settle(request: BuildRequest, source: Source) -> Settings:
    """All settings of a build.

    Raises:
        UserError: if a schedule or class names do not fit the model.
    """
    config, resolution = source.model.config, source.resolution
    name = model_name(config)
    known = published_settings(name, resolution, request.steps)
    stem = name or (source.checkpoint.stem if source.checkpoint else "lpd")
    full_name = f"{stem}-{resolution}-{request.precision}"
    schedule = make_schedule(request, config.grid, known)
    return Settings(
        name=Path(request.out).name if request.out else full_name,
        schedule=schedule,
        phases=phase_table(schedule.group_sizes),
        cfg=request.cfg if request.cfg is not None else known.cfg if known else DEFAULT_CFG,
        class_names=find_class_names(request, source.checkpoint, config.num_classes),
        out=Path(request.out or f"engines/{full_name}"),
        max_batch=request.max_batch
        or (DEFAULT_MAX_BATCH if BACKENDS[request.backend].compiles else None),
    )


def make_schedule(request: BuildRequest, grid: int, known: PublishedSettings | None) -> Schedule:
    """The schedule of the request's file, or a locality-aware one."""
    if request.schedule:
        schedule = Schedule.load(request.schedule, steps=request.steps)
        schedule.check_grid(grid)
        return schedule
    # 20 steps for a 16x16 grid and 48 for 32x32 are published; others lie on the line through.
    usual_steps = known.steps if known else min(grid * grid, max(1, round(1.75 * grid) - 8))
    usual_repulsion = known.repulsion if known else max(1, grid // 8)
    return Schedule.make(
        grid,
        steps=usual_steps if request.steps is None else request.steps,
        repulsion=usual_repulsion if request.repulsion is None else request.repulsion,
        count=request.orders or DEFAULT_ORDERS,
        seed=request.seed,
    )


def find_class_names(
    request: BuildRequest, checkpoint: Path | None, num_classes: int
) -> classes.ClassNames:
    """Class names from the request's file, the checkpoint's folder, or ImageNet."""
    if request.classes:
        return classes.read_names(Path(request.classes), num_classes)
    beside = checkpoint.with_name("classes.json") if checkpoint else None
    if beside is not None and beside.is_file():
        return classes.read_names(beside, num_classes)
    return classes.imagenet_names() if num_classes == classes.IMAGENET_CLASSES else []


def needed_room(request: BuildRequest, source: Source) -> tuple[int, int]:
    """The bytes that a build takes of memory, besides the loaded model, and of the disk."""
    weights = sum(
        weight.nbytes for model in (source.model, source.tokenizer) for weight in model.parameters()
    )
    if PRECISIONS[request.precision].exact and not BACKENDS[request.backend].compiles:
        return int(EXTRA_MEMORY_FP32 * weights), int(EXTRA_DISK_FP32 * weights)
    return int(EXTRA_MEMORY * weights), int(EXTRA_DISK * weights)


def check_room(request: BuildRequest, out: Path, source: Source) -> None:
    """Raises UserError unless the build will fit in memory and on the disk."""
    memory, needed = needed_room(request, source)
    free_memory = read_memory().free
    if free_memory is not None and free_memory < memory:
        raise UserError(
            f"this build needs about {memory / 1e9:.1f} GB more memory and {free_memory / 1e9:.1f} "
            "GB are free: end other programs, or use a larger machine"
        )
    folder = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the build needs {needed / 1e6:.0f} MB and {folder} has {free / 1e6:.0f} MB "
            "free: make room, or choose another --out"
        )
