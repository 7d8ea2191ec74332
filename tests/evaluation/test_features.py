"""torch-fidelity's Inception, with random weights: read from a file, and from nowhere else."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from commandline import mistake
from lpd_export.errors import UserError
from lpd_export.evaluation.evaluate import evaluate
from lpd_export.evaluation.features import InceptionExtractor, _import_inception, open_extractor
from lpd_export.evaluation.request import EvaluateRequest


class Mischief:
    """What a pickle can do when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("mischief",)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights of Inception."""
    network = _import_inception()
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(network.__init__.__globals__, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(network, "load_state_dict", lambda *_: None)
        state = network("random", ["2048"]).state_dict()
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


def test_inception_sees_what_torch_fidelity_sees(weights: Path) -> None:
    extractor = open_extractor(weights)
    assert isinstance(extractor, InceptionExtractor)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    seen = extractor.see(pixels)
    assert seen.features.shape == (2, extractor.dimensions)
    assert seen.logits.shape == (2, 1008)
    network = _import_inception()("inception-v3-compat", ["2048", "logits_unbiased"], str(weights))
    features, logits = network(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert torch.allclose(seen.features, features)
    assert torch.allclose(seen.logits, logits)
    assert "torchvision" not in sys.modules


def test_too_few_for_inception_is_told_before_any_is_seen(weights: Path, tmp_path: Path) -> None:
    pixels = np.zeros((8, 64, 64, 3), np.uint8)
    np.savez(tmp_path / "drawn.npz", arr_0=pixels)
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    request = EvaluateRequest(tmp_path / "drawn.npz", tmp_path / "adm.npz", weights)
    with pytest.raises(UserError, match="gives 8 images, and a distance over 2048 features"):
        evaluate(request)


@pytest.mark.parametrize("content", ["nothing", "other weights", "mischief"])
def test_a_file_of_anything_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    if content == "nothing":
        path.write_bytes(b"")
    else:
        torch.save({"fc.weight": torch.ones(1)} if content != "mischief" else Mischief(), path)
    np.savez(tmp_path / "drawn.npz", arr_0=np.zeros((8, 64, 64, 3), np.uint8))
    said = mistake("evaluate", "drawn.npz", "--against", "drawn.npz", "--features", path)
    assert said.startswith(
        f"{path} holds no weights of torch-fidelity's Inception: give --features"
    )
    assert "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" in said
    assert not (tmp_path / "mischief").exists()


def test_without_torch_fidelity(monkeypatch: pytest.MonkeyPatch, weights: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch_fidelity" else found(name)
    )
    with pytest.raises(UserError, match=r"not installed: pip install 'lpd-export\[evaluate\]'"):
        open_extractor(weights)
