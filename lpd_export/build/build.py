"""From a request to a bundle: exports, sets the precision, compiles, compares, writes.

Knows the order of the work. What a request means is in `settings`; the graphs, the ONNX files and
the bundle's format are each somebody else's.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import platform
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import onnx
import onnxruntime
import torch

import lpd_export
from lpd_export.build.check import compare_with_reference, reference_check
from lpd_export.build.compiler import EngineOptions
from lpd_export.build.engine import compile_graph
from lpd_export.build.memory import memory_shortage_told
from lpd_export.build.profiles import decode_profiles, tokenizer_profiles
from lpd_export.build.refusals import capabilities, check_request
from lpd_export.build.request import BuildRequest
from lpd_export.build.settings import (
    Settings,
    Source,
    check_room,
    load,
    settle,
    weight_sources,
)
from lpd_export.bundle.manifest import (
    FORMAT_VERSION,
    GRAPH_NAMES,
    MANIFEST,
    SCHEDULE,
    EngineRecord,
    Made,
    Manifest,
    ModelDescription,
    Origin,
    TokenizerDescription,
    describe_files,
    new_bundle,
)
from lpd_export.files import cache_folder, sha256
from lpd_export.formats import BACKENDS, PRECISIONS, Backend
from lpd_export.graphs import contract, export
from lpd_export.graphs.written_rows import cut_to_written_rows
from lpd_export.precision.writer import KeptLayers, PrecisionWriter, read_kept_layers
from lpd_export.progress import Progress, Report
from lpd_reference.checkpoint import lasting_source


def build(
    request: BuildRequest,
    report: Report = lambda stage: None,
    progress: Progress = lambda stage, step, steps: None,
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
    request = request.model_copy(update={"compute_capability": capabilities(request)})
    file = request.keep_layers
    kept_layers = read_kept_layers(Path(file)) if file else KeptLayers({})
    with memory_shortage_told():
        source = load(request, report)
        settings = settle(request, source)
    check_room(request, settings.out, source)
    # Inside: to the folder, the system's lack of memory would be a disk's that is full.
    with new_bundle(settings.out, replace=request.force) as folder, memory_shortage_told():
        check = reference_check(source, settings)
        manifest = describe(request, source, settings)
        settings.schedule.save(folder / SCHEDULE)
        onnx_folder, exact = folder / "onnx", folder / "exact"
        write_exact_graphs(exact, source, BACKENDS[request.backend], report)
        # Weights twice in memory are enough: the reference goes before the graphs are loaded.
        del source
        gc.collect()
        if PRECISIONS[request.precision].exact:
            exact.rename(onnx_folder)
        else:
            writer = PrecisionWriter(
                exact, folder / "scratch", manifest, settings.schedule, kept_layers
            )
            decided = writer.write(onnx_folder, report)
            manifest = dataclasses.replace(manifest, calibration=decided)
            shutil.rmtree(exact)
        write_phases(onnx_folder, settings, report)
        compare_with_reference(onnx_folder, manifest, settings, check, report)
        if BACKENDS[request.backend].compiles:
            engines = compile_engines(folder, request, settings, report, progress)
            version = engines["decode"]["backend_version"]
            manifest = dataclasses.replace(manifest, engines=engines, backend_version=version)
        report("taking checksums")
        manifest = dataclasses.replace(manifest, files=describe_files(folder))
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return settings.out


# ------------------------------------------------------------------------------- the graphs


def write_exact_graphs(folder: Path, source: Source, backend: Backend, report: Report) -> None:
    """Writes the graphs in FP32, as a backend takes them."""
    grid = source.model.config.grid
    folder.mkdir()
    report("exporting decode.onnx")
    models = {"decode": export.export_decode(source.model, backend.fuses_attention)}
    if not backend.fuses_attention:
        cut_to_written_rows(models["decode"])
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
    progress: Progress,
) -> dict[str, EngineRecord]:
    """Compiles every graph to `engines/`, with the builder's logs; returns what they became."""
    fields = [field.name for field in dataclasses.fields(EngineOptions)]
    options = EngineOptions(**{name: getattr(request, name) for name in fields})
    engines: dict[str, EngineRecord] = {}
    (folder / "engines").mkdir()
    assert settings.max_batch is not None
    for graph in GRAPH_NAMES:
        report(f"compiling {graph} for {request.backend}")
        profiles = (
            decode_profiles(settings.phases, settings.max_batch)
            if graph == "decode"
            else tokenizer_profiles(settings.max_batch)
        )
        path, log = folder / "onnx" / f"{graph}.onnx", engine_log(settings, graph)
        engine = folder / "engines" / f"{graph}.engine"
        compiled = compile_graph(path, graph, profiles, options, engine, log, progress)
        shutil.move(log, engine.with_suffix(".log"))
        for note in compiled.notes:
            report(note)
        engines[graph] = {
            **dataclasses.asdict(compiled),  # type: ignore[typeddict-item]
            "tensors": {
                name: f"[{', '.join(map(str, shape))}]"
                for name, shape in export.load_shapes(path).items()
                if not (contract.is_past(name) or contract.is_present(name))
            },
            "optimization_profiles": [
                {axis: dataclasses.astuple(ends) for axis, ends in profile.items()}
                for profile in profiles
            ],
        }
    return engines


def engine_log(settings: Settings, graph: str) -> Path:
    """Where the builder's log is written: outside the bundle, of which a failure leaves nothing."""
    place = hashlib.sha256(str(settings.out.absolute()).encode()).hexdigest()[:8]
    log = cache_folder() / "logs" / f"{settings.name}-{place}-{graph}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    return log


# ----------------------------------------------------------------------------- the manifest

Description = TypeVar("Description", ModelDescription, TokenizerDescription)


def described(description: type[Description], config: object) -> Description:
    """What a manifest says of an architecture: its fields, as the reference's configuration has."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(description):
        value = getattr(config, field.name)
        values[field.name] = list(value) if isinstance(value, tuple) else value  # as JSON has it
    return description(**values)


def describe(request: BuildRequest, source: Source, settings: Settings) -> Manifest:
    """The manifest, all but the files."""
    config, vq = source.model.config, source.tokenizer.config
    return Manifest(
        format_version=FORMAT_VERSION,
        name=settings.name,
        model=described(ModelDescription, config),
        tokenizer=described(TokenizerDescription, vq),
        resolution=source.resolution,
        precision=request.precision,
        float_type=PRECISIONS[request.precision].float_type(request.backend).torch,
        backend=request.backend,
        backend_version=onnxruntime.__version__,  # of engines it is known when they are compiled
        target_compute_capabilities=list(request.compute_capability),
        max_batch=settings.max_batch,
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


def describe_making(request: BuildRequest, source: Source) -> Made:
    """Where the weights came from and what the bundle was made with."""

    def origin(name: str, file: Path | None) -> Origin | None:
        return {"source": lasting_source(name, file), "sha256": sha256(file)} if file else None

    checkpoint, tokenizer = ("", "") if request.random_weights else weight_sources(request)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": origin(checkpoint, source.checkpoint),
        "tokenizer": origin(tokenizer, source.tokenizer_file),
        "random_weights_seed": request.seed if request.random_weights else None,
        "versions": {
            "lpd-export": lpd_export.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }
