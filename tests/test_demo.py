"""The model of `make demo`: it draws what it is asked for, and its card tells the truth."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import claims
import claims_results
from lpd_export import Pipeline
from lpd_export.accuracy.comparison import image_psnr
from lpd_export.accuracy.thresholds import LIMITS
from lpd_export.bundle.classes import display_name
from lpd_export.bundle.manifest import Bundle
from lpd_export.evaluation.classifier import load
from lpd_export.evaluation.request import CLASSIFIER, STATISTICS, EvaluateRequest
from lpd_export.evaluation.statistics import read_statistics
from lpd_export.files import sha256
from lpd_export.runtime.requests import GeneratedImage
from lpd_reference import load_tokenizer
from training.data import to_signed
from training.tokenizer import psnr, reconstruct

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "lpd-emoji"
NEXT = ROOT / "models" / "emoji-tokenizer"
CARD = MODEL / "README.md"
README = ROOT / "README.md"
CLAIMS_PAGE = ROOT / "docs" / "claims.md"
MEGABYTE = 10**6


@pytest.fixture(scope="module")
def exact(demo_bundle: Path) -> Pipeline:
    return Pipeline.open(demo_bundle)


@pytest.fixture(scope="module")
def images(exact: Pipeline) -> list[GeneratedImage]:
    """Two of each class."""
    return exact.generate(2 * [*range(exact.manifest.model.num_classes)], seed=0, batch=5)


def test_it_draws_what_it_is_asked_for(images: list[GeneratedImage]) -> None:
    """The classifier sees the class that was asked for, not much less often than in real images."""
    judge = load(MODEL / "classifier.safetensors")
    pixels = np.stack([image.pixels for image in images])
    with torch.inference_mode():
        seen = judge.logits(to_signed(torch.from_numpy(pixels))).argmax(dim=1)
    asked_for = torch.tensor([image.request.label for image in images])
    accuracy = float((seen == asked_for).double().mean())
    measured = next(
        row.accuracy
        for row in claims_results.Claims.read(MODEL / "claims.json").rows
        if row.variant == claims.published_variant([20])
    )
    # Classes are asked for equally often here, not as often as there are images.
    assert accuracy > measured - 0.2
    assert accuracy > 0.4


def test_int8_decodes_the_same_images(
    exact: Pipeline, images: list[GeneratedImage], demo_int8_bundle: Path
) -> None:
    """The worst of many images, of classes that no calibration saw, is what verify asks for."""
    limit = LIMITS["int8"]["image_psnr"]
    quantized = Pipeline.open(demo_int8_bundle)
    decisions = Bundle.open(demo_int8_bundle).manifest.calibration["quantization"]
    assert len(decisions["detokenize"]["kept"]) < decisions["detokenize"]["layers"] / 2
    for image in images:
        token_ids = image.token_ids[None]
        assert image_psnr(exact.detokenize(token_ids), quantized.detokenize(token_ids)) >= limit


def test_what_it_is(demo_bundle: Path) -> None:
    manifest = Bundle.open(demo_bundle).manifest
    assert (manifest.resolution, manifest.model.grid, manifest.model.head_dim) == (64, 16, 64)
    assert Bundle.open(demo_bundle).schedule().steps == 20
    names = json.loads((MODEL / "classes.json").read_text())
    assert [display_name(manifest.class_names, i) for i in range(len(names))] == names
    assert list(load(MODEL / "classifier.safetensors").class_names) == names


def test_it_can_be_evaluated(demo_bundle: Path) -> None:
    """Without a word of what sees its images and what they are compared with."""
    request, classifier = EvaluateRequest(demo_bundle), MODEL / "classifier.safetensors"
    assert request.beside(CLASSIFIER) == classifier
    assert request.beside(STATISTICS) == MODEL / "statistics.npz"
    statistics = read_statistics(MODEL / "statistics.npz")
    # Of another classifier than this: make them again, with the command in the card.
    assert statistics.features == sha256(classifier)
    assert f"{statistics.count} images are for training" in CARD.read_text("utf-8")


def test_weights_are_small_and_halves() -> None:
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert sizes["lpd.safetensors"] + sizes["vq.safetensors"] < 20 * MEGABYTE
    parameters = 0
    for name in ("lpd", "vq"):
        with safe_open(MODEL / f"{name}.safetensors", framework="pt") as file:
            tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
        assert {tensor.dtype for tensor in tensors} == {torch.float16}
        assert all(bool(tensor.isfinite().all()) for tensor in tensors)
        parameters += sum(math.prod(tensor.shape) for tensor in tensors)
    assert 6 * MEGABYTE < parameters < 10 * MEGABYTE
    everything = [*(ROOT / "models").rglob("*"), *(ROOT / "tests" / "data").rglob("*")]
    assert sum(path.stat().st_size for path in everything if path.is_file()) < 40 * MEGABYTE


@pytest.mark.parametrize("page", [CLAIMS_PAGE, CARD])
def test_pages_show_the_table_that_was_measured(page: Path) -> None:
    found = claims_results.Claims.read(MODEL / "claims.json")
    assert found.samples >= 2000
    assert claims_results.table(found) in page.read_text("utf-8")


def test_the_card_repeats_what_the_weights_say() -> None:
    text = CARD.read_text("utf-8")
    for name, figure, unit in (("vq", "validation_psnr", "dB"), ("lpd", "validation_loss", "nats")):
        with safe_open(MODEL / f"{name}.safetensors", framework="pt") as file:
            header = file.metadata()
        assert f"{float(header[figure]):.2f} {unit}" in text
        assert f"{int(header['step'])} steps" in text


def test_the_next_tokenizer_is_sharper() -> None:
    with safe_open(NEXT / "vq.safetensors", framework="pt") as file:
        header = file.metadata()
    assert float(header["validation_psnr"]) >= 30
    card = (NEXT / "README.md").read_text("utf-8")
    assert f"{float(header['validation_psnr']):.2f} dB" in card
    assert f"{int(header['step'])} steps" in card
    pixels = np.full((1, 64, 64, 3), 255, np.uint8)
    pixels[:, 12:52, 8:33] = (214, 30, 84)
    pixels[:, 26:40, 25:57] = (40, 90, 200)
    drawn = torch.from_numpy(pixels)
    before, after = (
        psnr(reconstruct(load_tokenizer(folder / "vq.safetensors"), drawn), to_signed(drawn))
        for folder in (MODEL, NEXT)
    )
    assert float(after) > float(before)


def test_licences_are_beside_the_weights() -> None:
    text = (MODEL / "licences.md").read_text("utf-8")
    for words in ("Apache License 2.0", "CC BY 4.0", "MIT License", "Google LLC", "Twitter, Inc."):
        assert words in text
    assert "licences.md" in CARD.read_text("utf-8")
    notice = (ROOT / "NOTICE").read_text("utf-8")
    assert "models/lpd-emoji/licences.md" in notice
    of_next = (NEXT / "licences.md").read_text("utf-8")
    for words in ("Microsoft", "Google LLC", "Twitter, Inc.", "Ranks.com Inc.", "CC BY 4.0"):
        assert words in of_next
        assert words in notice
    assert "models/emoji-tokenizer/licences.md" in notice


def test_pictures_of_the_readme_are_there() -> None:
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README.read_text("utf-8")):
        with Image.open(ROOT / name) as picture:
            assert picture.width >= 1000
        assert (ROOT / name).stat().st_size < 2 * MEGABYTE
