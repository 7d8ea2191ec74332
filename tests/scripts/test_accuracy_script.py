"""scripts/accuracy.py: the table of docs/verification.md, from what `lpd-export verify` finds."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

pytestmark = pytest.mark.model

SCRIPT = Path(__file__).parents[2] / "scripts" / "accuracy.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accuracy", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def findings(metric: str, *values: float | None, passed: bool = True) -> dict[str, Any]:
    """What `verify --json` says of these values of a metric, and of another metric."""
    found = [{"metric": metric, "value": value, "passed": passed} for value in values]
    other = {"metric": "other", "value": None, "passed": False}
    if metric == "token_agreement":
        return {"measurements": [other], "reported": found}
    return {"measurements": [*found, other], "reported": []}


@pytest.mark.parametrize(
    ("metric", "worst"),
    [
        ("cache_error", 3.0),
        ("sequence_kl", 3.0),
        ("unexplained_draws", 3.0),
        ("sequence_top_1", 1.0),
        ("image_psnr", 1.0),
        ("token_agreement", 1.0),
    ],
)
def test_the_worst_of_a_metric(script: ModuleType, metric: str, worst: float) -> None:
    assert script.worst(findings(metric, 2.0, 3.0, 1.0), metric) == worst


def test_what_json_has_no_number_for(script: ModuleType) -> None:
    psnr = "image_psnr"
    assert script.worst(findings(psnr, 50.0, None), psnr) == 50  # one is of equal images
    assert script.worst(findings(psnr, None), psnr) == math.inf
    assert math.isnan(script.worst(findings(psnr, 50.0, None, passed=False), psnr))
    assert math.isnan(script.worst(findings("kl", 1.0, None, passed=False), "kl"))


def test_the_table_is_of_a_verification(
    script: ModuleType, emoji_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "demo-fp32").symlink_to(emoji_bundle)
    options = ["--precision", "fp32", "--images", "1", "--folder", str(tmp_path)]
    said = CliRunner().invoke(script.main, options)
    assert said.exit_code == 0, said
    assert "demo, 1 images, against the PyTorch reference" in said.output
    (row,) = (line for line in said.output.splitlines() if "fp32" in line)
    assert "100.00%" in row
    assert "passed" in row
    assert (tmp_path / "demo-fp32-verification/report.html").is_file()
