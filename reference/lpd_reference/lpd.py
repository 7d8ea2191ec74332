"""The LPD transformer (arXiv 2507.01957, section 3), in PyTorch.

Knows one network and its two ways of being run: the teacher-forced pass over a whole image
(training, likelihoods) and the decode step that fills one group of cells (generation). It does not
know where weights come from (`checkpoint`), how a token is drawn (`generate`) or what a token
looks like (`vq`).

Cells are counted from 0 in raster order. A *position* is a row of `pos_embed`: 0 is the
condition's, i + 1 is cell i's. Shapes are written with B images, C context tokens, Q position
queries, T = C + Q, S cells, V vocabulary entries, D model width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_DIM = 64
"""Head width of every published model; the number of heads is not in a checkpoint's shapes."""

PUBLISHED_MODELS: dict[str, dict[str, int]] = {
    "lpd-l": {"dim": 1024, "depth": 24, "heads": 16},
    "lpd-xl": {"dim": 1280, "depth": 36, "heads": 20},
    "lpd-xxl": {"dim": 1536, "depth": 48, "heads": 24},
}
"""Width, depth and heads of the published models (1000 classes, vocabulary 16384)."""


@dataclass(frozen=True)
class LPDConfig:
    """The architecture of an LPD: all of it but `heads` can be read off a checkpoint's shapes."""

    dim: int
    depth: int
    heads: int
    grid: int
    num_classes: int = 1000
    vocab_size: int = 16384
    mlp_dim: int = 0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} does not divide into {self.heads} heads")
        if not self.mlp_dim:
            object.__setattr__(self, "mlp_dim", 4 * self.dim)

    @property
    def cells(self) -> int:
        """S, the number of grid cells and so of tokens of an image."""
        return self.grid * self.grid

    @property
    def head_dim(self) -> int:
        """d, the width of one attention head."""
        return self.dim // self.heads


@dataclass
class LayerCache:
    """One layer's keys and values of the context tokens seen so far, [B, H, n, d].

    Those of position queries are never kept: each query is looked at in its own step alone.
    """

    key: Tensor | None = None
    value: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.key is None else self.key.shape[2]

    def extend(self, key: Tensor, value: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """Keeps the first `keep` of the new keys and values [B, H, T, d]; returns past and new."""
        keep += len(self)
        if self.key is not None and self.value is not None:
            key = torch.cat([self.key, key], dim=2)
            value = torch.cat([self.value, value], dim=2)
        self.key, self.value = key[:, :, :keep], value[:, :, :keep]
        return key, value


KeyValueCache = list[LayerCache]
"""A layer each; `LPD.new_cache` makes an empty one."""


class Attention(nn.Module):
    """Multi-head attention with one matrix for queries, keys and values."""

    def __init__(self, config: LPDConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [B, H, T, d] of x [B, T, D]."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return query, key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        """[B, T, D] from query [B, H, T, d], key and value [B, H, n, d], visible [T, n] bool."""
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with an exact (erf) GELU in between."""

    def __init__(self, config: LPDConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: LPDConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, visible: Tensor, cache: LayerCache | None = None, keep: int = 0
    ) -> Tensor:
        """[B, T, D] from x [B, T, D]; visible [T, past + T] bool says who sees what.

        With a cache, what it holds is seen as well, and it takes up the first `keep` tokens.
        """
        query, key, value = self.attn.project(self.norm1(x))
        if cache is not None:
            key, value = cache.extend(key, value, keep)
        x = x + self.attn.attend(query, key, value, visible)
        return x + self.mlp(self.norm2(x))


class LPD(nn.Module):
    """The network; parameter names and shapes are those of a released checkpoint."""

    def __init__(self, config: LPDConfig) -> None:
        super().__init__()
        self.config = config
        self.class_emb = nn.Embedding(config.num_classes, config.dim)
        self.fake_latent = nn.Parameter(torch.empty(1, config.dim))
        self.token_emb = nn.Embedding(config.vocab_size, config.dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.empty(1, config.cells + 1, config.dim))
        self.z_proj_ln = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def initialize(self, seed: int) -> LPD:
        """Draws every weight from `seed`: matrices and embeddings N(0, 0.02), biases zero."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02, generator=generator)
            else:
                nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
        return self

    def new_cache(self) -> KeyValueCache:
        """An empty cache for `decode_step`."""
        return [LayerCache() for _ in self.blocks]

    def condition(self, labels: Tensor | None, batch: int) -> Tensor:
        """The condition token's content [B, 1, D]: class embeddings, or the null condition's.

        labels: [B] int64 class ids, or None for no class.
        """
        if labels is None:
            return self.fake_latent.expand(batch, -1).unsqueeze(1)
        return self.class_emb(labels).unsqueeze(1)

    def embed(self, context: Tensor, positions: Tensor) -> Tensor:
        """Input tokens [B, T, D]: context [B, C, D], then as many queries as positions are left.

        positions: [B, T] int64 rows of `pos_embed`, those of the context first.
        """
        batch, context_tokens, _ = context.shape
        queries = self.mask_token.expand(batch, positions.shape[1] - context_tokens, -1)
        x = torch.cat([context, queries], dim=1) + self.pos_embed[0][positions]
        return self.z_proj_ln(x)

    def forward(
        self,
        token_ids: Tensor,
        labels: Tensor | None,
        orders: Tensor,
        group_sizes: Sequence[int],
        mutual_visibility: bool = True,
    ) -> Tensor:
        """Teacher-forced logits of every cell in one pass (paper section 3.1, figure 4).

        Args:
            token_ids: [B, S] int64, the image's tokens in raster order.
            labels: [B] int64 class ids, or None for the null condition.
            orders: [B, S] int64, each row a permutation of the cells.
            group_sizes: K sizes that sum to S.
            mutual_visibility: whether the queries of a step see one another.

        Returns:
            [B, S, V] logits in generation order: row n is about cell orders[:, n].
        """
        sizes = torch.tensor(group_sizes, device=token_ids.device)
        context_cells = orders[:, : orders.shape[1] - group_sizes[-1]]
        context = torch.cat(
            [
                self.condition(labels, token_ids.shape[0]),
                self.token_emb(token_ids.gather(1, context_cells)),
            ],
            dim=1,
        )
        positions = torch.cat(
            [torch.zeros_like(orders[:, :1]), context_cells + 1, orders + 1], dim=1
        )
        x = self.embed(context, positions)
        visible = teacher_forcing_mask(sizes, mutual_visibility)
        for block in self.blocks:
            x = block(x, visible)
        return self.head(self.norm(x[:, context.shape[1] :]))

    def decode_step(self, context: Tensor, positions: Tensor, cache: KeyValueCache) -> Tensor:
        """One parallel decoding step (paper section 3.2): logits of the queried cells.

        Args:
            context: [B, C, D], the condition's content or the embeddings of the last group.
            positions: [B, T] int64, rows of `pos_embed`: the context's, then the queries'.
            cache: of the steps so far; this step's context is added to it.

        Returns:
            [B, Q, V] logits, before guidance.
        """
        context_tokens, tokens = context.shape[1], positions.shape[1]
        x = self.embed(context, positions)
        # Context sees the past and its own group; queries see that and one another.
        past = len(cache[0])
        visible = torch.ones(tokens, past + tokens, dtype=torch.bool, device=x.device)
        visible[:context_tokens, past + context_tokens :] = False
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            x = block(x, visible, layer_cache, keep=context_tokens)
        return self.head(self.norm(x[:, context_tokens:]))


def teacher_forcing_mask(group_sizes: Tensor, mutual_visibility: bool = True) -> Tensor:
    """Who sees whom in the teacher-forced pass (paper figure 4).

    group_sizes: [K] int64, summing to S. The sequence is the condition, the tokens of every group
    but the last, then a query for every cell. Without mutual_visibility a query sees no other
    query. Returns [T, T] bool, true where row sees column.
    """
    device = group_sizes.device
    group = torch.repeat_interleave(torch.arange(len(group_sizes), device=device), group_sizes)
    # The step at which a context token enters, and the step at which a query is asked.
    context_tokens = 1 + len(group) - int(group_sizes[-1])
    entered = torch.cat([group.new_zeros(1), group + 1])[:context_tokens]
    step = torch.cat([entered, group])
    is_query = torch.arange(len(step), device=device) >= context_tokens
    sees_context = ~is_query[None, :] & (step[None, :] <= step[:, None])
    sees_query = is_query[:, None] & is_query[None, :] & (step[None, :] == step[:, None])
    if not mutual_visibility:
        sees_query &= torch.eye(len(step), dtype=torch.bool, device=device)
    return sees_context | sees_query
