"""Training of the LPD transformer on images as a trained tokenizer sees them.

Knows the teacher-forced loss (paper section 3.1) and how a batch is drawn: augmented images, random
and locality-aware orders, one list of group sizes, conditions replaced by the null condition. What
is common to all training is in `training.loop`.

`query_features` computes what `LPD.forward` computes, faster where gradients are wanted: attention
skips most of what the mask hides, and the last block skips the context, which nothing reads there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lpd_export.schedule.orders import make_orders
from lpd_reference.lpd import LPD, Block, LPDConfig, teacher_forcing_mask
from lpd_reference.vq import VQTokenizer
from training.data import (
    ImageSet,
    TrainingError,
    augment,
    batch_of_step,
    class_weights,
    seeded,
    to_signed,
)
from training.loop import Batch, Figures, Outcome, Recipe, autocast

CHUNK = 64
"""Cells whose rows attend together: few enough to skip much, enough for fast products."""
VALIDATION_BATCH = 16
# Purposes of random numbers, so that no two draws of a step are the same.
_AUGMENTATION, _ORDERS, _GROUPS, _CONDITION, _DROPOUT, _VALIDATION = 20, 21, 22, 23, 24, 25


class Chunk(NamedTuple):
    """Rows of the teacher-forced sequence that attend together, and all that they see."""

    context: slice
    """Context rows."""
    queries: slice
    """Query rows, which are also the query columns."""
    seen: int
    """Context columns, from the first."""
    bias: Tensor
    """[rows, columns] float, 0 where a row sees a column and -inf elsewhere."""


class Layout(NamedTuple):
    """The teacher-forced sequence of one list of group sizes, cut into chunks."""

    context_tokens: int
    chunks: list[Chunk]
    """Together they hold every row once."""
    query_chunks: list[Chunk]
    """The same without context rows."""


def make_layout(
    group_sizes: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    mutual_visibility: bool = True,
) -> Layout:
    """Cuts the sequence of these group sizes between groups, about every `CHUNK` cells.

    The biases have the given type, that of the attention scores. Without mutual_visibility a query
    sees no other query.
    """
    cells = sum(group_sizes)
    context_tokens = 1 + cells - group_sizes[-1]
    visible = teacher_forcing_mask(torch.tensor(group_sizes, device=device), mutual_visibility)
    ends: list[int] = []
    filled = 0
    for size in group_sizes:
        filled += size
        if filled - (ends[-1] if ends else 0) >= CHUNK or filled == cells:
            ends.append(filled)

    def cut(context: slice, queries: slice, seen: int) -> Chunk:
        place = torch.arange(len(visible), device=device)
        asked = place[context_tokens:][queries]
        sub = visible[torch.cat([place[context], asked])][:, torch.cat([place[:seen], asked])]
        bias = torch.zeros(sub.shape, dtype=dtype, device=device)
        return Chunk(context, queries, seen, bias.masked_fill(~sub, -torch.inf))

    chunks, query_chunks = [], []
    for start, end in zip([0, *ends], ends, strict=False):
        queries = slice(start, end)
        # The token of the n-th cell is row n + 1; the condition is row 0.
        first, seen = start + 1 if start else 0, min(end + 1, context_tokens)
        chunks.append(cut(slice(first, max(first, seen)), queries, seen))
        query_chunks.append(cut(slice(0, 0), queries, seen))
    return Layout(context_tokens, chunks, query_chunks)


class ChunkedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d) + bias) v, chunk by chunk, as plain matrix products.

    On a CPU, products in bf16 are several times as fast as the fused attention.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, context: int, chunks: list[Chunk]
    ) -> Tensor:
        """[B, H, R, d] from query [B, H, R, d], key and value [B, H, T, d].

        The first `context` of the T rows are context tokens. R is T, or the queries alone.
        """
        skipped = key.shape[2] - query.shape[2]
        mixed = torch.empty_like(query, memory_format=torch.contiguous_format)
        probabilities = []
        for chunk in chunks:
            rows = row_slices(chunk, context, skipped)
            scores = gather(query, rows) @ gather(key, column_slices(chunk, context)).mT
            scores = torch.add(chunk.bias, scores, alpha=query.shape[-1] ** -0.5)
            probability = torch.softmax(scores, dim=-1)
            scatter(mixed, rows, probability @ gather(value, column_slices(chunk, context)))
            probabilities.append(probability)
        ctx.save_for_backward(query, key, value, *probabilities)
        ctx.context, ctx.chunks = context, chunks
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *probabilities = ctx.saved_tensors
        context = ctx.context
        skipped = key.shape[2] - query.shape[2]
        by_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        by_key = torch.zeros_like(key, memory_format=torch.contiguous_format)
        by_value = torch.zeros_like(value, memory_format=torch.contiguous_format)
        for chunk, probability in zip(ctx.chunks, probabilities, strict=True):
            rows, columns = row_slices(chunk, context, skipped), column_slices(chunk, context)
            gradient = gather(gradients[0], rows)
            scatter(by_value, columns, probability.mT @ gradient, add=True)
            by_probability = gradient @ gather(value, columns).mT
            by_scores = torch.ops.aten._softmax_backward_data(
                by_probability, probability, -1, probability.dtype
            ).mul_(query.shape[-1] ** -0.5)
            scatter(by_query, rows, by_scores @ gather(key, columns))
            scatter(by_key, columns, by_scores.mT @ gather(query, rows), add=True)
        return by_query, by_key, by_value, None, None


def row_slices(chunk: Chunk, context: int, skipped: int) -> list[slice]:
    """Where a chunk's rows lie; the first `skipped` rows of the sequence are left out."""
    first = context - skipped
    asked = slice(chunk.queries.start + first, chunk.queries.stop + first)
    return [asked] if chunk.context.start == chunk.context.stop else [chunk.context, asked]


def column_slices(chunk: Chunk, context: int) -> list[slice]:
    """Where a chunk's columns lie in the whole sequence."""
    asked = slice(chunk.queries.start + context, chunk.queries.stop + context)
    return [slice(0, chunk.seen), asked]


def gather(tensor: Tensor, slices: list[slice]) -> Tensor:
    """The rows [B, H, n, d] of these slices of [B, H, T, d], one after another."""
    return torch.cat([tensor[:, :, part] for part in slices], dim=2)


def scatter(target: Tensor, slices: list[slice], rows: Tensor, add: bool = False) -> None:
    """Writes the rows [B, H, n, d] to these slices of [B, H, T, d], or adds them there."""
    taken = 0
    for part in slices:
        length = part.stop - part.start
        source = rows[:, :, taken : taken + length]
        if add:
            target[:, :, part] += source
        else:
            target[:, :, part] = source
        taken += length


def query_features(
    model: LPD,
    token_ids: Tensor,
    condition: Tensor,
    orders: Tensor,
    layout: Layout,
    kept_channels: Tensor | None = None,
) -> Tensor:
    """What the head is applied to, [B, S, D]: `LPD.forward` up to its head.

    Args:
        model: the network.
        token_ids: [B, S] int64, in raster order.
        condition: [B, 1, D], the condition token's content.
        orders: [B, S] int64, each row a permutation of the cells.
        layout: of the group sizes; its biases have the type that attention is computed in.
        kept_channels: [B, 2 * depth, D], what is multiplied to what a block's attention and its
            MLP add: dropout of whole channels. To draw for every row as well would take a sixth of
            the time of a step on a CPU.
    """
    context_cells = orders[:, : layout.context_tokens - 1]
    context = torch.cat([condition, model.token_emb(token_ids.gather(1, context_cells))], dim=1)
    positions = torch.cat([torch.zeros_like(orders[:, :1]), context_cells + 1, orders + 1], dim=1)
    x = model.embed(context, positions)
    for number, module in enumerate(model.blocks):
        block = cast(Block, module)
        query, key, value = block.attn.project(block.norm1(x))
        chunks = layout.chunks
        if number == len(model.blocks) - 1:
            # Nothing reads what the last block makes of the context.
            query, x = query[:, :, layout.context_tokens :], x[:, layout.context_tokens :]
            chunks = layout.query_chunks
        mixed = cast(
            Tensor, ChunkedAttention.apply(query, key, value, layout.context_tokens, chunks)
        )
        attended = block.attn.proj(mixed.transpose(1, 2).flatten(2))
        if kept_channels is not None:
            attended = attended * kept_channels[:, None, 2 * number].to(attended.dtype)
        x = x + attended
        added = block.mlp(block.norm2(x))
        if kept_channels is not None:
            added = added * kept_channels[:, None, 2 * number + 1].to(added.dtype)
        x = x + added
    return model.norm(x)


def check_same_architecture(given: LPDConfig, wanted: LPDConfig) -> None:
    """Raises TrainingError naming what sets a model to begin with apart from the one to train."""
    have, want = asdict(given), asdict(wanted)
    if other := [name for name in want if have[name] != want[name]]:
        told = ", ".join(f"{name} {have[name]}, not {want[name]}" for name in other)
        raise TrainingError(
            f"the model to begin with has {told}: give the settings that it was trained with, and, "
            "if its tokens or classes are others, --start-tokenizer, its tokenizer"
        )


@torch.no_grad()
def transfer(
    start: LPD,
    start_tokenizer: VQTokenizer,
    config: LPDConfig,
    tokenizer: VQTokenizer,
    pixels: Tensor,
) -> LPD:
    """What an LPD of other tokens and classes has learned, as the beginning of one of `config`.

    Blocks and positions are taken as they are. A token's embedding and its row of the head are the
    mean of those of the other tokens that are found in its place; every class begins as their mean.

    Args:
        pixels: [N, H, W, 3] uint8, images that are read with both tokenizers.

    Raises:
        TrainingError: if the models differ in more than tokens and classes, or the tokenizers'
            grids differ.
    """
    same = replace(start.config, num_classes=config.num_classes, vocab_size=config.vocab_size)
    check_same_architecture(same, config)
    if start_tokenizer.config.stride != tokenizer.config.stride:
        raise TrainingError(
            f"the tokenizer of the model to begin with has stride {start_tokenizer.config.stride}, "
            f"not {tokenizer.config.stride}"
        )
    if start_tokenizer.config.codebook_size != start.config.vocab_size:
        raise TrainingError(
            f"the model to begin with has {start.config.vocab_size} tokens, its tokenizer "
            f"{start_tokenizer.config.codebook_size}: give the one that it was trained with"
        )
    together = torch.zeros(config.vocab_size, start.config.vocab_size)
    for part in pixels.split(VALIDATION_BATCH):
        images = to_signed(part)
        places = tokenizer.encode(images) * together.shape[1] + start_tokenizer.encode(images)
        together.view(-1).index_add_(0, places.flatten(), torch.ones(places.numel()))
    # A token that is nowhere is as good as any.
    together += together.sum(dim=0) / together.sum()
    shares = together / together.sum(dim=1, keepdim=True)
    weights = start.state_dict()
    for name in ("token_emb.weight", "head.weight"):
        weights[name] = shares @ weights[name]
    weights["class_emb.weight"] = (
        weights["class_emb.weight"].mean(dim=0).repeat(config.num_classes, 1)
    )
    model = LPD(config)
    model.load_state_dict(weights)
    return model


class LPDTask:
    """A `training.loop.Task` that trains an LPD on the tokens of augmented images.

    Every step draws new augmentations and tokenizes them: next to the transformer that is cheap,
    and no two passes over the images see the same tokens.
    """

    def __init__(
        self,
        config: LPDConfig,
        recipe: Recipe,
        images: ImageSet,
        validation: ImageSet,
        tokenizer: VQTokenizer,
        device: torch.device,
        *,
        group_sizes: Mapping[int, Sequence[int]],
        group_weights: Mapping[int, float],
        balance: float = 0.0,
        null_share: float = 0.1,
        plain_share: float = 0.0,
        dropout: float = 0.1,
        order_weights: Mapping[str, float] | None = None,
        mutual_visibility: bool = True,
        start: LPD | None = None,
    ) -> None:
        """Raises TrainingError if an image has not as many tokens as the model's grid has cells, or
        `start` is of another architecture.

        Args:
            group_sizes: by their number of steps, the lists that a batch draws from.
            group_weights: how often each is drawn, relative to the others. With the most frequent
                (the first of them) the validation loss is measured.
            balance: from 0, every image is drawn as often, to 1, every class is.
            null_share: probability that a sample's condition is replaced by the null condition.
            plain_share: probability that an image is seen as it is, not augmented.
            dropout: share of the channels of what each block adds that is dropped.
            order_weights: how often a sample's order is of each kind, "random", "locality" (grown
                for the batch's group sizes) or "raster"; by default the first two as often.
            mutual_visibility: whether the queries of a step see one another.
            start: the weights to begin with; by default random ones.
        """
        if start is not None:
            check_same_architecture(start.config, config)
        grid = images.resolution // tokenizer.config.stride
        cells = grid * grid
        if cells != config.cells:
            raise TrainingError(
                f"images of {images.resolution} pixels have {cells} tokens, where the model's "
                f"grid has {config.cells} cells: give a grid of {grid}"
            )
        self.start_digest = weights_digest(start) if start is not None else None
        model = start if start is not None else LPD(config).initialize(recipe.seed)
        self.model = model.to(device).train().requires_grad_()
        self.tokenizer = tokenizer.to(device)
        self.config, self.recipe, self.device = config, recipe, device
        self.images, self.validation = images, validation
        self.group_sizes = {steps: list(sizes) for steps, sizes in group_sizes.items()}
        self.group_weights = dict(group_weights)
        self.balance, self.null_share, self.dropout = balance, null_share, dropout
        self.plain_share = plain_share
        self.order_weights = dict(order_weights or {"random": 1.0, "locality": 1.0})
        self.mutual_visibility = mutual_visibility
        self.weights = class_weights(images.labels, balance)
        self.validation_steps = max(self.group_weights, key=lambda steps: group_weights[steps])
        dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        self.layouts = {
            steps: make_layout(sizes, device, dtype, mutual_visibility)
            for steps, sizes in self.group_sizes.items()
        }
        self.validation_tokens = self.tokenize(to_signed(validation.pixels))

    def settings(self) -> dict[str, Any]:
        return {
            **asdict(self.config),
            "group_sizes": {str(steps): sizes for steps, sizes in self.group_sizes.items()},
            "group_weights": {str(steps): weight for steps, weight in self.group_weights.items()},
            "balance": self.balance,
            "null_share": self.null_share,
            "plain_share": self.plain_share,
            "dropout": self.dropout,
            "order_weights": self.order_weights,
            "mutual_visibility": self.mutual_visibility,
            "images_digest": self.images.digest(),
            "tokenizer_digest": weights_digest(self.tokenizer),
            "start_digest": self.start_digest,
        }

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        pass

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Token ids [B, S] int64 of images [B, 3, H, W] in [-1, 1]."""
        parts = images.split(VALIDATION_BATCH)
        return torch.cat([self.tokenizer.encode(part.to(self.device)) for part in parts])

    def draw_steps(self, step: int) -> int:
        """The number of decoding steps that training step `step` trains for."""
        choices = list(self.group_sizes)
        weights = torch.tensor([self.group_weights[choice] for choice in choices])
        generator = seeded(self.recipe.seed, _GROUPS, step)
        return choices[int(torch.multinomial(weights.float(), 1, generator=generator))]

    def draw_nulls(self, step: int) -> Tensor:
        """Which samples of a step get the null condition: [B] bool."""
        generator = seeded(self.recipe.seed, _CONDITION, step)
        return torch.rand(self.recipe.batch_size, generator=generator) < self.null_share

    def draw_orders(self, count: int, sizes: Sequence[int], *words: int) -> Tensor:
        """Orders [count, S] int64 of the kinds of training, for these group sizes."""
        generator = seeded(self.recipe.seed, *words)
        weights = torch.tensor(list(self.order_weights.values()))
        kinds = torch.multinomial(weights, count, replacement=True, generator=generator)
        seed = int(torch.randint(2**31, (1,), generator=generator))
        orders = torch.empty(count, self.config.cells, dtype=torch.int64)
        for number, kind in enumerate(self.order_weights):
            if wanted := int((kinds == number).sum()):
                made = make_orders(self.config.grid, list(sizes), kind, wanted, seed)
                orders[kinds == number] = torch.from_numpy(made).long()
        return orders

    def draw_kept_channels(self, count: int, *words: int) -> Tensor:
        """What the channels of each block's two branches are multiplied by: [count, 2 * depth, D].

        1 / (1 - dropout), or 0 for a share `dropout` of them.
        """
        shape = (count, 2 * self.config.depth, self.config.dim)
        kept = torch.rand(shape, generator=seeded(self.recipe.seed, *words)) >= self.dropout
        return kept / (1 - self.dropout)

    def batch(self, step: int) -> Batch:
        """Images, labels, orders, who gets the null condition, the dropped channels."""
        recipe = self.recipe
        places = batch_of_step(step, recipe.batch_size, self.weights, recipe.seed)
        labels, pixels = self.images.labels[places], self.images.pixels[places]
        generator = seeded(recipe.seed, _AUGMENTATION, step)
        images = augment(pixels, generator, self.images.may_mirror(labels))
        plain = torch.rand(len(places), generator=generator) < self.plain_share
        images[plain] = to_signed(pixels[plain])
        sizes = self.group_sizes[self.draw_steps(step)]
        batch = {
            "images": images,
            "labels": labels,
            "orders": self.draw_orders(len(places), sizes, _ORDERS, step),
            "nulls": self.draw_nulls(step),
        }
        if self.dropout:
            batch["kept_channels"] = self.draw_kept_channels(len(places), _DROPOUT, step)
        return batch

    def loss(self, step: int, part: Batch) -> Outcome:
        """Mean cross-entropy in nats a token."""
        model = self.model
        part = {name: tensor.to(self.device) for name, tensor in part.items()}
        orders, count = part["orders"], len(part["orders"])
        layout = self.layouts[self.draw_steps(step)]
        with autocast(self.device, self.recipe.precision):
            token_ids = self.tokenize(part["images"])
            condition = torch.where(
                part["nulls"][:, None, None],
                model.condition(None, count),
                model.condition(part["labels"], count),
            )
            features = query_features(
                model, token_ids, condition, orders, layout, part.get("kept_channels")
            )
            logits = model.head(features)
        targets = token_ids.gather(1, orders)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        return Outcome(loss, {}, {})

    def after_update(
        self, step: int, kept: Batch, average: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Figures:
        return {}

    @torch.no_grad()
    def validate(self, model: nn.Module) -> Figures:
        """Mean cross-entropy in nats a token on validation images, in the orders of training.

        The orders are the same at every validation.
        """
        network = cast(LPD, model).eval()
        sizes = self.group_sizes[self.validation_steps]
        orders = self.draw_orders(len(self.validation), sizes, _VALIDATION).to(self.device)
        layout = self.layouts[self.validation_steps]
        total = 0.0
        for places in torch.arange(len(self.validation)).split(VALIDATION_BATCH):
            token_ids, order = self.validation_tokens[places], orders[places]
            labels = self.validation.labels[places].to(self.device)
            with autocast(self.device, self.recipe.precision):
                condition = network.condition(labels, len(places))
                features = query_features(network, token_ids, condition, order, layout)
                logits = network.head(features).float()
            targets = token_ids.gather(1, order).flatten()
            total += float(F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum"))
        return {"validation_loss": round(total / self.validation_tokens.numel(), 5)}


def weights_digest(model: nn.Module) -> str:
    """16 hexadecimal digits that tell a model's weights from any other's."""
    content = hashlib.sha256()
    for tensor in model.state_dict().values():
        content.update(tensor.cpu().numpy().tobytes())
    return content.hexdigest()[:16]
