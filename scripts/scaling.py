"""What an image costs as steps, resolution, batch and model size change: counted, and measured.

    python scripts/scaling.py --quick
    python scripts/scaling.py --model lpd-l --model lpd-xl --res 256 --res 512 --seconds 600

For each model and resolution a bundle of random weights is built and kept, and run with schedules
from one token a step in raster order down to 8 steps; operations and bytes are those of its graphs.
When the time is up, what is left is counted and not run. Prints Markdown.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import click

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


@click.command()
@click.option("--model", "models", multiple=True, default=("lpd-l",), show_default=True)
@click.option("--res", "resolutions", type=int, multiple=True, default=(256,), show_default=True)
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 4), show_default=True)
@click.option("--precision", default="fp32", show_default=True)
@click.option("--seconds", default=600, show_default=True, help="To measure for, at most.")
@click.option("--threads", type=int, help="CPU threads.  [default: the physical cores]")
@click.option("--folder", default="engines", show_default=True, help="Where bundles are kept.")
@click.option("--quick", is_flag=True, help="One token a step and 20 steps alone.")
def main(
    models: tuple[str, ...],
    resolutions: tuple[int, ...],
    batches: tuple[int, ...],
    precision: str,
    seconds: int,
    threads: int | None,
    folder: str,
    quick: bool,
) -> None:
    """Prints a row for every model, resolution, number of steps and batch size."""
    click.echo(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    deadline = time.monotonic() + seconds
    for model in models:
        for res in resolutions:
            bundle = Bundle.open(full_size_bundle(Path(folder), model, res, precision))
            with Pipeline.open(bundle.path, threads=threads) as pipeline:
                for batch in batches:
                    for cells in scaling(bundle, pipeline, batch, quick, deadline):
                        click.echo(f"| {' | '.join([model, str(res), *cells])} |")


def scaling(
    bundle: Bundle, pipeline: Pipeline, batch: int, quick: bool, deadline: float
) -> list[list[str]]:
    """The cells of each number of steps, the fewest first: they are the quickest to run."""
    grid = bundle.manifest.model.grid
    one_a_step = grid * grid
    wanted = (one_a_step, LPD_STEPS) if quick else (one_a_step, *STEPS)
    rows, seconds = [], dict[int, float]()
    for steps in sorted(count for count in set(wanted) if count <= one_a_step):
        kind = "raster" if steps == one_a_step else "locality"
        schedule = Schedule.make(grid, steps, kind=kind, count=batch)
        work = total(generation_work(bundle, phase_table(schedule.group_sizes)).values()).of(batch)
        if time.monotonic() < deadline:
            generate = partial(pipeline.generate, [0] * batch, batch=batch, schedule=schedule)
            generate()
            begun = time.perf_counter()
            generate()
            seconds[steps] = (time.perf_counter() - begun) / batch
        rows.append((steps, work))
    return [
        [
            f"{steps} ({'raster' if steps == one_a_step else 'LPD'})",
            str(batch),
            number(work.operations.total() / batch / 1e12),
            number(work.bytes / batch / 1e9),
            f"{seconds[steps]:.3g}" if steps in seconds else "not run",
            f"{seconds[steps] / seconds[LPD_STEPS]:.2f}"
            if {steps, LPD_STEPS} <= seconds.keys()
            else "",
        ]
        for steps, work in rows
    ]


if __name__ == "__main__":
    main()
