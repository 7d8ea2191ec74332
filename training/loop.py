"""Training in steps that can be stopped, killed and gone on with: what every model shares.

Knows the loop: learning rate, AdamW, weight averaging, checkpoints, the log and the signals. What
is trained, on which loss, is a `Task`: `training.tokenizer` and `training.lpd`.

A run is a folder: `checkpoint.pt` (weights, their average, optimizer, step, settings), `log.jsonl`
(a JSON object a line) and, where a run ends when it no longer gets better, `best.pt` (the average
of the lowest validation loss). All that is random in step n follows from the seed and n, so a
checkpoint needs no generator's state, and a resumed run takes the very steps that an uninterrupted
one takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import math
import os
import pickle
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from training.data import TrainingError

Precision = Literal["fp32", "bf16"]
Figures = dict[str, float]
"""Measured numbers by name, as the log holds them."""

CHECKPOINT, BEST = "checkpoint.pt", "best.pt"
BEST_KEYS = ("settings", "step", "figures", "average")
"""What a file of weights to export holds; a checkpoint holds it as well."""
CHECKPOINT_KEYS = (*BEST_KEYS, "seconds", "model", "optimizer", "task", "early")
LOG = "log.jsonl"
LOCK = ".lock"


class TrainingStopped(Exception):  # noqa: N818, like KeyboardInterrupt it is no error
    """Training that was asked to stop and has saved a checkpoint; the sentence says so."""


Batch = dict[str, Tensor]
"""What a step trains on: tensors whose first dimension is that of the samples."""


class Outcome(NamedTuple):
    """What a task computes of a batch, or of a part of it."""

    loss: Tensor
    """Scalar, the mean over the samples, with a gradient."""
    figures: Figures
    """Means over the samples, for the log."""
    kept: Batch
    """What `Task.after_update` wants to know of the samples."""


class Task(Protocol):
    """What is trained: a model, its loss and how well it does.

    A batch is drawn in one piece, but `loss` is called on its parts, several at a time.
    """

    model: nn.Module

    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it resumes, as plain JSON values."""

    def batch(self, step: int) -> Batch:
        """What step `step` (from 0) trains on; follows from the seed and the step alone."""

    def loss(self, step: int, part: Batch) -> Outcome:
        """The loss of some samples of the batch. Changes nothing and draws no random numbers."""

    def after_update(
        self, step: int, kept: Batch, average: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Figures:
        """What the task changes once the optimizer has taken step `step`."""

    def validate(self, model: nn.Module) -> Figures:
        """How well a model (the weight average) does on images it is not trained on."""

    def state(self) -> dict[str, Tensor]:
        """What the task keeps between steps, apart from the model."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what `state` returned."""


@dataclass(frozen=True)
class Recipe:
    """How a task is optimized."""

    steps: int
    batch_size: int
    learning_rate: float
    """At its height, after the warm-up."""
    warmup_steps: int
    stable: float = 0.0
    """Share of the steps after the warm-up for which the rate stays at its height."""
    weight_decay: float = 0.05
    """Of the weights of linear layers and convolutions; nothing else decays."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    """The gradient's norm is scaled down to this."""
    patience: int | None = None
    """Validations without a lower loss after which the rate falls, sooner than `stable` says; the
    run ends with that, and what is exported are the weights of the lowest loss. None: never."""
    average_decay: float = 0.999
    """Of the exponential moving average of the weights, which is what is exported."""
    precision: Precision = "bf16"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{option(name)} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.warmup_steps < self.steps:
            raise TrainingError(
                f"--warmup-steps {self.warmup_steps} must be below --steps, which is {self.steps}"
            )
        if not self.learning_rate > 0:
            raise TrainingError(f"--learning-rate must be above 0, not {self.learning_rate:g}")
        if not 0 <= self.stable <= 1:
            raise TrainingError(f"--stable must be between 0 and 1, not {self.stable:g}")

    @property
    def decay_steps(self) -> int:
        """The steps at the end in which the rate falls."""
        after_warmup = self.steps - self.warmup_steps
        return max(after_warmup - round(self.stable * after_warmup), 1)


def option(setting: str) -> str:
    """A setting as the command line spells it."""
    return "--" + setting.replace("_", "-")


def learning_rate(step: int, recipe: Recipe, end: int | None = None) -> float:
    """The rate of step `step` (from 0): linear warm-up, a stable phase if any, cosine to 1 %.

    end: the number of steps of a run that ends early.
    """
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    left = min(1.0, ((end or recipe.steps) - step) / recipe.decay_steps)
    return recipe.learning_rate * (0.01 + 0.99 * (1 - math.cos(math.pi * left)) / 2)


@dataclass
class EarlyEnd:
    """What is known of when a run ends that goes on only while its validation loss falls."""

    lowest: float = math.inf
    waited: int = 0
    """Validations since the lowest loss."""
    end: int | None = None
    """The number of steps, once it is known that the run ends early."""

    def see(self, step: int, loss: float, recipe: Recipe) -> bool:
        """Takes note of the validation loss after `step` steps; whether it is the lowest."""
        better = loss < self.lowest
        self.lowest, self.waited = min(loss, self.lowest), 0 if better else self.waited + 1
        end = step + recipe.decay_steps
        patient = recipe.patience is None or self.waited < recipe.patience
        if self.end is None and not patient and end < recipe.steps:
            self.end = end
        return better


def open_device(name: str) -> torch.device:
    """The device of this name, such as "cpu" or "cuda:0".

    Raises:
        TrainingError: if there is none here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    # A build without a backend asserts, one without a device raises its runtime's error.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise TrainingError(f"there is no device {name!r} here: give --device cpu") from error
    return device


def new_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over all trained weights; those of linear layers and convolutions decay."""
    decaying = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        [
            {
                "params": [parameter for parameter in trained if id(parameter) in decaying],
                "weight_decay": recipe.weight_decay,
            },
            {
                "params": [parameter for parameter in trained if id(parameter) not in decaying],
                "weight_decay": 0.0,
            },
        ],
        lr=recipe.learning_rate,
        betas=recipe.betas,
        fused=True,
    )


def new_average(model: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of a model's weights; young averages forget faster."""

    def update(averages: Any, currents: Any, updates: Any) -> None:
        count = int(updates)
        weight = 1 - min(decay, (1 + count) / (10 + count))
        for average, current in zip(averages, currents, strict=True):
            average.lerp_(current, weight)

    average = AveragedModel(model, multi_avg_fn=update)
    return average.requires_grad_(False)


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Matrix products and convolutions in `precision`, the rest as PyTorch sees fit."""
    # Each weight is cast once a step anyway, and the cache is shared by all threads.
    enabled = precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def keep_freed_memory() -> None:
    """Has the C library (glibc alone can) reuse freed memory, not return it to the system.

    Else every large tensor of a step is given back and mapped anew, page by page: a fifth of the
    time of a step on a CPU.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        trim_threshold, top_pad, most_maps = -1, -2, -4  # parameters of malloc.h's mallopt
        library.mallopt(most_maps, 0)
        library.mallopt(trim_threshold, 2**31 - 1)
        library.mallopt(top_pad, 2**28)


# ------------------------------------------------------------------------------- the run folder


class RunFolder:
    """The files of one run, which one process at a time may write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(
                f"cannot write {path}: {error.strerror or error}; choose another --run"
            ) from error
        self.lock = FileLock(path / LOCK, timeout=0)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Raises TrainingError if another process trains in this folder."""
        try:
            self.lock.acquire()
        except Timeout as error:
            raise TrainingError(
                f"another process is training in {self.path}: wait for it or choose another --run"
            ) from error
        except OSError as error:
            raise TrainingError(
                f"cannot write {self.path}: {error.strerror or error}; choose another --run"
            ) from error
        try:
            # What a kill left half-written.
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            yield
        finally:
            self.lock.release()

    def save(self, checkpoint: dict[str, Any], name: str = CHECKPOINT) -> None:
        """Writes a checkpoint whole or not at all."""
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_whole(self.path / name, content.getbuffer())

    def log(self, record: Mapping[str, Any]) -> None:
        """Adds a line to the log."""
        try:
            with open(self.path / LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise unwritable(self.path / LOG, error) from error

    def forget_after(self, step: int) -> None:
        """Takes the log's lines of later steps away, and a line that a kill cut off."""
        path = self.path / LOG
        if not path.exists():
            return
        kept = []
        for line in path.read_text("utf-8").splitlines():
            with contextlib.suppress(ValueError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        write_whole(path, "".join(kept).encode())


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The checkpoint of a run's folder on the CPU, or None if it has none yet.

    Raises:
        TrainingError: if the file is damaged or is not a run's checkpoint.
    """
    return read_saved(folder / CHECKPOINT, CHECKPOINT_KEYS)


def read_best(folder: Path) -> dict[str, Any] | None:
    """What a run's folder has to export: of the lowest validation loss, if the run looks for that.

    Raises:
        TrainingError: if a file is damaged or is not a run's.
    """
    return read_saved(folder / BEST, BEST_KEYS) or read_saved(folder / CHECKPOINT, BEST_KEYS)


def read_saved(path: Path, keys: Sequence[str]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {name: saved[name] for name in keys}
    except (OSError, RuntimeError, pickle.UnpicklingError, KeyError, TypeError, EOFError) as error:
        raise TrainingError(
            f"{path} is damaged or is not the checkpoint of a run: take it away to start anew"
        ) from error


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes a file under a temporary name beside it, then renames it.

    Raises:
        TrainingError: if it cannot be written; nothing is left behind then.
    """
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def unwritable(path: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"cannot write {path}: {error.strerror or error}; check that its folder exists and is "
        "writable"
    )


def check_same_settings(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises TrainingError naming the first setting in which a resumed run differs.

    The number of steps may differ: more of them extend a run.
    """
    for name, value in now.items():
        if name != "steps" and before.get(name) != value:
            raise TrainingError(
                f"the run in {folder} was started with {name.replace('_', ' ')} "
                f"{before.get(name)}, not {value}: give the former to go on with it, or another "
                "--run to start anew"
            )


# ------------------------------------------------------------------------------------- the loop


def train(
    task: Task,
    recipe: Recipe,
    folder: Path,
    *,
    checkpoint_minutes: float = 3.0,
    validate_every: int = 500,
    log_every: int = 20,
    workers: int = 1,
    preview: Callable[[int, nn.Module], None] | None = None,
    console: Console | None = None,
) -> Figures:
    """Trains a task from its last checkpoint, or from the start, to `recipe.steps`.

    Args:
        task: what is trained; its model's weights are the run's when this returns.
        recipe: how it is trained.
        folder: the run's folder, made if need be.
        checkpoint_minutes: how much training a kill may cost.
        validate_every: steps between two validations; there is one at the end in any case.
        log_every: steps between two lines of the log.
        workers: parts of a batch that are computed at the same time, each on a thread of its own.
            A resumed run with another number differs from the first by rounding errors.
        preview: called with the step and the weight average after each validation.
        console: where progress is shown; nowhere by default.

    Returns:
        The figures of the log's last line.

    Raises:
        TrainingError: if the run was started with other settings, another process trains in the
            folder, files cannot be written, or the loss is no longer finite.
        TrainingStopped: on Ctrl-C or a polite kill, once a checkpoint is on disk.
    """
    keep_freed_memory()
    run = RunFolder(folder)
    settings = json.loads(json.dumps(asdict(recipe) | task.settings()))
    with (
        run.locked(),
        stop_requests() as stop,
        progress_bar(console, recipe.steps) as show,
        one_thread_each(workers) as pool,
    ):
        optimizer = new_optimizer(task.model, recipe)
        average = new_average(task.model, recipe.average_decay)
        step, seconds = 0, 0.0
        early = EarlyEnd()
        checkpoint = read_checkpoint(folder)
        if checkpoint is not None:
            check_same_settings(folder, checkpoint["settings"], settings)
            task.model.load_state_dict(checkpoint["model"])
            average.load_state_dict(checkpoint["average"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            task.load_state(checkpoint["task"])
            step, seconds = checkpoint["step"], checkpoint["seconds"]
            early = EarlyEnd(**checkpoint["early"])
            if step > recipe.steps:
                raise TrainingError(
                    f"the run in {folder} has taken {step} steps already: give --steps {step} or "
                    "more"
                )
        run.forget_after(step)

        figures: Figures = dict(checkpoint["figures"]) if checkpoint is not None else {}
        sums, started, saved = Sums(), time.monotonic(), time.monotonic()

        def of_average() -> dict[str, Any]:
            state = average.state_dict()
            return {"settings": settings, "step": step, "figures": figures, "average": state}

        def save() -> None:
            rest = {
                "seconds": seconds,
                "model": task.model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "task": task.state(),
                "early": asdict(early),
            }
            run.save(of_average() | rest)

        while step < (early.end or recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe, early.end)
            of_step = update(task, recipe, step, optimizer, average, pool, workers)
            step += 1
            if not math.isfinite(of_step["loss"]):
                raise TrainingError(
                    f"the loss is {of_step['loss']} at step {step}: lower --learning-rate, which "
                    f"is {recipe.learning_rate:g}, and start anew with another --run"
                )
            sums.add(of_step)
            now = time.monotonic()
            seconds, started = seconds + now - started, now
            show(step, figures)
            last = step == (early.end or recipe.steps)
            due = last or step % validate_every == 0
            if due or step % log_every == 0:
                figures = {
                    "step": step,
                    "seconds": round(seconds, 1),
                    "learning_rate": optimizer.param_groups[0]["lr"],
                    "images_per_second": round(sums.count * recipe.batch_size / sums.seconds(), 2),
                    **{name: round(mean, 5) for name, mean in sums.means().items()},
                }
                if due:
                    figures |= task.validate(average.module)
                    if recipe.patience is not None and early.see(
                        step, figures["validation_loss"], recipe
                    ):
                        run.save(of_average(), BEST)
                run.log(figures)
                if due and preview is not None:
                    preview(step, average.module)
                sums = Sums()
            if last or stop.is_set() or time.monotonic() - saved > 60 * checkpoint_minutes:
                save()
                saved = time.monotonic()
            if stop.is_set() and not last:
                raise TrainingStopped(
                    f"stopped after {step} of {early.end or recipe.steps} steps; the checkpoint "
                    f"is in {folder}, and the same command goes on from it"
                )
    return figures


def update(
    task: Task,
    recipe: Recipe,
    step: int,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel,
    pool: Executor,
    workers: int,
) -> Figures:
    """Takes one step of training: gradient, clipping, AdamW, weight average."""
    weights = [parameter for parameter in task.model.parameters() if parameter.requires_grad]

    def gradients(part: Batch) -> tuple[Outcome, tuple[Tensor | None, ...]]:
        outcome = task.loss(step, part)
        share = len(next(iter(part.values()))) / recipe.batch_size
        return outcome, torch.autograd.grad(outcome.loss * share, weights, allow_unused=True)

    outcomes, parts = zip(*pool.map(gradients, split_batch(task.batch(step), workers)), strict=True)
    # Added in the order of the parts, so that a step gives the same weights every time.
    for weight, *of_parts in zip(weights, *parts, strict=True):
        weight.grad = of_parts[0]
        for gradient in of_parts[1:]:
            if gradient is not None and weight.grad is not None:
                weight.grad += gradient
    norm = nn.utils.clip_grad_norm_(weights, recipe.clip)
    optimizer.step()
    average.update_parameters(task.model)
    kept = {
        name: torch.cat([outcome.kept[name] for outcome in outcomes]) for name in outcomes[0].kept
    }
    sums = Sums()
    for outcome in outcomes:
        sums.add({"loss": float(outcome.loss.detach()), **outcome.figures})
    changed = task.after_update(step, kept, average.module, optimizer)
    return {**sums.means(), "gradient_norm": float(norm), **changed}


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """A batch in at most this many parts, as equal as can be."""
    samples = len(next(iter(batch.values())))
    size = -(-samples // parts)
    return [
        {name: tensor[start : start + size] for name, tensor in batch.items()}
        for start in range(0, samples, size)
    ]


@contextlib.contextmanager
def one_thread_each(workers: int) -> Iterator[Executor]:
    """Threads on each of which PyTorch computes alone.

    Not PyTorch's own threads: these wait for one another at every operation, and where another
    program takes some of a core's time they wait for most of theirs.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


class Sums:
    """Sums of figures over the steps since the log's last line."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.count = 0
        self.started = time.monotonic()

    def add(self, figures: Figures) -> None:
        self.count += 1
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> Figures:
        return {name: self.sums[name] / self.counts[name] for name in self.sums}

    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that Ctrl-C and a polite kill set, so that a step is never cut in half."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def progress_bar(console: Console | None, steps: int) -> Iterator[Callable[[int, Figures], None]]:
    """Shows steps done, the last figures and the time left; does nothing without a console."""
    if console is None:
        yield lambda step, figures: None
        return
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    shown = ("loss", "validation_loss", "validation_psnr", "images_per_second")
    with Progress(*columns, console=console, speed_estimate_period=120) as progress:
        bar = progress.add_task("training", total=steps)

        def show(step: int, figures: Figures) -> None:
            words = [f"{name} {figures[name]:.4g}" for name in shown if name in figures]
            progress.update(bar, completed=step, description=", ".join(words) or "training")

        yield show


C = TypeVar("C")


def config_of(checkpoint: Mapping[str, Any] | None, config: Callable[..., C]) -> C:
    """The architecture that a run trains: `LPDConfig` or `VQConfig`, made of its settings.

    Raises:
        TrainingError: if there is no checkpoint, or it is one of another model.
    """
    if checkpoint is None:
        raise TrainingError("this run has no checkpoint yet: train first, or give another --run")
    names = [field.name for field in fields(cast(Any, config))]
    settings = checkpoint["settings"]
    if any(name not in settings for name in names):
        raise TrainingError("this run trains another model: give another --run")
    values = {name: settings[name] for name in names}
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def export_average(
    model: nn.Module, checkpoint: Mapping[str, Any], path: Path, metadata: Mapping[str, str]
) -> None:
    """Writes a run's weight average as a float16 safetensors file with the released key names.

    Args:
        model: of the run's architecture; it is given the averaged weights.
        checkpoint: what `read_best` returned.
        path: the file; a `.safetensors` name is what `lpd_reference.checkpoint` reads as such.
        metadata: more to be said in the file's header, beside step and figures.

    Raises:
        TrainingError: if the name is no `.safetensors` name or the file cannot be written.
    """
    if path.suffix != ".safetensors":
        raise TrainingError(f"{path} must end in .safetensors, the format that is written")
    prefix = "module."
    averaged = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint["average"].items()
        if name.startswith(prefix)
    }
    model.load_state_dict(averaged)
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    figures = {name: f"{value:g}" for name, value in checkpoint["figures"].items()}
    header = {"format": "pt", **figures, **metadata, "step": str(checkpoint["step"])}
    write_whole(path, save(weights, header))
