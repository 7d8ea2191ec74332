"""A bundle of which some images fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import damage


@pytest.fixture(scope="session")
def broken_bundle(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of which one class, number 3, is NaN; leave it as it is."""

    def spoil(models: damage.Models) -> None:
        def row(weight: NDArray[Any]) -> NDArray[Any]:
            weight[64 + 3] = np.nan  # conditions come after the tokens
            return weight

        damage.change(models["decode"], "embedding", row)

    return damage.damaged(small_bundle, tmp_path_factory.mktemp("broken") / "bundle", spoil)
