"""scripts/load.py: every image of mixed requests is run's, and every figure is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from load import draw, measure, report


@pytest.mark.slow
def test_a_server_is_measured(small_bundle: Path, tmp_path: Path) -> None:
    found = measure(small_bundle, batch=4, threads=1, replicas=None, clients=6, seconds=3, turn=0.5)
    mixed = found["mixed"]
    assert mixed["images"] >= mixed["requests"] > 0
    assert mixed["other_images"] == mixed["errors"] == 0
    assert found["many"]["served"] > 0
    assert found["lone"]["served"] > 0
    rows = list(report(found))
    assert sum(row.startswith("| ") for row in rows) == 9 + len(found["offered"])
    draw(found, tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 1000
