"""Where an error comes from: the output of every layer of a graph beside the reference's.

Layers go by the names of the exported modules, as they stand in the ONNX files: `blocks.3.fc1`.
Intermediate values are marked as outputs of a copy of the graph, which ONNX Runtime's CPU runs,
whatever the bundle's backend: marking a TensorRT engine's values would change how it is compiled.
Does not know limits: what is too much is judged elsewhere.
"""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from polygraphy.backend.onnxrt import OnnxrtRunner
from torch import Tensor, nn

from lpd_export.accuracy.comparison import quiet, relative_error
from lpd_export.accuracy.context import Context
from lpd_export.accuracy.phases import phase_runs
from lpd_export.accuracy.reference_side import Reference
from lpd_export.accuracy.results import LayerError, Measurement
from lpd_export.accuracy.sides import Task
from lpd_export.formats import PRECISIONS
from lpd_export.graphs import export
from lpd_export.precision.portable import portable_files
from lpd_export.schedule.phases import Phase
from lpd_reference.lpd import LPD, Block
from lpd_reference.vq import AttentionBlock, ResidualBlock, VQTokenizer

Arrays = Mapping[str, NDArray[Any]]
Captures = OrderedDict[str, Tensor]

# -------------------------------------------------------------------------------- the reference


def capture_transformer(model: LPD, captured: Captures, stack: ExitStack) -> None:
    """Lets the next pass of a transformer fill `captured` with the output of each layer."""

    def after(module: nn.Module, *names: str) -> None:
        stack.callback(module.register_forward_hook(partial(_keep, captured, names)).remove)

    after(model.z_proj_ln, "z_proj_ln")
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        stem = f"blocks.{i}"
        after(block.norm1, f"{stem}.norm1")
        after(block.attn.qkv, *(f"{stem}.{part}" for part in ("query", "key", "value")))
        before = partial(_keep_input, captured, f"{stem}.attention")
        stack.callback(block.attn.proj.register_forward_pre_hook(before).remove)
        after(block.attn.proj, f"{stem}.proj")
        after(block.norm2, f"{stem}.norm2")
        after(block.mlp.fc1, f"{stem}.fc1")
        after(block.mlp.fc2, f"{stem}.fc2")
        after(block, stem)
    after(model.norm, "norm")
    after(model.head, "head")


def capture_tokenizer(tokenizer: VQTokenizer, captured: Captures, stack: ExitStack) -> None:
    """Lets the next pass of a tokenizer fill `captured` with the output of each layer."""
    layers = (nn.Conv2d, nn.GroupNorm, ResidualBlock, AttentionBlock)
    for name, module in tokenizer.named_modules():
        if isinstance(module, layers):
            hook = partial(_keep, captured, (name,))
            stack.callback(module.register_forward_hook(hook).remove)


def _keep(
    captured: Captures, names: tuple[str, ...], module: nn.Module, inputs: object, output: Tensor
) -> None:
    for name, part in zip(names, output.chunk(len(names), dim=-1), strict=True):
        captured[name] = part


def _keep_input(
    captured: Captures, name: str, module: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    captured[name] = inputs[0]


# ------------------------------------------------------------------------------------ the graph


def layer_values(graph: ir.Graph, layers: Iterable[str]) -> dict[str, ir.Value]:
    """The value that each layer of a graph computes, by the layer's name.

    It is the output of the last node of the module, or for `blocks.i.attention`, which is no
    module, what `blocks.i.proj` multiplies with its weight.
    """
    last: dict[str, ir.Value] = {}
    products: dict[str, ir.Value] = {}
    for node in graph:
        module = (node.name or "").partition("/")[0]
        last[module] = node.outputs[0]
        if node.op_type == "MatMul" and node.inputs[0] is not None:
            products[module] = node.inputs[0]
    found = {}
    for layer in layers:
        stem, _, part = layer.rpartition(".")
        if part == "attention" and f"{stem}.proj" in products:
            found[layer] = products[f"{stem}.proj"]
        elif layer in last:
            found[layer] = last[layer]
    return found


def nearest_layers(values: Mapping[str, ir.Value]) -> dict[str, list[str]]:
    """For each layer, the layers that feed it with no other in between."""
    names = {value.name: layer for layer, value in values.items()}
    feeding: dict[str, list[str]] = {}
    for layer, value in values.items():
        producer = value.producer()
        found: dict[str, None] = {}
        seen = set()
        waiting = list(producer.inputs) if producer else []
        while waiting:
            source = waiting.pop()
            if source is None or source.name in seen:
                continue
            seen.add(source.name)
            if source.name in names:
                found[names[source.name]] = None
            elif source.producer() is not None:
                waiting.extend(source.producer().inputs)  # type: ignore[union-attr]
        feeding[layer] = list(found)
    return feeding


class MarkedGraph:
    """A graph whose layers are outputs.

    Args:
        file: the ONNX file, one that ONNX Runtime's CPU can run.
        layers: names of the layers wanted; those that the graph has not are left out.
        folder: an empty folder for the marked copy and its weights.
    """

    def __init__(self, file: Path, layers: Iterable[str], folder: Path) -> None:
        model = ir.load(file)
        values = layer_values(model.graph, layers)
        self.feeding = nearest_layers(values)
        self._outputs = {layer: str(value.name) for layer, value in values.items()}
        known = {value.name for value in model.graph.outputs}
        for value in values.values():
            if value.name not in known:
                known.add(value.name)
                model.graph.outputs.append(value)
        export.write_models({file.stem: model}, folder)
        self._file = folder / file.name

    def run(self, feed: Arrays) -> dict[str, NDArray[Any]]:
        """The output of each layer, in FP32, for the inputs of the graph."""

        def session() -> onnxruntime.InferenceSession:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            return onnxruntime.InferenceSession(
                self._file, options, providers=["CPUExecutionProvider"]
            )

        with quiet(), OnnxrtRunner(session) as runner:
            outputs = runner.infer(dict(feed))
        return {layer: outputs[name].astype(np.float32) for layer, name in self._outputs.items()}


# ------------------------------------------------------------------------------- the comparison


def compare_layers(
    graph: str,
    file: Path,
    feed: Arrays,
    reference: Reference,
    run_reference: Callable[[], object],
    precision: str,
    folder: Path,
) -> list[LayerError]:
    """The error of every layer of a graph, in the order of computation.

    Args:
        graph: decode, detokenize or tokenize.
        file: its ONNX file, one that ONNX Runtime's CPU can run.
        feed: its inputs, in the graph's types.
        reference: the exact model.
        run_reference: runs it on the same inputs.
        precision: of the bundle, which says what error is no news.
        folder: for a copy of the graph; made, and to be removed with the rest.
    """
    captured: Captures = OrderedDict()
    with ExitStack() as stack:
        if graph == "decode":
            capture_transformer(reference.model, captured, stack)
        else:
            capture_tokenizer(reference.tokenizer, captured, stack)
        run_reference()
    if graph == "decode" and not PRECISIONS[precision].exact:
        # Balanced channels (`precision.equalization`) are the reference's times a factor.
        for layer in [name for name in captured if "norm" in name]:
            del captured[layer]
    folder.mkdir(parents=True)
    marked = MarkedGraph(file, captured, folder)
    outputs = marked.run(feed)
    errors: dict[str, float] = {}
    found = []
    for layer, exact in captured.items():
        if layer not in outputs:
            continue
        expected, actual = exact.numpy(), outputs[layer]
        if graph == "decode":
            # Of the last block there are the queries alone, which come last.
            expected = expected[:, -actual.shape[1] :]
        actual = actual.reshape(expected.shape)
        errors[layer] = relative_error(expected, actual)
        before = max((errors.get(name, 0.0) for name in marked.feeding[layer]), default=0.0)
        found.append(
            LayerError(
                graph=graph,
                layer=layer,
                relative_error=errors[layer],
                largest_error=float(np.abs(expected - actual).max()),
                growth=errors[layer] / max(before, PRECISIONS[precision].roundoff),
            )
        )
    return found


# ---------------------------------------------------------------------------- in a verification


def phase_to_look_at(task: Task, measurements: list[Measurement]) -> Phase:
    """The decode phase that fails first, or else the one with the largest error of its logits."""
    by_name = {phase.name: phase for phase in task.phases}
    ours = [entry for entry in measurements if entry.phase in by_name]
    failed = [entry for entry in ours if not entry.passed]
    errors = [entry for entry in ours if entry.metric == "logits_error"]
    return by_name[(failed or [max(errors, key=lambda entry: entry.value)])[0].phase]


def find_layer_errors(context: Context, phase: Phase) -> list[LayerError]:
    """The error of every layer, of the decode graph in one phase, for the first image.

    Of a graph that fails when it is run there are none.
    """
    reference, scratch = context.expected, context.scratch
    assert isinstance(reference, Reference)
    files, _ = portable_files(context.bundle, scratch / "portable")
    failing = {name for names in context.actual.faults.values() for name in names}
    work: dict[str, tuple[str, Callable[[Arrays], object]]] = {
        phase.name: ("decode", partial(reference.decode, context.task, phase)),
        "detokenize": ("detokenize", reference.detokenize),
        "tokenize": ("tokenize", reference.tokenize),
    }
    errors = []
    for run in phase_runs(context, 0):
        if run.name not in work or run.name in failing:
            continue
        # The same inputs for both, so that only what the graph computes differs.
        feed = {
            k: v.astype(np.float32) if v.dtype == np.float16 else v for k, v in run.feed.items()
        }
        graph, run_reference = work[run.name]
        context.report(f"comparing the layers of {graph}")
        folder = scratch / f"layers-{graph}"
        errors += compare_layers(
            graph,
            files[graph],
            run.feed,
            reference,
            partial(run_reference, feed),
            context.bundle.manifest.precision,
            folder,
        )
        shutil.rmtree(folder)
    return errors
