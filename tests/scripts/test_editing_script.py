"""scripts/editing.py: a row of figures for each mask, order, number of steps and class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file

import editing
from lpd_export.evaluation.classifier import Classifier, ClassifierConfig

pytestmark = pytest.mark.model

NAMES = ("panda", "ice-cream", "crane", "bird", "monkey-face")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier of 16 px, and images of two classes."""
    folder = tmp_path_factory.mktemp("editing")
    judge = Classifier(ClassifierConfig(classes=5, resolution=16, widths=(16, 32)), NAMES)
    weights = {name: value.contiguous() for name, value in judge.initialize(0).state_dict().items()}
    save_file(weights, folder / "classifier.safetensors", judge.header())
    chance = np.random.default_rng(0)
    for split in ("train", "validation"):
        for name in ("ice-cream", "monkey-face"):
            (folder / split / name).mkdir(parents=True)
            for number in range(3):
                pixels = chance.integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    (folder / "classes.json").write_text(
        json.dumps([f"{i}-{name}" for i, name in enumerate(NAMES)])
    )
    names = [*NAMES[:3], "bird", "monkey-face"]
    (folder / "classes.json").write_text(json.dumps(names))
    return folder


def measure(bundle: Path, parts: Path, *options: object) -> Result:
    words = [
        "--bundle",
        bundle,
        "--images",
        parts,
        "--classifier",
        parts / "classifier.safetensors",
    ]
    words += ["--steps", 4, 2, *options]
    return CliRunner().invoke(editing.main, [str(word) for word in words])


def test_every_row_is_measured(small_bundle: Path, parts: Path, tmp_path: Path) -> None:
    said = measure(small_bundle, parts, "--short", "--samples", 4, "--out", tmp_path / "out")
    assert said.exit_code == 0, said.output
    kept = json.loads((tmp_path / "out" / "editing.json").read_text())
    rows = [editing.Row(**row) for row in kept["rows"]]
    asked = [(row.mask, row.order, row.steps, row.asked) for row in rows]
    assert asked == [
        (row.mask, row.order, row.steps, row.asked) for row in editing.rows(4, 2, short=True)
    ]
    assert kept["images"] == 4
    for row in rows:
        assert row.frechet_distance > 0
        assert 0 <= row.accuracy <= 1
        assert 3 < row.nats < 6  # of untrained weights, about the logarithm of 64 tokens
        assert row.mask in said.output
    for name in ("editing.png", "samples.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 500
    # The own class is the image's, and another is not.
    assert len({row.nats for row in rows}) > 20


def test_masks_have_the_size_that_they_say() -> None:
    shares = {"left half": 0.5, "centre": 0.25, "border": 0.75, "random 50 %": 0.5}
    for name, share in shares.items():
        assert editing.MASKS[name](16, 3).mean() == share
    assert round(float(editing.MASKS["random 90 %"](16, 3).mean()), 2) == 0.9
    assert (editing.MASKS["random 50 %"](16, 3) != editing.MASKS["random 50 %"](16, 4)).any()


def test_examples_are_drawn_without_a_measurement(small_bundle: Path, tmp_path: Path) -> None:
    said = measure(small_bundle, tmp_path / "none", "--picture", tmp_path / "picture.png")
    assert said.exit_code == 0, said.output
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width >= 1000


def test_a_mistake_is_a_sentence(small_bundle: Path, tmp_path: Path) -> None:
    said = measure(small_bundle, tmp_path / "none", "--out", tmp_path / "out")
    assert said.exit_code == 2
    assert "editing: error: " in said.output
    assert not (tmp_path / "out").exists()
