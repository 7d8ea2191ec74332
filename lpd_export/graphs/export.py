"""Writes the modules of `graphs` as ONNX files that share one file of weights.

Knows ONNX: opset, names, dynamic axes, external data, and how a dynamic graph becomes a static
one. Does not know what the graphs compute, nor any backend.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript.onnx_opset import opset24
from torch import nn
from torch.export import Dim

from lpd_export.graphs import contract
from lpd_export.graphs.modules import Decode, Detokenize, Tokenize
from lpd_export.graphs.static import EMBEDDED_BYTES, make_static
from lpd_export.graphs.written_rows import fix_written_rows
from lpd_export.schedule.phases import Phase
from lpd_reference.lpd import LPD
from lpd_reference.vq import VQTokenizer

OPSET = 24
WEIGHTS_FILE = "weights.data"
ALIGNMENT = 4096
"""Of each tensor in the weights file, so that it can be mapped page by page."""
OF_BLOCK = r"^(blocks\.|(?:past|present)_(?:key|value)_){}\b"
"""Names of a block's nodes, weights and caches."""


def _tensor_scatter_to_onnx(cache: Any, update: Any, write_index: Any) -> Any:
    axis = len(cache.shape) - 2
    return opset24.TensorScatter(cache, update, write_index, axis=axis, mode="linear")


def _attention_to_onnx(query: Any, key: Any, value: Any, mask: Any, heads: int) -> Any:
    mixed, *_ = opset24.Attention(query, key, value, mask, q_num_heads=heads, kv_num_heads=heads)
    return mixed


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.lpd_export.tensor_scatter.default: _tensor_scatter_to_onnx,
    torch.ops.lpd_export.attention.default: _attention_to_onnx,
}


def export_decode(model: LPD, fused_attention: bool = True) -> ir.Model:
    """`decode.onnx`: the transformer of all phases (see `graphs.Decode`).

    The first two blocks and the last are traced, and the second repeated for all others: a block
    takes half a second.

    fused_attention: as `graphs.Decode` takes it.
    """
    config = model.config
    module = Decode(model, fused_attention)
    depth = min(config.depth, 3)
    weights = module.blocks.state_dict(prefix="blocks.")
    module.blocks = nn.ModuleList([*module.blocks[: depth - 1], module.blocks[-1]])
    # Small, but distinct from one another and from 1: the exporter would take those for constants.
    rows, context, tokens = 2, 3, 5
    of_row = contract.cache_shape(config.heads, config.cells, config.head_dim, fused_attention)
    shape = (rows, *of_row)
    caches = [torch.zeros(shape) for _ in range(2 * depth)]
    args = (
        torch.zeros(rows, context, dtype=torch.int64),
        torch.zeros(rows, tokens, dtype=torch.int64),
        torch.zeros(tokens, config.cells + 1),
        torch.zeros(rows, dtype=torch.int64),
        caches[:depth],
        caches[depth:],
    )
    row, column, token = map(Dim, (contract.ROWS, contract.CONTEXT_TOKENS, contract.TOKENS))
    cache_axes = [{0: row}] * depth
    exported = _export(
        module,
        args,
        dynamic_shapes=(
            {0: row, 1: column},
            {0: row, 1: token},
            {0: token},
            {0: row},
            cache_axes,
            cache_axes,
        ),
        input_names=[
            *contract.STEP_INPUTS,
            *contract.cache_names(contract.PAST, depth),
        ],
        output_names=[contract.LOGITS, *contract.cache_names(contract.PRESENT, depth)],
    )
    _repeat_block(exported.graph, weights, config.depth)
    return exported


def _repeat_block(graph: ir.Graph, weights: Mapping[str, torch.Tensor], depth: int) -> None:
    """Repeats the second of three blocks until there are `depth`, with weights by name."""
    if depth <= 3:
        return
    _rename_block(graph, 2, depth - 1)
    block = [node for node in graph if str(node.name).startswith(("blocks.1.", "blocks.1/"))]
    residual, end = block[0].inputs[0], block[-1].outputs[0]
    after = list(end.uses())
    values = {str(value.name): value for value in (*graph.inputs, *graph.outputs)}
    last = block[-1]
    for layer in range(2, depth - 1):
        renamed = partial(re.sub, OF_BLOCK.format(1), rf"\g<1>{layer}")
        copies: dict[ir.Value | None, ir.Value] = {residual: last.outputs[0]}
        for node in block:
            for value in (*node.inputs, *node.outputs):
                name = renamed(str(value.name)) if value else ""
                if value is None or value in copies or name == value.name:
                    continue  # of all blocks
                copy = ir.Value(name=name, type=value.type, shape=value.shape)
                copies[value] = values[name] = copy
                if value.is_initializer():
                    copy.const_value = ir.tensor(weights[name], name=name)
                    graph.register_initializer(copy)
            repeated = ir.Node(
                node.domain,
                node.op_type,
                [copies.get(value, value) for value in node.inputs],
                node.attributes.values(),
                outputs=[copies[value] for value in node.outputs],
                name=renamed(str(node.name)),
            )
            graph.insert_after(last, repeated)
            last = repeated
    for node, index in after:
        node.replace_input_with(index, last.outputs[0])
    for ends, names in (
        (graph.inputs, [*contract.STEP_INPUTS, *contract.cache_names(contract.PAST, depth)]),
        (graph.outputs, [contract.LOGITS, *contract.cache_names(contract.PRESENT, depth)]),
    ):
        ends.clear()
        ends.extend(values[name] for name in names)


def _rename_block(graph: ir.Graph, layer: int, new: int) -> None:
    """Renames all that is of a block."""
    renamed = partial(re.sub, OF_BLOCK.format(layer), rf"\g<1>{new}")
    values = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
    for node in graph:
        node.name = renamed(str(node.name))
        values.update(node.outputs)
    for value in values:
        value.name = renamed(str(value.name))


def export_detokenize(tokenizer: VQTokenizer, grid: int) -> ir.Model:
    """`detokenize.onnx`: indices [B, S] int64 to image [B, 3, height, width]."""
    indices = torch.zeros(2, grid * grid, dtype=torch.int64)
    return _export(
        Detokenize(tokenizer, grid),
        (indices,),
        ({0: Dim(contract.BATCH)},),
        [contract.INDICES],
        [contract.IMAGE],
    )


def export_tokenize(tokenizer: VQTokenizer, grid: int) -> ir.Model:
    """`tokenize.onnx`: image [B, 3, height, width] in [-1, 1] to indices [B, S] int64."""
    side = grid * tokenizer.config.stride
    image = torch.zeros(2, 3, side, side)
    return _export(
        Tokenize(tokenizer),
        (image,),
        ({0: Dim(contract.BATCH)},),
        [contract.IMAGE],
        [contract.INDICES],
    )


def _export(
    module: nn.Module,
    args: tuple[Any, ...],
    dynamic_shapes: tuple[Any, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> ir.Model:
    with _quiet_exporter():
        program = torch.onnx.export(
            module.eval(),
            args,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=output_names,
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
    assert program is not None
    model = program.model
    _name_by_module(model.graph)
    # Traces of where each node came from, with this machine's paths in them.
    passes.ClearMetadataAndDocStringPass()(model)
    model.graph.name = type(module).__name__.lower()
    return model


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keeps the exporter's remarks about its own internals off the user's terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name_by_module(graph: ir.Graph) -> None:
    """Names nodes and inner values after the module they come from: `blocks.3.fc1/MatMul`."""
    fixed = {value.name for value in (*graph.inputs, *graph.outputs)}
    used: Counter[str] = Counter()
    scope = ""
    for node in graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        if scopes:
            # The innermost module; the last entry is the operation itself.
            scope = max(scopes.strip("[]").replace("'", "").split(", ")[:-1], key=len, default="")
            scope = "" if scope.startswith("_") else scope
        name = f"{scope}/{node.op_type}" if scope else node.op_type
        used[name] += 1
        node.name = name if used[name] == 1 else f"{name}_{used[name]}"
        for i, value in enumerate(node.outputs):
            if value.name not in fixed:
                value.name = f"{node.name}:{i}" if len(node.outputs) > 1 else node.name


def write_models(models: Mapping[str, ir.Model], folder: Path) -> None:
    """Writes `NAME.onnx` for each model, and their weights once in one file beside them.

    Tensors of equal content are stored once, whichever models they are in.
    """
    with open(folder / WEIGHTS_FILE, "wb") as file:
        offsets: dict[bytes, int] = {}
        for model in models.values():
            for value in model.graph.initializers.values():
                tensor = value.const_value
                assert tensor is not None
                if tensor.nbytes <= EMBEDDED_BYTES:
                    continue
                if tensor.dtype.bitwidth < 8:  # two values a byte, which NumPy has not
                    content = np.frombuffer(tensor.tobytes(), np.uint8)
                else:
                    # As bytes: NumPy has no buffers of bfloat16.
                    content = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
                digest = hashlib.sha256(content.data).digest()
                if digest not in offsets:
                    file.seek(-file.tell() % ALIGNMENT, io.SEEK_CUR)
                    offsets[digest] = file.tell()
                    content.tofile(file)
                value.const_value = ir.ExternalTensor(
                    WEIGHTS_FILE,
                    offsets[digest],
                    tensor.nbytes,
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=value.name or "",
                    base_dir=folder,
                )
    for name, model in models.items():
        ir.save(model, folder / f"{name}.onnx")


def write_phases(folder: Path, phases: Sequence[Phase], rows: int) -> list[Path]:
    """Writes `phase_00.onnx` and so on: decode.onnx at the static shapes of each phase.

    All of them use the weights of decode.onnx, in the same folder. `rows` is R: two an image with
    guidance. Each can be opened, compiled or run without a shape flag.
    """
    paths = []
    for phase in phases:
        model = ir.load(folder / "decode.onnx")
        sizes = {
            contract.ROWS: rows,
            contract.CONTEXT_TOKENS: phase.context,
            contract.TOKENS: phase.tokens,
        }
        fix_written_rows(model, phase.write_index + phase.tokens)
        make_static(model, sizes)
        model.graph.name = phase.name
        paths.append(folder / f"{phase.name}.onnx")
        ir.save(model, paths[-1])
    return paths


def check_model(path: Path) -> None:
    """Runs ONNX's checker with full shape inference over a written model and its weights.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: if it is not valid.
    """
    onnx.checker.check_model(path, full_check=True)


def load_shapes(path: Path) -> dict[str, list[int | str]]:
    """Shapes of a model's inputs and outputs by name, symbolic axes as text."""
    graph = onnx.load(path, load_external_data=False).graph
    return {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
