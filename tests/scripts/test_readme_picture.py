"""scripts/readme_picture.py: the README's picture, drawn from a bundle and a measurement."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from matplotlib.figure import Figure
from PIL import Image

import claims_results
import readme_picture
from claims_results import Variant

pytestmark = pytest.mark.model


def made_up(path: Path) -> Path:
    """A measurement's file, without the hour that it takes."""
    measured = [
        Variant("raster", 256),
        *(Variant(kind, steps) for kind in ("random", "locality") for steps in (64, 20)),
        Variant("locality", 20, mutual_visibility=False),
    ]
    rows = [
        claims_results.Row(variant, 3.0 + number, 0.1, 0.5, 2.0 + number / 10, 0.1)
        for number, variant in enumerate(measured)
    ]
    floor = claims_results.Floor(1.0, 0.5, 0.9, 0.7, 1.9)
    claims_results.Claims(2000, 10, 10, 3.0, rows, floor).write(path)
    return path


def draw(*arguments: object) -> Result:
    return CliRunner().invoke(readme_picture.main, [str(word) for word in arguments])


def test_picture_of_classes_steps_and_curves(small_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "docs" / "picture.png"
    measured = made_up(tmp_path / "claims.json")
    options = ("--bundle", small_bundle, "--claims", measured, "--steps-of", 1, "--out", out)
    first = draw(*options)
    assert first.exit_code == 0, first.output
    picture = Image.open(out)
    assert picture.width >= readme_picture.WIDTH
    assert f"{picture.width}x{picture.height}" in first.output
    content = out.read_bytes()
    assert draw(*options).exit_code == 0
    assert out.read_bytes() == content  # the same seed, the same picture
    assert draw(*options, "--seed", 1).exit_code == 0
    assert out.read_bytes() != content


def test_axes_start_at_zero_or_say_that_they_do_not(tmp_path: Path) -> None:
    panels = list(Figure().subplots(1, 3))
    claims_results.draw_curves(
        claims_results.Claims.read(made_up(tmp_path / "claims.json")), panels
    )
    for axes in panels:
        said = axes.get_ylabel() == "axis does not start at 0"
        assert said == (axes.get_ylim()[0] != 0)


def test_mistakes_leave_nothing(small_bundle: Path, tmp_path: Path) -> None:
    measured, out = made_up(tmp_path / "claims.json"), tmp_path / "picture.png"
    for options, words in (
        (("--claims", tmp_path / "none.json"), "run it first"),
        (("--bundle", tmp_path / "none"), "none"),
        (("--steps-of", "no such class"), "no such class"),
        (("--steps-of", 1, "--out", measured / "picture.png"), f"cannot write {measured}"),
    ):
        given = ("--bundle", small_bundle, "--claims", measured, "--out", out)
        result = draw(*given, *options)
        assert result.exit_code == 2
        assert words in result.output
        assert len(result.output.splitlines()) == 1
        assert not out.exists()
