"""The classifier of generated images, and its training."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lpd_export.errors import UserError
from lpd_export.evaluation.classifier import Classifier, ClassifierConfig, load

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_classifier.py"
TINY = ClassifierConfig(classes=3, resolution=32, widths=(16, 32))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny() -> Classifier:
    return Classifier(TINY, ("a", "b", "c")).initialize(0).eval()


# ------------------------------------------------------------------------------ the classifier


def test_features_and_logits() -> None:
    model, images = tiny(), noise(4, 3, 32, 32).float().clamp(-1, 1)
    with torch.inference_mode():
        features, logits = model.features(images), model.logits(images)
        alone = torch.cat([model.features(image[None]) for image in images])
        assert torch.allclose(logits, model.head(features), atol=1e-6)
    assert features.shape == (4, TINY.feature_count) == (4, 32)
    assert features.dtype == logits.dtype == torch.float32
    assert (features >= 0).all()
    assert logits.shape == (4, 3)
    assert torch.allclose(features, alone, atol=1e-5)  # an image's features are its own
    assert not torch.allclose(features[0], features[1], atol=1e-3)


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[N, 3, 32, 32\], not \[2, 3, 64, 64\]"):
        tiny().features(torch.zeros(2, 3, 64, 64))


def test_the_default_is_small() -> None:
    model = Classifier(ClassifierConfig(25))
    assert sum(parameter.numel() for parameter in model.parameters()) < 750_000


@pytest.mark.parametrize("widths", [(), (16, 20), (0,)])
def test_widths_that_groups_do_not_divide_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        ClassifierConfig(3, 32, widths)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "classifier.safetensors"
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, path, model.header())
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    loaded = load(path)
    assert loaded.config == TINY
    assert loaded.class_names == ("a", "b", "c")
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    images = noise(2, 3, 32, 32).float()
    assert torch.allclose(loaded.logits(images), model.logits(images), atol=1e-5)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no classifier .*nothing"):
        load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("damage", ["cut", "no header", "other config", "no JSON", "other weights"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    model, path = tiny(), tmp_path / "classifier.safetensors"
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    header = model.header()
    if damage == "no header":
        header = {}
    elif damage == "other config":
        header["config"] = json.dumps({"classes": 3, "widths": [16, 48], "resolution": 32})
    elif damage == "no JSON":
        header["classes"] = "["
    elif damage == "other weights":
        del weights["head.bias"]
    save_file(weights, path, header)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or is not a classifier"):
        load(path)


# ---------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("train_classifier", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that differ in where a square is."""
    folder = tmp_path_factory.mktemp("images")
    corners = {"left": (2, 12), "middle": (12, 12), "right": (22, 12)}
    (folder / "classes.json").write_text(json.dumps(list(corners)))
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 4)):
        for name, (x, y) in corners.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                picture = Image.new("RGB", (32, 32), "white")
                colour = tuple(generator.integers(0, 160, 3).tolist())
                picture.paste(colour, (x, y, x + 8, y + 8))
                picture.save(folder / split / name / f"{number}.png")
    return folder


def train(script: ModuleType, *arguments: object) -> Result:
    return CliRunner().invoke(script.main, [str(argument) for argument in arguments])


def test_training_learns_and_writes_what_it_measured(
    script: ModuleType, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = script.ClassifierConfig
    monkeypatch.setattr(
        script, "ClassifierConfig", lambda classes, side: narrow(classes, side, (16, 32))
    )
    out = tmp_path / "models" / "classifier.safetensors"
    settings = ("--batch-size", 24, "--steps", 100, "--warmup-steps", 5, "--average-decay", 0.9)
    said = train(script, images, "--run", tmp_path / "run", "--out", out, *settings)
    assert said.exit_code == 0, said.output
    with safe_open(out, "pt") as file:
        header = file.metadata()
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    assert json.loads(header["classes"]) == ["left", "middle", "right"]
    assert header["features"] == "32"
    model = load(out)
    validation = script.load_image_set(images, "validation")
    right = script.logits_of(model, validation).argmax(dim=1) == validation.labels
    accuracy = float(right.float().mean())
    assert accuracy > 0.9
    assert float(header["validation_accuracy"]) == pytest.approx(accuracy, abs=1e-5)
    assert f"{100 * accuracy:.1f} % of 12 validation images right" in said.stdout


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--label-smoothing", 1, "--label-smoothing must be in [0, 1), not 1"),
        ("--balance", 2, "--balance must be between 0 and 1, not 2"),
        ("--workers", 0, "--workers must be at least 1, not 0"),
        ("--steps", 0, "--steps must be at least 1, not 0"),
    ],
)
def test_mistakes_are_one_sentence(
    script: ModuleType, images: Path, tmp_path: Path, option: str, value: float, words: str
) -> None:
    said = train(script, images, "--run", tmp_path / "run", option, value)
    assert said.exit_code == 2
    assert said.stderr.splitlines()[-1] == f"train_classifier: error: {words}"
    assert not list(tmp_path.iterdir())


def test_a_folder_without_images_is_named(script: ModuleType, tmp_path: Path) -> None:
    said = train(script, tmp_path / "nothing")
    assert said.exit_code == 2
    assert said.stderr.startswith("train_classifier: error: ")
    assert "Traceback" not in said.output
