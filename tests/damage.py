"""Bundles as a wrong build would leave them: whole, with right checksums and wrong numbers.

A damage changes the three graphs in memory, as `onnx_ir` models. Layers go by the names of their
modules, as they stand in the ONNX files: `blocks.1.fc1`.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from lpd_export.bundle.manifest import GRAPH_NAMES, MANIFEST, SCHEDULE, Bundle, describe_files
from lpd_export.graphs import export
from lpd_export.graphs.contract import ATTENTION_MASK
from lpd_reference import LPD, VQTokenizer
from lpd_reference.lpd import LPDConfig
from lpd_reference.vq import VQConfig

Models = dict[str, ir.Model]
Damage = Callable[[Models], None]

MODEL = LPDConfig(dim=128, depth=3, heads=2, grid=4, num_classes=5, vocab_size=64)
TOKENIZER = VQConfig(
    channels=32, channel_multipliers=(1, 1, 2), num_res_blocks=1, z_channels=32, codebook_size=64
)


# ----------------------------------------------------------------------------------- weights


def lifelike_weights(folder: Path) -> Path:
    """A folder with lpd.pth and vq.pt, weights of the magnitudes that training leads to.

    `initialize` alone gives every class nearly the same logits and attention that looks at all
    alike, where a wrong mask or a lost row would change next to nothing.
    """
    model = randomize(LPD(MODEL), torch.Generator().manual_seed(1))
    torch.save({"model": model.state_dict()}, folder / "lpd.pth")
    tokenizer = randomize(VQTokenizer(TOKENIZER), torch.Generator().manual_seed(2))
    torch.save({"model": tokenizer.state_dict()}, folder / "vq.pt")
    return folder


@torch.no_grad()
def randomize(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draws all weights, so that activations, attention scores and logits are of order 1."""

    def draw(weight: nn.Parameter, mean: float, std: float) -> None:
        nn.init.normal_(weight, mean, std, generator=generator)

    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            norm_weight = "norm" in name or "_ln" in name
            draw(weight, 1.0 if norm_weight and name.endswith("weight") else 0.0, 0.1)
        elif name in ("fake_latent", "mask_token", "pos_embed") or "_emb." in name:
            draw(weight, 0.0, 0.03)  # as trained models have them: a norm is what follows
        else:
            # Sharper attention and logits than of unit variance.
            gain = {"head.weight": 2.0, "qkv.weight": 1.5}.get(name.rpartition("attn.")[2], 1.0)
            draw(weight, 0.0, gain * weight[0].numel() ** -0.5)
        if name == "head.weight":
            # Few tokens that stand out, as where a model has learned something: else most cells
            # are near ties, which lower precisions rightly decide otherwise.
            weight.mul_(torch.randn(len(weight), 1, generator=generator).exp())
    return model


# ----------------------------------------------------------------------------------- bundles


def damaged(bundle: Path, out: Path, damage: Damage) -> Path:
    """A copy of a bundle at `out` with a damage in it, as a build would have written it.

    The static phases are left out: they take longer than all the rest, and nothing reads them.
    """
    manifest = Bundle.open(bundle).manifest
    models = {graph: ir.load(bundle / "onnx" / f"{graph}.onnx") for graph in GRAPH_NAMES}
    damage(models)
    (out / "onnx").mkdir(parents=True)
    shutil.copy(bundle / SCHEDULE, out)
    export.write_models(models, out / "onnx")
    manifest = dataclasses.replace(manifest, files=describe_files(out))
    (out / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return out


# ----------------------------------------------------------------------------- parts of a graph


def change(model: ir.Model, name: str, to: Callable[[NDArray], NDArray]) -> None:
    """Changes the content of an initializer."""
    value = model.graph.initializers[name]
    assert value.const_value is not None
    content = to(value.const_value.numpy().copy())
    value.const_value = ir.Tensor(np.ascontiguousarray(content), dtype=value.dtype, name=name)


def operators(model: ir.Model, *types: str) -> Iterator[ir.Node]:
    """The nodes of these types, at least one."""
    found = [node for node in model.graph if node.op_type in types]
    assert found, types
    yield from found


def constant(model: ir.Model, name: str, content: object) -> ir.Value:
    """A new initializer of whole numbers."""
    array = np.asarray(content, np.int64)
    value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
    value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape(array.shape)
    model.graph.register_initializer(value)
    return value


def replace_input(
    model: ir.Model, user: ir.Node, index: int, nodes: Callable[[ir.Value], list[ir.Node]]
) -> None:
    """Puts nodes, made of the value that a node uses, between it and that node."""
    value = user.inputs[index]
    assert value is not None
    made = nodes(value)
    made[-1].outputs[0].dtype = value.dtype
    model.graph.insert_before(user, made)
    user.replace_input_with(index, made[-1].outputs[0])


# ------------------------------------------------------------------------ damages of the decoder


def scaled_weight(models: Models) -> None:
    """One layer's weight 5 % too large."""
    change(models["decode"], "blocks.1.fc1.weight", lambda weight: weight * weight.dtype.type(1.05))


def query_and_key_swapped(models: Models) -> None:
    """One block's query weights in the place of its key weights, and the other way round."""
    for part in ("weight", "bias"):
        names = [f"blocks.1.{layer}.{part}" for layer in ("query", "key")]
        query, key = (models["decode"].graph.initializers[name] for name in names)
        query.const_value, key.const_value = key.const_value, query.const_value


def mask_off_by_one(models: Models) -> None:
    """The mask's columns stand one further than the cache's rows."""
    model = models["decode"]
    (mask,) = (value for value in model.graph.inputs if value.name == ATTENTION_MASK)
    columns = constant(model, "columns", np.roll(np.arange(mask.shape[1]), 1))  # type: ignore[index]
    shifted = ir.node("Gather", [mask, columns], {"axis": 1})
    shifted.outputs[0].type, shifted.outputs[0].shape = mask.type, mask.shape
    for node, place in list(mask.uses()):
        if node is not shifted:
            node.replace_input_with(place, shifted.outputs[0])
    model.graph.insert_before(model.graph[0], shifted)


def write_index_off_by_one(models: Models) -> None:
    """Everything is written one row late: in the last phase that is past the cache's end."""
    model = models["decode"]
    one = constant(model, "one", 1)
    for node in operators(model, "TensorScatter"):
        replace_input(model, node, 2, lambda index: [ir.node("Add", [index, one])])


def condition_row_forgotten(models: Models) -> None:
    """Rows are counted from the first cell, so that all but the condition come one too early."""
    model = models["decode"]
    one, zero = constant(model, "one", 1), constant(model, "zero", 0)

    def before(index: ir.Value) -> list[ir.Node]:
        less = ir.node("Sub", [index, one])
        return [less, ir.node("Max", [less.outputs[0], zero])]

    for node in operators(model, "TensorScatter"):
        replace_input(model, node, 2, before)


def rows_beyond(limit: int) -> Damage:
    """A cache that is never written from beyond a row, whatever the phase."""

    def apply(models: Models) -> None:
        model = models["decode"]
        last = constant(model, "last", limit)
        for node in operators(model, "TensorScatter"):
            replace_input(model, node, 2, lambda index: [ir.node("Min", [index, last])])

    return apply


def stale_row(models: Models) -> None:
    """The last of the rows that one layer's values should be written to keeps what it held."""
    model = models["decode"]
    bounds = [constant(model, name, [value]) for name, value in (("0", 0), ("-1", -1), ("1", 1))]
    node = next(node for node in model.graph if node.outputs[0].name == "present_value_1")
    replace_input(model, node, 1, lambda update: [ir.node("Slice", [update, *bounds])])


def guided_twice(scale: float) -> Damage:
    """Conditional logits that have guidance in them already, as if the graph did the sampler's."""

    def apply(models: Models) -> None:
        graph = models["decode"].graph
        head = graph.outputs[0].producer()
        assert head is not None
        factor = ir.Value(name="cfg", const_value=ir.Tensor(np.float32(scale), name="cfg"))
        factor.type, factor.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(())
        graph.register_initializer(factor)
        split = ir.node("Split", head.outputs, {"axis": 0, "num_outputs": 2}, num_outputs=2)
        conditional, null = split.outputs
        difference = ir.node("Sub", [conditional, null])
        scaled = ir.node("Mul", [difference.outputs[0], factor])
        guided = ir.node("Add", [null, scaled.outputs[0]])
        rows = ir.node("Concat", [guided.outputs[0], null], {"axis": 0})
        logits = rows.outputs[0]
        logits.type, logits.shape = graph.outputs[0].type, graph.outputs[0].shape
        graph.insert_after(head, [split, difference, scaled, guided, rows])
        graph.outputs[0].name, logits.name = "logits/raw", "logits"
        graph.outputs[0] = logits

    return apply


def norm_epsilon(models: Models) -> None:
    """PyTorch's default of nn.LayerNorm in the place of the model's 1e-6."""
    for node in operators(models["decode"], "LayerNormalization"):
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-5)


def positions_of_queries_off_by_one(models: Models) -> None:
    """Cell i's query at row i of the table, which is cell i - 1's: row 0 is the condition's."""
    model = models["decode"]
    zero, one, many = (
        constant(model, name, value) for name, value in (("0", [0]), ("1", [1]), ("T", [2**31]))
    )
    (node,) = (node for node in operators(model, "Gather") if node.inputs[0].name == "pos_embed")  # type: ignore[union-attr]
    token_ids = model.graph.inputs[0]

    def shift(positions: ir.Value) -> list[ir.Node]:
        context = ir.node("Shape", [token_ids], {"start": 1})
        head = ir.node("Slice", [positions, zero, context.outputs[0], one])
        tail = ir.node("Slice", [positions, context.outputs[0], many, one])
        shifted = ir.node("Sub", [tail.outputs[0], one])
        both = ir.node("Concat", [head.outputs[0], shifted.outputs[0]], {"axis": 1})
        return [context, head, tail, shifted, both]

    replace_input(model, node, 1, shift)


def position_lost(cell: int) -> Damage:
    """A cell whose row of the position table is empty."""

    def empty(table: NDArray) -> NDArray:
        table[cell + 1] = 0
        return table

    return lambda models: change(models["decode"], "pos_embed", empty)


def classes_off_by_one(models: Models) -> None:
    """Each class has the embedding of the next."""
    first, last = MODEL.vocab_size, MODEL.vocab_size + MODEL.num_classes

    def roll(table: NDArray) -> NDArray:
        table[first:last] = np.roll(table[first:last], -1, axis=0)
        return table

    change(models["decode"], "embedding", roll)


def null_condition_is_a_class(models: Models) -> None:
    """Guidance away from a class, not from no condition."""

    def replace(table: NDArray) -> NDArray:
        table[-1] = table[MODEL.vocab_size]
        return table

    change(models["decode"], "embedding", replace)


def logits_off_by_one(models: Models) -> None:
    """Each logit is the next token's."""
    change(models["decode"], "head.weight", lambda weight: np.roll(weight, -1, axis=1))


def tanh_gelu(models: Models) -> None:
    """GELU's approximation, which is another function by 5e-4."""
    for node in operators(models["decode"], "Gelu"):
        node.attributes["approximate"] = ir.AttrString("approximate", "tanh")


def not_a_number(models: Models) -> None:
    """One weight that is NaN."""

    def spoil(weight: NDArray) -> NDArray:
        weight[3, 4] = np.nan
        return weight

    change(models["decode"], "blocks.1.proj.weight", spoil)


def rounded_to_fp16(models: Models) -> None:
    """Weights that were stored in half precision and read back."""

    def stored(weight: NDArray) -> NDArray:
        return weight.astype(np.float16).astype(np.float32)

    for name, value in models["decode"].graph.initializers.items():
        if value.dtype == ir.DataType.FLOAT:
            change(models["decode"], name, stored)


def doubled_scales(models: Models) -> None:
    """INT8 levels of one layer that are read as twice what they are."""
    change(models["decode"], "blocks.1.value.weight/scales", lambda scales: 2 * scales)


# ---------------------------------------------------------------------- damages of the tokenizer


def codebook_not_normalized(weights: Path) -> Damage:
    """The codebook as it lies in the checkpoint, its rows of any length."""

    def apply(models: Models) -> None:
        rows = torch.load(weights / "vq.pt")["model"]["quantize.embedding.weight"].numpy()
        change(models["detokenize"], "codebook", lambda _: rows)

    return apply


def codebook_off_by_one(graph: str) -> Damage:
    """Each token has the codebook row of the next."""

    def apply(models: Models) -> None:
        change(models[graph], "codebook", lambda rows: np.roll(rows, -1, axis=0))

    return apply


def group_norm_epsilon(models: Models) -> None:
    """PyTorch's default of nn.GroupNorm in the place of the tokenizer's 1e-6."""
    for node in operators(models["detokenize"], "InstanceNormalization"):
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-5)


def bias_dropped(models: Models) -> None:
    """A convolution without its bias."""
    # Of 64 channels: where a norm's groups are single channels, it takes any bias out again.
    name = "decoder.conv_blocks.0.upsample.conv.bias"
    change(models["detokenize"], name, np.zeros_like)


def unscaled_attention(models: Models) -> None:
    """Attention in the tokenizer without its factor C^-1/2."""
    for node in operators(models["detokenize"], "Attention"):
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)


def least_similar(models: Models) -> None:
    """The codebook row farthest from a latent, as where distances were taken for similarities."""
    for node in operators(models["tokenize"], "ArgMax"):
        node.op_type = "ArgMin"
