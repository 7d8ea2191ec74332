"""Bundles that several test files use, built once a test session."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lpd_export.build.build import build
from lpd_export.build.request import BuildRequest, read_recipe
from lpd_reference import LPD, VQTokenizer
from lpd_reference.lpd import LPDConfig
from lpd_reference.vq import VQConfig

EMOJI_RECIPE = Path(__file__).parent / "data" / "lpd-emoji32" / "recipe.toml"
SMALL_NAMES = [["red panda", "firefox"], "ice-cream", "crane", ["Crane", "bird"], "monkey-face"]


@pytest.fixture(scope="session")
def emoji_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a small trained model: 32 px emoji, 20 steps; leave it as it is."""
    out = tmp_path_factory.mktemp("engines") / "emoji32"
    return build(BuildRequest(**read_recipe(EMOJI_RECIPE) | {"out": str(out)}))


def save_small_weights(folder: Path, heads: int) -> Path:
    """Writes lpd.pth (a 4x4 grid, 5 classes, heads of 64), vq.pt (16 px) and classes.json."""
    config = LPDConfig(dim=64 * heads, depth=2, heads=heads, grid=4, num_classes=5, vocab_size=64)
    torch.save({"model": LPD(config).initialize(0).state_dict()}, folder / "lpd.pth")
    tokenizer = VQTokenizer(
        VQConfig(
            channels=32,
            channel_multipliers=(1, 1, 2),
            num_res_blocks=1,
            z_channels=32,
            codebook_size=64,
        )
    )
    torch.save({"model": tokenizer.initialize(0).state_dict()}, folder / "vq.pt")
    (folder / "classes.json").write_text(json.dumps(SMALL_NAMES))
    return folder


@pytest.fixture(scope="session")
def small_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small weights with one head (see `save_small_weights`); leave it be."""
    return save_small_weights(tmp_path_factory.mktemp("weights"), heads=1)


@pytest.fixture(scope="session")
def small_bundle(small_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of `small_weights` in 4 steps; shared, so leave it as it is."""
    return build(
        BuildRequest(
            checkpoint=str(small_weights / "lpd.pth"),
            tokenizer=str(small_weights / "vq.pt"),
            steps=4,
            out=str(tmp_path_factory.mktemp("engines") / "small"),
        )
    )
