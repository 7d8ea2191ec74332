"""Kills runs at random moments, starts them again, and compares what they end with.

    python scripts/kill_and_resume.py engines/demo

For each format: a run that nobody disturbs, and runs of one process and of workers, which are
killed (SIGKILL) again and again, and started again by the same command, until they end; they must
have the same files with the same bytes. Exits with 1 if one has not.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

COMMAND = Path(sys.executable).with_name("lpd-export")
AT_ONCE = 2
"""Runs beside one another."""
A_BATCH = 0.5
"""Seconds in which about a batch is made and stored."""
WHILE_STARTING = 0.2
"""The share of kills that may come before an image is made."""
HEADINGS = (
    *("format", "processes", "kills", "images there at a kill"),
    *("runs compared", "with other bytes", "images lost", "images twice"),
)


class Job(NamedTuple):
    """A run that nobody disturbed."""

    asked: list[str]
    images: int
    start_seconds: float
    """Until its first image was there."""
    files: dict[str, str]


class Outcome(NamedTuple):
    """What became of the runs of one kind."""

    at: list[int]
    """Images that were recorded at each kill."""
    ended: int
    """Runs that came to their end, all of which were compared."""
    different: int
    lost: int
    twice: int


def start(asked: list[str], out: Path) -> subprocess.Popen[bytes]:
    command = [str(COMMAND), "run", *asked, "--out", str(out), "--quiet"]
    # A file: it outlives the run as an open pipe, where processes of Ray's do.
    with open(out.with_suffix(".log"), "wb") as log:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)


def content(out: Path) -> dict[str, str]:
    """Every file's SHA-256, hidden ones too."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def recorded(out: Path) -> int:
    records = out / "images.jsonl"
    return records.read_bytes().count(b"\n") if records.exists() else 0


def wait_for_images(process: subprocess.Popen[bytes], out: Path, more: int) -> None:
    """So many more than there are, or the run's end."""
    wanted = recorded(out) + more
    while process.poll() is None and recorded(out) < wanted:
        time.sleep(0.02)


def whole(asked: list[str], images: int, out: Path) -> Job:
    begun = time.monotonic()
    process = start(asked, out)
    wait_for_images(process, out, 1)
    start_seconds = time.monotonic() - begun
    if process.wait():
        sys.exit(f"the run that nobody disturbed failed: {out.with_suffix('.log').read_text()}")
    return Job(asked, images, start_seconds, content(out))


def disturb(of: Future[Job], workers: int, cycles: int, runs: int, out: Path, seed: int) -> Outcome:
    """Kills runs of a job so often, about as often in each of so many runs."""
    job = of.result()
    asked = [*job.asked, "--workers", str(workers)] if workers else job.asked
    chance = random.Random(seed)
    at: list[int] = []
    ended = different = lost = twice = 0
    while len(at) < cycles:
        path = Path(f"{out}_{workers}_{ended}")
        while True:
            process = start(asked, path)
            if len(at) < cycles:
                if chance.random() < WHILE_STARTING:
                    time.sleep(chance.random() * job.start_seconds)
                else:
                    # By images, not by time: a machine has other work too.
                    most = 2 * job.images * runs // cycles
                    wait_for_images(process, path, chance.randint(1, max(most, 1)))
                    time.sleep(chance.random() * A_BATCH)
                if process.poll() is None:
                    process.kill()
                    at.append(recorded(path))
            code = process.wait()
            if code == 0:
                break
            if code != -9:
                sys.exit(f"a run ended with {code}: {path.with_suffix('.log').read_text()}")
        ended += 1
        different += content(path) != job.files
        lines = (path / "images.jsonl").read_text().splitlines()
        times = collections.Counter(json.loads(line)["position"] for line in lines)
        lost += job.images - len(times)
        twice += sum(many > 1 for many in times.values())
    return Outcome(at, ended, different, lost, twice)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument(
        "--cycles", default="54,13", help="kills of each kind, in each format (%(default)s)"
    )
    parser.add_argument("--images", type=int, default=500, help="of a run (%(default)s)")
    parser.add_argument(
        "--runs",
        type=int,
        default=1,
        help="that the kills of a kind are spread over, about (%(default)s)",
    )
    parser.add_argument("--formats", default="png,tar,npz")
    parser.add_argument("--cfg", type=float, default=1, help="1 takes half the time (%(default)s)")
    parser.add_argument("--workers", default="0,2", help="0 is one process (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    options = parser.parse_args()
    kinds = [int(workers) for workers in options.workers.split(",")]
    cycles = [int(kills) for kills in options.cycles.split(",")]
    if len(cycles) != len(kinds) or min(cycles) < 1:
        parser.error(
            f"--cycles {options.cycles} has not a number for each of --workers "
            f"{options.workers}: give {len(kinds)}, from 1 on"
        )
    formats = options.formats.split(",")
    total = Outcome([], 0, 0, 0, 0)
    begun = time.monotonic()
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}", flush=True)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(AT_ONCE) as together:
        folder = Path(name)
        requests = folder / "requests.csv"
        requests.write_text(f"class,count\n0,{options.images}\n")
        per_file = max(options.images // 5, 1)
        asked = [options.bundle, "--requests", str(requests)]
        asked += ["--cfg", str(options.cfg), "--per-file", str(per_file), "--format"]
        jobs = [
            together.submit(whole, [*asked, format_], options.images, folder / f"{format_}_whole")
            for format_ in formats
        ]
        found = {
            (format_, workers): together.submit(
                disturb, job, workers, kills, options.runs, folder / format_, options.seed
            )
            for format_, job in zip(formats, jobs, strict=True)
            for workers, kills in zip(kinds, cycles, strict=True)
        }
        for (format_, workers), outcome in found.items():
            at, *counts = outcome.result()
            there = f"{min(at)} to {max(at)}"
            cells = (format_, f"1 + {workers} workers" if workers else "1", len(at), there)
            print(f"| {' | '.join(map(str, (*cells, *counts)))} |", flush=True)
            total = Outcome(total.at + at, *(a + b for a, b in zip(total[1:], counts, strict=True)))
    print(
        f"\n{len(total.at)} kills of runs of {options.images} images, and as many restarts, in "
        f"{(time.monotonic() - begun) / 60:.0f} minutes"
    )
    sys.exit(bool(total.different or total.lost or total.twice))


if __name__ == "__main__":
    main()
