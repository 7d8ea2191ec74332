"""What a verification compares: opens the bundle, and what it is compared with.

Knows where the reference's weights come from, and what can run a bundle here. Does not know how
anything is compared.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import torch

from lpd_export.accuracy.implementations import BundleImplementation, Implementation, Reference
from lpd_export.bundle.manifest import GRAPH_NAMES, Bundle, Manifest, Origin
from lpd_export.errors import UserError
from lpd_export.files import sha256
from lpd_export.formats import BACKENDS
from lpd_export.precision.portable import portable_files
from lpd_export.progress import Report
from lpd_export.runtime.backends import open_executor
from lpd_export.runtime.executor import Executor
from lpd_export.runtime.onnxruntime_executor import OnnxRuntimeExecutor
from lpd_export.runtime.pipeline import Pipeline
from lpd_reference.checkpoint import CheckpointError, load_lpd, load_tokenizer, locate
from lpd_reference.lpd import LPD, LPDConfig
from lpd_reference.vq import VQConfig, VQTokenizer

REFERENCE = "reference"
"""What a bundle is compared with unless another bundle is named."""


@dataclasses.dataclass(frozen=True)
class SidesRequest:
    """What is to be compared, and how it is run."""

    bundle: Path
    against: str = REFERENCE
    """`reference`, or the folder of another bundle."""
    checkpoint: str | None = None
    tokenizer: str | None = None
    """Instead of the files that the bundle was made from."""
    device: str | None = None
    threads: int | None = None
    onnx: bool = False
    """Run the ONNX graphs on the CPU, whatever the bundle's backend."""


class Sides(NamedTuple):
    """Both implementations, and what must be said of them."""

    expected: Implementation
    actual: BundleImplementation
    precisions: tuple[str, ...]
    """Of the bundles; the reference is FP32."""
    ran: str
    """In words: what runs the bundle's graphs."""
    remarks: list[str]


def open_sides(request: SidesRequest, bundle: Bundle, scratch: Path, report: Report) -> Sides:
    """Both sides, loaded.

    Args:
        request: what to compare.
        bundle: of the request, opened.
        scratch: a folder for graphs that are changed so that the CPU can run them.
        report: called with a line at the start of each stage.

    Raises:
        UserError: if one cannot be had here, or they are different models.
    """
    remarks: list[str] = []
    actual, ran = open_bundle(bundle, request, scratch / "actual", report)
    if request.against == REFERENCE:
        reference = open_reference(request, bundle.manifest, remarks, report)
        return Sides(reference, actual, (bundle.manifest.precision,), ran, remarks)
    other = Bundle.open(request.against)
    check_same_model(bundle, other)
    expected, _ = open_bundle(other, request, scratch / "expected", report)
    precisions = bundle.manifest.precision, other.manifest.precision
    return Sides(expected, actual, precisions, ran, remarks)


def check_same_model(bundle: Bundle, other: Bundle) -> None:
    """Raises UserError unless two bundles are of one architecture."""
    for what in ("model", "tokenizer"):
        ours, theirs = (
            dataclasses.asdict(getattr(each.manifest, what)) for each in (bundle, other)
        )
        different = [
            f"{key} {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key]
        ]
        if different:
            raise UserError(
                f"{bundle.path} and {other.path} are different models: {what} with "
                f"{', '.join(different)}"
            )


def open_bundle(
    bundle: Bundle, request: SidesRequest, scratch: Path, report: Report
) -> tuple[BundleImplementation, str]:
    """A bundle, and in words what runs it.

    Raises:
        UserError: if nothing here can.
    """
    manifest = bundle.manifest
    report(f"loading {bundle.path}")
    schedule = bundle.schedule()
    executor: Executor
    if request.onnx:
        files, note = portable_files(bundle, scratch)
        float_type = torch.float16 if manifest.float_type == "float16" else torch.float32
        executor = OnnxRuntimeExecutor(files, float_type, "cpu", request.threads)
        ran = f"its ONNX graphs on ONNX Runtime {onnxruntime.__version__}, cpu{note}"
    else:
        if BACKENDS[manifest.backend].compiles and not torch.cuda.is_available():
            raise UserError(
                f"{bundle.path} holds {manifest.backend} engines and there is no GPU to run them: "
                "verify it on its GPU, or with --onnx the graphs that they were compiled from"
            )
        executor = open_executor(bundle, request.device, request.threads)
        backend = BACKENDS[manifest.backend]
        version = importlib.import_module(backend.module).__version__
        ran = f"{backend.product} {version}, {executor.device.type}"
    for graph in GRAPH_NAMES:
        executor.load(graph)
    return BundleImplementation(str(bundle.path), Pipeline(manifest, schedule, executor)), ran


# -------------------------------------------------------------------------------- the reference


def open_reference(
    request: SidesRequest, manifest: Manifest, remarks: list[str], report: Report
) -> Reference:
    """The reference with the weights that a bundle was made from, or with those of the request.

    Raises:
        UserError: if the files are not there, damaged, or of another architecture.
    """
    report("loading the reference")
    seed = manifest.made["random_weights_seed"]
    config, vq_config = architecture(manifest)
    if seed is not None and not (request.checkpoint or request.tokenizer):
        model, vq = LPD(config).initialize(seed), VQTokenizer(vq_config).initialize(seed)
        return Reference(model.requires_grad_(False).eval(), vq.requires_grad_(False).eval())
    checkpoint = find_weights(
        "--checkpoint", request.checkpoint, manifest.made["checkpoint"], remarks
    )
    tokenizer = find_weights("--tokenizer", request.tokenizer, manifest.made["tokenizer"], remarks)
    try:
        model = load_lpd(checkpoint, grid=config.grid, heads=config.heads)
        vq = load_tokenizer(tokenizer)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    for file, ours, theirs in (
        (checkpoint, config, model.config),
        (tokenizer, vq_config, vq.config),
    ):
        check_architecture(file, dataclasses.asdict(ours), dataclasses.asdict(theirs))
    return Reference(model, vq)


def architecture(manifest: Manifest) -> tuple[LPDConfig, VQConfig]:
    """The architectures that a bundle was made from."""
    model, tokenizer = dataclasses.asdict(manifest.model), dataclasses.asdict(manifest.tokenizer)
    fields = {field.name for field in dataclasses.fields(LPDConfig)}
    config = LPDConfig(**{key: value for key, value in model.items() if key in fields})
    fields = {field.name for field in dataclasses.fields(VQConfig)}
    tokenizer["channel_multipliers"] = tuple(tokenizer["channel_multipliers"])
    return config, VQConfig(**{key: value for key, value in tokenizer.items() if key in fields})


def check_architecture(file: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raises UserError unless a file's architecture is the bundle's."""
    for key, value in ours.items():
        if theirs[key] != value:
            raise UserError(
                f"{file} is another model than the bundle's: its {key} is {theirs[key]}, the "
                f"bundle's {value}"
            )


def find_weights(option: str, given: str | None, made: Origin | None, remarks: list[str]) -> Path:
    """The file of weights that the user names, or else that the bundle was made from.

    Raises:
        UserError: if there is none.
    """
    source = given or (made["source"] if made else None)
    if source is None:
        raise UserError(f"the bundle has random weights of a seed: {option} must be given as well")
    try:
        file = locate(source)
    except CheckpointError as error:
        hint = "" if given else f"; it is what the bundle was made from: say with {option} where"
        raise UserError(f"{error}{hint}") from error
    if made is None or sha256(file) != made["sha256"]:
        remarks.append(f"{file} is not the file that the bundle was made from: its content differs")
    return file
