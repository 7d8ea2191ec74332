"""From FP32 graphs to the graphs of a precision: measures, decides, then writes.

Knows which steps a precision takes. How values are cast is in `casting`, how layers are quantized
in `quantization`, what is measured in `calibration`, and which layers stay as they are in
`sensitivity`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime

from lpd_export import __version__
from lpd_export.bundle.manifest import GRAPH_NAMES, CalibrationRecord, Manifest
from lpd_export.errors import UserError
from lpd_export.files import cache_folder, read_file, sha256, write_atomically
from lpd_export.formats import BACKENDS, FLOAT32, INT8, PRECISIONS, Precision, Quantization
from lpd_export.graphs import export
from lpd_export.precision import calibration as calibration_module
from lpd_export.precision import convolutions, equalization, quantization
from lpd_export.precision.block_weights import (
    WeightRounder,
    quantize_weights,
    store_embedding,
)
from lpd_export.precision.calibration import (
    BATCH,
    SEED,
    Calibration,
    Calibrator,
    calibration_images,
)
from lpd_export.precision.casting import HEADROOM, check_ranges, lower
from lpd_export.precision.convolutions import Spans
from lpd_export.precision.equalization import equalize_graphs, equalized_ranges, range_scales
from lpd_export.precision.quantization import CLIPPING, quantizable_layers
from lpd_export.precision.quantized_graph import quantize_graph
from lpd_export.precision.sensitivity import Chooser
from lpd_export.precision.weight_only import choose_weights
from lpd_export.progress import Report
from lpd_export.runtime import (
    generator,
    onnxruntime_executor,
    onnxruntime_session,
    pipeline,
    randomness,
    sampler,
)
from lpd_export.schedule.schedule_file import Schedule

MEASURING = (
    calibration_module,
    convolutions,
    equalization,
    quantization,
    generator,
    onnxruntime_executor,
    onnxruntime_session,
    pipeline,
    randomness,
    sampler,
)
"""The modules whose text decides what is measured."""


@dataclass(frozen=True)
class PrecisionWriter:
    """Writes the graphs of one bundle in another precision.

    Attributes:
        exact: a folder with the FP32 ONNX files.
        scratch: a folder for trials, removed again.
        manifest, schedule: of the bundle in the making.
        kept_layers: of quantized graphs, the layers to leave in higher precision; those of other
            graphs are chosen.
    """

    exact: Path
    scratch: Path
    manifest: Manifest
    schedule: Schedule
    kept_layers: KeptLayers = field(default_factory=lambda: KeptLayers({}))

    def write(self, out: Path, report: Report) -> CalibrationRecord:
        """Writes the graphs to `out`; returns what was measured and decided, for the manifest.

        Raises:
            UserError: if the precision cannot hold the model.
        """
        precision, backend = PRECISIONS[self.manifest.precision], self.manifest.backend
        float_type, quantization = precision.float_type(backend), precision.quantization
        weights_alone = quantization is not None and not precision.rounds_activations
        check_kept_layers(self.kept_layers.of, self.exact, precision)
        self.scratch.mkdir()
        calibration = calibrate(self.exact, self.scratch, self.manifest, self.schedule, report)
        if float_type != FLOAT32:
            check_ranges(calibration.ranges, float_type)
        spans = spans_for(backend, calibration)
        quantized: dict[str, tuple[dict[str, float], Quantization | None]] = {}
        rounder = WeightRounder({})
        weights: dict[str, Quantization] = {}
        decided: CalibrationRecord = {"largest_values": largest_values(calibration)}
        if quantization:
            report(f"measuring which layers {precision.name} must leave out")
            chooser = Chooser(self.exact, self.scratch, self.manifest, self.schedule, spans)
            decided["quantization"] = {}
            if weights_alone:
                calibrator = Calibrator(self.exact, self.scratch, self.manifest, self.schedule)
                rounder = WeightRounder(calibrator.moments())
                weights, decision = choose_weights(
                    chooser,
                    precision,
                    rounder,
                    self.kept_layers.of.get("decode"),
                    report,
                    self.kept_layers.exact,
                )
                decided["quantization"]["decode"] = dataclasses.asdict(decision)  # type: ignore[assignment]
            for graph, layers in calibration.layers.items():
                if (kept := self.kept_layers.of.get(graph)) is not None:
                    exact = self.kept_layers.exact
                    chosen = chooser.keep(graph, layers, kept, exact, report)
                else:
                    chosen = chooser.choose(graph, layers, report)
                ranges, decision = chosen
                quantized[graph] = ranges, quantization.kept if decision.kept_as else None
                decided["quantization"][graph] = dataclasses.asdict(decision)  # type: ignore[assignment]
        shutil.rmtree(self.scratch)
        report(f"writing {precision.name} weights")
        models = {graph: ir.load(self.exact / f"{graph}.onnx") for graph in GRAPH_NAMES}
        for graph, model in models.items():
            lower(model, float_type)
            unsigned = BACKENDS[backend].unsigned
            if graph in quantized:
                ranges, kept_as = quantized[graph]
                quantize_graph(model, graph, precision, ranges, spans, unsigned, kept_as)
        if weights:
            quantize_weights(models["decode"], weights, rounder)
        if quantization:
            store_embedding(models["decode"], BACKENDS[backend])
        out.mkdir()
        export.write_models(models, out)
        return decided


def calibrate(
    exact: Path,
    scratch: Path,
    manifest: Manifest,
    schedule: Schedule,
    report: Report,
) -> Calibration:
    """Measures FP32 graphs at work, and equalizes the channels of the decode graph in place.

    What was measured of these very graphs before is taken instead. For quantized precisions all
    channels are equalized, for others those of a normalization that the float type could not hold.

    Args:
        exact: a folder with the FP32 ONNX files.
        scratch: an empty folder for instrumented copies.
        manifest, schedule: of the bundle.
        report: called with a line at the start of each stage.

    Returns:
        What was measured, of the graphs as they are now.
    """
    precision = PRECISIONS[manifest.precision]
    kinds = kinds_of_levels(precision)
    # Where weights alone are stored as levels, a CPU's kernels round activations to INT8 as well.
    equalized_for = precision.quantization and kinds.get("decode", INT8)
    key = _content_key(exact, manifest, schedule, (equalized_for, kinds))
    known = cache_folder() / f"calibration-{key}.json"
    kept = _read_calibration(known, report)
    calibrator = Calibrator(exact, scratch, manifest, schedule)
    if kept is None:
        report("measuring the range of every value at work")
    measured = kept or calibrator.survey(equalized_for)
    decode = ir.load(exact / "decode.onnx")
    limit = precision.float_type(manifest.backend).largest / HEADROOM
    scales = measured.scales or range_scales(decode, measured.channels, limit)
    ranges = equalized_ranges(decode, measured.ranges["decode"], measured.channels, scales)
    equalized = dataclasses.replace(measured, ranges=measured.ranges | {"decode": ranges})
    if scales:
        report(f"equalizing the channels of {len(scales)} normalizations")
        equalize_graphs(exact, scales)
    if kept is not None:
        return equalized
    if kinds:
        report("measuring the noise of every quantized layer")
        layers, spans = calibrator.layers(equalized.ranges, kinds)
        equalized = dataclasses.replace(equalized, layers=layers, spans=spans)
    try:
        known.parent.mkdir(parents=True, exist_ok=True)
        as_measured = dataclasses.replace(equalized, ranges=measured.ranges)
        write_atomically(known, as_measured.to_json().encode())
    except (OSError, UserError) as error:
        report(f"what was measured is not kept for the next build: {error}")
    return equalized


def kinds_of_levels(precision: Precision) -> dict[str, Quantization]:
    """For each graph whose products are computed on levels, of which kind."""
    kinds = {graph: precision.quantization_of(graph) for graph in GRAPH_NAMES}
    return {graph: kind for graph, kind in kinds.items() if kind and kind.activations}


def _read_calibration(file: Path, report: Report) -> Calibration | None:
    """What an earlier build measured, if it is there and whole."""
    if not file.is_file():
        return None
    try:
        calibration = Calibration.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        report(f"{file} is damaged: measuring again")
        return None
    report(f"taking measured ranges from {file}")
    return calibration


def spans_for(backend: str, calibration: Calibration) -> Mapping[str, Spans]:
    """For each graph, of what convolutions read and give; none where only what they read counts."""
    return calibration.spans if BACKENDS[backend].unsigned else {}


def _content_key(exact: Path, manifest: Manifest, schedule: Schedule, wanted: object) -> str:
    """What the measurements depend on; `wanted` says what is measured."""
    parts = [
        __version__,
        onnxruntime.__version__,
        *(sha256(Path(str(module.__file__))) for module in MEASURING),
        (SEED, BATCH, CLIPPING),
        repr(wanted),
        calibration_images(manifest.resolution),
        manifest.cfg,
        manifest.guidance,
        hashlib.sha256(schedule.orders.tobytes()).hexdigest(),
        schedule.group_sizes.tolist(),
        *(sha256(exact / f"{graph}.onnx") for graph in GRAPH_NAMES),
        sha256(exact / export.WEIGHTS_FILE),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class KeptLayers:
    """The layers of some graphs that are left in higher precision.

    Attributes:
        of: the nodes of each graph.
        exact: whether their weights stay as they are, even if fewer bits would do.
    """

    of: Mapping[str, Sequence[str]]
    exact: bool = False


EXACT = "exact"
"""Of a file of layers to keep, beside the graphs' names."""


def read_kept_layers(path: Path) -> KeptLayers:
    """The file of `--keep-layers`: a JSON object with a list of layers for each graph.

    Raises:
        UserError: if it is not such a file.
    """
    try:
        kept = json.loads(read_file(path, "--keep-layers", 2**24))
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read --keep-layers {path}: it is not JSON") from error
    exact = kept.pop(EXACT, False) if isinstance(kept, dict) else False
    if (
        not isinstance(kept, dict)
        or not isinstance(exact, bool)
        or not set(kept) <= set(GRAPH_NAMES)
        or not all(
            isinstance(layers, list) and all(isinstance(layer, str) for layer in layers)
            for layers in kept.values()
        )
    ):
        raise UserError(
            f"--keep-layers {path} must be a JSON object with a list of layers for some of "
            f"{', '.join(GRAPH_NAMES)}, as `lpd-export verify --bisect` writes it"
        )
    return KeptLayers(kept, exact)


def check_kept_layers(kept: Mapping[str, Sequence[str]], exact: Path, precision: Precision) -> None:
    """Raises UserError for a layer to keep that the graph has not, or that is kept anyway.

    exact: a folder with the FP32 ONNX files.
    """
    for graph, names in kept.items():
        if names and not precision.quantization_of(graph):
            raise UserError(
                f"--keep-layers names {names[0]!r} of {graph}.onnx, of which {precision.name} "
                "quantizes no layer: leave them out"
            )
        layers = [layer.node for layer in quantizable_layers(ir.load(exact / f"{graph}.onnx"))]
        for name in names:
            if name not in layers:
                known = ", ".join(layers[:3])
                raise UserError(
                    f"--keep-layers names {name!r}, which is no layer of {graph}.onnx; there are "
                    f"{known}, and so on"
                )


def largest_values(calibration: Calibration) -> dict[str, Any]:
    """The value of each graph that comes nearest to overflow, with its magnitude."""
    worst = {
        graph: max(values.items(), key=lambda entry: entry[1])
        for graph, values in calibration.ranges.items()
    }
    return {graph: {"value": name, "magnitude": m} for graph, (name, m) in worst.items()}
