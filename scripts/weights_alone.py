"""Measures what weights of a few bits are there for, on a full-size model: room, and time on a CPU.

    python scripts/weights_alone.py
    python scripts/weights_alone.py --model lpd-xl --precision int8-weights

Weights are random and rounded to the nearest level, no layer left out: what is stored and computed
is the same. Room is that of all weights beside those of FP16, and of decode engines that
TensorRT-RTX compiles for one image, which takes no GPU. The CPU decodes one image with guidance,
without the tokenizer, in FP32 and on levels by turns in one process.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import onnx_ir as ir

from lpd_export.build.build import describe, write_exact_graphs
from lpd_export.build.compiler import EngineOptions
from lpd_export.build.engine import compile_graph
from lpd_export.build.profiles import decode_profiles
from lpd_export.build.request import BuildRequest
from lpd_export.build.settings import draw_random_weights, settle
from lpd_export.bundle.manifest import GRAPH_NAMES
from lpd_export.formats import (
    FLOAT16,
    ONNXRUNTIME,
    PRECISIONS,
    QUANTIZED,
    TENSORRT_RTX,
    Backend,
    Precision,
)
from lpd_export.graphs import export
from lpd_export.precision.block_weights import WeightRounder, quantize_weights, store_embedding
from lpd_export.precision.casting import lower
from lpd_export.precision.quantization import quantizable_layers, quantize
from lpd_export.runtime.onnxruntime_executor import OnnxRuntimeExecutor
from lpd_export.runtime.pipeline import Pipeline

WEIGHTS_ALONE = [name for name in QUANTIZED if not PRECISIONS[name].rounds_activations]


def write_levels(exact: Path, precision: Precision, backend: Backend, out: Path) -> None:
    """Writes FP32 graphs in a precision as a build would, every layer of them on levels."""
    models = {graph: ir.load(exact / f"{graph}.onnx") for graph in GRAPH_NAMES}
    for graph, model in models.items():
        lower(model, precision.float_type(backend.name))
        kind = precision.quantization_of(graph)
        layers = [layer.node for layer in quantizable_layers(model)]
        if kind is not None and kind.activations:
            quantize(model, dict.fromkeys(layers, 1.0), backend.unsigned, kind)
        elif kind is not None:
            quantize_weights(model, dict.fromkeys(layers, kind), WeightRounder({}))
            store_embedding(model, backend)
    out.mkdir()
    export.write_models(models, out)


def write_half(exact: Path, out: Path) -> None:
    """Writes FP32 graphs in FP16."""
    models = {graph: ir.load(exact / f"{graph}.onnx") for graph in GRAPH_NAMES}
    for model in models.values():
        lower(model, FLOAT16)
    out.mkdir()
    export.write_models(models, out)


def megabytes(folder: Path) -> float:
    return (folder / export.WEIGHTS_FILE).stat().st_size / 1e6


def by_turns(first: Callable[[], None], second: Callable[[], None], rounds: int) -> list[float]:
    """How many times as long the first takes in each round; one more before warms up."""
    ratios = []
    for _ in range(rounds + 1):
        seconds = []
        for work in (first, second):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[0] / seconds[1])
    return ratios[1:]


@click.command()
@click.option("--model", default="lpd-l", show_default=True)
@click.option("--res", default=256, show_default=True)
@click.option(
    "--precision",
    "name",
    type=click.Choice(WEIGHTS_ALONE),
    default="int4-weights",
    show_default=True,
)
@click.option("--rounds", default=5, show_default=True, help="Of decoding by turns.")
@click.option("--threads", type=int, help="CPU threads.  [default: the physical cores]")
@click.option("--folder", type=click.Path(path_type=Path), help="For some GB of graphs.")
def main(
    model: str, res: int, name: str, rounds: int, threads: int | None, folder: Path | None
) -> None:
    """Measures room and CPU time of a full-size model with weights of a few bits."""
    say = partial(click.echo, err=True)
    request = BuildRequest(model=model, res=res, random_weights=True)
    precision, title = PRECISIONS[name], f"{model}, {res} px, {name}"
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        place = Path(temporary)
        source = draw_random_weights(request, say)
        settings = settle(request, source)
        manifest = describe(request, source, settings)
        write_exact_graphs(place / "exact", source, ONNXRUNTIME, say)
        del source
        half, engines, cpu = place / "half", place / "engines", place / "cpu"
        say("writing FP16 graphs, and levels for engines and for a CPU")
        write_half(place / "exact", half)
        write_levels(place / "exact", precision, TENSORRT_RTX, engines)
        write_levels(place / "exact", precision, ONNXRUNTIME, cpu)
        room = {"FP16": megabytes(half), "engines": megabytes(engines), "CPU": megabytes(cpu)}
        for kind in ("engines", "CPU"):
            click.echo(
                f"{title}, graphs for {kind}: {room[kind]:.0f} MB, {room[kind] / room['FP16']:.3f} "
                f"of FP16's {room['FP16']:.0f}"
            )
        sizes = []
        for graphs in (half, engines):
            say(f"compiling {graphs.name}/decode.onnx for {TENSORRT_RTX.name}")
            report = compile_graph(
                graphs / "decode.onnx",
                "decode",
                decode_profiles(settings.phases, 1),
                EngineOptions(TENSORRT_RTX.name),
                graphs / "decode.engine",
                graphs / "decode.log",
            )
            sizes.append(report.size / 1e6)
        click.echo(
            f"{title}, decode engine: {sizes[1]:.0f} MB, {sizes[1] / sizes[0]:.3f} of FP16's "
            f"{sizes[0]:.0f}"
        )

        def decoder(graphs: Path) -> Callable[[], None]:
            files = {graph: graphs / f"{graph}.onnx" for graph in GRAPH_NAMES}
            executor = OnnxRuntimeExecutor(files, threads=threads)
            steps = Pipeline(manifest, settings.schedule, executor).bind_steps(1, guided=True)

            def decode() -> None:
                for step in steps:
                    step.run()

            return decode

        say("decoding by turns")
        ratios = by_turns(decoder(place / "exact"), decoder(cpu), rounds)
        click.echo(
            f"{title}, decoding on the CPU: {statistics.median(ratios):.2f} times as fast as FP32 "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
