"""A grown model computes what the small one computes, and weighs what a trained one would."""

from __future__ import annotations

import torch

from grow_demo import Growth, grow
from lpd_reference.lpd import LPD, LPDConfig

SIZES = [1, 3, 5, 7]


def logits(model: LPD) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(0, model.config.vocab_size, (2, 16), generator=generator)
    orders = torch.stack([torch.randperm(16, generator=generator) for _ in range(2)])
    with torch.no_grad():
        return model(token_ids, torch.tensor([0, 2]), orders, SIZES)


def test_growth_keeps_the_function_and_outliers_too() -> None:
    config = LPDConfig(dim=32, depth=2, heads=2, grid=4, num_classes=3, vocab_size=20)
    small = LPD(config).initialize(0).double()
    for value in small.state_dict().values():  # biases and gains that are not all alike
        value += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(2))
    growth = Growth(4, seed=0)
    grown = grow(small, growth, depth_factor=2).double()
    assert (grown.config.dim, grown.config.depth, grown.config.heads) == (128, 4, 8)
    # The grown weights were rounded to FP32 on the way.
    torch.testing.assert_close(logits(grown), logits(small), atol=1e-5, rtol=0)
    for name in ("blocks.0.mlp.fc1.weight", "blocks.1.attn.proj.weight", "head.weight"):
        ratio = (
            grown.get_parameter(name).std()
            / small.state_dict()[name.replace("blocks.1", "blocks.0")].std()
        )
        assert 0.4 < ratio < 0.6, name  # 1 / sqrt(4)
    before = logits(grown)
    with torch.no_grad():
        growth.add_outliers(grown, 50.0)
        torch.testing.assert_close(logits(grown), before, atol=1e-6, rtol=0)
        assert grown.get_parameter("blocks.3.norm1.weight").abs().max() > 20
        growth.perturb(grown, 0.03)
    assert 1e-4 < (logits(grown) - before).abs().max() < 3
