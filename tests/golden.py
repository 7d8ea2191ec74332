"""The vectors recorded from the authors' implementation, as models and expectations.

Weights are float16 in the files and computed with in float32; `expect` holds what was recorded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lpd_export.graphs import contract
from lpd_export.schedule.phases import attention_mask, phase_table
from lpd_reference.checkpoint import fill, lpd_config, vq_config
from lpd_reference.lpd import LPD
from lpd_reference.vq import VQTokenizer

DATA = Path(__file__).parent / "data"
LPD_NAMES = ("lpd_grid4", "lpd_grid8")
VQ_NAMES = ("vq_f4", "vq_f16")
MASKED = float(torch.finfo(torch.float32).min)


@dataclass(frozen=True)
class Golden:
    """One file of golden vectors."""

    config: dict[str, Any]
    state: dict[str, Tensor]
    expect: dict[str, Tensor]


def read(name: str) -> Golden:
    with safe_open(DATA / "golden" / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
        config = json.loads(file.metadata()["config"])

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    return Golden(config, under("model."), under("expect."))


def lpd(golden: Golden) -> LPD:
    with torch.device("meta"):
        model = LPD(lpd_config(golden.state, golden.config["heads"]))
    fill(model, golden.state, frozenset(), "an LPD checkpoint")
    return model


def tokenizer(golden: Golden) -> VQTokenizer:
    with torch.device("meta"):
        model = VQTokenizer(vq_config(golden.state))
    fill(model, golden.state, frozenset({"quantize.codebook_used"}), "a VQ tokenizer")
    return model


def step_inputs(
    model: LPD, sizes: list[int], rows: int, number: int, fused_attention: bool = True
) -> dict[str, Tensor]:
    """Random but valid inputs of one phase, by name; caches hold random rows where read."""
    config = model.config
    phase = phase_table(sizes)[number]
    generator = torch.Generator().manual_seed(number)
    vocabulary = config.vocab_size + config.num_classes + 1
    of_row = contract.cache_shape(config.heads, config.cells, config.head_dim, fused_attention)
    caches = {
        name: torch.randn((rows, *of_row), generator=generator)
        for name in contract.cache_names("past", config.depth)
    }
    return {
        "token_ids": torch.randint(vocabulary, (rows, phase.context), generator=generator),
        "positions": torch.randint(config.cells + 1, (rows, phase.tokens), generator=generator),
        "attention_mask": torch.from_numpy(attention_mask(phase, config.cells, MASKED)),
        "write_index": torch.full((rows,), phase.write_index),
        **caches,
    }
