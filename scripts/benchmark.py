"""Times full-size bundles against the eager PyTorch reference, in one process.

    python scripts/benchmark.py
    python scripts/benchmark.py --model lpd-xl --res 512 --runs 3

Weights are random: what is computed is the same, and no checkpoint has to be fetched. Bundles are
built on the first call and kept. Eager and bundle take turns, so that a machine whose speed
drifts is fair to both; medians and the ratios of each pair are printed. Peak memory is that of a
process of its own which only opens the bundle and generates.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import torch

from lpd_export import Pipeline
from lpd_export.build.build import build
from lpd_export.build.request import BuildRequest
from lpd_export.bundle.manifest import Bundle
from lpd_export.runtime.randomness import image_randomness
from lpd_reference import LPD, PUBLISHED_MODELS, LPDConfig, VQConfig, VQTokenizer, generate

SEED = 0
GENERATE_ONCE = """
import resource, sys
from pathlib import Path
from lpd_export import Pipeline
Pipeline.open(sys.argv[1]).generate([0] * int(sys.argv[2]), batch=int(sys.argv[2]))
status = Path("/proc/self/status")
if status.exists():  # the usage that the system keeps counts what the process was forked from
    print(next(int(line.split()[1]) for line in status.open() if line.startswith("VmHWM:")) * 1024)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@click.command()
@click.option("--model", default="lpd-l", show_default=True)
@click.option("--res", default=256, show_default=True)
@click.option("--runs", default=5, show_default=True, help="Timed pairs; one more warms up.")
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 4), show_default=True)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    default=("fp32", "int8"),
    show_default=True,
    help="fp32, fp16 or int8.",
)
@click.option("--folder", default="engines", show_default=True, help="Where bundles are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON alone.")
def main(
    model: str,
    res: int,
    runs: int,
    batches: tuple[int, ...],
    precisions: tuple[str, ...],
    folder: str,
    as_json: bool,
) -> None:
    """Times full-size bundles with random weights against the eager reference."""

    def say(line: str) -> None:
        click.echo(line, err=as_json)

    bundles = {
        precision: full_size_bundle(Path(folder), model, res, precision, say)
        for precision in precisions
    }
    manifest = Bundle.open(bundles[precisions[0]]).manifest
    say(
        f"{model}, {res} px, {len(manifest.phases)} steps, cfg {manifest.cfg:g}, "
        f"{os.cpu_count()} CPUs, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    )
    lpd, tokenizer = reference_models(model, manifest.model.grid)
    results = []
    for precision, bundle in bundles.items():
        pipeline = Pipeline.open(bundle)
        disk = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
        for batch in batches:
            result = compare(lpd, tokenizer, pipeline, batch, runs)
            result |= {
                "precision": precision,
                "peak_memory_gb": peak_memory(bundle, batch) / 1e9,
                "disk_gb": disk / 1e9,
            }
            results.append(result)
            say(
                f"{precision}, batch {batch}: eager fp32 {result['eager_seconds']:.2f} s, bundle "
                f"{result['bundle_seconds']:.2f} s "
                f"({result['bundle_seconds_an_image']:.2f} s an image), "
                f"{result['ratio']:.2f} times faster, peak memory "
                f"{result['peak_memory_gb']:.2f} GB, disk {result['disk_gb']:.2f} GB"
            )
        del pipeline
    if as_json:
        machine = {"processor": platform.processor(), "cpus": os.cpu_count()}
        click.echo(json.dumps({"model": model, "res": res, **machine, "results": results}))


def full_size_bundle(
    folder: Path, model: str, res: int, precision: str, say: Callable[[str], None]
) -> Path:
    """The bundle of a published architecture with random weights, built if it is not there."""
    bundle = folder / f"benchmark-{model}-{res}-{precision}"
    if not bundle.exists():
        request = BuildRequest(
            model=model,
            res=res,
            precision=precision,
            random_weights=True,
            seed=SEED,
            out=str(bundle),
        )
        build(request, report=say)
    return bundle


def compare(
    lpd: LPD, tokenizer: VQTokenizer, pipeline: Pipeline, batch: int, runs: int
) -> dict[str, Any]:
    """Medians of eager and bundle, which take turns, and of the ratio of each pair."""
    pairs = [
        (
            seconds(partial(run_eager, lpd, tokenizer, pipeline, batch)),
            seconds(partial(pipeline.generate, [0] * batch, seed=SEED, batch=batch)),
        )
        for _ in range(runs + 1)
    ][1:]
    ours = statistics.median(bundle for _, bundle in pairs)
    return {
        "batch": batch,
        "eager_seconds": statistics.median(eager for eager, _ in pairs),
        "bundle_seconds": ours,
        "bundle_seconds_an_image": ours / batch,
        "ratio": statistics.median(eager / bundle for eager, bundle in pairs),
    }


def reference_models(model: str, grid: int) -> tuple[LPD, VQTokenizer]:
    """The reference with the bundle's random weights."""
    lpd = LPD(LPDConfig(**PUBLISHED_MODELS[model], grid=grid)).initialize(SEED)
    tokenizer = VQTokenizer(VQConfig()).initialize(SEED)
    return lpd.requires_grad_(False).eval(), tokenizer.requires_grad_(False).eval()


def run_eager(lpd: LPD, tokenizer: VQTokenizer, pipeline: Pipeline, batch: int) -> None:
    """The same images as the bundle's, with the reference, decoded to pixels."""
    schedule = pipeline.choose_schedule(None)
    chances = [image_randomness(SEED, i, schedule.cells, schedule.count) for i in range(batch)]
    orders = np.stack([schedule.orders[chance.order_index] for chance in chances])
    with torch.inference_mode():
        generation = generate(
            lpd,
            torch.zeros(batch, dtype=torch.int64),
            torch.from_numpy(orders.astype(np.int64)),
            schedule.group_sizes.tolist(),
            torch.from_numpy(np.stack([chance.uniform for chance in chances])),
            cfg=pipeline.manifest.cfg,
            guidance=pipeline.sampling().guidance,
        )
        tokenizer.decode(generation.token_ids)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peak_memory(bundle: Path, batch: int) -> int:
    """Bytes resident at most in a process that opens the bundle and generates one batch."""
    command = [sys.executable, "-c", GENERATE_ONCE, str(bundle), str(batch)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


if __name__ == "__main__":
    main()
