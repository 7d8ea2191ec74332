"""The first image of a process that has just started, in a process of its own.

Knows the stages from the start of Python to an image, and how much memory they take at most. The
files are in the system's file cache if they were read before: what is timed is not the disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from lpd_export.errors import UserError
from lpd_export.runtime.arrays import HOST


@dataclass(frozen=True)
class ColdStart:
    """Seconds of each stage, one after another, and bytes.

    Attributes:
        imports: from the start of the process until all packages are imported.
        verify: the manifest is read, and what is used is compared with its checksums.
        load: the graphs become ready to run; of ONNX weights the checksum is taken meanwhile.
        first_image: the first batch of images.
        total: of them all.
        peak_memory: resident at most; on a GPU, what its memory held more in the end.
    """

    imports: float
    verify: float
    load: float
    first_image: float
    total: float
    peak_memory: int


MOST_STARTS = 3
"""Of which the one of median time is told."""


def cold_start(
    bundle: Path, batch: int, device: str | None, threads: int | None, runs: int
) -> ColdStart:
    """The median of several processes, one after another, that make one batch of images each.

    Args:
        bundle: the folder.
        batch: images.
        device, threads: as `Pipeline.open` takes them.
        runs: how many, up to `MOST_STARTS`.

    Raises:
        UserError: if a process fails, with its last words.
    """
    starts = [one_start(bundle, batch, device, threads) for _ in range(min(runs, MOST_STARTS))]
    return sorted(starts, key=lambda start: start.total)[len(starts) // 2]


def one_start(bundle: Path, batch: int, device: str | None, threads: int | None) -> ColdStart:
    """Starts a process that makes one batch of images."""
    settings = [str(bundle), str(batch), device or "", str(threads or "")]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lpd_export.bench.cold", *settings, str(time.monotonic())],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        # It imports from where this process would.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it does not say why"])[-1]
        raise UserError(f"a process of its own cannot generate from {bundle}: {said}")
    return ColdStart(**json.loads(done.stdout.splitlines()[-1]))


def measure(bundle: str, batch: int, device: str | None, threads: int | None, begun: float) -> None:
    """Makes images and prints a ColdStart as JSON; `begun` is when this process was started."""
    from lpd_export.bundle.manifest import Bundle
    from lpd_export.runtime.backends import open_executor
    from lpd_export.runtime.pipeline import GENERATING, Pipeline

    marks = [time.monotonic()]
    opened = Bundle.open(bundle)
    schedule = opened.schedule()
    executor = open_executor(opened, device, threads)
    before = held_memory(executor.device)
    marks.append(time.monotonic())
    executor.load(*GENERATING)
    marks.append(time.monotonic())
    Pipeline(opened.manifest, schedule, executor).generate([0] * batch, batch=batch)
    marks.append(time.monotonic())
    imports, verify, load, image = (b - a for a, b in zip([begun, *marks], marks, strict=False))
    peak = held_memory(executor.device) - before if executor.device != HOST else peak_memory()
    print(json.dumps(vars(ColdStart(imports, verify, load, image, marks[-1] - begun, peak))))


def held_memory(device: str) -> int:
    """Bytes of a GPU's memory that are in use; 0 of the CPU's."""
    if device == HOST:
        return 0
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return total - free


def peak_memory() -> int:
    """Bytes that this process had resident at most."""
    status = Path("/proc/self/status")
    if status.exists():  # the usage that the system keeps counts what it was forked from
        lines = status.read_text("ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) << 10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    path, size, where, used, started = sys.argv[1:]
    measure(path, int(size), where or None, int(used) if used else None, float(started))
