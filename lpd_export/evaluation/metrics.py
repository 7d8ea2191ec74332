"""From features and verdicts to figures: Fréchet distance, inception score, precision and recall.

Every figure comes with its standard error, by the jackknife: the figure again and again without one
of 20 parts of the images. It tells how much another set of as many images would differ. (Sets drawn
with replacement, the bootstrap, tell less of a Fréchet distance: with every third image gone and
others there twice their distance is another one.) The same sets tell how much a Fréchet distance is
too large because there are so few images, as far as this falls as one over their number.
Knows tensors. Does not know images, files or what made the features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NEIGHBOURS = 3
"""An image's part of a manifold reaches to its third neighbour (arXiv 1904.06991)."""
SPLITS = 10
"""Parts of the images over which the inception score is averaged (arXiv 1606.03498)."""
SHUFFLING = 2020
"""Seed of the order in which images are split: torch-fidelity's, so that the score is its score."""
PARTS = 20
"""Of the images, each of which is left out once, to see how sure a figure is."""
ROWS = 2048
"""Images taken together where a product would not fit into memory."""


class Figure(NamedTuple):
    """A figure and how sure it is."""

    value: float
    standard_error: float
    bias: float
    """By how much it is too large for want of images, estimated to first order."""

    @classmethod
    def of(cls, value: float, left_out: Sequence[float]) -> Figure:
        """By the jackknife: from the value of all images and those without one part each."""
        values, count = np.array(left_out), len(left_out)
        error = math.sqrt((count - 1) * float(values.var()))
        return cls(value, error, (count - 1) * (float(values.mean()) - value))


def parts(count: int) -> Tensor:
    """The part [N] that each of `count` images, at least 4, belongs to, in turn."""
    return torch.arange(count) % min(PARTS, count // 2)


@dataclass(frozen=True)
class Moments:
    """The Gaussian that a Fréchet distance takes a set of features for."""

    mean: Tensor
    """[F] float64."""
    covariance: Tensor
    """[F, F] float64, unbiased."""

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of features [N, F], of any float type.

        Raises:
            ValueError: if there are fewer than two, or they hold NaN or infinity.
        """
        if features.ndim != 2:
            raise ValueError(f"features must be [N, F], not {list(features.shape)}")
        if len(features) < 2:
            raise ValueError(f"a covariance takes at least 2 samples, not {len(features)}")
        if not features.isfinite().all():
            raise ValueError("features must be finite, but some are NaN or infinite")
        return _Sums.of(features, features.double().mean(dim=0)).moments()


class _Sums(NamedTuple):
    """What moments follow from, and what a part takes away from."""

    point: Tensor
    """[F] float64, near the mean: sums are of differences to it, so that nothing large cancels."""
    size: int
    total: Tensor
    products: Tensor

    @classmethod
    def of(cls, features: Tensor, point: Tensor) -> _Sums:
        total, products = torch.zeros_like(point), torch.zeros(len(point), len(point)).double()
        for rows in features.split(ROWS):  # in parts, for the memory
            centred = rows.double() - point
            total += centred.sum(dim=0)
            products.addmm_(centred.T, centred)
        return cls(point, len(features), total, products)

    def without(self, part: _Sums) -> _Sums:
        return _Sums(
            self.point,
            self.size - part.size,
            self.total - part.total,
            self.products - part.products,
        )

    def moments(self) -> Moments:
        shift = self.total / self.size
        products = self.products - self.size * torch.outer(shift, shift)
        return Moments(self.point + shift, products / (self.size - 1))


def frechet_distance(a: Moments | Tensor, b: Moments | Tensor) -> float:
    """The squared Fréchet distance between Gaussians fitted to two sets of features.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), with A and B the unbiased covariances. A set
    of not many more samples than features gives too large a distance: compare sets of one size.

    Args:
        a, b: moments, or features [N, F] of any float type; computed in float64.

    Raises:
        ValueError: if a set has fewer than two samples, they differ in F, or hold NaN or infinity.
    """
    a, b = (side if isinstance(side, Moments) else Moments.of(side) for side in (a, b))
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"sets have {len(a.mean)} and {len(b.mean)} features: not comparable")
    return _distance_from(a)(b)


def _distance_from(a: Moments) -> Callable[[Moments], float]:
    """The distance to one set, whose square root is taken once."""
    root = square_root(a.covariance)

    def distance(b: Moments) -> float:
        # tr((A B)^(1/2)) is that of (A^(1/2) B A^(1/2))^(1/2): never a root of a non-symmetric
        # product, whose eigenvalues rounding makes complex.
        overlap = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
        spread = a.covariance.trace() + b.covariance.trace() - 2 * overlap
        squared = (a.mean - b.mean).square().sum() + spread
        return max(float(squared), 0.0)  # rounding can take it a little below

    return distance


def square_root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a symmetric matrix [F, F] without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def distance_figure(
    reference: Moments, features: Tensor, advance: Callable[[int, int], None] = lambda *_: None
) -> Figure:
    """The Fréchet distance of features [N, F] to a reference, which is taken as exact.

    Args:
        advance: called with how many parts were left out, and how many there are.

    Raises:
        ValueError: as `frechet_distance`.
    """
    value = frechet_distance(reference, features)
    distance = _distance_from(reference)
    sums = _Sums.of(features, features.double().mean(dim=0))
    part_of = parts(len(features))
    count = int(part_of.max()) + 1
    left_out = []
    for part in range(count):
        rest = sums.without(_Sums.of(features[part_of == part], sums.point))
        left_out.append(distance(rest.moments()))
        advance(part + 1, count)
    return Figure.of(value, left_out)


def inception_score(logits: Tensor, splits: int = SPLITS) -> float:
    """The exponential of how much a verdict says of an image, averaged over parts of the images.

    As torch-fidelity computes it: exp(mean KL(p(class | image) || p(class))) over `splits` parts
    of the images, shuffled.

    Args:
        logits: [N, C], N at least `splits`.
    """
    return _score(logits[_shuffled(len(logits))], splits)


def _shuffled(count: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(SHUFFLING).permutation(count))


def _score(logits: Tensor, splits: int) -> float:
    scores = []
    for part in range(splits):
        start, stop = part * len(logits) // splits, (part + 1) * len(logits) // splits
        log_p = logits[start:stop].double().log_softmax(dim=1)
        p = log_p.exp()
        own, shared = (p * log_p).sum(dim=1).mean(), p.mean(dim=0)
        # x log x, which is 0 at 0: a class that nothing is seen as says nothing.
        scores.append(float((own - torch.special.xlogy(shared, shared).sum()).exp()))
    return float(np.mean(scores))


def score_figure(logits: Tensor) -> Figure:
    """The inception score of logits [N, C]."""
    order, part_of = _shuffled(len(logits)), parts(len(logits))
    left_out = [_score(logits[order[part_of[order] != part]], SPLITS) for part in part_of.unique()]
    return Figure.of(inception_score(logits), left_out)


def share_figure(hits: Tensor) -> Figure:
    """The share of images of which something is true: [N] bool."""
    part_of, hits = parts(len(hits)), hits.double()
    left_out = [float(hits[part_of != part].mean()) for part in part_of.unique()]
    return Figure.of(float(hits.mean()), left_out)


# ------------------------------------------------------------------------ precision and recall


def inside_manifold(points: Tensor, manifold: Tensor) -> Tensor:
    """Which points [N, F] lie in the manifold of others [M, F]: [N] bool.

    It is the balls around the others, each as large as reaches its third neighbour among them.
    Precision is the share of generated images in the manifold of real ones; recall the share of
    real images in the manifold of generated ones.

    Raises:
        ValueError: if there are too few others to have such neighbours.
    """
    if len(manifold) <= NEIGHBOURS:
        raise ValueError(f"a manifold takes more than {NEIGHBOURS} images, not {len(manifold)}")
    radii = torch.cat(
        [
            # The nearest is the image itself.
            torch.cdist(rows, manifold).kthvalue(NEIGHBOURS + 1, dim=1).values
            for rows in manifold.split(ROWS)
        ]
    )
    return torch.cat(
        [(torch.cdist(rows, manifold) <= radii).any(dim=1) for rows in points.split(ROWS)]
    )
