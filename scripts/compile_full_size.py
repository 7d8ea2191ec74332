"""Compiles a full-size model for TensorRT-RTX, which needs no GPU, and prints what that takes.

    python scripts/compile_full_size.py
    python scripts/compile_full_size.py --model lpd-l --res 512 --precision bf16 --max-batch 8

Weights are random, the schedule is the published one: the decode graph and the VQ-16 decoder are
those of scripts/benchmark.py's bundle, which is built on the first call and kept. Each graph is
compiled in a process of its own, whose peak memory is printed.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import resource
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import onnx_ir as ir

from lpd_export import formats
from lpd_export.build.build import build
from lpd_export.build.compiler import EngineOptions
from lpd_export.build.engine import compile_graph
from lpd_export.build.profiles import Profile, decode_profiles, tokenizer_profiles
from lpd_export.build.request import BuildRequest
from lpd_export.bundle.manifest import SCHEDULE
from lpd_export.graphs import export
from lpd_export.precision.casting import lower
from lpd_export.schedule.phases import phase_table
from lpd_export.schedule.schedule_file import Schedule


@click.command()
@click.option("--model", default="lpd-l", show_default=True)
@click.option("--res", default=256, show_default=True)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    default="fp16",
    show_default=True,
)
@click.option("--max-batch", default=4, show_default=True, help="Images; twice as many rows.")
@click.option("--folder", default="engines", show_default=True, help="Where the bundle is kept.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON alone.")
def main(model: str, res: int, precision: str, max_batch: int, folder: str, as_json: bool) -> None:
    """Compiles a full-size model with random weights for TensorRT-RTX."""

    def say(line: str) -> None:
        click.echo(line, err=as_json)

    path = Path(folder) / f"benchmark-{model}-{res}-fp32"
    if not path.exists():
        build(BuildRequest(model=model, res=res, random_weights=True, out=str(path)), report=say)
    phases = phase_table(Schedule.load(path / SCHEDULE).group_sizes)
    say(f"{model}, {res} px, {len(phases)} steps, {precision}, batches of 1 to {max_batch}")
    work: dict[str, Sequence[Profile]] = {
        "decode": decode_profiles(phases, max_batch),
        "detokenize": tokenizer_profiles(max_batch),
    }
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        lowered = Path(temporary)
        lower_graphs(path / "onnx", list(work), precision, lowered)
        for graph, profiles in work.items():
            result = compile_in_process(lowered, graph, profiles)
            results.append({"graph": graph, **result})
            say(
                f"{graph}: {result['seconds']:.1f} s, {result['size'] / 1e6:.0f} MB engine, peak "
                f"memory {result['peak_memory'] / 1e9:.2f} GB, {result['profiles']} profiles, "
                f"{len(result['fused_kernels'])} fused attention kernels for "
                f"{result['attentions']} attentions, {result['cache_updates']} caches in place"
            )
    if as_json:
        click.echo(json.dumps({"model": model, "res": res, "results": results}))


def lower_graphs(source: Path, graphs: Sequence[str], precision: str, folder: Path) -> None:
    """Writes graphs of an fp32 bundle in another precision."""
    models = {graph: ir.load(source / f"{graph}.onnx") for graph in graphs}
    for model in models.values():
        lower(model, formats.PRECISIONS[precision].throughout)
    export.write_models(models, folder)


def compile_in_process(folder: Path, graph: str, profiles: Sequence[Profile]) -> dict[str, Any]:
    """The report of an engine, with the peak memory in bytes of the process that compiled it.

    From a fresh process, which has had no other child.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_compile, folder, graph, profiles).result()


def _compile(folder: Path, graph: str, profiles: Sequence[Profile]) -> dict[str, Any]:
    path, engine, log = (folder / f"{graph}.{kind}" for kind in ("onnx", "engine", "log"))
    report = compile_graph(
        path, graph, profiles, EngineOptions(formats.TENSORRT_RTX.name), engine, log
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    return {**dataclasses.asdict(report), "peak_memory": peak}


if __name__ == "__main__":
    main()
