"""scripts/scaling.py: rows of every number of steps, counted; measured while there is time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lpd_export import Pipeline
from lpd_export.bench.work import generation_work, total
from lpd_export.bundle.manifest import Bundle
from lpd_export.schedule.phases import phase_table
from scaling import HEADINGS, scaling


@pytest.mark.parametrize("quick", [False, True])
def test_rows_of_steps(small_bundle: Path, quick: bool) -> None:
    bundle = Bundle.open(small_bundle)
    with Pipeline.open(small_bundle, threads=1) as pipeline:
        rows = scaling(bundle, pipeline, 2, quick, math.inf)
        unrun = scaling(bundle, pipeline, 2, quick, 0)
    steps = ["16 (raster)"] if quick else ["8 (LPD)", "12 (LPD)", "16 (raster)"]
    assert [row[0] for row in rows] == steps
    assert all(len(row) + 2 == len(HEADINGS) and row[1] == "2" for row in rows)
    assert all(float(row[4]) > 0 for row in rows)
    assert [row[4] for row in unrun] == ["not run"] * len(steps)
    raster = total(generation_work(bundle, phase_table([1] * 16)).values())
    assert float(rows[-1][2]) == pytest.approx(raster.operations.total() / 1e12, rel=1e-2)
    assert float(rows[-1][3]) == pytest.approx(raster.of(2).bytes / 2e9, rel=1e-2)
