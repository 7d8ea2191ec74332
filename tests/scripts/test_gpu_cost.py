"""scripts/gpu_cost.py: kernels counted in the compiler's log and in PyTorch's operators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import gpu_cost


def test_views_and_allocations_start_no_kernel() -> None:
    x = torch.ones(4, 3)
    with gpu_cost.Kernels() as kernels:
        y = torch.empty(4, 3)
        y.copy_(x.t().view(3, 4).t())
        y.add_(1).mul(2).unsqueeze(0)
    assert kernels.count == 3


@pytest.mark.engine
@pytest.mark.slow
def test_every_part_of_an_image_is_counted(lifelike_bundle: Callable[..., Path]) -> None:
    bundle = lifelike_bundle(backend="tensorrt-rtx", precision="fp16")
    said = CliRunner().invoke(gpu_cost.main, [str(bundle)])
    assert said.exit_code == 0, said
    rows = [line.split(" | ") for line in said.output.splitlines() if line.startswith("| fp16")]
    kernels = {row[1]: int(row[2] or 0) for row in rows}
    parts = [kernels[part] for part in ("prefill", "4 steps", "detokenize")]
    assert min(parts) > 10
    assert kernels["**an image**"] == sum(parts)
    between, eager = (int(line.split(": ")[1].split()[0]) for line in said.output.splitlines()[-2:])
    assert between > 5 * 5
    assert eager > between
