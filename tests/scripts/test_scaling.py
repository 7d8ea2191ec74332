"""scripts/scaling.py: rows of every number of steps, counted; measured while there is time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from PIL import Image

from lpd_export import Pipeline
from lpd_export.bench.work import generation_work, total
from lpd_export.bundle.manifest import Bundle
from lpd_export.schedule.phases import phase_table
from scaling import HEADINGS, cells, draw, scaling


@pytest.mark.parametrize("quick", [False, True])
def test_rows_of_steps(small_bundle: Path, tmp_path: Path, quick: bool) -> None:
    bundle = Bundle.open(small_bundle)
    with Pipeline.open(small_bundle, threads=1) as pipeline:
        rows = list(scaling(bundle, pipeline, "small", 2, quick, math.inf))
        unrun = list(scaling(bundle, pipeline, "small", 2, quick, 0))
    steps = ["16 (raster)"] if quick else ["8 (LPD)", "12 (LPD)", "16 (raster)"]
    told = [cells(row, rows) for row in rows]
    assert [row[2] for row in told] == steps
    assert all(len(row) == len(HEADINGS) and row[:2] == ["small", "16"] for row in told)
    assert all(row.seconds for row in rows)
    assert [cells(row, unrun)[6] for row in unrun] == ["not run"] * len(steps)
    raster = total(generation_work(bundle, phase_table([1] * 16)).values())
    assert rows[-1].operations == raster.operations.total()
    assert rows[-1].bytes == raster.of(2).bytes / 2
    draw([*rows, *unrun], tmp_path / "scaling.png")
    with Image.open(tmp_path / "scaling.png") as picture:
        assert picture.width > 900
