"""What an image costs as steps, resolution, batch and model size change: counted, and measured.

    python scripts/scaling.py --quick
    python scripts/scaling.py --model lpd-l --model lpd-xl --res 256 --res 512 --seconds 600
    python scripts/scaling.py --draw docs/scaling.png

For each model and resolution a bundle of random weights is built and kept, and run with schedules
from one token a step in raster order down to 8 steps; operations and bytes are those of its graphs.
When the time is up, what is left is counted and not run. Prints Markdown, and draws what was run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import matplotlib

from benchmark import full_size_bundle
from lpd_export import Pipeline
from lpd_export.bench.tables import number
from lpd_export.bench.work import generation_work, total
from lpd_export.bundle.manifest import Bundle
from lpd_export.schedule.phases import phase_table
from lpd_export.schedule.schedule_file import Schedule

STEPS = (256, 128, 64, 48, 32, 20, 12, 8)
LPD_STEPS = 20
"""Of the paper at 256 px, which rows are compared with."""
HEADINGS = (
    "model",
    "px",
    "steps",
    "batch",
    "TFLOP an image",
    "GB an image",
    "s an image",
    "x 20 steps",
)


class Row(NamedTuple):
    """What an image costs."""

    model: str
    resolution: int
    steps: int
    raster: bool
    batch: int
    operations: float
    bytes: float
    seconds: float | None
    """None where it was not run."""


@click.command()
@click.option("--model", "models", multiple=True, default=("lpd-l",), show_default=True)
@click.option("--res", "resolutions", type=int, multiple=True, default=(256,), show_default=True)
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 4), show_default=True)
@click.option("--precision", default="fp32", show_default=True)
@click.option("--seconds", default=600, show_default=True, help="To measure for, at most.")
@click.option("--threads", type=int, help="CPU threads.  [default: the physical cores]")
@click.option("--folder", default="engines", show_default=True, help="Where bundles are kept.")
@click.option("--quick", is_flag=True, help="One token a step and 20 steps alone.")
@click.option("--draw", "picture", type=click.Path(path_type=Path), help="Seconds over steps.")
def main(
    models: tuple[str, ...],
    resolutions: tuple[int, ...],
    batches: tuple[int, ...],
    precision: str,
    seconds: int,
    threads: int | None,
    folder: str,
    quick: bool,
    picture: Path | None,
) -> None:
    """Prints a row for every model, resolution, number of steps and batch size."""
    click.echo(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    deadline = time.monotonic() + seconds
    found: list[Row] = []
    for model in models:
        for res in resolutions:
            bundle = Bundle.open(full_size_bundle(Path(folder), model, res, precision))
            with Pipeline.open(bundle.path, threads=threads) as pipeline:
                for batch in batches:
                    rows = list(scaling(bundle, pipeline, model, batch, quick, deadline))
                    for row in rows:
                        click.echo(f"| {' | '.join(cells(row, rows))} |")
                    found += rows
    if picture:
        draw(found, picture)


def scaling(
    bundle: Bundle, pipeline: Pipeline, model: str, batch: int, quick: bool, deadline: float
) -> Iterator[Row]:
    """A row for each number of steps, the fewest first: they are the quickest to run."""
    grid, res = bundle.manifest.model.grid, bundle.manifest.resolution
    one_a_step = grid * grid
    wanted = (one_a_step, LPD_STEPS) if quick else (one_a_step, *STEPS)
    for steps in sorted(count for count in set(wanted) if count <= one_a_step):
        raster, seconds = steps == one_a_step, None
        schedule = Schedule.make(grid, steps, kind="raster" if raster else "locality", count=batch)
        work = total(generation_work(bundle, phase_table(schedule.group_sizes)).values()).of(batch)
        if time.monotonic() < deadline:
            generate = partial(pipeline.generate, [0] * batch, batch=batch, schedule=schedule)
            generate()
            begun = time.perf_counter()
            generate()
            seconds = (time.perf_counter() - begun) / batch
        operations = work.operations.total() / batch
        yield Row(model, res, steps, raster, batch, operations, work.bytes / batch, seconds)


def cells(row: Row, rows: list[Row]) -> list[str]:
    """Of a row of the table, which is compared with that of 20 steps."""
    usual = next((each.seconds for each in rows if each.steps == LPD_STEPS), None)
    return [
        row.model,
        str(row.resolution),
        f"{row.steps} ({'raster' if row.raster else 'LPD'})",
        str(row.batch),
        number(row.operations / 1e12),
        number(row.bytes / 1e9),
        f"{row.seconds:.3g}" if row.seconds else "not run",
        f"{row.seconds / usual:.2f}" if row.seconds and usual else "",
    ]


def draw(rows: list[Row], path: Path) -> None:
    """Seconds an image over steps, a line for each model, resolution and batch."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.seconds:
            name = f"{row.model}, {row.resolution} px, batch {row.batch}"
            lines.setdefault(name, []).append((row.steps, row.seconds))
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    steps = sorted({row.steps for row in rows})
    axes.set(xscale="log", xlabel="steps an image", ylabel="seconds an image", ylim=(0, None))
    axes.set_xticks(steps, [str(count) for count in steps])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
