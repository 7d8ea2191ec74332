"""Runs for half an hour, and says whether memory, open files and threads stay as they are.

    python scripts/soak.py engines/demo --minutes 30

A bulk run in a process of its own, looked at every few seconds; the last quarter of the time is
compared with the second. Exits with 1 if anything grew.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

COMMAND = Path(sys.executable).with_name("lpd-export")
TOLERATED = 0.02
"""Of the memory: the allocator's own ups and downs."""


class Look(NamedTuple):
    """What a process holds."""

    megabytes: float
    files: int
    threads: int
    images: int


def look(process: int, records: Path) -> Look:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines()
    )
    return Look(
        int(status["VmRSS"].split()[0]) / 1024,
        len(list(Path(f"/proc/{process}/fd").iterdir())),
        int(status["Threads"]),
        records.read_bytes().count(b"\n"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--minutes", type=float, default=30, help="(%(default)s)")
    parser.add_argument("--every", type=float, default=5, help="seconds (%(default)s)")
    parser.add_argument("--format", default="tar", help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="(the physical cores)")
    options = parser.parse_args()
    looks: list[Look] = []
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out"
        requests = Path(name) / "requests.csv"
        requests.write_text("class,count\n0,200000\n")
        asked = ["--requests", str(requests), "--format", options.format, "--out", str(out), "-q"]
        if options.threads:
            asked += ["--threads", str(options.threads)]
        process = subprocess.Popen([str(COMMAND), "run", options.bundle, *asked])
        while not (out / "images.jsonl").exists() and process.poll() is None:
            time.sleep(0.1)
        end = time.monotonic() + 60 * options.minutes
        while time.monotonic() < end and process.poll() is None:
            time.sleep(options.every)
            looks.append(look(process.pid, out / "images.jsonl"))
        process.send_signal(signal.SIGTERM)
        if process.wait() != 130:
            sys.exit(f"the run ended with {process.returncode}")
    quarter = len(looks) // 4
    if not quarter:
        sys.exit("too short: look more often, or longer")
    early, late = looks[quarter : 2 * quarter], looks[-quarter:]
    print(f"{looks[-1].images} images in {options.minutes:g} minutes, {len(looks)} looks")
    print("| | second quarter | last quarter |\n|---|---|---|")
    grown = False
    for name, tolerated in (("megabytes", TOLERATED), ("files", 0.0), ("threads", 0.0)):
        before, after = (
            statistics.median(getattr(found, name) for found in part) for part in (early, late)
        )
        grown |= after > before * (1 + tolerated)
        print(f"| {name} | {before:.1f} | {after:.1f} |")
    print("it grows" if grown else "flat")
    sys.exit(grown)


if __name__ == "__main__":
    main()
