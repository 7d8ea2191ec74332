"""From a checkpoint to a bundle: loads, settles the settings, exports, checks, writes.

Knows the order of the work and what follows from what the user left out. The graphs, the ONNX
files and the bundle's format are each somebody else's.
"""

from __future__ import annotations

import dataclasses
import gc
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

import lpd_export
from lpd_export import classes, export
from lpd_export.bundle import (
    FORMAT_VERSION,
    MANIFEST,
    SCHEDULE,
    Manifest,
    ModelDescription,
    TokenizerDescription,
    check_destination,
    describe_files,
    new_bundle,
)
from lpd_export.errors import UserError
from lpd_export.files import sha256
from lpd_export.pipeline import Pipeline
from lpd_export.published import (
    NUM_CLASSES,
    TOKENIZER,
    VOCAB_SIZE,
    PublishedSettings,
    published_settings,
)
from lpd_export.recipe import BuildRequest
from lpd_export.schedule import Phase, Schedule, phase_table
from reference.checkpoint import CheckpointError, load_lpd, load_tokenizer, locate
from reference.lpd import LPD, PUBLISHED_MODELS, LPDConfig
from reference.vq import VQConfig, VQTokenizer

Report = Callable[[str], None]

DEFAULT_MODEL = "lpd-l"
DEFAULT_RESOLUTION = 256
DEFAULT_ORDERS = 64
DEFAULT_CFG = 3.0
"""Guidance recommended for a model without published settings, unless --cfg says otherwise."""
CHECK_TOLERANCE = 1e-3
"""How far a written graph may be from the reference, of the output's largest magnitude."""


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

    @property
    def phase_rows(self) -> int:
        """Rows of the static phase graphs: one image, with its null row if there is guidance."""
        return 1 if self.cfg == 1.0 else 2


def build(request: BuildRequest, report: Report = lambda stage: None) -> Path:
    """Makes the bundle that a request asks for and returns its folder.

    `report` is called with a line at the start of each stage.

    Raises:
        UserError: if the request cannot be met; nothing is then left on disk.
    """
    check_request(request)
    if request.out:
        check_destination(Path(request.out), request.force)
    source = load(request, report)
    settings = settle(request, source)
    check_disk_space(settings.out, source)
    with new_bundle(settings.out, replace=request.force) as folder:
        check = reference_check(source, settings)
        manifest = describe(request, source, settings)
        settings.schedule.save(folder / SCHEDULE)
        write_graphs(folder / "onnx", source, settings, report)
        # Weights twice in memory are enough: the reference goes before the graphs are loaded.
        del source
        gc.collect()
        report("taking checksums")
        manifest = dataclasses.replace(manifest, files=describe_files(folder))
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        report("comparing the bundle with the reference")
        compare_with_reference(folder, check)
    return settings.out


# ------------------------------------------------------------------------------ the request


def check_request(request: BuildRequest) -> None:
    """Raises UserError for what contradicts itself or cannot be built by this version."""
    if request.backend != "onnxruntime":
        raise UserError(
            f"this version builds no {request.backend} engines: use --backend onnxruntime"
        )
    if request.precision != "fp32":
        raise UserError(f"this version builds no {request.precision} bundles: use --precision fp32")
    if request.model is not None and request.model not in PUBLISHED_MODELS:
        known = ", ".join(PUBLISHED_MODELS)
        raise UserError(f"there is no model {request.model!r}: the published ones are {known}")
    if request.heads is not None and not request.checkpoint:
        raise UserError("--heads needs --checkpoint, the model that has them")
    if request.random_weights and (request.checkpoint or request.tokenizer):
        raise UserError("--random-weights goes with neither --checkpoint nor --tokenizer")
    if request.tokenizer and not request.checkpoint:
        raise UserError("--tokenizer needs --checkpoint, the model whose tokens it decodes")
    for option, value in (
        ("--res", request.res),
        ("--steps", request.steps),
        ("--heads", request.heads),
        ("--orders", request.orders),
        ("--max-batch", request.max_batch),
    ):
        if value is not None and value < 1:
            raise UserError(f"{option} must be at least 1, but it is {value}")
    if not 0 <= request.seed < 2**64:
        raise UserError(f"--seed must be from 0 to 2^64 - 1, but it is {request.seed}")
    if request.cfg is not None and not 0 <= request.cfg < float("inf"):
        raise UserError(f"--cfg must be a number from 0 up, but it is {request.cfg}")
    if not (request.random_weights or request.checkpoint or request.model or request.res):
        raise UserError(
            "say what to build: --res 256 (the published lpd-l), --checkpoint FILE --tokenizer "
            "FILE, or a recipe such as engines/demo.toml"
        )


def load(request: BuildRequest, report: Report) -> Source:
    """The models of a request.

    Raises:
        UserError: if they cannot be read or do not belong together.
    """
    if request.random_weights:
        return draw_random_weights(request, report)
    checkpoint, tokenizer = request.checkpoint, request.tokenizer or TOKENIZER
    if checkpoint is None:
        checkpoint = published(request).checkpoint
    try:
        report(f"reading {tokenizer}")
        tokenizer_file = locate(tokenizer)
        vq = load_tokenizer(tokenizer_file)
        report(f"reading {checkpoint}")
        checkpoint_file = locate(checkpoint)
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


def published(request: BuildRequest) -> PublishedSettings:
    """The published model that a request without a checkpoint means."""
    name, res = request.model or DEFAULT_MODEL, request.res or DEFAULT_RESOLUTION
    settings = published_settings(name, res, request.steps)
    if settings is None:
        raise UserError(
            f"{name} was not published at {res} px: give a --checkpoint, or --random-weights"
        )
    return settings


def draw_random_weights(request: BuildRequest, report: Report) -> Source:
    """A published architecture, its weights drawn from the seed."""
    name = request.model or DEFAULT_MODEL
    report(f"drawing random weights for {name}")
    vq_config = VQConfig()
    config = LPDConfig(
        **PUBLISHED_MODELS[name],
        grid=grid_for(request.res or DEFAULT_RESOLUTION, vq_config.stride),
        num_classes=NUM_CLASSES,
        vocab_size=VOCAB_SIZE,
    )
    models = LPD(config).initialize(request.seed), VQTokenizer(vq_config).initialize(request.seed)
    for model in models:
        model.requires_grad_(False).eval()
    return Source(*models, checkpoint=None, tokenizer_file=None)


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
    )


def make_schedule(request: BuildRequest, grid: int, known: PublishedSettings | None) -> Schedule:
    """The schedule of the request's file, or a locality-aware one."""
    if request.schedule:
        for option, value in (("--orders", request.orders), ("--repulsion", request.repulsion)):
            if value is not None:
                raise UserError(f"{option} is for making a schedule, and --schedule gives one")
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


def check_disk_space(out: Path, source: Source) -> None:
    """Raises UserError unless the bundle will fit where it is to be written."""
    needed = sum(
        weight.nbytes for model in (source.model, source.tokenizer) for weight in model.parameters()
    )
    folder = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < 1.1 * needed:
        raise UserError(
            f"the bundle needs {1.1 * needed / 1e6:.0f} MB and {folder} has {free / 1e6:.0f} MB "
            "free: make room, or choose another --out"
        )


# ------------------------------------------------------------------------------- the graphs


def write_graphs(folder: Path, source: Source, settings: Settings, report: Report) -> None:
    """Writes and checks every ONNX file of a bundle, in a folder of their own."""
    grid = source.model.config.grid
    folder.mkdir()
    report("exporting decode.onnx")
    models = {"decode": export.export_decode(source.model)}
    report("exporting detokenize.onnx and tokenize.onnx")
    models["detokenize"] = export.export_detokenize(source.tokenizer, grid)
    models["tokenize"] = export.export_tokenize(source.tokenizer, grid)
    report("writing weights")
    export.write_models(models, folder)
    del models
    report(f"writing {len(settings.phases)} static phases")
    export.write_phases(folder, settings.phases, settings.phase_rows)
    report("checking the ONNX files")
    for path in sorted(folder.glob("*.onnx")):
        export.check_model(path)


class CheckStep(NamedTuple):
    """One decode step, teacher-forced, as the reference computes it."""

    token_ids: Tensor
    """[2, C], of the first class and of no class."""
    positions: Tensor
    """[2, T]."""
    logits: Tensor
    """[2, Q, V]."""


class Check(NamedTuple):
    """What the written graphs are compared with."""

    steps: list[CheckStep]
    indices: Tensor
    """[1, S] int64."""
    image: Tensor
    """[1, 3, height, width] of these indices."""


@torch.inference_mode()
def reference_check(source: Source, settings: Settings) -> Check:
    """The reference's prefill, first decode step and one decoded image."""
    model, tokenizer, cells = source.model, source.tokenizer, source.model.config.cells
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(tokenizer.config.codebook_size, (1, cells), generator=generator)
    order = torch.from_numpy(settings.schedule.orders[0].astype(np.int64))
    context = torch.cat([model.condition(torch.tensor([0]), 1), model.condition(None, 1)])
    vocab_size = model.config.vocab_size
    token_ids = torch.tensor([[vocab_size], [vocab_size + model.config.num_classes]])
    sequence = torch.cat([torch.zeros(1, dtype=torch.int64), order + 1])
    cache, steps = model.new_cache(), []
    for phase in settings.phases[:2]:
        rows = sequence[phase.write_index : phase.write_index + phase.tokens].repeat(2, 1)
        logits = model.decode_step(context, rows, cache)
        steps.append(CheckStep(token_ids, rows, logits))
        token_ids = indices[:, : phase.queries].repeat(2, 1)
        context = model.token_emb(token_ids)
    return Check(steps, indices, tokenizer.decode(indices))


def compare_with_reference(folder: Path, check: Check) -> None:
    """Opens a written bundle and raises UserError if it computes something else."""
    pipeline = Pipeline.open(folder)
    steps = pipeline.bind_steps(images=1, guided=True)
    for number, (step, expected) in enumerate(zip(steps, check.steps, strict=False)):
        step.token_ids.copy_(expected.token_ids)
        step.positions.copy_(expected.positions)
        step.run()
        check_close(f"the logits of step {number}", step.logits, expected.logits)
    image = torch.from_numpy(pipeline.detokenize(check.indices.numpy()))
    check_close("the decoded image", image, check.image)


def check_close(what: str, actual: Tensor, expected: Tensor) -> None:
    worst, magnitude = (actual - expected).abs().max().item(), expected.abs().max().item()
    if not worst <= CHECK_TOLERANCE * max(1.0, magnitude):
        raise UserError(
            f"the bundle was not written: {what} differ from the reference's by {worst:.2g} (of "
            f"{magnitude:.2g}); please report this with your versions of torch and onnxruntime"
        )


# ----------------------------------------------------------------------------- the manifest


def describe(request: BuildRequest, source: Source, settings: Settings) -> Manifest:
    """The manifest, all but the files."""
    config, vq = source.model.config, source.tokenizer.config
    return Manifest(
        format_version=FORMAT_VERSION,
        name=settings.name,
        model=ModelDescription(
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            head_dim=config.head_dim,
            mlp_dim=config.mlp_dim,
            grid=config.grid,
            num_classes=config.num_classes,
            vocab_size=config.vocab_size,
        ),
        tokenizer=TokenizerDescription(
            channels=vq.channels,
            channel_multipliers=list(vq.channel_multipliers),
            num_res_blocks=vq.num_res_blocks,
            z_channels=vq.z_channels,
            codebook_size=vq.codebook_size,
            codebook_dim=vq.codebook_dim,
            stride=vq.stride,
        ),
        resolution=source.resolution,
        precision=request.precision,
        backend=request.backend,
        backend_version=onnxruntime.__version__,
        target_compute_capabilities=[],
        max_batch=request.max_batch,
        phases=list(settings.phases),
        phase_rows=settings.phase_rows,
        cfg=settings.cfg,
        guidance=request.guidance,
        class_names=settings.class_names,
        made=describe_making(request, source),
        files={},
    )


def describe_making(request: BuildRequest, source: Source) -> dict[str, Any]:
    """Where the weights came from and what the bundle was made with."""

    def origin(name: str | None, file: Path | None) -> dict[str, str] | None:
        return {"source": name or file.name, "sha256": sha256(file)} if file else None

    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": origin(request.checkpoint, source.checkpoint),
        "tokenizer": origin(request.tokenizer, source.tokenizer_file),
        "random_weights_seed": request.seed if request.random_weights else None,
        "versions": {
            "lpd-export": lpd_export.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }
