"""`lpd-export schedule`: makes, checks and draws schedules."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import click

from lpd_export.cli.output import json_option, print_json
from lpd_export.errors import UserError


@click.group()
def schedule() -> None:
    """Makes, checks and draws generation schedules.

    \b
    Example:
      lpd-export schedule make --res 256 --steps 20 --out orders.npz
    """


@schedule.command()
@click.option("--res", type=int, required=True, help="Resolution in pixels.")
@click.option("--steps", type=int, required=True, help="Steps an image.")
@click.option(
    "--kind",
    type=click.Choice(["locality", "random", "raster"]),
    default="locality",
    show_default=True,
)
@click.option(
    "--repulsion",
    type=int,
    default=2,
    show_default=True,
    help="Cells of a step are further apart than this (Chebyshev distance).",
)
@click.option(
    "--proximity",
    type=float,
    default=1.0,
    show_default=True,
    help="How close to generated cells counts as close.",
)
@click.option("--count", type=int, default=64, show_default=True, help="How many orders.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--stride", type=int, default=16, show_default=True, help="Pixels of a cell's side.")
@click.option("--out", metavar="FILE.npz", required=True)
@click.option("--force", is_flag=True, help="Replace the file if there is one.")
@json_option
def make(res: int, stride: int, out: str, force: bool, as_json: bool, **settings: Any) -> None:
    """Makes a schedule: group sizes, and many orders to choose from.

    \b
    Example:
      lpd-export schedule make --res 256 --steps 20 --out orders.npz
    """
    from lpd_export.schedule.schedule_file import Schedule

    if stride < 1 or res < stride or res % stride:
        raise UserError(f"--res {res} is not a multiple of the tokenizer's stride of {stride}")
    refuse_existing(Path(out), force)
    made = Schedule.make(res // stride, **settings)
    made.save(out)
    describe_schedule(out, made, as_json)


@schedule.command()
@click.argument("file")
@click.option("--steps", type=int, help="For a JSON list of orders, which does not say.")
@json_option
def check(file: str, steps: int | None, as_json: bool) -> None:
    """Checks a schedule and describes it.

    \b
    Example:
      lpd-export schedule check orders.npz
      lpd-export schedule check res256_steps20_repulsion2.json --steps 20
    """
    from lpd_export.schedule.schedule_file import Schedule

    describe_schedule(file, Schedule.load(file, steps=steps), as_json)


@schedule.command()
@click.argument("file")
@click.option("--steps", type=int, help="For a JSON list of orders, which does not say.")
@click.option("--order", type=int, default=0, show_default=True, help="Which of the orders.")
@click.option("--out", metavar="FILE.png", required=True)
@click.option("--force", is_flag=True, help="Replace the file if there is one.")
@json_option
def show(file: str, steps: int | None, order: int, out: str, force: bool, as_json: bool) -> None:
    """Draws a schedule: a grid coloured by step, and how the image fills.

    \b
    Example:
      lpd-export schedule show orders.npz --out orders.png
    """
    import numpy as np

    from lpd_export.images import draw_schedule, save_png
    from lpd_export.schedule.schedule_file import Schedule

    refuse_existing(Path(out), force)
    loaded = Schedule.load(file, steps=steps)
    save_png(np.asarray(draw_schedule(loaded, order)), out)
    if as_json:
        print_json({"file": file, "order": order, "out": out})
    else:
        click.echo(out)


def refuse_existing(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise UserError(f"{out} exists: choose another --out, or replace it with --force")


def describe_schedule(file: str, schedule: Any, as_json: bool) -> None:
    from lpd_export.schedule.orders import locality_statistics

    statistics = locality_statistics(schedule.orders, schedule.group_sizes)
    if as_json:
        print_json(
            {
                "file": file,
                "kind": schedule.kind,
                "grid": schedule.grid,
                "steps": schedule.steps,
                "orders": schedule.count,
                "repulsion": schedule.repulsion,
                "proximity": schedule.proximity,
                "seed": schedule.seed,
                "group_sizes": schedule.group_sizes.tolist(),
                **dataclasses.asdict(statistics),
            }
        )
        return
    click.echo(
        f"{file}: {schedule.count} {schedule.kind} orders of a {schedule.grid}x{schedule.grid} "
        f"grid in {schedule.steps} steps"
    )
    click.echo("group sizes: " + " ".join(map(str, schedule.group_sizes)))
    if math.isfinite(statistics.isolated_share):
        click.echo(f"cells with no generated neighbour: {100 * statistics.isolated_share:.1f} %")
    if math.isfinite(statistics.group_distance):
        click.echo(
            "mean distance to the nearest cell of the same step: "
            f"{statistics.group_distance:.2f} cells"
        )
