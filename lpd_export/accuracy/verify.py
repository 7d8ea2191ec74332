"""Verifies a bundle: the same work done by it and by the reference, compared, and a verdict.

Knows the order of the work. What is asked is in `request`, the two sides in `reference_side` and
`bundle_side`, their work in `phases` and `end_to_end`, the metrics in `comparison`, the limits in
`thresholds`, and what the user reads in `report`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from lpd_export.accuracy.bisection import find_kept_layers, save_kept_layers
from lpd_export.accuracy.comparison import Comparison
from lpd_export.accuracy.context import Context, make_task, open_context
from lpd_export.accuracy.end_to_end import (
    compare_generation,
    compare_sequences,
    draw_actual,
    make_pairs,
)
from lpd_export.accuracy.layers import find_layer_errors, phase_to_look_at
from lpd_export.accuracy.phases import phase_runs
from lpd_export.accuracy.polygraphy_files import NONE, PolygraphyFiles, kept_phases, phase_bytes
from lpd_export.accuracy.report import write_report
from lpd_export.accuracy.request import KEPT_LAYERS, POLYGRAPHY, VerifyRequest, new_report
from lpd_export.accuracy.results import Measurement, Step, Verification
from lpd_export.bundle.inspection import quantized_line
from lpd_export.bundle.manifest import Bundle
from lpd_export.progress import Report


def verify(request: VerifyRequest, report: Report) -> Verification:
    """Compares a bundle with the reference or another bundle, and writes the report.

    Raises:
        UserError: if something that is needed is missing, damaged or does not fit.
    """
    start = time.perf_counter()
    request.check()
    bundle = Bundle.open(request.bundle)
    manifest = bundle.manifest
    task = make_task(bundle, request.images, request.seed)
    # Mistakes are found before the work.
    kept = kept_phases(request.save_phases, task.phase_names, phase_bytes(manifest))
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lpd-export-")))
        context = open_context(request, bundle, task, scratch, report)
        folder = stack.enter_context(new_report(request.folder))
        files = PolygraphyFiles(folder / POLYGRAPHY)
        verification = compare(context, kept, files)
        save_first_failure(context, verification.failures, files)
        verification = dataclasses.replace(
            verification,
            saved_phases=[name for name in task.phase_names if name in files.saved],
            seconds=time.perf_counter() - start,
        )
        if request.bisect:
            save_kept_layers(verification.bisections, folder / KEPT_LAYERS)
        report("writing the report")
        commands = files.commands(
            bundle.path, request.folder / POLYGRAPHY, context.limits, manifest.backend
        )
        write_report(verification, folder, commands)
    return verification


def compare(context: Context, kept: list[str], files: PolygraphyFiles) -> Verification:
    """All comparisons, phase by phase and end to end.

    Args:
        context: of the verification.
        kept: phases of the first image that are left for Polygraphy.
        files: where they are left.
    """
    request, manifest, task = context.request, context.bundle.manifest, context.task
    comparison = Comparison(context.limits)
    for i in range(task.images):
        context.report(f"comparing the phases: image {i + 1} of {task.images}")
        for run in phase_runs(context, i):
            comparison.add(run.name, *run.compared)
            if i == 0 and run.name in kept:
                files.save(run.name, run.feed, run.expected, run.actual)
    divergence = compare_sequences(context, comparison)
    context.remarks.extend(
        f"{side.name} fails in {', '.join(phases)}: {reason}"
        for side in context.sides
        for reason, phases in side.faults.items()
    )
    other = draw_actual(context)
    agreement = compare_generation(context, other, comparison)
    measurements = comparison.measurements()
    layers, layers_phase = [], ""
    if request.by_layer:
        phase = phase_to_look_at(task, measurements)
        layers, layers_phase = find_layer_errors(context, phase), phase.name
    return Verification(
        bundle=str(request.bundle),
        name=manifest.name,
        precision=manifest.precision,
        backend=manifest.backend,
        quantized=quantized_line(manifest),
        against=request.against,
        ran=context.actual.ran,
        images=request.images,
        seed=request.seed,
        cfg=manifest.cfg,
        guidance=manifest.guidance,
        versions={name: version(name) for name in ("lpd-export", "torch", "polygraphy")},
        time=datetime.now().astimezone().isoformat(timespec="seconds"),
        remarks=context.remarks,
        measurements=measurements,
        reported=comparison.figures(),
        limits=context.limits,
        steps=[
            Step(phase.index + 1, phase.queries, float(kl), float(top_1), float(equal))
            for phase, (kl, top_1), equal in zip(task.phases, divergence, agreement, strict=True)
        ],
        pairs=make_pairs(context, other) if other else [],
        layers=layers,
        layers_phase=layers_phase,
        decisions=manifest.calibration.get("quantization", {}),
        bisections=find_kept_layers(context) if request.bisect else [],
    )


def save_first_failure(
    context: Context, failures: list[Measurement], files: PolygraphyFiles
) -> None:
    """Leaves the phase that failed first for Polygraphy as well, unless `none` are wanted."""
    failed = [entry.phase for entry in failures if entry.phase in context.task.phase_names][:1]
    if context.request.save_phases == NONE or set(failed) <= set(files.saved):
        return
    context.report(f"saving {failed[0]} for Polygraphy")
    run = next(run for run in phase_runs(context, 0) if run.name == failed[0])
    files.save(run.name, run.feed, run.expected, run.actual)
