"""The scripts that try and measure long runs, short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.model, pytest.mark.slow]
SCRIPTS = Path(__file__).parents[2] / "scripts"


def said_by(script: str, *arguments: object) -> str:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said
    return said.stdout


def test_runs_that_are_killed_and_go_on(small_bundle: Path) -> None:
    asked = ["--cycles", 2, "--images", 400, "--formats", "tar", "--workers", 0]
    *_, row, _, total = said_by("kill_and_resume.py", small_bundle, *asked).splitlines()
    assert re.fullmatch(r"\| tar \| 1 \| 2 \| \d+ to \d+ \| \d \| 0 \| 0 \| 0 \|", row)
    assert total.startswith("2 kills of runs of 400 images, and as many restarts, in ")


def test_a_soak(small_bundle: Path) -> None:
    """Too short to judge memory: that the figures are there."""
    said = subprocess.run(
        [sys.executable, SCRIPTS / "soak.py", small_bundle, "--minutes", "0.1", "--every", "0.5"],
        capture_output=True,
        text=True,
    )
    assert re.search(r"\| files \| [\d.]+ \| [\d.]+ \|\n", said.stdout), said


def test_what_bulk_costs(small_bundle: Path) -> None:
    asked = ["--images", 40, "--rounds", 1, "--workers", 0, "--formats", "png"]
    *_, bench, run = said_by("bulk_speed.py", small_bundle, *asked).splitlines()
    assert bench.startswith("| bench | ")
    assert re.fullmatch(r"\| run --format png \| [\d.]+ \| [\d.]+ \| 1.000 \|", run)
