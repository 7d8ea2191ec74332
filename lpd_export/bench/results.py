"""What a benchmark found, as data that JSON, a table and a page are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lpd_export.bench.cold import ColdStart
from lpd_export.bench.devices import Device
from lpd_export.bench.floor import Floor, least_seconds
from lpd_export.bench.profiling import OperatorTime
from lpd_export.bench.timing import PREPARE, TOTAL, Seconds


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one thing, in order."""

    values: Sequence[float]

    @property
    def p50(self) -> float:
        """The median."""
        return float(np.median(self.values))

    @property
    def p90(self) -> float:
        """What nine of ten keep below."""
        return float(np.quantile(self.values, 0.9))

    def as_json(self) -> dict[str, Any]:
        return {"p50": self.p50, "p90": self.p90, "values": list(self.values)}


@dataclass(frozen=True)
class Compared:
    """Another contender, which took turns with the bundle."""

    name: str
    seconds: Mapping[str, Spread]
    ratios: Spread
    """Its total over the bundle's, of each pair: how many times faster the bundle is."""
    part_ratios: Mapping[str, Spread]
    """The same of the parts that both have."""


@dataclass(frozen=True)
class BatchTimes:
    """One batch size."""

    batch: int
    seconds: Mapping[str, Spread]
    """By part, `total` last; of the whole batch."""
    floors: Mapping[str, Floor]
    """By part; empty where nothing is known of the device."""
    compared: Sequence[Compared]

    @property
    def parts(self) -> list[str]:
        """In order of time, without the total."""
        return [name for name in self.seconds if name != TOTAL]

    @property
    def longest(self) -> float:
        """Seconds of the part that takes longest."""
        return max(self.seconds[name].p50 for name in self.parts)

    @property
    def images_a_second(self) -> float:
        """At the median."""
        return self.batch / self.seconds[TOTAL].p50

    @property
    def least(self) -> float | None:
        """The floor of them all, in seconds."""
        return least_seconds(self.floors) if self.floors else None

    @property
    def over_floor(self) -> float | None:
        """How many times its floor the median takes."""
        return self.seconds[TOTAL].p50 / self.least if self.least else None


@dataclass(frozen=True)
class Benchmark:
    """All that `lpd-export bench` found."""

    bundle: str
    name: str
    precision: str
    backend: str
    steps: int
    resolution: int
    cfg: float
    runs: int
    machine: Mapping[str, Any]
    device: Device | None
    disk_bytes: int
    batches: Sequence[BatchTimes]
    cold: ColdStart | None
    operators: Mapping[str, Sequence[OperatorTime]]
    """By graph, at the first batch size."""

    def as_json(self) -> dict[str, Any]:
        """What `bench --json` prints; seconds are for the whole batch, ratios above 1 a gain."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {
            "device": self.device and dataclasses.asdict(self.device),
            "cold": self.cold and dataclasses.asdict(self.cold),
            "operators": {
                graph: [dataclasses.asdict(entry) for entry in entries]
                for graph, entries in self.operators.items()
            },
            "batches": [
                {
                    "batch": times.batch,
                    "seconds": {name: s.as_json() for name, s in times.seconds.items()},
                    "images_a_second": times.images_a_second,
                    "floors": {
                        name: {**dataclasses.asdict(part), "seconds": part.seconds}
                        for name, part in times.floors.items()
                    },
                    "least": times.least,
                    "over_floor": times.over_floor,
                    "compared": [
                        {
                            "name": other.name,
                            "seconds": {name: s.as_json() for name, s in other.seconds.items()},
                            "ratios": other.ratios.as_json(),
                            "part_ratios": {
                                name: s.as_json() for name, s in other.part_ratios.items()
                            },
                        }
                        for other in times.compared
                    ],
                }
                for times in self.batches
            ],
        }


def collect(
    batch: int,
    rounds: Sequence[Sequence[Seconds]],
    names: Sequence[str],
    floors: Mapping[str, Floor],
) -> BatchTimes:
    """Sums up rounds of one batch size.

    Args:
        batch: images.
        rounds: of each, the times of every contender, the bundle first.
        names: of the contenders.
        floors: see `BatchTimes`.
    """

    def spreads(contender: int) -> dict[str, Spread]:
        return {
            part: Spread([times[contender][part] for times in rounds])
            for part in rounds[0][contender]
        }

    ours = spreads(0)
    compared = []
    for place, name in enumerate(names[1:], 1):
        theirs = spreads(place)
        ratios = {
            part: Spread(
                [b / a for a, b in zip(ours[part].values, theirs[part].values, strict=True)]
            )
            for part in theirs
            if part in ours and part != PREPARE
        }
        compared.append(Compared(name, theirs, ratios.pop(TOTAL), ratios))
    return BatchTimes(batch, ours, floors, compared)
