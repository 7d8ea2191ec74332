"""Kills runs at random moments, starts them again, and compares what they end with.

    python scripts/kill_and_resume.py engines/demo --cycles 200

For each format, with one process and with workers: a run that nobody disturbs, then runs that are
killed (SIGKILL) again and again, until one ends; it must have the same files with the same bytes.
Exits with 1 if one has not.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

COMMAND = Path(sys.executable).with_name("lpd-export")


class Outcome(NamedTuple):
    """What became of the runs of one kind."""

    kills: int
    at: list[int]
    """Images that were recorded at each kill."""
    ended: int
    """Runs that came to their end, all of which were compared."""
    different: int


def start(asked: list[str], out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(COMMAND), "run", *asked, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


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


def wait_until_it_makes_images(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("image"):
            return


def disturb(
    asked: list[str],
    whole: dict[str, str],
    seconds: float,
    cycles: int,
    until: float,
    folder: Path,
    chance: random.Random,
) -> Outcome:
    """Kills runs of which one takes so many seconds, at most so often."""
    kills = ended = different = 0
    at: list[int] = []
    while kills < cycles and time.monotonic() < until:
        out = folder / f"run_{ended}"
        while True:
            process = start(asked, out)
            alone = kills == cycles or time.monotonic() > until
            if not alone:
                if chance.random() < 0.8:  # else it may be killed while it starts
                    wait_until_it_makes_images(process)
                    time.sleep(chance.random() * seconds / 3)
                else:
                    time.sleep(chance.random() * 20)
                if process.poll() is None:
                    process.kill()
                    kills += 1
                    at.append(recorded(out))
            _, said = process.communicate()
            if process.returncode == 0:
                break
            if process.returncode != -9:
                sys.exit(f"a run ended with {process.returncode}: {said}")
        ended += 1
        different += content(out) != whole
    return Outcome(kills, at, ended, different)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--cycles", type=int, default=200, help="kills of each kind (%(default)s)")
    parser.add_argument("--images", type=int, default=500, help="of a run (%(default)s)")
    parser.add_argument("--formats", default="png,tar,npz")
    parser.add_argument("--workers", default="0,2", help="0 is one process (%(default)s)")
    parser.add_argument("--minutes", type=float, default=1e9, help="at most, for all kinds")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    kinds = [(f, int(w)) for f in options.formats.split(",") for w in options.workers.split(",")]
    begun, wrong = time.monotonic(), 0
    print("| format | workers | kills | images there at a kill | runs compared | different |")
    print("|---|---|---|---|---|---|", flush=True)
    for number, (kind, workers) in enumerate(kinds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            requests = folder / "requests.csv"
            requests.write_text(f"class,count\n0,{options.images}\n")
            asked = [options.bundle, "--requests", str(requests), "--format", kind]
            asked += ["--per-file", str(max(options.images // 5, 1))]
            process = start(asked, folder / "whole")
            wait_until_it_makes_images(process)  # a tenth of them
            started = time.monotonic()
            process.communicate()
            seconds, whole = time.monotonic() - started, content(folder / "whole")
            if process.returncode or not whole:
                sys.exit("the run that nobody disturbed failed")
            asked += ["--workers", str(workers)] if workers else []
            until = begun + 60 * options.minutes * (number + 1) / len(kinds)
            found = disturb(asked, whole, seconds, options.cycles, until, folder, chance)
        wrong += found.different
        there = f"{min(found.at, default=0)} to {max(found.at, default=0)}"
        print(
            f"| {kind} | {workers or 'one process'} | {found.kills} | {there} | {found.ended} "
            f"| {found.different} |",
            flush=True,
        )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
