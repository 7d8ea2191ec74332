"""The least time that the work of each part takes on a device: its roofline.

Knows the formula alone; the work is counted in `work`, and the rates are in `devices`.
`docs/speed.md` says what it assumes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lpd_export.bench.devices import Device
from lpd_export.bench.work import Work


@dataclass(frozen=True)
class Floor:
    """The least time of a part.

    Attributes:
        operations: as `Work` counts them, in all.
        bytes: to and from memory.
        compute_seconds: of the operations, each type at its rate, one after another.
        memory_seconds: of the bytes.
    """

    operations: int
    bytes: int
    compute_seconds: float
    memory_seconds: float

    @property
    def seconds(self) -> float:
        """Of both, which go on at once."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def bound(self) -> str:
        """Which of the two it is: compute or memory."""
        return "compute" if self.compute_seconds > self.memory_seconds else "memory"


def floor(work: Work, device: Device) -> Floor:
    """The least time of some work."""
    return Floor(
        work.operations.total(),
        work.bytes,
        sum(count / device.rate(kind) for kind, count in work.operations.items()),
        work.bytes / device.bandwidth,
    )


def floors(parts: Mapping[str, Work], device: Device, images: int) -> dict[str, Floor]:
    """The least time of every part for several images together."""
    return {name: floor(work.of(images), device) for name, work in parts.items()}


def least_seconds(parts: Mapping[str, Floor]) -> float:
    """Of all parts, which wait for one another."""
    return sum(part.seconds for part in parts.values())
