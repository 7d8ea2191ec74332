"""What goes into the graphs and comes out: names of tensors and dynamic axes, and a cache's shape.

Written once for those who export, bind, compile and change graphs. Knows no framework; other shapes
and types are in the docs of `modules`, whose forward passes take and return these tensors in this
order. The two sides that `accuracy` compares build their inputs by themselves.
"""

from __future__ import annotations

TOKEN_IDS, POSITIONS = "token_ids", "positions"
ATTENTION_MASK, WRITE_INDEX = "attention_mask", "write_index"
STEP_INPUTS = (TOKEN_IDS, POSITIONS, ATTENTION_MASK, WRITE_INDEX)
"""Of decode, in order; the caches `past_...` follow."""
LOGITS = "logits"
"""Of decode, before the caches `present_...`; float32 in every precision."""
INDICES, IMAGE = "indices", "image"
"""Into and out of detokenize; tokenize has them the other way round."""

PAST, PRESENT = "past", "present"
ROWS, CONTEXT_TOKENS, TOKENS = "rows", "context_tokens", "tokens"
"""The dynamic axes of decode."""
BATCH = "batch"
"""The dynamic axis of detokenize and tokenize."""


def cache_shape(heads: int, cells: int, head_dim: int, fused_attention: bool) -> tuple[int, ...]:
    """Of one row's keys or values, in a graph whose attention is fused with its cache or is not."""
    rows = cells + 1
    return (heads, rows, head_dim) if fused_attention else (rows, heads * head_dim)


def cache_names(prefix: str, depth: int) -> list[str]:
    """Names of the caches in the graph's order: every layer's keys, then every layer's values."""
    return [f"{prefix}_{kind}_{i}" for kind in ("key", "value") for i in range(depth)]


def is_past(name: str) -> bool:
    """Whether a tensor of decode is a cache that goes in."""
    return name.startswith(f"{PAST}_")


def is_present(name: str) -> bool:
    """Whether a tensor of decode is a cache that comes out."""
    return name.startswith(f"{PRESENT}_")


def present_of(past: str) -> str:
    """The name under which a cache that goes in comes out."""
    return PRESENT + past.removeprefix(PAST)
