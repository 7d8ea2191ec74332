"""Verifies a bundle: the same work done by it and by the reference, compared, and a verdict.

Knows the order of the work. The two sides are in `sides` and `implementations`, the metrics in
`comparison`, the limits in `thresholds`, and what the user reads in `report`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.comparator import Comparator

from lpd_export.accuracy.bisection import Bisector, save_kept_layers
from lpd_export.accuracy.comparison import (
    GUIDED,
    Comparison,
    agreement,
    comparable,
    kl_divergence,
    psnr,
    quiet,
    top_1_agreement,
)
from lpd_export.accuracy.implementations import (
    BundleImplementation,
    Drawn,
    Reference,
    RememberingReference,
    Task,
    past_rows,
)
from lpd_export.accuracy.layers import compare_layers
from lpd_export.accuracy.polygraphy_files import (
    NONE,
    PolygraphyFiles,
    kept_phases,
    phase_bytes,
    phase_name,
)
from lpd_export.accuracy.portable import portable_files
from lpd_export.accuracy.report import IMAGES, RECORD, REPORT, write_report
from lpd_export.accuracy.results import (
    GENERATION,
    SEQUENCE,
    Bisection,
    ImagePair,
    LayerError,
    Measurement,
    Steps,
    Verification,
)
from lpd_export.accuracy.sides import REFERENCE, Sides, SidesRequest, open_sides
from lpd_export.accuracy.thresholds import Limits
from lpd_export.build import write_exact_graphs
from lpd_export.bundle import GRAPH_NAMES, Bundle, Manifest
from lpd_export.calibration import spread_labels
from lpd_export.classes import display_name
from lpd_export.errors import NumericalError, UserError
from lpd_export.export import cache_names
from lpd_export.files import check_writable, uninterrupted
from lpd_export.pipeline import Pipeline
from lpd_export.precision import calibrate, compute_precision
from lpd_export.runtime.onnxruntime_executor import OnnxRuntimeExecutor, check_threads
from lpd_export.runtime.randomness import image_randomness
from lpd_export.runtime.sampler import Sampling
from lpd_export.schedule import Phase, attention_mask
from lpd_export.settings import Source
from reference.generate import draw

Report = Callable[[str], None]
Arrays = Mapping[str, NDArray[Any]]

DEFAULT_IMAGES = 8
MOST_PAIRS = 16
"""Images that the report shows side by side."""
KEPT_LAYERS = "keep_layers.json"
"""In the report's folder, what `build --keep-layers` takes."""
POLYGRAPHY = "polygraphy"
"""In the report's folder, what `PolygraphyFiles` writes."""
REPORT_CONTENT = frozenset({REPORT, RECORD, IMAGES, POLYGRAPHY, KEPT_LAYERS})
"""All that there may be in a report's folder."""
TOKENIZER_PHASES = ("detokenize", "tokenize")


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
    if request.bisect and bundle.manifest.precision != "int8":
        raise UserError(
            f"--bisect finds the layers that int8 must spare, and {bundle.path} is "
            f"{bundle.manifest.precision}: build one with --precision int8"
        )
    task = make_task(bundle, request.images, request.seed)
    names = [*map(phase_name, task.phases), *TOKENIZER_PHASES]
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
        write_report(verification, folder, limits, commands)
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
        sampling=Sampling(cfg=manifest.cfg, guidance=manifest.guidance),  # type: ignore[arg-type]
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
    drawn = sides.expected.draw(task, report)
    for i in range(task.images):
        report(f"comparing the phases: image {i + 1} of {task.images}")
        for run in phase_runs(task, i, sides, drawn):
            comparison.add(run.name, *run.compared)
    steps = compare_sequences(task, sides, drawn, comparison, report)
    other = draw_actual(task, sides, report)
    agreement_by_step = compare_generation(task, sides, drawn, other, comparison)
    measurements = comparison.measurements()
    save_phases(request, task, sides, drawn, measurements, files, report)
    layers, layers_phase = [], ""
    if request.by_layer:
        phase = phase_to_look_at(task, measurements)
        layers_phase = phase_name(phase)
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
        steps=dataclasses.replace(steps, token_agreement=agreement_by_step),
        pairs=make_pairs(task, manifest, drawn, other) if other else [],
        layers=layers,
        layers_phase=layers_phase,
        bisections=bisections,
    )


# ------------------------------------------------------------------------------ single phases


def run_both(expected: BaseRunner, actual: BaseRunner, feed: Arrays) -> tuple[Arrays, Arrays]:
    """The outputs of two runners for one feed, through Polygraphy's comparator."""
    with quiet():
        (results,) = Comparator.run([expected, actual], data_loader=[feed], streaming=True)
    one, other = (dict(results[i][1][0].items()) for i in range(2))
    return one, other


class PhaseRun(NamedTuple):
    """One phase, run by both sides for one image."""

    name: str
    feed: Arrays
    expected: Arrays
    actual: Arrays
    compared: tuple[Arrays, Arrays]
    """Of both sides, what is compared: all outputs, of caches the rows that are written."""


def phase_runs(task: Task, image: int, sides: Sides, drawn: Drawn) -> Iterator[PhaseRun]:
    """Every phase for one image, fed the expected side's tokens, caches and image."""
    yield from decode_runs(task, image, sides, drawn)
    yield detokenize_run(image, sides, drawn)
    yield tokenize_run(image, sides, drawn)


def decode_runs(task: Task, image: int, sides: Sides, drawn: Drawn) -> Iterator[PhaseRun]:
    """Prefill and every decode step for one image."""
    caches = first_caches(sides.actual.decode_sizes(task))
    for phase in task.phases:
        runners = sides.expected.decode(task, phase), sides.actual.decode(task, phase)
        feed = decode_feed(task, image, phase, drawn.token_ids[image], caches, sides)
        one, other = run_both(*runners, feed)
        fed = sides.actual.cast(feed)
        compared = (
            comparable(one, sides.expected.cast(feed), phase),
            comparable(other, fed, phase),
        )
        yield PhaseRun(phase_name(phase), fed, one, other, compared)
        caches = {name.replace("present", "past", 1): values for name, values in one.items()}


def detokenize_run(image: int, sides: Sides, drawn: Drawn) -> PhaseRun:
    """One image's tokens, decoded."""
    feed = {"indices": drawn.token_ids[[image]]}
    one, other = run_both(sides.expected.detokenize(), sides.actual.detokenize(), feed)
    return PhaseRun("detokenize", feed, one, other, (one, other))


def tokenize_run(image: int, sides: Sides, drawn: Drawn) -> PhaseRun:
    """One image, as the expected side drew it, encoded."""
    pixels = drawn.pixels[[image]].astype(np.float32).transpose(0, 3, 1, 2)
    feed = {"image": np.ascontiguousarray(pixels / 127.5 - 1)}
    one, other = run_both(sides.expected.tokenize(), sides.actual.tokenize(), feed)
    return PhaseRun("tokenize", sides.actual.cast(feed), one, other, (one, other))


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
    names = [*map(phase_name, task.phases), *TOKENIZER_PHASES]
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


def first_caches(sizes: Mapping[str, int]) -> dict[str, NDArray[np.float32]]:
    """Caches as a runtime finds them, [R, H, S + 1, d] each: full of what was there before."""
    generator = np.random.default_rng(0)
    shape = (sizes["rows"], sizes["heads"], sizes["cells"] + 1, sizes["head_dim"])
    return {
        name: generator.standard_normal(shape, np.float32)
        for name in cache_names("past", sizes["depth"])
    }


def decode_feed(
    task: Task,
    image: int,
    phase: Phase,
    token_ids: NDArray[np.int64],
    caches: Arrays,
    sides: Sides,
) -> dict[str, NDArray[Any]]:
    """The inputs of one decode phase for one image, as the runtime would make them.

    token_ids: [S], raster order, of the image.
    """
    dimensions = sides.actual.pipeline.dimensions
    sizes = sides.actual.decode_sizes(task)
    rows, order = sizes["rows"], task.orders[image]
    positions = np.concatenate([[0], order + 1])
    written = positions[phase.write_index : phase.write_index + phase.tokens]
    if phase.index:
        last = order[phase.first_cell - phase.context : phase.first_cell]
        context = np.tile(token_ids[last], (rows, 1))
    else:
        labels = [task.labels[image], None][:rows]
        context = np.array([[dimensions.condition_id(label)] for label in labels])
    masked = float(torch.finfo(sides.actual.pipeline.executor.float_type).min)
    inputs = {
        "token_ids": context,
        "positions": np.tile(written, (rows, 1)),
        "attention_mask": attention_mask(phase, sizes["cells"], masked),
        "write_index": np.full(rows, phase.write_index),
    }
    return inputs | {name: caches[name] for name in cache_names("past", sizes["depth"])}


def phase_to_look_at(task: Task, measurements: list[Measurement]) -> Phase:
    """The decode phase that fails first, or else the one with the largest error of its logits."""
    by_name = {phase_name(phase): phase for phase in task.phases}
    ours = [entry for entry in measurements if entry.phase in by_name]
    failed = [entry for entry in ours if not entry.passed]
    errors = [entry for entry in ours if entry.metric == "logits_error"]
    return by_name[(failed or [max(errors, key=lambda entry: entry.value)])[0].phase]


def find_layer_errors(
    bundle: Bundle,
    task: Task,
    phase: Phase,
    sides: Sides,
    drawn: Drawn,
    scratch: Path,
    report: Report,
) -> list[LayerError]:
    """The error of every layer, of the decode graph in one phase, for the first image."""
    reference, precision = sides.expected, bundle.manifest.precision
    assert isinstance(reference, Reference)
    files, _ = portable_files(bundle, scratch / "portable")
    past, errors = past_rows(task, phase), []
    for run in phase_runs(task, 0, sides, drawn):
        # The same inputs for both, so that only what the graph computes differs.
        feed = {
            k: v.astype(np.float32) if v.dtype == np.float16 else v for k, v in run.feed.items()
        }
        work = {
            phase_name(phase): ("decode", partial(reference.decode_phase, feed, past, None)),
            "detokenize": ("detokenize", partial(reference.decode_image, feed)),
            "tokenize": ("tokenize", partial(reference.encode_image, feed)),
        }
        if run.name in work:
            graph, run_reference = work[run.name]
            report(f"comparing the layers of {graph}")
            folder = scratch / f"layers-{graph}"
            errors += compare_layers(
                graph, files[graph], run.feed, reference, run_reference, precision, folder
            )
            shutil.rmtree(folder)
    return errors


# --------------------------------------------------------------------------------- end to end


def compare_sequence(
    task: Task, image: int, sides: Sides, drawn: Drawn, comparison: Comparison
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """All steps of one image teacher-forced, each side on its own caches.

    Returns the guided logits [S, V] of both sides.
    """
    one, other = (
        side.sequence_logits(task.image(image), drawn.token_ids[[image]])[0].numpy()
        for side in (sides.expected, sides.actual)
    )
    comparison.note(SEQUENCE, GUIDED, "sequence_kl", kl_divergence(one, other))
    comparison.note(SEQUENCE, GUIDED, "sequence_top_1", top_1_agreement(one, other))
    return one, other


def compare_sequences(
    task: Task, sides: Sides, drawn: Drawn, comparison: Comparison, report: Report
) -> Steps:
    """Sequences of all images; returns the metrics by step."""
    kl, top_1 = [], []
    cells = [slice(p.first_cell, p.first_cell + p.queries) for p in task.phases]
    for i in range(task.images):
        report(f"comparing whole sequences: image {i + 1} of {task.images}")
        one, other = compare_sequence(task, i, sides, drawn, comparison)
        kl.append([kl_divergence(one[c], other[c]) for c in cells])
        top_1.append([top_1_agreement(one[c], other[c]) for c in cells])
    return Steps(
        cells=task.schedule.group_sizes.tolist(),
        kl=np.mean(kl, axis=0).tolist(),
        top_1=np.mean(top_1, axis=0).tolist(),
        token_agreement=[],
    )


def draw_actual(task: Task, sides: Sides, report: Report) -> Drawn | None:
    """The bundle's images, or None with a remark if it gives none."""
    try:
        if not sides.actual.faults:
            return sides.actual.draw(task, report)
        reason = "; ".join(sides.actual.faults.values())
    except NumericalError as error:
        reason = str(error)
    sides.remarks.append(f"{sides.actual.name} draws no image: {reason}")
    return None


def compare_generation(
    task: Task, sides: Sides, drawn: Drawn, other: Drawn | None, comparison: Comparison
) -> list[float]:
    """Whole images drawn with the same uniform numbers; returns the share of equal tokens by step.

    Whether or not an image's tokens part from the expected ones, each must be what the
    reference's own rule draws from the logits that the bundle has for the tokens before it: then
    rounding explains all differences, and not the loop or the sampler.
    """
    if other is None:
        for metric in ("token_agreement", "unexplained_draws"):
            comparison.note(GENERATION, "token_ids", metric, float("nan"))
        return [0.0 for _ in task.phases]
    equal_by_step = []
    for i, logits in enumerate(sides.actual.drawn_logits(task, other.token_ids)):
        one, two = (side.token_ids[i][task.orders[i]] for side in (drawn, other))
        comparison.note(GENERATION, "token_ids", "token_agreement", agreement(one, two))
        equal_by_step.append(
            [
                agreement(*(ids[p.first_cell : p.first_cell + p.queries] for ids in (one, two)))
                for p in task.phases
            ]
        )
        explained = draw(logits, torch.from_numpy(task.uniform[i])).numpy()
        unexplained = float(np.sum(explained != two))
        comparison.note(GENERATION, "token_ids", "unexplained_draws", unexplained)
        if np.array_equal(one, two):
            pixels = (images.pixels[i].astype(np.float64) for images in (drawn, other))
            comparison.note(
                GENERATION, "pixels", "generation_psnr", psnr(next(pixels), next(pixels), 255.0)
            )
    return [float(share) for share in np.mean(equal_by_step, axis=0)]


def make_pairs(task: Task, manifest: Manifest, drawn: Drawn, other: Drawn) -> list[ImagePair]:
    """What the report shows side by side."""
    return [
        ImagePair(
            label=display_name(manifest.class_names, task.labels[i]),
            expected=drawn.pixels[i],
            actual=other.pixels[i],
            equal_tokens=agreement(drawn.token_ids[i], other.token_ids[i]),
        )
        for i in range(min(task.images, MOST_PAIRS))
    ]


# ------------------------------------------------------------------------------- the bisection


def find_kept_layers(
    bundle: Bundle,
    task: Task,
    sides: Sides,
    drawn: Drawn,
    limits: Limits,
    threads: int | None,
    scratch: Path,
    report: Report,
) -> list[Bisection]:
    """For each graph of an INT8 bundle, the fewest layers that must not be INT8."""
    manifest, schedule = bundle.manifest, task.schedule
    assert isinstance(sides.expected, Reference)
    reference = RememberingReference(sides.expected)
    exact, trials = scratch / "exact", scratch / "trials"
    write_exact_graphs(exact, Source(reference.model, reference.tokenizer, None, None), report)
    trials.mkdir()
    calibration = calibrate(exact, trials, manifest, schedule, True, report)
    around = compute_precision("int8", manifest.backend)
    float_type = {"fp32": torch.float32, "fp16": torch.float16}[around]

    def judge(graph: str, file: Path) -> bool:
        executor = OnnxRuntimeExecutor({graph: file}, float_type, threads=threads)
        trial = BundleImplementation("trial", Pipeline(manifest, schedule, executor))
        return holds(graph, task, sides._replace(expected=reference, actual=trial), drawn, limits)

    bisector = Bisector(exact, trials, around, judge, report)
    return [bisector.search(graph, calibration.layers[graph]) for graph in GRAPH_NAMES]


def holds(graph: str, task: Task, sides: Sides, drawn: Drawn, limits: Limits) -> bool:
    """Whether every threshold that concerns one graph holds."""
    comparison = Comparison(limits)
    if graph == "decode":
        for i in range(task.images):
            compare_sequence(task, i, sides, drawn, comparison)
        # The cheaper half first: most trials that fail do so here.
        if not all(entry.passed for entry in comparison.measurements()):
            return False
    for i in range(task.images):
        if graph == "decode":
            runs = list(decode_runs(task, i, sides, drawn))
        else:
            runs = [(detokenize_run if graph == "detokenize" else tokenize_run)(i, sides, drawn)]
        for run in runs:
            comparison.add(run.name, *run.compared)
    return all(entry.passed for entry in comparison.measurements())


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


@contextlib.contextmanager
def new_report(folder: Path) -> Iterator[Path]:
    """A folder to write a report in, which takes the name `folder` when the block ends well.

    An earlier report there is then replaced; if the block fails it stays, and nothing else does.
    What a killed verification left is removed by the next one.

    Raises:
        UserError: if it cannot be written, or another verification is writing it.
    """
    partial, replaced, lock_file = (
        folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "replaced", "lock")
    )
    made = [parent for parent in folder.absolute().parents if not os.path.lexists(parent)]
    lock = FileLock(lock_file)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock_file.touch()  # where it cannot be written, the lock would say that it is taken
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"another verification is writing {folder}: wait for it to end, or choose another "
                "--out"
            ) from error
        try:
            for leftover in (partial, replaced):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir()
            yield partial
            with uninterrupted():
                check_report_folder(folder)  # something may have come there meanwhile
                if folder.exists():
                    folder.rename(replaced)
                partial.rename(folder)
        finally:
            with uninterrupted():
                for leftover in (partial, replaced):
                    shutil.rmtree(leftover, ignore_errors=True)
                lock_file.unlink(missing_ok=True)
                lock.release()
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        if not folder.exists():
            for parent in made:
                with contextlib.suppress(OSError):  # not empty: another process uses it
                    parent.rmdir()
