"""Trains an LPD on a folder of images and a trained tokenizer, from where the last call left off.

    python scripts/train_lpd.py data/lpd-emoji
    python scripts/train_lpd.py data/lpd-emoji --export lpd.safetensors

The images are those that scripts/train_tokenizer.py takes, the tokenizer is what its --export
writes. The run's folder holds a checkpoint, a log of JSON lines and a sheet of samples. The run
ends when its loss on validation images no longer falls. With --export nothing is trained: the
weight average of the lowest such loss is written in the released format.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `training` is not installed

import click
import numpy as np
import torch
from torch import nn

from lpd_export.images import contact_sheet, save_png, to_uint8
from lpd_export.schedule.orders import KINDS, make_orders
from lpd_export.schedule.phases import group_sizes
from lpd_reference import LPD, LPDConfig, VQTokenizer, generate, load_lpd, load_tokenizer
from training.command import (
    TrainingOptions,
    execution_options,
    export_option,
    export_run,
    recipe_options,
    run_options,
    run_training,
    tell_finished,
    training_command,
)
from training.data import TrainingError, load_image_set
from training.loop import open_device
from training.lpd import LPDTask, transfer

SHEET_CLASSES = 16
SHEET_COLUMNS = 4
SHEET_STEPS = 20
SHEET_SEED = 0


@training_command("train_lpd")
@click.option(
    "--tokenizer",
    "tokenizer_path",
    default="runs/lpd-emoji/tokenizer.safetensors",
    show_default=True,
    help="A trained tokenizer's weights.",
)
@click.option(
    "--start-from",
    "start_source",
    help="An LPD's weights to begin with, a file or hf:ORG/NAME.  [default: random ones]",
)
@click.option(
    "--start-tokenizer",
    "start_tokenizer_source",
    help="The tokenizer of --start-from, if it is another; its classes may be others, too.",
)
@run_options("runs/lpd-emoji/lpd")
@export_option
@recipe_options(
    steps=40000,
    steps_help="More than before extend a run.",
    batch_size=16,
    learning_rate=1e-3,
    warmup_steps=400,
    stable=0.9,
    patience=6,
    weight_decay=0.05,
    average_decay=0.999,
)
@click.option("--dim", default=256, show_default=True)
@click.option("--depth", default=9, show_default=True)
@click.option("--heads", default=4, show_default=True)
@click.option(
    "--dropout",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.1,
    show_default=True,
    help="Share of the channels of what a block adds.",
)
@click.option(
    "--balance",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="From 0, every image is drawn as often, to 1, every class is.",
)
@click.option(
    "--null-share",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Share of the samples that get the null condition.",
)
@click.option(
    "--plain-share",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of images that are seen as they are: not mirrored, moved or recoloured.",
)
@click.option(
    "--orders",
    default="random:1,locality:1",
    show_default=True,
    help="Kinds of generation order that are trained for, each with how often; raster is another.",
)
@click.option(
    "--schedules",
    default="20:3,32:3,256:1,64:1,12:1,8:1",
    show_default=True,
    help="Decoding steps that are trained for, each with how often.",
)
@click.option(
    "--mutual-visibility/--each-query-alone",
    default=True,
    show_default=True,
    help="Whether the queries of a step see one another.",
)
@click.option("--cfg", default=3.0, show_default=True, help="Guidance of the sheet of samples.")
@execution_options
def main(
    options: TrainingOptions,
    tokenizer_path: str,
    start_source: str | None,
    start_tokenizer_source: str | None,
    dim: int,
    depth: int,
    heads: int,
    dropout: float,
    balance: float,
    null_share: float,
    plain_share: float,
    orders: str,
    schedules: str,
    mutual_visibility: bool,
    cfg: float,
) -> None:
    """Trains an LPD on a folder of images and a trained tokenizer."""
    if options.export_path is not None:
        export_run(options, options.export_path, LPD, LPDConfig)
        return
    recipe = options.recipe()
    training = load_image_set(options.images, "train")
    validation = load_image_set(options.images, "validation")
    tokenizer = load_tokenizer(tokenizer_path)
    if heads < 1 or dim % heads:
        raise TrainingError(f"--dim {dim} does not divide into --heads {heads}")
    config = LPDConfig(
        dim=dim,
        depth=depth,
        heads=heads,
        grid=training.resolution // tokenizer.config.stride,
        num_classes=len(training.class_names),
        vocab_size=tokenizer.config.codebook_size,
    )
    weights = read_schedules(schedules)
    start = load_lpd(start_source, heads=heads) if start_source is not None else None
    if start_tokenizer_source is not None:
        if start is None:
            raise TrainingError("--start-tokenizer is that of --start-from: give both")
        other = load_tokenizer(start_tokenizer_source)
        start = transfer(start, other, config, tokenizer, training.pixels)
    task = LPDTask(
        config,
        recipe,
        training,
        validation,
        tokenizer,
        open_device(options.device),
        group_sizes={count: group_sizes(config.cells, count).tolist() for count in weights},
        group_weights=weights,
        balance=balance,
        null_share=null_share,
        plain_share=plain_share,
        dropout=dropout,
        order_weights=read_orders(orders),
        mutual_visibility=mutual_visibility,
        start=start,
    )

    def preview(step: int, model: nn.Module) -> None:
        path = options.folder / "samples.png"
        write_samples(model, tokenizer, training.class_names, cfg, path)

    tell_finished(run_training(options, task, recipe, training, validation, preview))


def read_schedules(text: str) -> dict[int, float]:
    """How often each number of steps is trained for, of `STEPS:WEIGHT,...`."""
    weights = read_weights("--schedules", text)
    if not all(steps.isdecimal() for steps in weights):
        raise TrainingError(f"--schedules {text!r} is not of the form STEPS:WEIGHT,...")
    return {int(steps): weight for steps, weight in weights.items()}


def read_orders(text: str) -> dict[str, float]:
    """How often each kind of order is trained for, of `KIND:WEIGHT,...`."""
    weights = read_weights("--orders", text)
    if not weights.keys() <= set(KINDS):
        raise TrainingError(f"--orders {text!r} holds other kinds than {', '.join(KINDS)}")
    return weights


def read_weights(option: str, text: str) -> dict[str, float]:
    """Weights above 0 by name, of `NAME:WEIGHT,...`."""
    try:
        pairs = [pair.split(":") for pair in text.split(",")]
        weights = {name.strip(): float(weight) for name, weight in pairs}
    except ValueError as error:
        raise TrainingError(f"{option} {text!r} is not of the form NAME:WEIGHT,...") from error
    if not all(weight > 0 for weight in weights.values()):
        raise TrainingError(f"{option} {text!r} holds a weight that is not above 0")
    return weights


def write_samples(
    model: nn.Module, tokenizer: VQTokenizer, names: tuple[str, ...], cfg: float, path: Path
) -> None:
    """A row of samples a class, in 20 steps, locality-aware orders and linear guidance."""
    assert isinstance(model, LPD)
    shown = np.linspace(0, len(names) - 1, min(SHEET_CLASSES, len(names))).round().astype(int)
    labels = torch.from_numpy(shown.repeat(SHEET_COLUMNS))
    device = next(model.parameters()).device
    cells = model.config.cells
    sizes = group_sizes(cells, min(SHEET_STEPS, cells)).tolist()
    orders = make_orders(model.config.grid, sizes, "locality", len(labels), SHEET_SEED)
    generator = torch.Generator().manual_seed(SHEET_SEED)
    uniform = torch.rand(len(labels), cells, generator=generator)
    pictures, captions = [], []
    for part in torch.arange(len(labels)).split(SHEET_COLUMNS):
        drawn = generate(
            model,
            labels[part].to(device),
            torch.from_numpy(orders).long()[part].to(device),
            sizes,
            uniform[part].to(device),
            cfg=cfg,
        )
        with torch.inference_mode():
            pictures += list(to_uint8(tokenizer.decode(drawn.token_ids).float().cpu().numpy()))
        captions += [names[label] for label in labels[part].tolist()]
    save_png(np.asarray(contact_sheet(pictures, captions, 2 * SHEET_COLUMNS)), path)


if __name__ == "__main__":
    main()
