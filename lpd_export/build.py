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
from lpd_export import classes, engine, export
from lpd_export.bundle import (
    FORMAT_VERSION,
    GRAPH_NAMES,
    MANIFEST,
    SCHEDULE,
    Manifest,
    ModelDescription,
    TokenizerDescription,
    check_destination,
    describe_files,
    new_bundle,
)
from lpd_export.doctor import can_build
from lpd_export.engine import Progress
from lpd_export.errors import UserError
from lpd_export.files import sha256
from lpd_export.machine import read_memory
from lpd_export.pipeline import Pipeline
from lpd_export.precision import PrecisionWriter, compute_precision
from lpd_export.published import (
    NUM_CLASSES,
    TOKENIZER,
    VOCAB_SIZE,
    PublishedSettings,
    published_settings,
)
from lpd_export.recipe import ENGINE_FIELDS, BuildRequest
from lpd_export.runtime.onnxruntime_executor import OnnxRuntimeExecutor
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
DEFAULT_MAX_BATCH = 8
"""The largest batch that engines are built for, unless --max-batch says otherwise."""
EXTRA_MEMORY_FP32, EXTRA_MEMORY = 1.5, 3.5
"""What a build takes besides the loaded model, in sizes of its weights: lpd-l, 256 px, measured."""
CHECK_TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "int8": 0.3}
"""How far a graph may be from the reference, of the output's largest magnitude.

These catch a wrong graph; how close a precision is, is measured where it is decided.
"""
FLOAT_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


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


def build(
    request: BuildRequest,
    report: Report = lambda stage: None,
    progress: Progress | None = None,
) -> Path:
    """Makes the bundle that a request asks for and returns its folder.

    Args:
        request: what to build.
        report: called with a line at the start of each stage.
        progress: called while TensorRT builds, with its stage, the steps done, and all steps.

    Raises:
        UserError: if the request cannot be met; nothing is then left on disk.
    """
    check_request(request)
    if request.out:
        check_destination(Path(request.out), request.force)
    source = load(request, report)
    settings = settle(request, source)
    check_room(request, settings.out, source)
    with new_bundle(settings.out, replace=request.force) as folder:
        check = reference_check(source, settings)
        manifest = describe(request, source, settings)
        settings.schedule.save(folder / SCHEDULE)
        onnx_folder, exact = folder / "onnx", folder / "exact"
        write_exact_graphs(exact, source, report)
        # Weights twice in memory are enough: the reference goes before the graphs are loaded.
        del source
        gc.collect()
        if request.precision == "fp32":
            exact.rename(onnx_folder)
        else:
            writer = PrecisionWriter(exact, folder / "scratch", manifest, settings.schedule)
            decided = writer.write(onnx_folder, report)
            manifest = dataclasses.replace(manifest, calibration=decided)
            shutil.rmtree(exact)
        write_phases(onnx_folder, settings, report)
        compare_with_reference(onnx_folder, manifest, settings, check, report)
        if request.backend != "onnxruntime":
            engines = compile_engines(folder, request, settings, report, progress)
            manifest = dataclasses.replace(manifest, engines=engines)
        report("taking checksums")
        manifest = dataclasses.replace(manifest, files=describe_files(folder))
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return settings.out


# ------------------------------------------------------------------------------ the request


def check_request(request: BuildRequest) -> None:
    """Raises UserError for what contradicts itself or cannot be built by this version."""
    if request.backend == "onnxruntime":
        refuse_engine_options(request)
    else:
        engine_options(request)
    why_not = can_build(request.precision, request.backend)
    if why_not:
        raise UserError(f"cannot build {request.precision} for {request.backend} here: {why_not}")
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


def refuse_engine_options(request: BuildRequest) -> None:
    """Raises UserError for options of engines where none is built."""
    for field in ENGINE_FIELDS:
        if getattr(request, field):
            raise UserError(
                f"--{field.replace('_', '-')} is for engines: it needs --backend tensorrt or "
                "tensorrt-rtx"
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


def check_room(request: BuildRequest, out: Path, source: Source) -> None:
    """Raises UserError unless the build will fit in memory and on the disk."""
    weights = sum(
        weight.nbytes for model in (source.model, source.tokenizer) for weight in model.parameters()
    )
    plain = request.precision == "fp32" and request.backend == "onnxruntime"
    memory = int((EXTRA_MEMORY_FP32 if plain else EXTRA_MEMORY) * weights)
    free_memory = read_memory().free
    if free_memory is not None and free_memory < memory:
        raise UserError(
            f"this build needs about {memory / 1e9:.1f} GB more memory and {free_memory / 1e9:.1f} "
            "GB are free: end other programs, or use a larger machine"
        )
    needed = (1.1 if plain else 3.2) * weights
    folder = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the build needs {needed / 1e6:.0f} MB and {folder} has {free / 1e6:.0f} MB "
            "free: make room, or choose another --out"
        )


# ------------------------------------------------------------------------------- the graphs


def write_exact_graphs(folder: Path, source: Source, report: Report) -> None:
    """Writes the graphs in FP32."""
    grid = source.model.config.grid
    folder.mkdir()
    report("exporting decode.onnx")
    models = {"decode": export.export_decode(source.model)}
    report("exporting detokenize.onnx and tokenize.onnx")
    models["detokenize"] = export.export_detokenize(source.tokenizer, grid)
    models["tokenize"] = export.export_tokenize(source.tokenizer, grid)
    report("writing weights")
    export.write_models(models, folder)


def write_phases(folder: Path, settings: Settings, report: Report) -> None:
    """Writes the static phases beside decode.onnx, and checks every ONNX file."""
    report(f"writing {len(settings.phases)} static phases")
    export.write_phases(folder, settings.phases, settings.phase_rows)
    report("checking the ONNX files")
    for path in sorted(folder.glob("*.onnx")):
        export.check_model(path)


def compile_engines(
    folder: Path,
    request: BuildRequest,
    settings: Settings,
    report: Report,
    progress: Progress | None,
) -> dict[str, dict[str, Any]]:
    """Compiles every graph to `engines/`, with the builder's logs; returns what they became."""
    options = engine_options(request)
    engines: dict[str, dict[str, Any]] = {}
    (folder / "engines").mkdir()
    max_batch = request.max_batch or DEFAULT_MAX_BATCH
    for graph in GRAPH_NAMES:
        report(f"compiling {graph} for {request.backend}")
        profiles = (
            engine.decode_profiles(settings.phases, max_batch)
            if graph == "decode"
            else engine.tokenizer_profiles(max_batch)
        )
        log = folder / "engines" / f"{graph}.log"
        compiled = engine.compile_graph(
            folder / "onnx" / f"{graph}.onnx",
            graph,
            profiles,
            options,
            log,
            progress or (lambda stage, step, steps: None),
        )
        (folder / "engines" / f"{graph}.engine").write_bytes(compiled.serialized)
        for note in compiled.report.notes:
            report(note)
        engines[graph] = {
            **dataclasses.asdict(compiled.report),
            "weight_stripped": options.weight_stripped,
            "tensors": {
                name: "x".join(map(str, shape))
                for name, shape in export.load_shapes(folder / "onnx" / f"{graph}.onnx").items()
                if not name.startswith(("past_", "present_"))
            },
            "optimization_profiles": [
                {axis: dataclasses.astuple(ends) for axis, ends in profile.items()}
                for profile in profiles
            ],
        }
    return engines


def engine_options(request: BuildRequest) -> engine.EngineOptions:
    """The engine options of a request.

    Raises:
        UserError: for an option that the backend has not.
    """
    return engine.EngineOptions(
        backend=request.backend,
        workspace_mib=request.workspace,
        optimization_level=request.optimization_level,
        timing_cache=Path(request.timing_cache) if request.timing_cache else None,
        version_compatible=request.version_compatible,
        hardware_compatible=request.hardware_compatible,
        compute_capabilities=tuple(request.compute_capability),
        weight_stripped=request.weight_stripped,
    )


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


def compare_with_reference(
    folder: Path, manifest: Manifest, settings: Settings, check: Check, report: Report
) -> None:
    """Runs written graphs and raises UserError if they compute something else.

    ONNX Runtime's CPU runs them, whatever backend they are for; where it cannot, this is said.
    """
    tolerance = CHECK_TOLERANCES.get(manifest.precision)
    signed = manifest.precision == "int8" and manifest.backend != "onnxruntime"
    if tolerance is None or signed:
        report(
            f"not compared with the reference: no CPU runs {manifest.precision} graphs like these"
        )
        return
    report("comparing the graphs with the reference")
    files = {graph: folder / f"{graph}.onnx" for graph in GRAPH_NAMES}
    executor = OnnxRuntimeExecutor(files, getattr(torch, manifest.float_type))
    pipeline = Pipeline(manifest, settings.schedule, executor)
    steps = pipeline.bind_steps(images=1, guided=True)
    for number, (step, expected) in enumerate(zip(steps, check.steps, strict=False)):
        step.token_ids.copy_(expected.token_ids)
        step.positions.copy_(expected.positions)
        step.run()
        check_close(f"the logits of step {number}", step.logits, expected.logits, tolerance)
    image = torch.from_numpy(pipeline.detokenize(check.indices.numpy()))
    check_close("the decoded image", image, check.image, tolerance)


def check_close(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    worst, magnitude = (actual - expected).abs().max().item(), expected.abs().max().item()
    if not worst <= tolerance * max(1.0, magnitude):
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
        float_type=FLOAT_TYPES[compute_precision(request.precision, request.backend)],
        backend=request.backend,
        backend_version=backend_version(request.backend),
        target_compute_capabilities=list(request.compute_capability),
        max_batch=request.max_batch
        or (None if request.backend == "onnxruntime" else DEFAULT_MAX_BATCH),
        phases=list(settings.phases),
        phase_rows=settings.phase_rows,
        cfg=settings.cfg,
        guidance=request.guidance,
        calibration={},
        engines={},
        class_names=settings.class_names,
        made=describe_making(request, source),
        files={},
    )


def backend_version(backend: str) -> str:
    if backend == "onnxruntime":
        return str(onnxruntime.__version__)
    return str(engine.load_tensorrt(backend).__version__)


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
