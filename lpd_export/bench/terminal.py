"""A benchmark on the terminal: the parts of each batch size with bars, then what is said once.

Knows the wording and the layout. It is made for 80 columns; without a terminal it is plain text.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from lpd_export.bench.results import BatchTimes, Benchmark
from lpd_export.bench.tables import bar, milliseconds, number, short_table
from lpd_export.bench.timing import TOTAL

_OPERATORS = 6
"""Of each graph."""


def machine_line(found: Benchmark) -> str:
    """The machine and the versions, in a line."""
    machine = found.machine
    threads = f", {machine['threads']} threads" if machine["threads"] else ""
    instructions = f" ({', '.join(machine['instructions'])})" if machine["instructions"] else ""
    gpu = f"{machine['gpu']}; " if machine["gpu"] else ""
    return (
        f"{gpu}{machine['processor']}, {machine['cores']} cores{threads}{instructions}; "
        f"torch {machine['torch']}, onnxruntime {machine['onnxruntime']}"
    )


def print_benchmark(found: Benchmark, console: Console) -> None:
    """Shows everything but the single values."""
    console.print(
        Text(
            f"{found.name}, {found.precision} on {found.backend}: {found.resolution} px, "
            f"{found.steps} steps, cfg {found.cfg:g}; {found.runs} rounds\n{machine_line(found)}"
        ),
        soft_wrap=True,
    )
    if device := found.device:
        rates = ", ".join(f"{kind} {number(r / 1e12)} T/s" for kind, r in device.rates.items())
        console.print(
            f"floor: {device.title}, {rates}, {number(device.bandwidth / 1e9)} GB/s "
            f"({device.source})",
            soft_wrap=True,
        )
    for times in found.batches:
        console.print()
        print_parts(times, console)
    console.print()
    print_totals(found, console)
    if cold := found.cold:
        console.print(
            f"\nfirst image in a new process: {cold.total:.2f} s (imports {cold.imports:.2f}, "
            f"verify {cold.verify:.2f}, load {cold.load:.2f}, image {cold.first_image:.2f}); peak "
            f"memory {cold.peak_memory / 1e9:.2f} GB; disk {found.disk_bytes / 1e9:.2f} GB",
            soft_wrap=True,
        )
    for graph, entries in found.operators.items():
        whole = sum(entry.seconds for entry in entries)
        told = ", ".join(
            f"{entry.operator} {100 * entry.seconds / whole:.0f} %"
            for entry in entries[:_OPERATORS]
        )
        console.print(f"{graph}: {told}", soft_wrap=True)


def print_parts(times: BatchTimes, console: Console) -> None:
    """Of one batch size the time of every part, a bar with its floor in full colour."""
    table = short_table(f"batch {times.batch}", "p50 ms", "p90 ms", "floor ms", "", left=1)
    for name in times.parts:
        spread, least = times.seconds[name], times.floors.get(name)
        least_seconds = least.seconds if least else 0.0
        table.add_row(
            name,
            milliseconds(spread.p50),
            milliseconds(spread.p90),
            milliseconds(least.seconds) if least else "-",
            bar(least_seconds, spread.p50, times.longest),
        )
    whole = times.seconds[TOTAL]
    table.add_section()
    floor = milliseconds(times.least) if times.least else "-"
    over = f"{times.over_floor:.2f} x its floor" if times.over_floor else ""
    table.add_row(TOTAL, milliseconds(whole.p50), milliseconds(whole.p90), floor, over)
    console.print(table)


def print_totals(found: Benchmark, console: Console) -> None:
    """A line a batch size; then one for each pair of it and what it is compared with."""
    table = short_table("batch", "ms an image", "images a second", left=1)
    for times in found.batches:
        an_image = milliseconds(times.seconds[TOTAL].p50 / times.batch)
        table.add_row(str(times.batch), an_image, number(times.images_a_second))
    console.print(table)
    for times in found.batches:
        for other in times.compared:
            ratios = other.ratios
            console.print(
                f"batch {times.batch}: {ratios.p50:.2f} times faster than {other.name} "
                f"({min(ratios.values):.2f} to {max(ratios.values):.2f} in pairs)",
                soft_wrap=True,
            )
