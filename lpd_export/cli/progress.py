"""How long work is shown: live on a terminal, as lines in a log.

Knows what the work calls to say how far it is, not what the work is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from lpd_export.bounds import printable

if TYPE_CHECKING:
    from lpd_export.run import Advance


@contextlib.contextmanager
def stages(
    quiet: bool = False, verbose: bool = False
) -> Iterator[tuple[Callable[[str], None], Callable[[str, int, int], None]]]:
    """Shows the current stage with a clock on a terminal, a line for each elsewhere.

    Nothing if `quiet`; a line for each step of TensorRT's builder too if `verbose`. Gives two
    functions: one to begin a stage, and one to tell how far TensorRT's builder is.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    if quiet:
        yield lambda stage: None, lambda stage, step, steps: None
        return
    if verbose or not console.is_terminal:

        def tell(stage: str, step: int, steps: int) -> None:
            if verbose:
                say(f"{stage} {step} of {steps}")

        yield say, tell
        return
    with Progress(*columns, console=console) as progress:

        def finish() -> None:
            for task in progress.tasks:
                progress.update(task.id, total=1, completed=1, detail="")

        def report(stage: str) -> None:
            finish()
            progress.add_task(stage, total=None, detail="")

        def advance(stage: str, step: int, steps: int) -> None:
            progress.update(progress.tasks[-1].id, detail=f": {stage} {step} of {steps}")

        yield report, advance
        finish()


@contextlib.contextmanager
def image_progress(
    quiet: bool, verbose: bool
) -> Iterator[tuple[Callable[[str], None], Callable[..., None]]]:
    """Shows which image and which step is being made, on a terminal.

    Elsewhere it is a line for every tenth of the images, or if `verbose` for every step; nothing
    if `quiet`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet:
        yield lambda stage: None, lambda advance: None
        return
    if verbose or not console.is_terminal:
        yield say, (lambda advance: say(advance.describe())) if verbose else tell_each_tenth()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def report(stage: str) -> None:
            progress.update(task, description=stage)

        def show(advance: Advance) -> None:
            progress.update(
                task,
                description=advance.describe(),
                total=advance.all_images,
                completed=advance.images_done,
            )

        yield report, show


def tell_each_tenth() -> Callable[[Any], None]:
    """Progress for a log: a line whenever another tenth of the images is whole."""
    told = 0

    def advance(advance: Any) -> None:
        nonlocal told
        if advance.progress.step < advance.progress.steps:
            return
        tenths = int(10 * advance.images_done / advance.all_images)
        if tenths > told:
            told = tenths
            say(advance.describe())

    return advance


def say(line: str) -> None:
    click.echo(printable(line), err=True)
