"""What an image costs on a GPU that is not here: kernels, operations and bytes, line by line.

    python scripts/gpu_cost.py engines/lpd-l-256-fp16 engines/lpd-l-256-int8-weights
    python scripts/gpu_cost.py engines/demo-fp16 --device a100

Kernels of the graphs are counted in the log that the compiler left in the bundle, in the profile
for one image. Those of sampling, and of the eager reference, are counted by running them on the
CPU and counting PyTorch's operators: all but views and allocations, each of which starts at least
one kernel on a GPU. Operations, bytes and floors are those of `lpd-export bench --roofline`.
Prints Markdown.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import array_api_compat.torch
import click
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lpd_export.accuracy.bundle_side import open_bundle
from lpd_export.accuracy.reference_side import architecture
from lpd_export.accuracy.request import VerifyRequest
from lpd_export.bench.devices import DATA_SHEETS
from lpd_export.bench.floor import floors, least_seconds
from lpd_export.bench.tables import number
from lpd_export.bench.work import DETOKENIZE, PIXELS, PREFILL, SAMPLING, generation_work, step_title
from lpd_export.bundle.manifest import Bundle
from lpd_export.errors import UserError
from lpd_export.runtime.arrays import HOST, Array, Arrays
from lpd_export.runtime.executor import Executor, ExecutorAround, Run
from lpd_export.runtime.pipeline import Pipeline
from lpd_reference.generate import generate
from lpd_reference.lpd import LPD
from lpd_reference.vq import VQTokenizer

KERNEL = re.compile(r"^ *Name: \S*_myl(\d+)_\d+, LayerType: (\w+)", re.MULTILINE)
NO_KERNELS = ("shape_call", "signal", "wait")
"""Layers of the host, and of streams that wait for one another."""
ALLOCATIONS = ("empty", "new_empty", "detach", "alias")


class Kernels(TorchDispatchMode):
    """Counts operators that compute or copy, as a GPU would start a kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        aliases = [value.alias_info for value in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliases)
        name = func._schema.name.removeprefix("aten::")
        self.count += not view and not name.startswith(ALLOCATIONS)
        return func(*args, **(kwargs or {}))


class WithTensors(ExecutorAround):
    """An executor of the CPU over torch's arrays, as a GPU's is."""

    def __init__(self, executor: Executor) -> None:
        super().__init__(executor)
        self.arrays = Arrays(array_api_compat.torch, HOST)

    def bind(self, graph: str, tensors: Mapping[str, Array]) -> Run:
        return self._executor.bind(graph, tensors)


def engine_kernels(bundle: Bundle) -> dict[str, int]:
    """Kernels of one image by part: every step, and detokenize; of the first fitting profile."""
    manifest = bundle.manifest
    counts = {
        graph: Counter(
            int(profile)
            for profile, kind in KERNEL.findall((bundle.path / f"engines/{graph}.log").read_text())
            if kind not in NO_KERNELS
        )
        for graph in ("decode", "detokenize")
    }
    rows = 2 if manifest.cfg != 1 else 1
    profiles = manifest.engines["decode"]["optimization_profiles"]
    parts = {}
    for phase in manifest.phases:
        sizes = {"rows": rows, "context_tokens": phase.context, "tokens": phase.tokens}
        fitting = next(
            index
            for index, profile in enumerate(profiles)
            if all(profile[axis][0] <= size <= profile[axis][2] for axis, size in sizes.items())
        )
        parts[step_title(phase)] = counts["decode"][fitting]
    return parts | {DETOKENIZE: counts["detokenize"][0]}


def sampling_kernels(bundle: Bundle) -> int:
    """Of an image drawn by the runtime: what it does between the graphs, and the pixels."""
    request = VerifyRequest(bundle.path, onnx=True)
    with tempfile.TemporaryDirectory() as scratch:
        side = open_bundle(bundle, request, Path(scratch) / "graphs", lambda line: None)
        executor = WithTensors(side.pipeline.executor)
        with Pipeline(bundle.manifest, bundle.schedule(), executor) as pipeline:
            pipeline.generate([0])
            with Kernels() as kernels:
                pipeline.generate([0])
    return kernels.count


@torch.inference_mode()
def reference_kernels(bundle: Bundle) -> int:
    """Of an image by the eager reference with random weights, decoding included."""
    manifest, schedule = bundle.manifest, bundle.schedule()
    config, vq_config = architecture(manifest)
    lpd, tokenizer = LPD(config).initialize(0).eval(), VQTokenizer(vq_config).initialize(0).eval()
    orders = torch.tensor(schedule.orders[:1]).long()
    uniform = torch.rand(orders.shape, dtype=torch.float64)
    with Kernels() as kernels:
        drawn = generate(
            lpd, torch.tensor([0]), orders, schedule.group_sizes, uniform, cfg=manifest.cfg
        )
        tokenizer.decode(drawn.token_ids)
    return kernels.count


def table(bundle: Bundle, device: str) -> list[str]:
    """Rows of one bundle, and of what they sum to."""
    kernels = engine_kernels(bundle)
    work = generation_work(bundle)
    found = floors(work, DATA_SHEETS[device], 1)
    # The steps between the first and the last differ in their sizes alone.
    steps = [name for name in kernels if name not in (PREFILL, DETOKENIZE)]
    lines = []
    for title, names in (
        (PREFILL, [PREFILL]),
        (f"{len(steps)} steps", steps),
        (SAMPLING, [SAMPLING]),
        (DETOKENIZE, [DETOKENIZE]),
        (PIXELS, [PIXELS]),
        ("**an image**", list(found)),
    ):
        count = sum(kernels.get(name, 0) for name in names)
        parts = {name: found[name] for name in names}
        values = (
            sum(part.operations for part in parts.values()) / 1e9,
            sum(part.bytes for part in parts.values()) / 1e6,
            least_seconds(parts) * 1e3,
        )
        cells = [bundle.manifest.precision, title, str(count or ""), *map(number, values)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--device", type=click.Choice([*DATA_SHEETS]), default="h100", show_default=True)
def main(bundles: tuple[Path, ...], device: str) -> None:
    """Prints what an image of bundles with engines costs on a GPU."""
    try:
        opened = [Bundle.open(path) for path in bundles]
        lines = [line for bundle in opened for line in table(bundle, device)]
        between = sampling_kernels(opened[0])
        eager = reference_kernels(opened[0])
    except UserError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"| {DATA_SHEETS[device].title} | | kernels | GFLOP | MB | at least, ms |")
    click.echo("|---|---|---|---|---|---|")
    click.echo("\n".join(lines))
    click.echo(f"\nbetween the graphs, with the plain sampler: {between} kernels an image")
    click.echo(f"the eager reference: {eager} kernels an image")


if __name__ == "__main__":
    main()
