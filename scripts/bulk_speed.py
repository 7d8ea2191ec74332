"""What bulk costs: a run against `bench`'s generations, and workers against one process.

    python scripts/bulk_speed.py engines/demo --rounds 3

Contenders take turns; each line is a ratio of images a second, of medians. Starting is not counted:
a run's rate is taken from its first tenth to its end. Wanted: bulk at least 0.97 of bench at the
same batch; as many workers as cores at least 0.95 of one process with all cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from lpd_export.bench.timing import TOTAL, BundleContender
from lpd_export.run import Advance, generate_images
from lpd_export.run_request import ImageFormat, RunRequest
from lpd_export.runtime.pipeline import Pipeline


def rate(bundle: Path, images: int, batch: int, kind: ImageFormat, workers: int | None) -> float:
    """Images a second of a run, from its first tenth on."""
    seen: list[tuple[float, float]] = []

    def advance(advance: Advance) -> None:
        seen.append((time.perf_counter(), advance.images_done))

    with tempfile.TemporaryDirectory() as folder:
        requests = Path(folder) / "requests.csv"
        requests.write_text(f"class,count\n0,{images}\n")
        generate_images(
            RunRequest(
                bundle,
                [],
                Path(folder) / "out",
                batch=batch,
                requests=str(requests),
                format=kind,
                workers=workers,
            ),
            advance=advance,
        )
    first = next(number for number, (_, done) in enumerate(seen) if done >= images / 10)
    (begun, before), (ended, after) = seen[first], seen[-1]
    return (after - before) / (ended - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--images", type=int, default=120, help="of a turn (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="(%(default)s)")
    parser.add_argument("--formats", default="png,tar,npz")
    options = parser.parse_args()
    batch, images = options.batch, options.images
    formats: list[ImageFormat] = options.formats.split(",")
    bench = BundleContender("bench", Pipeline.open(options.bundle))
    bench.run(batch, 0)
    rates: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        times = [bench.run(batch, seed)[TOTAL] for seed in range(images // batch)]
        rates.setdefault("bench", []).append(batch / statistics.median(times))
        for kind in formats:
            one = rate(options.bundle, images, batch, kind, None)
            rates.setdefault(f"run --format {kind}", []).append(one)
        if options.workers:
            many = rate(options.bundle, images, batch, formats[0], options.workers)
            rates.setdefault(f"run --workers {options.workers}", []).append(many)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    one = medians[f"run --format {formats[0]}"]
    print(f"| batch {batch} | images/s | of bench | of one process |\n|---|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:.2f} | {value / medians['bench']:.3f} | {value / one:.3f} |")


if __name__ == "__main__":
    main()
