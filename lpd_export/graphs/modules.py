"""The deployed phases as PyTorch modules over the reference's weights, ready for ONNX export.

Each module has the inputs and outputs of its graph and nothing else. One transformer graph serves
the prefill and every decode phase: conditions are vocabulary entries after the image tokens, and
keys and values are written into a cache that is handed in and out. Guidance, sampling and the
schedule are not here; nor is ONNX.

Shapes: R rows (an image has one, or two with guidance), C context tokens, Q position queries,
T = C + Q, S grid cells, V image tokens, H heads, d head width, D model width.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lpd_reference.lpd import LPD, Block
from lpd_reference.vq import VQTokenizer


@torch.library.custom_op("lpd_export::tensor_scatter", mutates_args=())
def tensor_scatter(cache: Tensor, update: Tensor, write_index: Tensor) -> Tensor:
    """`cache` [R, ..., N, d] with rows write_index[r] to write_index[r] + T replaced.

    The ONNX operator TensorScatter (opset 24) with axis -2, mode linear: update is [R, ..., T, d],
    write_index [R] int64.
    """
    rows = write_index[:, None] + torch.arange(update.shape[-2], device=update.device)
    between = [1] * (update.ndim - 3)
    index = rows.view(len(rows), *between, -1, 1).expand_as(update)
    return cache.scatter(-2, index, update)


@tensor_scatter.register_fake
def _(cache: Tensor, update: Tensor, write_index: Tensor) -> Tensor:
    return torch.empty_like(cache)


@torch.library.custom_op("lpd_export::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Attention of `heads` heads that lie beside one another in each row.

    The ONNX operator Attention (opset 24) of three axes: query is [R, T, D], key and value are
    [R, N, D], mask [T, N]; gives [R, T, D].
    """
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return mixed.transpose(1, 2).flatten(2)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, heads: int) -> Tensor:
    return torch.empty_like(query)


class Projection(nn.Module):
    """A linear layer as MatMul and Add, its weight stored [in, out] as MatMul reads it.

    `nn.Linear` would leave a Transpose of every weight in the file, to be undone by each backend.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def of(cls, linear: nn.Linear) -> Projection:
        """The projection of a whole linear layer."""
        return cls(linear.weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class DecodeBlock(nn.Module):
    """A transformer block over a fixed cache, by heads if attention is fused (see `Decode`)."""

    def __init__(self, block: nn.Module, fused_attention: bool) -> None:
        super().__init__()
        assert isinstance(block, Block)
        self.heads, self.fused_attention = block.attn.heads, fused_attention
        self.norm1, self.norm2 = block.norm1, block.norm2
        # Three products, which TensorRT merges: of one and a split it would make FP16 from INT8.
        weights, biases = (part.chunk(3) for part in (block.attn.qkv.weight, block.attn.qkv.bias))
        self.query, self.key, self.value = map(Projection, weights, biases)
        self.proj = Projection.of(block.attn.proj)
        self.fc1 = Projection.of(block.mlp.fc1)
        self.fc2 = Projection.of(block.mlp.fc2)

    def rows_of(self, x: Tensor) -> Tensor:
        """Rows [R, T, D] as they are written into the cache."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2) if self.fused_attention else x

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """[R, T, D] of query [R, T, D] and caches."""
        if not self.fused_attention:
            return attention(query, key, value, mask, self.heads)
        mixed = F.scaled_dot_product_attention(self.rows_of(query), key, value, attn_mask=mask)
        return mixed.transpose(1, 2).flatten(2)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        write_index: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        context_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What it gives of x [R, T, D], and present keys and values.

        context_tokens: C, where of the context nothing is read any more but its keys and values,
            and what is given is [R, Q, D].
        """
        normed = self.norm1(x)
        key, value = self.rows_of(self.key(normed)), self.rows_of(self.value(normed))
        present_key = tensor_scatter(past_key, key, write_index)
        present_value = tensor_scatter(past_value, value, write_index)
        query = self.query(normed)
        if context_tokens is not None:
            x, query, mask = x[:, context_tokens:], query[:, context_tokens:], mask[context_tokens:]
        x = x + self.proj(self.attend(query, present_key, present_value, mask))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x, present_key, present_value


class Decode(nn.Module):
    """Prefill and decode: one step of every phase (paper section 3.2).

    The embedding table is [V + classes + 1, D]: image tokens, then classes, then the null
    condition, so that a condition is a token id like any other.

    Args:
        model: the reference.
        fused_attention: whether attention is for one kernel with its cache, [R, H, S + 1, d]. Else
            a cache is [R, S + 1, D], and the last block leaves out what it would make of the
            context.
    """

    def __init__(self, model: LPD, fused_attention: bool = True) -> None:
        super().__init__()
        self.fused_attention = fused_attention
        self.config = model.config
        self.embedding = nn.Parameter(
            torch.cat([model.token_emb.weight, model.class_emb.weight, model.fake_latent]),
            requires_grad=False,
        )
        self.mask_token = model.mask_token
        self.pos_embed = nn.Parameter(model.pos_embed[0], requires_grad=False)
        self.z_proj_ln = model.z_proj_ln
        self.blocks = nn.ModuleList(DecodeBlock(block, fused_attention) for block in model.blocks)
        self.norm = model.norm
        self.head = Projection.of(model.head)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention_mask: Tensor,
        write_index: Tensor,
        past_keys: list[Tensor],
        past_values: list[Tensor],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits of the queries, and the caches with this step's rows written.

        Args:
            token_ids: [R, C] int64, below V + classes + 1.
            positions: [R, T] int64, context then queries; 0 is the condition, i + 1 is cell i.
            attention_mask: [T, S + 1], 0 or a large negative number.
            write_index: [R] int64, the first cache row written.
            past_keys, past_values: a layer each, [R, H, S + 1, d] or [R, S + 1, D].

        Returns:
            logits [R, Q, V], and present keys and values shaped as the past ones.
        """
        context = F.embedding(token_ids, self.embedding)
        tokens, context_tokens = positions.shape[1], token_ids.shape[1]
        queries = self.mask_token.expand(positions.shape[0], tokens - context_tokens, -1)
        x = torch.cat([context, queries], dim=1) + F.embedding(positions, self.pos_embed)
        x = self.z_proj_ln(x)
        keys, values = [], []
        last = None if self.fused_attention else self.blocks[-1]
        for block, past_key, past_value in zip(self.blocks, past_keys, past_values, strict=True):
            cut = context_tokens if block is last else None
            x, key, value = block(x, attention_mask, write_index, past_key, past_value, cut)
            keys.append(key)
            values.append(value)
        queries = x[:, context_tokens:] if self.fused_attention else x
        return self.head(self.norm(queries)), keys, values


class ChannelNorm(nn.Module):
    """A group normalization as an instance normalization of its groups, scaled and shifted.

    ONNX Runtime's CPU has a kernel for InstanceNormalization and none for GroupNormalization, which
    becomes ten operators there. TensorRT makes the same kernels of both.
    """

    ones: Tensor
    zeros: Tensor

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.register_buffer("ones", torch.ones(self.groups))
        self.register_buffer("zeros", torch.zeros(self.groups))
        self.weight = nn.Parameter(norm.weight[:, None, None], requires_grad=False)
        self.bias = nn.Parameter(norm.bias[:, None, None], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.flatten(1).unflatten(1, (self.groups, -1))
        normed = F.instance_norm(grouped, weight=self.ones, bias=self.zeros, eps=self.eps)
        return normed.view_as(x) * self.weight + self.bias


def with_channel_norms(module: nn.Module) -> nn.Module:
    """A copy of a module whose group normalizations are ChannelNorms; weights are shared."""
    copied = copy.deepcopy(module, {id(weight): weight for weight in module.parameters()})
    for parent in list(copied.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(parent, name, ChannelNorm(child))
    return copied


class Detokenize(nn.Module):
    """Token indices [B, S] int64 to an image [B, 3, height, width] in [-1, 1] up to overshoot."""

    def __init__(self, tokenizer: VQTokenizer, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.codebook = nn.Parameter(tokenizer.quantize.codebook(), requires_grad=False)
        self.post_quant_conv = tokenizer.post_quant_conv
        self.decoder = with_channel_norms(tokenizer.decoder)

    def forward(self, indices: Tensor) -> Tensor:
        latent = (
            F.embedding(indices, self.codebook).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        )
        return self.decoder(self.post_quant_conv(latent))


class Tokenize(nn.Module):
    """An image [B, 3, height, width] in [-1, 1] to token indices [B, S] int64."""

    def __init__(self, tokenizer: VQTokenizer) -> None:
        super().__init__()
        self.codebook = nn.Parameter(tokenizer.quantize.codebook(), requires_grad=False)
        self.quant_conv = tokenizer.quant_conv
        self.encoder = with_channel_norms(tokenizer.encoder)

    def forward(self, image: Tensor) -> Tensor:
        latent = self.quant_conv(self.encoder(image)).flatten(2).transpose(1, 2)
        # The row of greatest cosine: a latent's own length scales all of its products alike.
        similarity = F.linear(latent.flatten(0, 1), self.codebook)
        return similarity.argmax(dim=-1).view(latent.shape[:2])
