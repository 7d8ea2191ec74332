"""Prints the table of docs/speed.md: full-size bundles with `lpd-export bench`, as Markdown.

    python scripts/benchmark.py
    python scripts/benchmark.py --model lpd-xl --res 512 --precision int8 --runs 3

Weights are random: what is computed is the same, and no checkpoint has to be fetched. Bundles are
built on the first call and kept.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from lpd_export.bench.benchmark import bench
from lpd_export.bench.request import BenchRequest
from lpd_export.bench.results import BatchTimes, Benchmark
from lpd_export.bench.terminal import machine_line
from lpd_export.bench.timing import TOTAL
from lpd_export.build.build import build
from lpd_export.build.request import BuildRequest

HEADINGS = (
    "precision",
    "batch",
    "s an image",
    "p90",
    "eager over it (least to most)",
    "over its floor",
    "first image of a process, s",
    "peak memory, GB",
    "disk, GB",
)


@click.command()
@click.option("--model", default="lpd-l", show_default=True)
@click.option("--res", default=256, show_default=True)
@click.option("--runs", default=5, show_default=True, help="Timed rounds; one more warms up.")
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 4), show_default=True)
@click.option(
    "--precision", "precisions", multiple=True, default=("fp32", "int8"), show_default=True
)
@click.option("--threads", type=int, help="CPU threads.  [default: the physical cores]")
@click.option("--folder", default="engines", show_default=True, help="Where bundles are kept.")
def main(
    model: str,
    res: int,
    runs: int,
    batches: tuple[int, ...],
    precisions: tuple[str, ...],
    threads: int | None,
    folder: str,
) -> None:
    """Times full-size bundles with random weights against the eager reference, taking turns."""
    say = partial(click.echo, err=True)
    for number, precision in enumerate(precisions):
        bundle = full_size_bundle(Path(folder), model, res, precision)
        request = BenchRequest(bundle, batches, ("reference",), runs=runs, threads=threads)
        found = bench(request, say)
        if not number:
            click.echo(
                f"{model}, {res} px, {found.steps} steps, cfg {found.cfg:g}; medians of {runs} "
                f"rounds in which eager FP32 and bundle take turns; {machine_line(found)}\n"
            )
            click.echo(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
        for times in found.batches:
            click.echo(f"| {' | '.join(row(found, times))} |")


def full_size_bundle(folder: Path, model: str, res: int, precision: str) -> Path:
    """The bundle of a published architecture with random weights, built if it is not there."""
    bundle = folder / f"benchmark-{model}-{res}-{precision}"
    if not bundle.exists():
        request = BuildRequest(
            model=model, res=res, precision=precision, random_weights=True, out=str(bundle)
        )
        build(request, report=partial(click.echo, err=True))
    return bundle


def row(found: Benchmark, times: BatchTimes) -> list[str]:
    """The cells of one bundle and batch size; what is of the bundle stands at its first one."""
    (eager,) = times.compared
    total, ratios, cold = times.seconds[TOTAL], eager.ratios, found.cold
    assert cold is not None
    first = times is found.batches[0]
    return [
        found.precision,
        str(times.batch),
        f"{total.p50 / times.batch:.2f}",
        f"{total.p90 / times.batch:.2f}",
        f"{ratios.p50:.2f} ({min(ratios.values):.2f} to {max(ratios.values):.2f})",
        f"{times.over_floor:.2f}" if times.over_floor else "",
        f"{cold.total:.1f}" if first else "",
        f"{cold.peak_memory / 1e9:.2f}" if first else "",
        f"{found.disk_bytes / 1e9:.2f}" if first else "",
    ]


if __name__ == "__main__":
    main()
