"""Trains the small classifier that judges generated images, from where the last call left off.

    python scripts/train_classifier.py data/lpd-emoji
    python scripts/train_classifier.py data/lpd-emoji --steps 500 --out classifier.safetensors

The images are `<folder>/train/<class>/<file>.png` and `<folder>/validation/...`, all of one size,
with the class names in `<folder>/classes.json`, as scripts/prepare_emoji.py makes them. It takes
a few minutes on one core. The weight average is written in float16; the accuracy that is printed
and kept in the file's header is that of the written weights.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # `training` is not installed

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from lpd_export.evaluation.classifier import Classifier, ClassifierConfig
from training.command import (
    TrainingOptions,
    recipe_options,
    run_options,
    run_training,
    seed_option,
    training_command,
)
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
    Batch,
    Figures,
    Outcome,
    Recipe,
    autocast,
    export_average,
    read_checkpoint,
)

AUGMENTATION = 7
"""The stream of random numbers that augmentation draws from."""
VALIDATION_BATCH = 64


class ClassifierTask:
    """A `training.loop.Task` that trains a Classifier to name the class of an image."""

    def __init__(
        self,
        config: ClassifierConfig,
        recipe: Recipe,
        images: ImageSet,
        validation: ImageSet,
        *,
        label_smoothing: float,
        balance: float,
    ) -> None:
        if {images.resolution, validation.resolution} != {config.resolution}:
            raise TrainingError(
                f"images of {images.resolution} and {validation.resolution} pixels cannot be "
                f"trained on: both sets must have {config.resolution}"
            )
        if not 0 <= label_smoothing < 1:
            raise TrainingError(f"--label-smoothing must be in [0, 1), not {label_smoothing:g}")
        if not 0 <= balance <= 1:
            raise TrainingError(f"--balance must be between 0 and 1, not {balance:g}")
        self.classifier = Classifier(config, images.class_names).initialize(recipe.seed)
        self.model: nn.Module = self.classifier
        self.config, self.recipe = config, recipe
        self.images, self.validation = images, validation
        self.label_smoothing, self.balance = label_smoothing, balance
        self.weights = class_weights(images.labels, balance)

    def settings(self) -> dict[str, Any]:
        return {
            **asdict(self.config),
            "label_smoothing": self.label_smoothing,
            "balance": self.balance,
            "images_digest": self.images.digest(),
        }

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        pass

    def batch(self, step: int) -> Batch:
        """Augmented images [B, 3, H, H] and their labels [B]."""
        recipe = self.recipe
        places = batch_of_step(step, recipe.batch_size, self.weights, recipe.seed)
        pixels, labels = self.images.pixels[places], self.images.labels[places]
        generator = seeded(recipe.seed, AUGMENTATION, step)
        images = augment(pixels, generator, self.images.may_mirror(labels))
        return {"images": images, "labels": labels}

    def loss(self, step: int, part: Batch) -> Outcome:
        """Cross-entropy with smoothed labels."""
        with autocast(torch.device("cpu"), self.recipe.precision):
            logits = self.classifier.logits(part["images"])
        labels = part["labels"]
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return Outcome(loss, {"accuracy": float(accuracy)}, {})

    def after_update(
        self, step: int, kept: Batch, average: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Figures:
        return {}

    def validate(self, model: nn.Module) -> Figures:
        """Cross-entropy and accuracy on the validation images, over images and over classes."""
        assert isinstance(model, Classifier)
        labels = self.validation.labels
        logits = logits_of(model, self.validation)
        right = logits.argmax(dim=1) == labels
        of_classes = [float(right[labels == label].float().mean()) for label in labels.unique()]
        return {
            "validation_loss": float(F.cross_entropy(logits, labels)),
            "validation_accuracy": float(right.float().mean()),
            "validation_class_accuracy": sum(of_classes) / len(of_classes),
        }


@torch.inference_mode()
def logits_of(model: Classifier, images: ImageSet) -> Tensor:
    """[N, classes] float32 of all images, in float32."""
    parts = [model.logits(to_signed(part)) for part in images.pixels.split(VALIDATION_BATCH)]
    return torch.cat(parts)


@training_command("train_classifier")
@run_options("runs/lpd-emoji/classifier")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("models/lpd-emoji/classifier.safetensors"),
    show_default=True,
    help="The file of the weights.",
)
@recipe_options(
    steps=2000,
    batch_size=64,
    learning_rate=2e-3,
    warmup_steps=100,
    weight_decay=0.05,
    average_decay=0.998,
)
@click.option("--label-smoothing", default=0.1, show_default=True)
@click.option(
    "--balance",
    default=0.5,
    show_default=True,
    help="0 shows every image as often, 1 every class.",
)
@click.option("--workers", default=1, show_default=True, help="Threads; a core each.")
@seed_option
def main(options: TrainingOptions, out: Path, label_smoothing: float, balance: float) -> None:
    """Trains the small classifier that judges generated images."""
    recipe = options.recipe(betas=(0.9, 0.99))
    training = load_image_set(options.images, "train")
    validation = load_image_set(options.images, "validation")
    task = ClassifierTask(
        ClassifierConfig(len(training.class_names), training.resolution),
        recipe,
        training,
        validation,
        label_smoothing=label_smoothing,
        balance=balance,
    )
    run_training(options, task, recipe, training, validation)
    figures = export(task, options.folder, out, options.images)
    Console(stderr=True).print(table_of(task))
    click.echo(
        f"{out}: {out.stat().st_size / 1e6:.2f} MB, "
        f"{100 * figures['validation_accuracy']:.1f} % of {len(validation)} validation images "
        f"right, {100 * figures['validation_class_accuracy']:.1f} % as the mean over classes"
    )


def export(task: ClassifierTask, folder: Path, out: Path, images: Path) -> Figures:
    """Writes the run's weight average; the task's model is then what was written.

    Returns the validation figures of the written weights.
    """
    checkpoint = read_checkpoint(folder)
    if checkpoint is None:
        raise TrainingError(f"there is no checkpoint in {folder}: train first")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot write {out}: {error.strerror or error}") from error
    average = checkpoint["average"]
    with torch.no_grad():
        for name, weight in task.model.state_dict().items():
            weight.copy_(average[f"module.{name}"].half())  # rounded as in the file
    figures = task.validate(task.classifier)
    header = {name: f"{value:.6g}" for name, value in figures.items()}
    header |= {"dataset": images.name, "features": str(task.config.feature_count)}
    export_average(task.model, checkpoint, out, header | task.classifier.header())
    return figures


def table_of(task: ClassifierTask) -> Table:
    """What the classifier says of each class's validation images."""
    labels = task.validation.labels
    chosen = logits_of(task.classifier, task.validation).argmax(dim=1)
    table = Table("class", "images", "right", "taken for")
    for label, name in enumerate(task.validation.class_names):
        answers = chosen[labels == label].tolist()
        wrong = sorted({task.validation.class_names[one] for one in answers if one != label})
        table.add_row(name, str(len(answers)), str(answers.count(label)), ", ".join(wrong))
    return table


if __name__ == "__main__":
    main()
