"""A reference as an `.npz`: the mean and covariance of features, as evaluation suites publish them.

Knows the files of the ADM suite, `mu` and `sigma` (and in its reference batches `arr_0`, images),
and writes the same with two entries more. Does not know what made the features.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lpd_export.errors import UserError
from lpd_export.evaluation.metrics import Moments
from lpd_export.files import check_file, write_atomically

MEAN, COVARIANCE, FEATURES, COUNT = "mu", "sigma", "features_sha256", "count"
IMAGES, LABELS = "arr_0", "arr_1"
MAX_DIMENSIONS = 16384
"""Of features; a covariance of more would take gigabytes."""
MOST_BYTES = 2**42
"""Of a file, which is not read at once: five million images of 512 px."""


@dataclass(frozen=True)
class Statistics:
    """What a file of statistics holds."""

    path: Path
    moments: Moments
    features: str | None
    """SHA-256 of the weights that made the features, where the file says it."""
    count: int | None
    """Of images, where the file says it."""

    @property
    def dimensions(self) -> int:
        return len(self.moments.mean)


def entries(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """The arrays of an `.npz`, by name, as shape and dtype; none of them is read.

    Raises:
        UserError: if it is no such file.
    """
    check_file(path, "the arrays", MOST_BYTES)
    try:
        with zipfile.ZipFile(path) as archive:
            found = {}
            for member in archive.namelist():
                if member.endswith(".npy"):
                    with archive.open(member) as file:
                        found[member.removesuffix(".npy")] = read_header(file)
            return found
    except Exception as error:  # what zipfile, zlib, NumPy and the tokenizer of its headers raise
        raise UserError(f"{path} is not an .npz of NumPy's, or is damaged: {error}") from error


def read_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an array, from the beginning of its file; the values come next.

    Raises:
        ValueError: if it is none, or images that cannot be read one after another.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    if fortran and len(shape) == 4:
        raise ValueError("images are stored in Fortran order")
    return shape, dtype


def load_arrays(path: Path, *names: str) -> dict[str, NDArray[Any]]:
    """Some arrays of an `.npz`, whose shapes were looked at before; never a pickle.

    Raises:
        UserError: if they are damaged.
    """
    try:
        with np.load(path) as file:
            return {name: file[name] for name in names}
    except Exception as error:  # as above
        raise UserError(f"{path} is damaged: {error}") from error


def _is_one(found: tuple[tuple[int, ...], np.dtype[Any]] | None, kind: str) -> bool:
    return found is not None and found[0] == () and found[1].kind == kind


def read_statistics(path: Path) -> Statistics:
    """The mean and covariance in a file.

    Raises:
        UserError: if it holds none, or none that can be.
    """
    found = entries(path)
    if MEAN not in found or COVARIANCE not in found:
        raise UserError(
            f"{path} holds {', '.join(sorted(found)) or 'nothing'}, not the mean and covariance of "
            f"features ({MEAN} and {COVARIANCE}): give a file of statistics, such as the ADM "
            "suite's, or images"
        )
    (shape, dtype), (square, square_dtype) = found[MEAN], found[COVARIANCE]
    if (
        len(shape) != 1
        or square != shape * 2
        or not 1 <= shape[0] <= MAX_DIMENSIONS
        or {dtype.kind, square_dtype.kind} != {"f"}
    ):
        raise UserError(
            f"{path} holds {MEAN} {dtype} {list(shape)} and {COVARIANCE} {square_dtype} "
            f"{list(square)}, which are not the mean [F] and covariance [F, F] of features"
        )
    # What this package adds is taken where it is what this package writes.
    added = [n for n, kind in ((FEATURES, "U"), (COUNT, "i")) if _is_one(found.get(n), kind)]
    arrays = load_arrays(path, MEAN, COVARIANCE, *added)
    mean, covariance = (arrays[name].astype(np.float64) for name in (MEAN, COVARIANCE))
    features = str(arrays[FEATURES]) if FEATURES in added else None
    count = int(arrays[COUNT]) if COUNT in added else None
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path} holds NaN or infinity: it is no statistics of features")
    if not np.allclose(covariance, covariance.T, atol=1e-4 * np.abs(covariance).max()):
        raise UserError(f"{path} holds a {COVARIANCE} that is not symmetric: it is no covariance")
    moments = Moments(torch.from_numpy(mean), torch.from_numpy(covariance))
    return Statistics(path, moments, features, count)


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Writes an `.npz` that `read_statistics` and the evaluation suites read."""
    arrays: dict[str, NDArray[Any]] = {
        MEAN: statistics.moments.mean.numpy(),
        COVARIANCE: statistics.moments.covariance.numpy(),
    }
    if statistics.features is not None:
        arrays[FEATURES] = np.array(statistics.features)
    if statistics.count is not None:
        arrays[COUNT] = np.array(statistics.count)
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    write_atomically(path, content.getvalue())
