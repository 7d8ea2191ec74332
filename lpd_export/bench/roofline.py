"""The least time of a bundle on a device, part by part and for several batch sizes; runs nothing.

Knows what is told of it, as JSON and as a table. The counting is in `work`, the formula in `floor`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from lpd_export.bench.devices import Device
from lpd_export.bench.floor import Floor, floors, least_seconds
from lpd_export.bench.tables import bar, milliseconds, number, short_table
from lpd_export.bench.work import Work, generation_work
from lpd_export.bundle.manifest import Bundle


@dataclass(frozen=True)
class Roofline:
    """A bundle on a device."""

    bundle: str
    name: str
    precision: str
    device: Device
    work: Mapping[str, Work]
    """By part, of one image."""
    floors: Mapping[int, Mapping[str, Floor]]
    """By batch size and part."""

    def as_json(self) -> dict[str, Any]:
        """What `bench --roofline --json` prints; seconds are for the whole batch."""
        return {
            "bundle": self.bundle,
            "name": self.name,
            "precision": self.precision,
            "device": dataclasses.asdict(self.device),
            "work_of_an_image": {
                name: {**dataclasses.asdict(work), "operations": dict(work.operations)}
                for name, work in self.work.items()
            },
            "batches": [
                {
                    "batch": batch,
                    "seconds": least_seconds(parts),
                    "images_a_second": batch / least_seconds(parts),
                    "parts": {
                        name: {
                            **dataclasses.asdict(part),
                            "seconds": part.seconds,
                            "bound": part.bound,
                        }
                        for name, part in parts.items()
                    },
                }
                for batch, parts in self.floors.items()
            ],
        }


def count(bundle: Bundle, device: Device, batches: Sequence[int]) -> Roofline:
    """Counts a bundle's work and divides it by a device's rates.

    Raises:
        UserError: if a file of the bundle is damaged.
    """
    work = generation_work(bundle)
    manifest = bundle.manifest
    return Roofline(
        str(bundle.path),
        manifest.name,
        manifest.precision,
        device,
        work,
        {batch: floors(work, device, batch) for batch in batches},
    )


def print_roofline(found: Roofline, console: Console) -> None:
    """Shows every part of the first batch size, then all batch sizes, a line each."""
    device = found.device
    console.print(
        f"{found.name}, {found.precision}, at the least on {device.title}: "
        f"{device.bandwidth / 1e9:,.0f} GB/s; "
        + ", ".join(f"{kind} {number(rate / 1e12)} T/s" for kind, rate in device.rates.items()),
        soft_wrap=True,
    )
    batch, parts = next(iter(found.floors.items()))
    longest = max(part.seconds for part in parts.values())
    console.print()
    table = short_table(f"batch {batch}", "GFLOP", "MB", "compute", "memory ms", "", "", left=1)
    for name, part in parts.items():
        table.add_row(
            name,
            number(part.operations / 1e9),
            number(part.bytes / 1e6),
            milliseconds(part.compute_seconds),
            milliseconds(part.memory_seconds),
            part.bound,
            bar(part.seconds, part.seconds, longest),
        )
    console.print(table)
    console.print()
    table = short_table("batch", "least ms", "ms an image", "images a second", left=1)
    for batch, parts in found.floors.items():
        seconds = least_seconds(parts)
        table.add_row(
            str(batch),
            milliseconds(seconds),
            milliseconds(seconds / batch),
            number(batch / seconds),
        )
    console.print(table)
    console.print(f"\nsource: {device.source}", soft_wrap=True)
