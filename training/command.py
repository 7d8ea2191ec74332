"""What the scripts that train have in common: options, export, and how a command ends.

Knows the options that trainings share and what becomes of their values. What is trained, its own
options and every default that depends on it are the script's. The order of the decorators is that
of --help:

    @training_command("train_something")
    @run_options("runs/something")
    @export_option
    @recipe_options(steps=6000, batch_size=16, ...)
    @click.option("--depth", default=8, show_default=True)
    @execution_options
    def main(options: TrainingOptions, depth: int) -> None:
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from rich.console import Console
from torch import nn

from lpd_export.errors import UserError
from lpd_reference.checkpoint import CheckpointError
from training.data import ImageSet, TrainingError
from training.loop import (
    Figures,
    Precision,
    Recipe,
    Task,
    TrainingStopped,
    config_of,
    export_average,
    read_best,
    train,
)

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C")


@dataclass(frozen=True)
class TrainingOptions:
    """What a training is asked. Options that a script does not have keep the defaults from here.

    Raises:
        TrainingError: if there are no workers.
    """

    images: Path
    folder: Path
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    average_decay: float
    stable: float = Recipe.stable
    patience: int | None = Recipe.patience
    export_path: Path | None = None
    """Where weights are to be written, with no training."""
    precision: Precision = Recipe.precision
    device: str = "cpu"
    workers: int | None = None
    """Parts of a batch computed at a time; see `worker_count`."""
    seed: int = Recipe.seed
    checkpoint_minutes: float = 3.0
    validate_every: int = 500

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise TrainingError(f"--workers must be at least 1, not {self.workers}")

    @property
    def worker_count(self) -> int:
        """As asked, else one a core on a CPU, and one on a GPU."""
        return self.workers or (torch.get_num_threads() if self.device == "cpu" else 1)

    def recipe(self, betas: tuple[float, float] = Recipe.betas) -> Recipe:
        """How the task is optimized.

        Raises:
            TrainingError: if a value cannot be.
        """
        return Recipe(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            stable=self.stable,
            patience=self.patience,
            weight_decay=self.weight_decay,
            betas=betas,
            average_decay=self.average_decay,
            precision=self.precision,
            seed=self.seed,
        )


# ------------------------------------------------------------------------------------ the command


def training_command(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """A command out of a function of a `TrainingOptions` and, by name, the script's own options.

    Mistakes are told in one line that begins with `name` and end with code 2; a training that was
    stopped says so in one line and ends with code 130.
    """
    common = {field.name for field in fields(TrainingOptions)}

    def decorate(function: Callable[..., None]) -> click.Command:
        @click.command()
        @functools.wraps(function)
        def command(**values: Any) -> None:
            shared = {key: value for key, value in values.items() if key in common}
            own = {key: value for key, value in values.items() if key not in common}
            try:
                function(TrainingOptions(**shared), **own)
            except (TrainingError, CheckpointError, UserError) as error:
                click.echo(f"{name}: error: {error}", err=True)
                sys.exit(EXIT_MISTAKE)
            except TrainingStopped as stopped:
                click.echo(f"{name}: {stopped}", err=True)
                sys.exit(EXIT_INTERRUPTED)

        return command

    return decorate


def in_order(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Options as one decorator, in the order of --help."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def run_options(folder: str) -> Callable[[F], F]:
    """IMAGES and --run, the run's folder."""
    path = click.Path(path_type=Path)
    return in_order(
        click.argument("images", type=path),
        click.option(
            "--run",
            "folder",
            type=path,
            default=Path(folder),
            show_default=True,
            help="The run's folder.",
        ),
    )


export_option = click.option(
    "--export", "export_path", type=click.Path(path_type=Path), help="Write weights."
)


def recipe_options(
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    warmup_steps: int,
    weight_decay: float,
    average_decay: float,
    stable: float | None = None,
    patience: int | None = None,
    steps_help: str | None = None,
) -> Callable[[F], F]:
    """How the task is optimized, with these defaults.

    --stable and --patience are there only if they have one.
    """
    stable_option = click.option(
        "--stable",
        type=float,
        default=stable,
        show_default=True,
        help="Share of the steps at the full rate, before it falls.",
    )
    patience_option = click.option(
        "--patience",
        type=click.IntRange(min=1),
        default=patience,
        show_default=True,
        help="Validations without a lower loss after which the rate falls and the run ends.",
    )
    return in_order(
        click.option("--steps", default=steps, show_default=True, help=steps_help),
        click.option("--batch-size", default=batch_size, show_default=True),
        click.option("--learning-rate", type=float, default=learning_rate, show_default=True),
        click.option("--warmup-steps", default=warmup_steps, show_default=True),
        *([stable_option] if stable is not None else []),
        *([patience_option] if patience is not None else []),
        click.option("--weight-decay", type=float, default=weight_decay, show_default=True),
        click.option("--average-decay", type=float, default=average_decay, show_default=True),
    )


seed_option = click.option("--seed", default=TrainingOptions.seed, show_default=True)

execution_options = in_order(
    click.option(
        "--precision",
        type=click.Choice(["fp32", "bf16"]),
        default=TrainingOptions.precision,
        show_default=True,
    ),
    click.option("--device", default=TrainingOptions.device, show_default=True),
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        help="Parts of a batch computed at a time; by default one a CPU core.",
    ),
    seed_option,
    click.option(
        "--checkpoint-minutes",
        type=click.FloatRange(min=0),
        default=TrainingOptions.checkpoint_minutes,
        show_default=True,
        help="How much training a kill may cost.",
    ),
    click.option(
        "--validate-every",
        type=click.IntRange(min=1),
        default=TrainingOptions.validate_every,
        show_default=True,
        help="Steps between two validations and sheets.",
    ),
)
"""Where and how a step is computed, and what is done between steps."""


# ------------------------------------------------------------------------------- what it does


def run_training(
    options: TrainingOptions,
    task: Task,
    recipe: Recipe,
    training: ImageSet,
    validation: ImageSet,
    preview: Callable[[int, nn.Module], None] | None = None,
) -> Figures:
    """Says what is trained on what, and trains it; as `training.loop.train`.

    Raises:
        TrainingError: if the run was started with other settings, another process trains in its
            folder, files cannot be written, or the loss is no longer finite.
        TrainingStopped: on Ctrl-C or a polite kill, once a checkpoint is on disk.
    """
    console = Console(stderr=True)
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    console.print(
        f"{len(training)} images of {training.resolution} px to train on, {len(validation)} to "
        f"validate with; {parameters / 1e6:.2f} M parameters; run in {options.folder}"
    )
    return train(
        task,
        recipe,
        options.folder,
        checkpoint_minutes=options.checkpoint_minutes,
        validate_every=options.validate_every,
        workers=options.worker_count,
        preview=preview,
        console=console,
    )


def tell_finished(figures: Figures) -> None:
    """Prints the last figures of a run that has taken all its steps."""
    words = ", ".join(f"{name} {value:g}" for name, value in figures.items())
    Console(stderr=True).print(f"finished: {words}")


def export_run(
    options: TrainingOptions,
    path: Path,
    new_model: Callable[[C], nn.Module],
    config: Callable[..., C],
) -> None:
    """Writes a run's weight average in the released format: the best, or the last.

    Args:
        options: say whose weights they are and which images they were trained on.
        path: the `.safetensors` file.
        new_model: makes the model of an architecture, such as `VQTokenizer`.
        config: the architecture's class, such as `VQConfig`.

    Raises:
        TrainingError: if there is no checkpoint, it is damaged or one of another model, or the
            file cannot be written.
    """
    checkpoint = read_best(options.folder)
    model = new_model(config_of(checkpoint, config))
    assert checkpoint is not None  # config_of has seen to it
    export_average(model, checkpoint, path, {"dataset": options.images.name})
    size = path.stat().st_size / 1e6
    Console(stderr=True).print(f"{path}: {size:.2f} MB")
