"""What sees the images: Inception as published distances have it, or a classifier of one's own.

Both give features, of which distances are made, and logits, of which scores are. Weights are read
from a file that the user has; nothing is fetched, and nothing in it is executed. Does not know
where images come from or what is made of the features.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpd_export.errors import UserError
from lpd_export.evaluation.classifier import Classifier
from lpd_export.evaluation.classifier import load as load_classifier
from lpd_export.files import sha256

Pixels = NDArray[np.uint8]

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_PLACE = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
INCEPTION_SHA256 = "6726825d"
"""What the hash of the file begins with that published distances were computed with."""
INCEPTION_LAYERS = ["2048", "logits_unbiased"]
"""Of torch-fidelity's Inception: those of its distance and of its score."""


class Seen(NamedTuple):
    """What an extractor says of images."""

    features: Tensor
    """[N, F] float32."""
    logits: Tensor
    """[N, C] float32."""


class Extractor(Protocol):
    """A network that sees images."""

    name: str
    path: Path
    sha256: str
    """Of the file with its weights."""
    dimensions: int
    """F, the number of its features."""
    side: int | None
    """Of the images that it takes, in pixels; None if of any."""
    class_names: tuple[str, ...]
    """Of its logits; empty if they are not those of a bundle's classes."""

    def see(self, pixels: Pixels) -> Seen:
        """Features and logits, on the CPU, of images [N, H, W, 3] uint8 of the right size."""


class ClassifierExtractor:
    """The features and verdicts of a classifier that `scripts/train_classifier.py` made."""

    name = "classifier"

    def __init__(self, path: Path, classifier: Classifier, device: str = "cpu") -> None:
        self.path, self.sha256 = path, sha256(path)
        self._device, self._classifier = device, classifier.to(device)
        self.dimensions = classifier.config.feature_count
        self.side: int | None = classifier.config.resolution
        self.class_names = classifier.class_names

    @torch.inference_mode()
    def see(self, pixels: Pixels) -> Seen:
        levels = torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features = self._classifier.features(levels.float() / 127.5 - 1)
            return Seen(features.cpu(), self._classifier.head(features).float().cpu())


class InceptionExtractor:
    """torch-fidelity's Inception (`inception-v3-compat`), of which FID and IS are made."""

    name = "inception"

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.path, self.sha256 = path, sha256(path)
        self._device, self._network = device, _load_inception(path).to(device)
        self.dimensions = 2048
        self.side: int | None = None
        self.class_names: tuple[str, ...] = ()

    @torch.inference_mode()
    def see(self, pixels: Pixels) -> Seen:
        levels = torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features, logits = self._network(levels)
            return Seen(features.cpu(), logits.cpu())


def open_extractor(path: Path, device: str = "cpu") -> Extractor:
    """The extractor of a file of weights: a classifier's `.safetensors`, or Inception's `.pth`.

    Raises:
        UserError: if there is no such file, it is of another network, or torch-fidelity is missing.
    """
    if not path.is_file():
        raise UserError(f"there is no file of features {path}: {where_features_are()}")
    if path.suffix == ".safetensors":
        return ClassifierExtractor(path, load_classifier(path), device)
    return InceptionExtractor(path, device)


def where_features_are() -> str:
    """What to do without a file of weights."""
    return (
        f"give --features {INCEPTION_FILE} of {INCEPTION_PLACE} for FID and IS as published, or "
        "a classifier.safetensors"
    )


def _load_inception(path: Path) -> Any:
    network = _import_inception()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        # torch-fidelity would unpickle the file whatever is in it: it is given the weights alone.
        weights = io.BytesIO()
        torch.save({str(name): tensor for name, tensor in state.items()}, weights)
        weights.seek(0)
        return network("inception-v3-compat", INCEPTION_LAYERS, weights)
    except (
        OSError,
        EOFError,
        pickle.UnpicklingError,
        RuntimeError,
        AttributeError,
        TypeError,
        ValueError,
        KeyError,
    ) as error:
        raise UserError(
            f"{path} holds no weights of torch-fidelity's Inception: {where_features_are()}"
        ) from error


def _import_inception() -> Any:
    """The class of the network, by itself.

    The package as a whole imports torchvision, which does not load beside a torch of another
    build; Inception needs nothing of it.
    """
    name = "torch_fidelity"
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise UserError(
            "Inception is that of torch-fidelity, which is not installed: pip install "
            "'lpd-export[evaluate]'"
        )
    package = ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations or [])
    package.__spec__ = spec
    whole = sys.modules.get(name)
    sys.modules[name] = package
    try:
        module = importlib.import_module(f"{name}.feature_extractor_inceptionv3")
    finally:
        del sys.modules[name]
        if whole is not None:
            sys.modules[name] = whole
    return module.FeatureExtractorInceptionV3
