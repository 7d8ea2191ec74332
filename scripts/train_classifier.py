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

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from reference.classifier import Classifier, ClassifierConfig
from reference.train import (
    Batch,
    Figures,
    Outcome,
    Recipe,
    TrainingStopped,
    autocast,
    export_average,
    read_checkpoint,
    train,
)
from reference.training_data import (
    ImageSet,
    TrainingError,
    augment,
    batch_of_step,
    class_weights,
    load_image_set,
    seeded,
    to_signed,
)

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
AUGMENTATION = 7
"""The stream of random numbers that augmentation draws from."""
VALIDATION_BATCH = 64


class ClassifierTask:
    """A `reference.train.Task` that trains a Classifier to name the class of an image."""

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
        generator = seeded(recipe.seed, AUGMENTATION, step)
        images = augment(self.images.pixels[places], generator)
        return {"images": images, "labels": self.images.labels[places]}

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


@click.command()
@click.argument("images", type=click.Path(path_type=Path))
@click.option(
    "--run",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("training/lpd-emoji/classifier"),
    show_default=True,
    help="The run's folder.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("models/lpd-emoji/classifier.safetensors"),
    show_default=True,
    help="The file of the weights.",
)
@click.option("--steps", default=2000, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--learning-rate", default=2e-3, show_default=True)
@click.option("--warmup-steps", default=100, show_default=True)
@click.option("--weight-decay", default=0.05, show_default=True)
@click.option("--average-decay", default=0.998, show_default=True)
@click.option("--label-smoothing", default=0.1, show_default=True)
@click.option(
    "--balance",
    default=0.5,
    show_default=True,
    help="0 shows every image as often, 1 every class.",
)
@click.option("--workers", default=1, show_default=True, help="Threads; a core each.")
@click.option("--seed", default=0, show_default=True)
def main(
    images: Path,
    folder: Path,
    out: Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
    warmup_steps: int,
    weight_decay: float,
    average_decay: float,
    label_smoothing: float,
    balance: float,
    workers: int,
    seed: int,
) -> None:
    """Trains the small classifier that judges generated images."""
    console = Console(stderr=True)
    try:
        recipe = Recipe(
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            betas=(0.9, 0.99),
            average_decay=average_decay,
            seed=seed,
        )
        if workers < 1:
            raise TrainingError(f"--workers must be at least 1, not {workers}")
        training, validation = load_image_set(images, "train"), load_image_set(images, "validation")
        config = ClassifierConfig(len(training.class_names), training.resolution)
        task = ClassifierTask(
            config,
            recipe,
            training,
            validation,
            label_smoothing=label_smoothing,
            balance=balance,
        )
        parameters = sum(parameter.numel() for parameter in task.model.parameters())
        console.print(
            f"{len(training)} images of {training.resolution} px to train on, {len(validation)} to "
            f"validate with; {parameters / 1e6:.2f} M parameters; run in {folder}"
        )
        train(task, recipe, folder, workers=workers, console=console)
        figures = export(task, folder, out, images)
    except TrainingError as error:
        click.echo(f"train_classifier: error: {error}", err=True)
        sys.exit(EXIT_MISTAKE)
    except TrainingStopped as stopped:
        click.echo(f"train_classifier: {stopped}", err=True)
        sys.exit(EXIT_INTERRUPTED)
    console.print(table_of(task))
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
