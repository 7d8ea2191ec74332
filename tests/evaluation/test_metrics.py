"""Figures of features: against closed forms, against torch-fidelity, and how sure they are."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import sys
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from lpd_export.evaluation import metrics
from lpd_export.evaluation.metrics import (
    Moments,
    distance_figure,
    frechet_distance,
    inception_score,
    inside_manifold,
    score_figure,
    share_figure,
    square_root,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -------------------------------------------------------------------------- Fréchet distance

ROUNDED = 1e-5
"""Of few samples covariances have no full rank: the square roots of what rounding leaves of 0."""
SETS = st.tuples(st.integers(2, 40), st.integers(2, 40), st.integers(1, 12), st.integers(0, 99))


@given(SETS)
@hypothesis_settings(max_examples=50)
def test_no_distance_to_itself(sizes: tuple[int, int, int, int]) -> None:
    count, _, features, seed = sizes
    samples = noise(count, features, seed=seed)
    assert frechet_distance(samples, samples) == pytest.approx(0, abs=ROUNDED)
    assert frechet_distance(samples, samples.flip(0)) == pytest.approx(0, abs=ROUNDED)


@given(SETS, st.floats(-5, 5))
@hypothesis_settings(max_examples=50)
def test_shifted_sets_are_as_far_as_their_means(
    sizes: tuple[int, int, int, int], shift: float
) -> None:
    count, _, features, seed = sizes
    samples = noise(count, features, seed=seed)
    by = shift * noise(features, seed=seed + 1)
    expected = float(by.square().sum())
    assert frechet_distance(samples, samples + by) == pytest.approx(expected, abs=ROUNDED)


@given(SETS)
@hypothesis_settings(max_examples=50)
def test_distance_is_symmetric_and_not_negative(sizes: tuple[int, int, int, int]) -> None:
    count_a, count_b, features, seed = sizes
    a, b = noise(count_a, features, seed=seed), 2 * noise(count_b, features, seed=seed + 1) + 1
    there, back = frechet_distance(a, b), frechet_distance(b, a)
    assert there == pytest.approx(back, rel=1e-9, abs=ROUNDED)
    assert there >= 0


def with_deviations(deviations: Tensor, mean: Tensor) -> Tensor:
    """Samples [2F, F] whose covariance is exactly diagonal."""
    count = 2 * len(deviations)
    axes = torch.diag(deviations) * ((count - 1) / 2) ** 0.5
    return torch.cat([axes, -axes]) + mean


def test_closed_form_of_diagonal_covariances() -> None:
    s, t = noise(20).abs() + 0.1, noise(20, seed=1).abs() + 0.1
    a, b = with_deviations(s, noise(20, seed=2)), with_deviations(t, noise(20, seed=3))
    assert torch.allclose(torch.cov(a.T), torch.diag(s**2))
    expected = (noise(20, seed=2) - noise(20, seed=3)).square().sum() + (s - t).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_closed_form_of_rotated_covariances() -> None:
    turn = torch.linalg.qr(noise(20, 20)).Q
    s, t = noise(20).abs(), noise(20, seed=1).abs()
    zero = torch.zeros(20, dtype=torch.float64)
    a, b = with_deviations(s, zero) @ turn, with_deviations(t, zero) @ turn
    assert frechet_distance(a, b) == pytest.approx(float((s - t).square().sum()), rel=1e-9)


def test_against_the_eigenvalues_of_the_product() -> None:
    a, b = noise(200, 8) @ noise(8, 8, seed=5), noise(150, 8, seed=1) @ noise(8, 8, seed=6)
    covariances = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + sum(c.trace() for c in covariances)
    assert frechet_distance(a, b) == pytest.approx(float(expected - 2 * root), rel=1e-8)


def test_fewer_samples_than_features_and_float16() -> None:
    a, b = noise(5, 64).half(), (noise(7, 64, seed=1) + 1).half()
    assert 64 * 0.5 < frechet_distance(a, b) < 64 * 4


def test_square_root() -> None:
    half = noise(9, 4)
    matrix = half @ half.T  # of rank 4
    root = square_root(matrix)
    assert torch.allclose(root @ root, matrix, atol=1e-10)
    assert torch.allclose(root, root.T)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (torch.ones(1, 4), torch.ones(5, 4), "at least 2 samples, not 1"),
        (torch.ones(5, 4), torch.ones(5, 3), "sets have 4 and 3 features"),
        (torch.ones(5), torch.ones(5), r"must be \[N, F\], not \[5\]"),
        (torch.ones(5, 4), torch.full((5, 4), torch.nan), "NaN or infinite"),
    ],
)
def test_sets_without_a_distance_are_refused(a: Tensor, b: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        frechet_distance(a, b)


# ------------------------------------------------------------------------- beside torch-fidelity


@pytest.fixture(scope="module")
def fidelity() -> dict[str, ModuleType]:
    """torch-fidelity's metrics by themselves: the package imports torchvision, which they need not.

    Beside a torch of another build torchvision does not load.
    """
    spec = importlib.util.find_spec("torch_fidelity")
    assert spec is not None, "pip install torch-fidelity"
    package = ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations or [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_fidelity", package)
        patch.setitem(sys.modules, "torch_fidelity.utils", MagicMock())  # reads files, downloads
        return {
            name: importlib.import_module(f"torch_fidelity.metric_{name}")
            for name in ("fid", "isc", "prc")
        }


def test_distance_is_torch_fidelity_s(fidelity: dict[str, ModuleType]) -> None:
    a, b = noise(300, 48) @ noise(48, 48, seed=5), noise(200, 48, seed=1) + 0.1
    of = fidelity["fid"].fid_features_to_statistics
    theirs = fidelity["fid"].fid_statistics_to_metric(of(a), of(b), verbose=False)
    assert frechet_distance(a, b) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)
    assert distance_figure(Moments.of(a), b).value == frechet_distance(a, b)


@pytest.mark.parametrize("count", [100, 137])
def test_score_is_torch_fidelity_s(fidelity: dict[str, ModuleType], count: int) -> None:
    logits = 3 * noise(count, 12).float()
    theirs = fidelity["isc"].isc_features_to_metric(logits)
    assert inception_score(logits) == pytest.approx(theirs["inception_score_mean"], rel=1e-9)


def test_precision_and_recall_are_torch_fidelity_s(fidelity: dict[str, ModuleType]) -> None:
    drawn, real = 0.8 * noise(150, 6).float(), noise(200, 6, seed=1).float()
    theirs = fidelity["prc"].prc_features_to_metric(
        drawn, real, prc_neighborhood=3, prc_batch_size=10000, save_cpu_ram=False, verbose=False
    )
    figures = share_figure(inside_manifold(drawn, real)), share_figure(inside_manifold(real, drawn))
    assert [figure.value for figure in figures] == pytest.approx(
        [theirs["precision"], theirs["recall"]]
    )
    assert 0.3 < theirs["recall"] < theirs["precision"] < 1


def test_images_in_parts_are_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, real = noise(150, 6), noise(90, 6, seed=1)
    whole = distance_figure(Moments.of(real), drawn), inside_manifold(drawn, real)
    monkeypatch.setattr(metrics, "ROWS", 32)
    assert distance_figure(Moments.of(real), drawn) == pytest.approx(whole[0], rel=1e-9)
    assert torch.equal(inside_manifold(drawn, real), whole[1])


# ------------------------------------------------------------------------------- how sure it is


def test_errors_are_the_spread_of_other_images() -> None:
    """And the bias is how much a distance shrinks when there are very many images."""
    mixed = noise(16, 16) / 4
    reference = Moments(torch.zeros(16).double(), mixed.T @ mixed)

    def drawn(seed: int) -> Tensor:
        return 1.2 * noise(300, 16, seed=seed) @ mixed

    others = [drawn(seed) for seed in range(1, 60)]
    values = [frechet_distance(reference, features) for features in others]
    figures = [distance_figure(reference, features) for features in others[:20]]
    error = statistics.mean(figure.standard_error for figure in figures)
    assert error == pytest.approx(statistics.stdev(values), rel=0.35)
    bias = statistics.mean(figure.bias for figure in figures)
    of_many = 0.2**2 * float(reference.covariance.trace())
    assert bias == pytest.approx(statistics.mean(values) - of_many, rel=0.25)


def test_errors_of_scores_and_shares() -> None:
    sets = [4 * noise(400, 10, seed=seed) for seed in range(40)]
    for figure_of in (score_figure, lambda logits: share_figure(logits[:, 0] > 1)):
        figures = [figure_of(logits) for logits in sets]
        spread = statistics.stdev(figure.value for figure in figures)
        error = statistics.mean(figure.standard_error for figure in figures)
        assert error == pytest.approx(spread, rel=0.35)


def test_scores_of_the_sure_and_of_the_unsure() -> None:
    sure = 1000 * torch.eye(10).repeat(40, 1)
    assert inception_score(sure, splits=1) == pytest.approx(10)
    assert inception_score(torch.zeros(40, 10)) == pytest.approx(1)


def test_too_few_for_a_manifold() -> None:
    with pytest.raises(ValueError, match="more than 3 images, not 3"):
        inside_manifold(noise(5, 2), noise(3, 2))
