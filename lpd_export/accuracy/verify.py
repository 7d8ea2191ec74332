"""Verifies a bundle: the same work done by it and by the reference, compared, and a verdict.

Knows the order of the work. The two sides are in `sides` and `implementations`, what they are
asked in `phases` and `end_to_end`, the metrics in `comparison`, the limits in `thresholds`, and
what the user reads in `report`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from lpd_export.accuracy.bisection import find_kept_layers, save_kept_layers
from lpd_export.accuracy.comparison import Comparison
from lpd_export.accuracy.end_to_end import (
    compare_generation,
    compare_sequences,
    draw_actual,
    draw_expected,
    make_pairs,
)
from lpd_export.accuracy.implementations import Drawn, Task
from lpd_export.accuracy.layers import find_layer_errors, phase_to_look_at
from lpd_export.accuracy.phases import phase_names, phase_runs
from lpd_export.accuracy.polygraphy_files import NONE, PolygraphyFiles, kept_phases, phase_bytes
from lpd_export.accuracy.report import IMAGES, RECORD, REPORT, write_report
from lpd_export.accuracy.results import Measurement, Step, Verification
from lpd_export.accuracy.sides import REFERENCE, Sides, SidesRequest, open_sides
from lpd_export.accuracy.thresholds import Limits
from lpd_export.bundle.manifest import Bundle
from lpd_export.errors import UserError
from lpd_export.files import check_writable, new_folder
from lpd_export.formats import PRECISIONS, QUANTIZED
from lpd_export.precision.calibration import spread_labels
from lpd_export.progress import Report
from lpd_export.runtime.onnxruntime_executor import check_threads
from lpd_export.runtime.randomness import image_randomness
from lpd_export.runtime.sampler import Sampling

DEFAULT_IMAGES = 8
KEPT_LAYERS = "keep_layers.json"
"""In the report's folder, what `build --keep-layers` takes."""
POLYGRAPHY = "polygraphy"
"""In the report's folder, what `PolygraphyFiles` writes."""
REPORT_CONTENT = frozenset({REPORT, RECORD, IMAGES, POLYGRAPHY, KEPT_LAYERS})
"""All that there may be in a report's folder."""


@dataclass(frozen=True)
class VerifyRequest:
    """What `lpd-export verify` was asked."""

    sides: SidesRequest
    images: int = DEFAULT_IMAGES
    seed: int = 0
    thresholds: tuple[str, ...] = ()
    """METRIC=LIMIT."""
    by_layer: bool = False
    bisect: bool = False
    save_phases: str | None = None
    """See `polygraphy_files.kept_phases`."""
    out: Path | None = None

    @property
    def folder(self) -> Path:
        """Where the report goes."""
        bundle = self.sides.bundle
        if bundle.name in ("", ".."):
            bundle = bundle.resolve()
        return self.out or bundle.parent / f"{bundle.name}-verification"


def verify(request: VerifyRequest, report: Report) -> Verification:
    """Compares a bundle with the reference or another bundle, and writes the report.

    Raises:
        UserError: if something that is needed is missing, damaged or does not fit.
    """
    start = time.perf_counter()
    check_request(request)
    bundle = Bundle.open(request.sides.bundle)
    if request.bisect and not PRECISIONS[bundle.manifest.precision].quantization:
        raise UserError(
            f"--bisect finds the layers that quantization must leave out, and {bundle.path} is "
            f"{bundle.manifest.precision}: build one with --precision {' or '.join(QUANTIZED)}"
        )
    task = make_task(bundle, request.images, request.seed)
    names = phase_names(task)
    # A mistake is told before the work.
    kept_phases(request.save_phases, names, phase_bytes(bundle.manifest))
    Limits.of([bundle.manifest.precision], request.thresholds)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lpd-export-")))
        sides = open_sides(request.sides, bundle, scratch, report)
        limits = Limits.of(sides.precisions, request.thresholds)
        folder = stack.enter_context(new_report(request.folder))
        files = PolygraphyFiles(folder / POLYGRAPHY)
        comparison = Comparison(limits)
        verification = compare(request, bundle, task, sides, comparison, files, scratch, report)
        verification = dataclasses.replace(
            verification, saved_phases=list(files.saved), seconds=time.perf_counter() - start
        )
        if request.bisect:
            save_kept_layers(verification.bisections, folder / KEPT_LAYERS)
        report("writing the report")
        commands = files.commands(
            bundle.path, request.folder / POLYGRAPHY, limits, bundle.manifest.backend
        )
        write_report(verification, folder, commands)
    return verification


def check_request(request: VerifyRequest) -> None:
    """Raises UserError for a request that cannot be met, before any work."""
    if request.images < 1:
        raise UserError(f"--images must be at least 1, but it is {request.images}")
    if not 0 <= request.seed < 2**64:
        raise UserError(f"--seed must be from 0 to 2^64 - 1, but it is {request.seed}")
    sides = request.sides
    check_threads(sides.threads)
    if sides.onnx and sides.device == "cuda":
        raise UserError("--onnx runs the graphs on the CPU: it does not go with --device cuda")
    if sides.against != REFERENCE:
        for option, given in (
            ("--checkpoint", sides.checkpoint),
            ("--tokenizer", sides.tokenizer),
            ("--by-layer", request.by_layer),
            ("--bisect", request.bisect),
        ):
            if given:
                raise UserError(f"{option} needs the reference: it does not go with --against")
    check_report_folder(request.folder)


def make_task(bundle: Bundle, images: int, seed: int) -> Task:
    """Images of classes as far apart as possible, with the bundle's own schedule and guidance."""
    manifest, schedule = bundle.manifest, bundle.schedule()
    chances = [image_randomness(seed, i, schedule.cells, schedule.count) for i in range(images)]
    return Task(
        schedule=schedule,
        labels=spread_labels(manifest.model.num_classes, images),
        order_indices=[chance.order_index for chance in chances],
        uniform=np.stack([chance.uniform for chance in chances]),
        sampling=Sampling(cfg=manifest.cfg, guidance=manifest.guidance),
        seed=seed,
    )


def compare(
    request: VerifyRequest,
    bundle: Bundle,
    task: Task,
    sides: Sides,
    comparison: Comparison,
    files: PolygraphyFiles,
    scratch: Path,
    report: Report,
) -> Verification:
    """All comparisons, phase by phase and end to end."""
    manifest = bundle.manifest
    drawn = draw_expected(task, sides, report)
    for i in range(task.images):
        report(f"comparing the phases: image {i + 1} of {task.images}")
        for run in phase_runs(task, i, sides, drawn):
            comparison.add(run.name, *run.compared)
    divergence = compare_sequences(task, sides, drawn, comparison, report)
    sides.remarks.extend(faults_in_words(sides))
    other = draw_actual(task, sides, report)
    agreement = compare_generation(task, sides, drawn, other, comparison)
    steps = [
        Step(phase.index + 1, phase.queries, float(kl), float(top_1), float(equal))
        for phase, (kl, top_1), equal in zip(task.phases, divergence, agreement, strict=True)
    ]
    measurements = comparison.measurements()
    save_phases(request, task, sides, drawn, measurements, files, report)
    layers, layers_phase = [], ""
    if request.by_layer:
        phase = phase_to_look_at(task, measurements)
        layers_phase = phase.name
        layers = find_layer_errors(bundle, task, phase, sides, drawn, scratch, report)
    bisections = []
    if request.bisect:
        limits = comparison.limits
        threads = request.sides.threads
        bisections = find_kept_layers(bundle, task, sides, drawn, limits, threads, scratch, report)
    return Verification(
        bundle=str(request.sides.bundle),
        name=manifest.name,
        precision=manifest.precision,
        backend=manifest.backend,
        against=request.sides.against,
        ran=sides.ran,
        images=request.images,
        seed=request.seed,
        cfg=manifest.cfg,
        guidance=manifest.guidance,
        versions={name: version(name) for name in ("lpd-export", "torch", "polygraphy")},
        time=datetime.now().astimezone().isoformat(timespec="seconds"),
        remarks=sides.remarks,
        measurements=measurements,
        reported=comparison.figures(),
        limits=comparison.limits,
        steps=steps,
        pairs=make_pairs(task, manifest, drawn, other) if other else [],
        layers=layers,
        layers_phase=layers_phase,
        bisections=bisections,
    )


def faults_in_words(sides: Sides) -> list[str]:
    """What each side could not run, and why."""
    return [
        f"{side.name} fails in {', '.join(phases)}: {reason}"
        for side in (sides.expected, sides.actual)
        for reason, phases in side.faults.items()
    ]


def save_phases(
    request: VerifyRequest,
    task: Task,
    sides: Sides,
    drawn: Drawn,
    measurements: list[Measurement],
    files: PolygraphyFiles,
    report: Report,
) -> None:
    """Leaves phases of the first image for Polygraphy: those asked for, and the first to fail.

    With `none`, none at all.
    """
    names = phase_names(task)
    size = phase_bytes(sides.actual.pipeline.manifest)
    kept = set(kept_phases(request.save_phases, names, size))
    if request.save_phases != NONE:
        failed = [m.phase for m in measurements if not m.passed and m.phase in names]
        kept |= set(failed[:1])
    if kept:
        report("saving inputs and outputs for Polygraphy")
        for run in phase_runs(task, 0, sides, drawn):
            if run.name in kept:
                files.save(run.name, run.feed, run.expected, run.actual)


# --------------------------------------------------------------------------------- the folder


def check_report_folder(folder: Path) -> None:
    """Raises UserError unless a report may be written to `folder`."""
    if folder.name in ("", ".."):
        raise UserError(
            f"--out {folder} does not name a folder: give the name that the report gets"
        )
    if folder.is_symlink():
        raise UserError(f"{folder} is a symbolic link: give --out the folder that it leads to")
    content = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if content and not (folder / RECORD).is_file():
        raise UserError(
            f"{folder} exists and is not an earlier verification's: choose another --out"
        )
    # Many programs call a file report.json; nothing that is not a verification's may be lost.
    foreign = content - REPORT_CONTENT
    if foreign:
        raise UserError(
            f"{folder} holds {min(foreign)}, which is no part of a report: move it away, or choose "
            "another --out"
        )
    check_writable(folder)


def new_report(folder: Path) -> contextlib.AbstractContextManager[Path]:
    """A folder to write a report in, which takes the name `folder` when the block ends well.

    An earlier report there is then replaced; if the block fails it stays, and nothing else does.

    Raises:
        UserError: as `check_report_folder`, or if another verification is writing the same report.
    """
    return new_folder(
        folder,
        taken=f"another verification is writing {folder}: wait for it to end, or choose another "
        "--out",
        check=partial(check_report_folder, folder),
    )
