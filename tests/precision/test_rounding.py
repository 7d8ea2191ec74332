"""Weights are rounded to levels: to the nearest, or so that a layer's output changes least."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lpd_export.precision.rounding import Levels, round_weight

pytestmark = pytest.mark.unit

INT4 = Levels(-8, 7, 32, torch.float16)
INT8 = Levels(-128, 127, 64)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def restored(levels: Tensor, scales: Tensor) -> Tensor:
    """The weight [in, out] that levels and scales stand for."""
    return levels * scales.float().repeat_interleave(len(levels) // len(scales), dim=0)


def moments_of_related(inputs: int, seed: int) -> Tensor:
    """Second moments of channels that go together, as those of a trained model do."""
    x = normal(512, inputs // 4, seed=seed) @ normal(inputs // 4, inputs, seed=seed + 1)
    x += 0.3 * normal(512, inputs, seed=seed + 2)
    return x.T @ x


def output_error(weight: Tensor, rounded: Tensor, moments: Tensor) -> float:
    """Squared error of the layer's output over what it read."""
    error = weight - rounded
    return float((error * (moments @ error)).sum())


@given(st.sampled_from([INT4, INT8]), st.integers(1, 3), st.integers(1, 9), st.integers(0, 99))
def test_a_weight_is_as_near_as_its_levels_allow(
    levels: Levels, blocks: int, outputs: int, seed: int
) -> None:
    assert levels.block is not None
    weight = normal(blocks * levels.block, outputs, seed=seed)
    whole, scales = round_weight(weight, levels)
    assert scales.shape == (blocks, outputs)
    assert scales.dtype == levels.scale_type
    assert whole.dtype == torch.int8
    assert levels.lowest <= int(whole.min()) <= int(whole.max()) <= levels.highest
    error = (restored(whole, scales) - weight).abs()
    inside = (whole > levels.lowest) & (whole < levels.highest)
    step = scales.float().repeat_interleave(levels.block, dim=0)
    assert (error <= step * (0.5 + 1e-3))[inside].all()


@pytest.mark.parametrize("levels", [INT4, INT8])
def test_rounding_with_moments_changes_the_output_less(levels: Levels) -> None:
    weight, moments = normal(128, 48, seed=1), moments_of_related(128, seed=2)
    nearest = output_error(weight, restored(*round_weight(weight, levels)), moments)
    compensated = output_error(weight, restored(*round_weight(weight, levels, moments)), moments)
    assert compensated < 0.5 * nearest


def test_moments_of_unrelated_channels_round_to_the_nearest() -> None:
    weight = normal(64, 8, seed=3)
    for moments in (torch.eye(64), torch.zeros(64, 64)):
        for anyhow, nearest in zip(
            round_weight(weight, INT4, moments), round_weight(weight, INT4), strict=True
        ):
            assert torch.equal(anyhow, nearest)


def test_a_share_of_the_largest_weight_is_cut_off_where_that_is_nearer() -> None:
    weight = torch.full((32, 1), 0.1)
    weight[0] = 1.0
    weight[1:] += 0.02 * normal(31, 1, seed=4)
    levels, scales = round_weight(weight, INT4)
    assert scales.item() < 1 / 7
    kept = (restored(levels, scales) - weight).square().sum()
    uncut = (weight / (1 / 7)).round().clamp(-8, 7) / 7
    assert kept < (uncut - weight).square().sum()


def test_weights_of_zero_stay_zero() -> None:
    levels, scales = round_weight(torch.zeros(32, 2), INT4)
    assert not levels.any()
    assert (scales > 0).all()
