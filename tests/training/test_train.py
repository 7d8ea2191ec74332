"""Training from a folder of images: what is drawn, resuming, exporting, and wrong input."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lpd_export.schedule.phases import group_sizes
from lpd_reference import LPDConfig, VQConfig, VQTokenizer, load_lpd, load_tokenizer
from lpd_reference.lpd import LPD
from training.command import TrainingOptions
from training.data import (
    ImageSet,
    TrainingError,
    augment,
    batch_of_step,
    class_weights,
    load_image_set,
    seeded,
    to_signed,
)
from training.loop import (
    CHECKPOINT,
    LOG,
    Recipe,
    RunFolder,
    config_of,
    export_average,
    learning_rate,
    read_best,
    read_checkpoint,
    train,
)
from training.lpd import LPDTask, make_layout, query_features, transfer
from training.tokenizer import TokenizerTask, kmeans

SCRIPTS = Path(__file__).parents[2] / "scripts"
CPU = torch.device("cpu")
CLASSES = ("bar", "square")
LPD_CONFIG = LPDConfig(dim=64, depth=2, heads=1, grid=8, num_classes=2, vocab_size=32)
VQ_CONFIG = VQConfig(
    channels=32,
    channel_multipliers=(1, 1),
    num_res_blocks=1,
    z_channels=32,
    codebook_size=32,
)
TOKENIZER_OPTIONS = (
    "--batch-size=2",
    "--multipliers=1,1",
    "--z-channels=32",
    "--codebook-size=32",
    "--codebook-start=2",
    "--revive-every=2",
    "--warmup-steps=1",
    "--workers=1",
    "--validate-every=4",
)
LPD_OPTIONS = (
    "--batch-size=2",
    "--dim=64",
    "--depth=1",
    "--heads=1",
    "--warmup-steps=1",
    "--workers=1",
    "--schedules=8:1,4:1",
    "--validate-every=4",
)


def picture(kind: int, number: int) -> np.ndarray:
    """A bar or a square of 16x16 pixels in one of some colours, on white."""
    pixels = np.full((16, 16, 3), 255, np.uint8)
    colour = np.array([(200, 30, 40), (30, 60, 200), (20, 150, 60), (240, 200, 40)][number % 4])
    if kind:
        pixels[4:12, 4:12] = colour
    else:
        pixels[6:10] = colour
    return pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images in the layout that training reads."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    for split, count in (("train", 4), ("validation", 2)):
        for kind, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(picture(kind, number)).save(root / split / name / f"{number}.png")
    (root / "classes.json").write_text(json.dumps(CLASSES))
    return root


@pytest.fixture(scope="module")
def images(folder: Path) -> ImageSet:
    return load_image_set(folder, "train")


@pytest.fixture(scope="module")
def tokenizer() -> VQTokenizer:
    return VQTokenizer(VQ_CONFIG).initialize(0).requires_grad_(False)


def recipe(steps: int, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "batch_size": 4,
        "learning_rate": 2e-3,
        "warmup_steps": 2,
        "precision": "fp32",
    }
    return Recipe(steps=steps, **settings | changes)


def tokenizer_task(recipe: Recipe, images: ImageSet) -> TokenizerTask:
    return TokenizerTask(VQ_CONFIG, recipe, images, images, CPU, codebook_start=2, revive_every=2)


def lpd_task(recipe: Recipe, images: ImageSet, tokenizer: VQTokenizer, **changes: Any) -> LPDTask:
    weights = changes.pop("group_weights", {8: 1.0, 4: 1.0})
    return LPDTask(
        LPD_CONFIG,
        recipe,
        images,
        images,
        tokenizer,
        CPU,
        group_sizes={steps: group_sizes(LPD_CONFIG.cells, steps).tolist() for steps in weights},
        group_weights=weights,
        **changes,
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Everything a checkpoint says of the model, its average and its optimizer."""
    checkpoint = read_checkpoint(run)
    assert checkpoint is not None
    state = checkpoint["optimizer"]["state"]
    return {
        **{f"model {name}": tensor for name, tensor in checkpoint["model"].items()},
        **{f"average {name}": tensor for name, tensor in checkpoint["average"].items()},
        **{f"{number} {name}": t for number in state for name, t in state[number].items()},
        **checkpoint["task"],
    }


def assert_same_weights(run: Path, other: Path) -> None:
    first, second = weights(run), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# ----------------------------------------------------------------------------------- the images


def test_folder_becomes_pixels_and_labels(images: ImageSet) -> None:
    assert images.pixels.shape == (8, 16, 16, 3)
    assert images.pixels.dtype == torch.uint8
    assert images.labels.tolist() == [0] * 4 + [1] * 4
    assert images.class_names == CLASSES
    assert np.array_equal(images.pixels[5].numpy(), picture(1, 1))


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "classes.json").write_text('["a"]')
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "train" / "a" / "x.png")
    assert bool((load_image_set(tmp_path, "train").pixels == 255).all())


def test_augmentation_follows_from_the_seed_and_keeps_white(images: ImageSet) -> None:
    mirror = images.may_mirror(images.labels)
    first, again = (augment(images.pixels, seeded(3), mirror) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, augment(images.pixels, seeded(4), mirror))
    assert first.shape == (8, 3, 16, 16)
    assert float(first.min()) >= -1
    white = torch.full((8, 16, 16, 3), 255, dtype=torch.uint8)
    torch.testing.assert_close(augment(white, seeded(5), ~mirror), torch.ones(8, 3, 16, 16))
    # Small: the corner stays white, and something of the shape stays in the middle.
    assert float(first[:, :, 0, 0].min()) > 0.99
    assert float((first - to_signed(images.pixels)).abs().mean()) < 0.3


def test_only_classes_that_may_be_are_mirrored(folder: Path, tmp_path: Path) -> None:
    """The others' left halves, which are black here, stay on the left."""
    shutil.copytree(folder, tmp_path / "shapes")
    (tmp_path / "shapes" / "mirrored.json").write_text('["bar"]')
    images = load_image_set(tmp_path / "shapes", "train")
    assert images.digest() != load_image_set(folder, "train").digest()
    pixels = torch.full((64, 16, 16, 3), 255, dtype=torch.uint8)
    pixels[:, :, :8] = 0
    labels = torch.tensor([0, 1]).repeat(32)
    changed = augment(pixels, seeded(1), images.may_mirror(labels))
    left = changed[:, :, :, :8].mean(dim=(1, 2, 3)) < changed[:, :, :, 8:].mean(dim=(1, 2, 3))
    assert bool(left[labels == 1].all())
    assert 8 <= int(left[labels == 0].sum()) <= 24


def test_every_image_is_seen_before_any_is_seen_again() -> None:
    even = class_weights(torch.zeros(10, dtype=torch.int64), balance=0.5)
    seen = torch.cat([batch_of_step(step, 4, even, seed=1) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


@pytest.mark.parametrize(
    ("balance", "expected"), [(0.0, (90, 10)), (0.5, (75, 25)), (1.0, (50, 50))]
)
def test_rare_classes_are_drawn_as_often_as_asked(
    balance: float, expected: tuple[int, int]
) -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    drawn = batch_of_step(0, 1000, class_weights(labels, balance), seed=2)
    for label, share in enumerate(expected):
        assert abs(int((labels[drawn] == label).sum()) - 10 * share) <= 10


# -------------------------------------------------------------------------------- what is drawn


def test_learning_rate_warms_up_stays_and_falls() -> None:
    plan = recipe(110, learning_rate=1.0, warmup_steps=10, stable=0.5)
    rates = [learning_rate(step, plan) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10:61] == pytest.approx([1.0] * 51)
    assert all(after < before for before, after in pairwise(rates[60:]))
    assert rates[85] == pytest.approx(0.01 + 0.99 / 2)
    assert rates[-1] < 0.012
    cosine = recipe(100, learning_rate=1.0, warmup_steps=0)
    assert learning_rate(25, cosine) == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi / 4)) / 2)


def test_rate_falls_and_the_run_ends_once_the_loss_does_not(
    images: ImageSet, tokenizer: VQTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best weights are exported; a run that was cut off knows how long it has waited."""
    plan = recipe(40, patience=2, stable=0.9, warmup_steps=0)
    losses = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.1}

    def new_task() -> LPDTask:
        task = lpd_task(plan, images, tokenizer)
        step_of = (
            iter(range(2, 100, 2)) if not (tmp_path / CHECKPOINT).exists() else iter((8, 10, 12))
        )
        monkeypatch.setattr(
            task, "validate", lambda model: {"validation_loss": losses.get(next(step_of), 2.2)}
        )
        return task

    task = new_task()
    batch = task.batch

    def stopped(step: int) -> Any:
        if step == 7:
            raise KeyboardInterrupt
        return batch(step)

    monkeypatch.setattr(task, "batch", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(task, plan, tmp_path, validate_every=2, log_every=1, checkpoint_minutes=0)
    figures = train(new_task(), plan, tmp_path, validate_every=2, log_every=1)
    # Two validations without a better one at step 8, and the 4 steps that the rate falls in.
    assert figures["step"] == 12
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / LOG).open()]
    assert rates[:9] == pytest.approx([plan.learning_rate] * 9)
    assert all(after < before for before, after in pairwise(rates[8:]))
    best = read_best(tmp_path)
    assert best is not None
    assert (best["step"], best["figures"]["validation_loss"]) == (4, 2.0)


def test_group_sizes_are_drawn_from_the_list(images: ImageSet, tokenizer: VQTokenizer) -> None:
    task = lpd_task(recipe(10), images, tokenizer, group_weights={16: 1.0, 8: 3.0, 4: 1.0})
    drawn = Counter(task.draw_steps(step) for step in range(1000))
    assert set(drawn) == {16, 8, 4}
    assert 550 < drawn[8] < 650
    assert task.validation_steps == 8


def test_conditions_are_replaced_at_the_stated_rate(
    images: ImageSet, tokenizer: VQTokenizer
) -> None:
    task = lpd_task(recipe(10, batch_size=16), images, tokenizer, null_share=0.25)
    share = torch.cat([task.draw_nulls(step) for step in range(500)]).float().mean()
    assert abs(float(share) - 0.25) < 0.02
    # A sample whose condition is replaced learns nothing of its class.
    batch = task.batch(0)
    for nulls, learned in ((True, False), (False, True)):
        batch["nulls"][:] = nulls
        loss = task.loss(0, batch).loss
        of_classes, of_null = torch.autograd.grad(
            loss, [task.model.class_emb.weight, task.model.fake_latent]
        )
        assert bool(of_classes.any()) is learned
        assert bool(of_null.any()) is not learned


@pytest.mark.parametrize(
    ("kinds", "share"),
    [("random:2", 0.0), ("random:1,locality:1", 0.5), ("locality:1", 1.0)],
)
def test_orders_are_permutations_of_the_stated_kinds(
    images: ImageSet, tokenizer: VQTokenizer, kinds: str, share: float
) -> None:
    weights = script("train_lpd.py").read_orders(kinds)
    task = lpd_task(recipe(40, batch_size=8), images, tokenizer, order_weights=weights)
    drawn = [(task.draw_steps(step), task.batch(step)["orders"]) for step in range(40)]
    orders = torch.cat([orders for _, orders in drawn])
    assert torch.equal(orders.sort(dim=1).values, torch.arange(64).expand(320, 64))
    assert len({tuple(order) for order in orders.tolist()}) == 320

    def spread(order: torch.Tensor) -> bool:
        """Whether few of the second group's 16 cells touch: of random ones 13 pairs do."""
        cells = order[1:17]
        apart = (cells[:, None] // 8 - cells // 8).abs().max((cells[:, None] % 8 - cells % 8).abs())
        return int((apart == 1).sum()) // 2 < 8

    assert task.group_sizes[4][:2] == [1, 16]
    kept = [spread(order) for steps, orders in drawn if steps == 4 for order in orders]
    assert abs(np.mean(kept) - share) < 0.2


def test_raster_orders_go_row_by_row(images: ImageSet, tokenizer: VQTokenizer) -> None:
    task = lpd_task(recipe(3), images, tokenizer, order_weights={"raster": 1.0})
    assert torch.equal(task.batch(0)["orders"], torch.arange(64).expand(4, 64))


# ------------------------------------------------------------------------------------ the losses


@pytest.mark.parametrize(
    ("sizes", "mutual"),
    [
        ([1] * 256, True),
        ([1, 100, 155], True),
        ([1, 100, 155], False),
        ([256], True),
        ([1, 3, 60, 64, 64, 64], True),
    ],
)
def test_training_pass_equals_the_reference(sizes: list[int], mutual: bool) -> None:
    config = LPDConfig(dim=32, depth=2, heads=2, grid=16, num_classes=3, vocab_size=16)
    model = LPD(config).initialize(0)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(16, (2, 256), generator=generator)
    orders = torch.rand(2, 256, generator=generator).argsort(dim=1)
    labels = torch.tensor([0, 2])
    layout = make_layout(sizes, CPU, torch.float32, mutual)
    condition = model.condition(labels, 2)
    logits = model.head(query_features(model, tokens, condition, orders, layout))
    expected = model(tokens, labels, orders, sizes, mutual)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-6)
    used = [parameter for name, parameter in model.named_parameters() if name != "fake_latent"]
    gradients = torch.autograd.grad(logits.square().sum(), used)
    expected_gradients = torch.autograd.grad(expected.square().sum(), used)
    for gradient, right in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-3, atol=1e-5 * float(right.abs().max()))


def test_kmeans_finds_the_clusters() -> None:
    generator = seeded(1)
    centres = torch.nn.functional.normalize(torch.randn(6, 8, generator=generator), dim=1)
    # One cluster is a thousand times as large, as that of a blank background is.
    counts = torch.tensor([5000, 5, 5, 5, 5, 5])
    latents = centres.repeat_interleave(counts, dim=0)
    latents = latents + 0.01 * torch.randn(latents.shape, generator=generator)
    found = kmeans(torch.nn.functional.normalize(latents, dim=1), 12, generator)
    assert float((centres @ found.T).amax(dim=1).min()) > 0.999


def test_tokenizer_learns_and_uses_its_codebook(images: ImageSet, tmp_path: Path) -> None:
    plan = recipe(60, average_decay=0.9)
    task = tokenizer_task(plan, images)
    before = task.validate(task.model)["validation_psnr"]
    figures = train(task, plan, tmp_path / "run", validate_every=1000)
    lines = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert figures["validation_psnr"] > before + 3
    assert figures["codebook_usage"] > 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lpd_learns(
    images: ImageSet, tokenizer: VQTokenizer, tmp_path: Path, precision: str
) -> None:
    plan = recipe(60, precision=precision, average_decay=0.9, batch_size=8)
    task = lpd_task(plan, images, tokenizer)
    untrained = task.validate(task.model)["validation_loss"]
    assert abs(untrained - math.log(32)) < 0.1
    figures = train(task, plan, tmp_path / "run", validate_every=1000)
    assert figures["validation_loss"] < 0.85 * untrained


def test_lpd_begins_with_given_weights(
    images: ImageSet, tokenizer: VQTokenizer, tmp_path: Path
) -> None:
    plan = recipe(30, average_decay=0.9, batch_size=8)
    figures = train(lpd_task(plan, images, tokenizer), plan, tmp_path / "first")
    checkpoint = read_checkpoint(tmp_path / "first")
    assert checkpoint is not None
    path = tmp_path / "lpd.safetensors"
    export_average(LPD(LPD_CONFIG), checkpoint, path, {})
    task = lpd_task(plan, images, tokenizer, start=load_lpd(path))
    begun = task.validate(task.model)["validation_loss"]
    assert begun == pytest.approx(figures["validation_loss"], abs=0.01)
    assert train(task, plan, tmp_path / "second")["validation_loss"] < begun - 0.05
    # The run is that of these weights.
    with pytest.raises(TrainingError, match="started with start digest "):
        train(lpd_task(plan, images, tokenizer), plan, tmp_path / "second")
    other = LPD(replace(LPD_CONFIG, depth=1))
    with pytest.raises(TrainingError, match="to begin with has depth 1, not 2: give the settings"):
        lpd_task(plan, images, tokenizer, start=other)


def test_a_share_of_the_images_is_seen_as_it_is(images: ImageSet, tokenizer: VQTokenizer) -> None:
    for share in (0.0, 0.5, 1.0):
        task = lpd_task(recipe(3, batch_size=64), images, tokenizer, plain_share=share)
        seen = {image.numpy().tobytes() for image in to_signed(images.pixels)}
        plain = [image.numpy().tobytes() in seen for image in task.batch(0)["images"]]
        assert abs(sum(plain) / 64 - share) < 0.2 * (0 < share < 1) + 1e-9


def test_what_an_lpd_learned_is_transferred_to_other_tokens_and_classes(
    images: ImageSet, tokenizer: VQTokenizer
) -> None:
    """The same codes in another order, and more classes: the same model, but for its classes."""
    start = LPD(LPD_CONFIG).initialize(3)
    config = replace(LPD_CONFIG, num_classes=5)
    shuffled = torch.randperm(LPD_CONFIG.vocab_size, generator=torch.Generator().manual_seed(1))
    other = VQTokenizer(VQ_CONFIG).initialize(0).requires_grad_(False)
    other.quantize.embedding.weight.copy_(tokenizer.quantize.embedding.weight[shuffled])
    many = images.pixels.repeat(200, 1, 1, 1)
    model = transfer(start, tokenizer, config, other, many)
    token_ids = other.encode(to_signed(images.pixels))
    assert token_ids.unique().numel() > 2
    assert torch.equal(shuffled[token_ids], tokenizer.encode(to_signed(images.pixels)))
    orders = torch.arange(config.cells).expand(len(token_ids), -1)
    sizes = group_sizes(config.cells, 8).tolist()
    before = start(shuffled[token_ids], None, orders, sizes)
    after = model(token_ids, None, orders, sizes)
    used = token_ids.unique()
    torch.testing.assert_close(after[..., used], before[..., shuffled[used]], atol=2e-3, rtol=0.02)
    every_class = start.class_emb.weight.mean(dim=0).expand(5, -1)
    torch.testing.assert_close(model.class_emb.weight, every_class)


def test_a_run_begins_with_an_lpd_of_other_classes(
    folder: Path, tokenizer: VQTokenizer, tmp_path: Path
) -> None:
    vq, lpd = tmp_path / "vq.safetensors", tmp_path / "lpd.safetensors"
    save_file(tokenizer.state_dict(), vq)
    save_file(LPD(LPDConfig(64, 1, 1, 8, 3, 32)).initialize(0).state_dict(), lpd)
    options = (folder, *LPD_OPTIONS, "--steps=2", "--run", tmp_path / "run", "--tokenizer", vq)
    said = answer("train_lpd.py", *options, "--start-from", lpd)
    assert (said.exit_code, said.stderr.count("\n")) == (2, 1)
    assert "has num_classes 3, not 2" in said.stderr
    assert "--start-tokenizer" in said.stderr
    said = answer("train_lpd.py", *options, "--start-tokenizer", vq)
    assert said.exit_code == 2
    assert said.stderr.endswith("--start-tokenizer is that of --start-from: give both\n")
    assert not (tmp_path / "run").exists()
    said = answer("train_lpd.py", *options, "--start-from", lpd, "--start-tokenizer", vq)
    assert said.exit_code == 0
    checkpoint = read_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert (checkpoint["step"], checkpoint["settings"]["num_classes"]) == (2, 2)


def test_what_cannot_be_transferred_is_refused(images: ImageSet, tokenizer: VQTokenizer) -> None:
    start = LPD(LPD_CONFIG)
    with pytest.raises(TrainingError, match="has depth 2, not 1"):
        transfer(start, tokenizer, replace(LPD_CONFIG, depth=1), tokenizer, images.pixels)
    finer = VQTokenizer(replace(VQ_CONFIG, channel_multipliers=(1,)))
    with pytest.raises(TrainingError, match="has stride 1, not 2"):
        transfer(start, finer, LPD_CONFIG, tokenizer, images.pixels)
    larger = VQTokenizer(replace(VQ_CONFIG, codebook_size=64))
    with pytest.raises(TrainingError, match="has 32 tokens, its tokenizer 64"):
        transfer(start, larger, LPD_CONFIG, tokenizer, images.pixels)


# ----------------------------------------------------------------------------- stopping, resuming


def test_parts_of_a_batch_give_the_gradient_of_the_whole(
    images: ImageSet, tokenizer: VQTokenizer, tmp_path: Path
) -> None:
    plan = recipe(3)
    for workers in (1, 3):
        train(lpd_task(plan, images, tokenizer), plan, tmp_path / str(workers), workers=workers)
    first, second = weights(tmp_path / "1"), weights(tmp_path / "3")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["tokenizer", "lpd"])
def test_resumed_run_equals_an_uninterrupted_one(
    kind: str,
    images: ImageSet,
    tokenizer: VQTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = recipe(6)

    def new_task() -> Any:
        if kind == "tokenizer":
            return tokenizer_task(plan, images)
        return lpd_task(plan, images, tokenizer)

    train(new_task(), plan, tmp_path / "straight", log_every=1)
    task = new_task()
    batch = task.batch

    def killed(step: int) -> Any:
        if step == 4:
            raise KeyboardInterrupt  # as abrupt as a kill: nothing is saved on the way out
        return batch(step)

    monkeypatch.setattr(task, "batch", killed)
    with pytest.raises(KeyboardInterrupt):
        train(task, plan, tmp_path / "cut", log_every=1, checkpoint_minutes=0)
    # As if the last checkpoint were older than the log.
    checkpoint = read_checkpoint(tmp_path / "cut")
    assert checkpoint is not None
    assert checkpoint["step"] == 4
    with open(tmp_path / "cut" / LOG, "a") as file:
        file.write('{"step": 5}\n{"step": 6, "lo')
    train(new_task(), plan, tmp_path / "cut", log_every=1)
    assert_same_weights(tmp_path / "straight", tmp_path / "cut")

    def losses(run: str) -> list[tuple[int, float]]:
        lines = (tmp_path / run / LOG).read_text().splitlines()
        return [(line["step"], line["loss"]) for line in map(json.loads, lines)]

    assert losses("cut") == losses("straight")
    assert len(losses("cut")) == 6


def test_run_can_be_extended_but_not_shortened(
    images: ImageSet, tokenizer: VQTokenizer, tmp_path: Path
) -> None:
    for steps in (3, 5):
        plan = recipe(steps)
        assert train(lpd_task(plan, images, tokenizer), plan, tmp_path)["step"] == steps
    plan = recipe(4)
    with pytest.raises(TrainingError, match="taken 5 steps already: give --steps 5 or more"):
        train(lpd_task(plan, images, tokenizer), plan, tmp_path)


def test_other_settings_are_refused(
    images: ImageSet, tokenizer: VQTokenizer, tmp_path: Path
) -> None:
    plan = recipe(3)
    train(lpd_task(plan, images, tokenizer), plan, tmp_path)
    other = recipe(3, batch_size=2)
    with pytest.raises(TrainingError, match="started with batch size 4, not 2: "):
        train(lpd_task(other, images, tokenizer), other, tmp_path)
    with pytest.raises(TrainingError, match=r"started with dropout 0\.1, not 0\.2: "):
        train(lpd_task(plan, images, tokenizer, dropout=0.2), plan, tmp_path)
    fewer = ImageSet(images.pixels[:6], images.labels[:6], images.class_names)
    with pytest.raises(TrainingError, match="started with images digest "):
        train(lpd_task(plan, fewer, tokenizer), plan, tmp_path)


def test_loss_that_is_not_finite_stops_training(
    images: ImageSet, tokenizer: VQTokenizer, tmp_path: Path
) -> None:
    plan = recipe(3)
    task = lpd_task(plan, images, tokenizer)
    with torch.no_grad():
        task.model.head.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 1: lower --learning-rate"):
        train(task, plan, tmp_path)
    assert read_checkpoint(tmp_path) is None


def test_one_process_at_a_time(images: ImageSet, tokenizer: VQTokenizer, tmp_path: Path) -> None:
    plan = recipe(3)
    (tmp_path / ".half.tmp").write_text("what a kill left")
    with (
        RunFolder(tmp_path).locked(),
        pytest.raises(TrainingError, match="another process is training in"),
    ):
        train(lpd_task(plan, images, tokenizer), plan, tmp_path)
    train(lpd_task(plan, images, tokenizer), plan, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", CHECKPOINT, LOG]


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPTS / script), *map(str, arguments)]


def script(name: str) -> Any:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(name: str, *arguments: object) -> Result:
    """What a script says and how it ends, run in this process."""
    return CliRunner().invoke(script(name).main, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_killed_and_stopped_process_goes_on(folder: Path, tmp_path: Path) -> None:
    """A tokenizer is trained, killed, stopped and finished."""
    run = tmp_path / "run"
    options = [folder, *TOKENIZER_OPTIONS, "--run", run, "--checkpoint-minutes=0"]

    def interrupt(number: signal.Signals, at_step: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command("train_tokenizer.py", *options, "--steps=400"),
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            checkpoint = read_checkpoint(run)
            if checkpoint is not None and checkpoint["step"] >= at_step:
                break
            time.sleep(0.05)
        process.send_signal(number)
        return process

    killed = interrupt(signal.SIGKILL, 3)
    killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL
    checkpoint = read_checkpoint(run)
    assert checkpoint is not None
    reached = checkpoint["step"]
    stopped = interrupt(signal.SIGTERM, reached + 2)
    _, said = stopped.communicate(timeout=300)
    assert stopped.returncode == 130, said
    assert "train_tokenizer: stopped after " in said
    assert "the same command goes on from it" in said
    checkpoint = read_checkpoint(run)
    assert checkpoint is not None
    reached = checkpoint["step"]

    finished = answer("train_tokenizer.py", *options, f"--steps={reached + 2}")
    assert finished.exit_code == 0, finished.stderr
    steps = [json.loads(line)["step"] for line in (run / LOG).read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == reached + 2
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock",
        CHECKPOINT,
        LOG,
        "reconstructions.png",
    ]


@pytest.mark.slow
def test_the_demo_is_made_from_nothing_and_gone_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command trains all of it; given again, it takes up what is missing, and only that."""
    monkeypatch.syspath_prepend(SCRIPTS)
    demo = importlib.import_module("train_demo")
    monkeypatch.setattr(demo, "TOKENIZER", ("--steps=3", *TOKENIZER_OPTIONS))
    options = ("--steps=3", *LPD_OPTIONS)
    raster = (*options, "--orders=raster:1", "--each-query-alone")
    monkeypatch.setattr(demo, "LPDS", {"lpd": options, "raster": raster})
    few = ("--steps=2", "--batch-size=2", "--warmup-steps=1")
    monkeypatch.setattr(demo, "CLASSIFIER", few)
    made = ("tokenizer", "lpd", "raster", "classifier")

    def contents() -> dict[str, torch.Tensor]:
        weights = {name: load_file(tmp_path / f"{name}.safetensors") for name in made}
        return {f"{name} {key}": weights[name][key] for name in made for key in weights[name]}

    arguments = [f"--data={folder}", f"--runs={tmp_path}"]
    assert CliRunner().invoke(demo.main, arguments).exit_code == 0
    first = contents()
    assert load_tokenizer(tmp_path / "tokenizer.safetensors").config == VQ_CONFIG
    assert load_lpd(tmp_path / "lpd.safetensors").config == LPDConfig(64, 1, 1, 8, 2, 32)
    assert (tmp_path / "lpd" / "samples.png").exists()
    for name in ("lpd.safetensors", "classifier.safetensors", f"lpd/{CHECKPOINT}"):
        (tmp_path / name).unlink()
    written = (tmp_path / "tokenizer" / CHECKPOINT).stat().st_mtime_ns
    assert CliRunner().invoke(demo.main, arguments).exit_code == 0
    torch.testing.assert_close(contents(), first, rtol=0, atol=0)
    assert (tmp_path / "tokenizer" / CHECKPOINT).stat().st_mtime_ns == written

    # On the same tokenizer, but without its run.
    other = tmp_path / "other"
    given = f"--tokenizer={tmp_path / 'tokenizer.safetensors'}"
    assert CliRunner().invoke(demo.main, [*arguments[:1], f"--runs={other}", given]).exit_code == 0
    assert not list(other.glob("tokenizer*"))
    again = load_file(other / "lpd.safetensors")
    torch.testing.assert_close(again, load_file(tmp_path / "lpd.safetensors"), rtol=0, atol=0)

    # One that is not there is told before anything is trained.
    none = tmp_path / "none"
    said = CliRunner().invoke(demo.main, [arguments[0], f"--runs={none}", "--tokenizer=no.pt"])
    assert (said.exit_code, none.exists()) == (2, False)
    assert "no.pt" in said.stderr


@pytest.mark.parametrize(
    ("device", "asked", "expected"),
    [("cpu", None, 5), ("cuda", None, 1), ("cpu", 3, 3), ("cuda", 2, 2)],
)
def test_workers_are_those_asked_for_or_the_cores(
    device: str, asked: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    options = TrainingOptions(
        images=Path("images"),
        folder=Path("run"),
        steps=3,
        batch_size=2,
        learning_rate=1e-3,
        warmup_steps=1,
        weight_decay=0.0,
        average_decay=0.9,
        device=device,
        workers=asked,
    )
    assert options.worker_count == expected


# ------------------------------------------------------------------------------------- exporting


def test_exported_weights_are_the_average_and_load(
    images: ImageSet, tokenizer: VQTokenizer, tmp_path: Path
) -> None:
    plan = recipe(3)
    task = lpd_task(plan, images, tokenizer)
    figures = train(task, plan, tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint is not None
    model = LPD(config_of(checkpoint, LPDConfig))
    path = tmp_path / "lpd.safetensors"
    export_average(model, checkpoint, path, {"dataset": "shapes"})
    loaded = load_lpd(path)
    assert loaded.config == LPD_CONFIG
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(32, (2, 64), generator=generator)
    orders = torch.rand(2, 64, generator=generator).argsort(dim=1)
    labels, sizes = torch.tensor([0, 1]), group_sizes(64, 8).tolist()
    expected = model(tokens, labels, orders, sizes)
    torch.testing.assert_close(loaded(tokens, labels, orders, sizes), expected, atol=2e-3, rtol=0)
    assert not torch.allclose(task.model(tokens, labels, orders, sizes), expected, atol=2e-3)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        assert {str(file.get_tensor(key).dtype) for key in file.keys()} == {"torch.float16"}  # noqa: SIM118
    assert metadata["step"] == "3"
    assert metadata["dataset"] == "shapes"
    assert float(metadata["loss"]) == pytest.approx(figures["loss"], rel=1e-3)
    with pytest.raises(TrainingError, match="trains another model"):
        config_of(checkpoint, VQConfig)
    with pytest.raises(TrainingError, match=r"must end in \.safetensors"):
        export_average(model, checkpoint, tmp_path / "lpd.pth", {})


# ----------------------------------------------------------------------------------- wrong input


def test_mistakes_are_answered_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    names = tmp_path / "nowhere" / "classes.json"
    said = answer("train_tokenizer.py", names.parent)
    assert said.exit_code == 2
    assert said.stderr == (
        f"train_tokenizer: error: cannot read {names}: No such file or directory; it must hold a "
        "JSON list of the class names\n"
    )
    said = answer("train_lpd.py", folder, "--tokenizer", tmp_path / "none.safetensors")
    assert said.exit_code == 2
    assert said.stderr == (
        f"train_lpd: error: there is no checkpoint {tmp_path / 'none.safetensors'}\n"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("random", "--orders 'random' is not of the form NAME:WEIGHT,..."),
        ("random:0", "--orders 'random:0' holds a weight that is not above 0"),
        ("spiral:1", "--orders 'spiral:1' holds other kinds than locality, random, raster"),
    ],
)
def test_orders_that_are_none_are_named(text: str, said: str) -> None:
    with pytest.raises(TrainingError, match=re.escape(said)):
        script("train_lpd.py").read_orders(text)


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    def mistake() -> str:
        with pytest.raises(TrainingError) as error:
            load_image_set(tmp_path, "train")
        assert "\n" not in str(error.value)
        return str(error.value)

    names = tmp_path / "classes.json"
    names.write_text("{")
    assert "is not JSON" in mistake()
    names.write_text('["a", "a"]')
    assert "each once" in mistake()
    names.write_text('["a"]')
    assert "there is no folder" in mistake()
    (tmp_path / "train" / "a").mkdir(parents=True)
    assert "holds no images" in mistake()
    first, second = tmp_path / "train" / "a" / "1.png", tmp_path / "train" / "a" / "2.png"
    Image.new("RGB", (16, 16)).save(first)
    Image.new("RGB", (8, 8)).save(second)
    assert f"{second} is 8x8 pixels, where the images before it are 16x16" in mistake()
    Image.new("RGB", (8, 16)).save(second)
    assert "must be square" in mistake()
    second.write_bytes(first.read_bytes()[:40])
    assert f"cannot read the image {second}" in mistake()
    second.unlink()
    (tmp_path / "train" / "b").mkdir()
    assert "is not a class of" in mistake()


def test_wrong_settings_are_named(images: ImageSet, tokenizer: VQTokenizer, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="--warmup-steps 5 must be below --steps, which is 5"):
        recipe(5, warmup_steps=5)
    with pytest.raises(TrainingError, match="--batch-size must be at least 1, not 0"):
        recipe(5, batch_size=0)
    (tmp_path / CHECKPOINT).write_bytes(b"nonsense")
    plan = recipe(3)
    with pytest.raises(TrainingError, match="is damaged or is not the checkpoint of a run"):
        train(lpd_task(plan, images, tokenizer), plan, tmp_path)
