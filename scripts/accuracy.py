"""Verifies bundles of every precision, and prints the table of docs/verification.md.

    python scripts/accuracy.py                  # the demo model, 64 images
    python scripts/accuracy.py --model wide     # the demo grown to lpd-l's width, 8 images
    python scripts/accuracy.py --model outliers-200    # its function, with large channels

Bundles are built below --folder if they are not there, and kept. Graphs are run by ONNX Runtime
on the CPU: those of the BF16 bundle, which is one for TensorRT-RTX, with every value rounded to
BF16 (`lpd-export verify --onnx`). The room is that of the weights that all graphs share, the time
that of an image on this CPU, one at a time, without loading.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from lpd_export.accuracy.thresholds import METRICS
from lpd_export.bundle.manifest import Bundle
from lpd_export.formats import BACKENDS, CPU, ONNXRUNTIME, PRECISIONS, TENSORRT_RTX
from lpd_export.runtime.backends import WEIGHTS

ROOT = Path(__file__).parents[1]
GROWN = {
    "wide": ["--depth-factor", "1"],
    **{
        f"outliers-{factor}": [
            *("--copies", "1", "--depth-factor", "1", "--perturbation", "0"),
            *("--outliers", str(factor)),
        ]
        for factor in (10, 50, 200)
    },
}
"""What `grow_demo.py` makes of the demo model, with which options; made if it is not there."""
COMMAND = Path(sys.executable).with_name("lpd-export")
DEMO = "engines/demo.toml"
DEFAULT_IMAGES = {"demo": 64} | dict.fromkeys(GROWN, 8)
BACKEND_OF = {
    name: TENSORRT_RTX.name if precision.support[CPU].refused else ONNXRUNTIME.name
    for name, precision in PRECISIONS.items()
}
TIMED = 8
"""Images that are made to see how long one takes."""
COLUMNS = (
    ("sequence_top_1", "top-1", "{:.2%}"),
    ("sequence_kl", "KL, nats", "{:.2g}"),
    ("logits_error", "logits error", "{:.2g}"),
    ("cache_error", "cache error", "{:.2g}"),
    ("image_psnr", "image PSNR, dB", "{:.1f}"),
    ("index_agreement", "indices equal", "{:.2%}"),
    ("token_agreement", "tokens equal", "{:.2%}"),
)


def build(model: str, precision: str, folder: Path) -> Path:
    """The bundle of a model in a precision, built if it is not there."""
    bundle = folder / f"{model}-{precision}"
    checkpoint = folder / f"{model}.safetensors"
    weights = ["--checkpoint", checkpoint] if model in GROWN else []
    if weights and not checkpoint.exists():
        grow = [sys.executable, ROOT / "scripts/grow_demo.py", checkpoint, *GROWN[model]]
        subprocess.run(grow, check=True)
    if not bundle.exists():
        options = ["--precision", precision, "--backend", BACKEND_OF[precision], "--out", bundle]
        built = subprocess.run([COMMAND, "build", DEMO, *weights, *options], stdout=sys.stderr)
        if built.returncode:
            sys.exit(built.returncode)  # the build has said why
    return bundle


def verify(bundle: Path, images: int) -> dict[str, Any]:
    """The findings of `lpd-export verify --json`."""
    onnx = [] if runs_here(bundle) else ["--onnx"]
    command = [COMMAND, "verify", bundle, "--images", str(images), "--json", *onnx]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if found.returncode not in (0, 1):
        sys.exit(found.returncode)
    return json.loads(found.stdout)


def runs_here(bundle: Path) -> bool:
    return not BACKENDS[Bundle.open(bundle).manifest.backend].compiles


def room_and_time(bundle: Path) -> tuple[str, str]:
    """MB of the weights, and seconds an image where the CPU runs the bundle."""
    size = f"{(bundle / WEIGHTS).stat().st_size / 1e6:.1f}"
    if not runs_here(bundle):
        return size, ""
    with tempfile.TemporaryDirectory() as folder:
        command = [COMMAND, "run", bundle, "--class", "0", "-n", str(TIMED), "--json"]
        ran = subprocess.run([*command, "--out", Path(folder) / "images"], stdout=subprocess.PIPE)
    if ran.returncode:
        sys.exit(ran.returncode)
    return size, f"{json.loads(ran.stdout)['seconds'] / TIMED:.2f}"


def worst(found: dict[str, Any], metric: str) -> float:
    """The worst value of a metric over all phases and tensors; NaN if one is not a number."""
    values = []
    for measured in [*found["measurements"], *found["reported"]]:
        if measured["metric"] == metric:
            # Of what JSON has no number for, infinity may pass, as the PSNR of equal images does.
            missing = math.inf if measured.get("passed") else math.nan
            values.append(missing if measured["value"] is None else measured["value"])
    # NumPy hands NaN on.
    return float(np.min(values) if METRICS[metric].higher_is_better else np.max(values))


@click.command()
@click.option("--model", type=click.Choice(list(DEFAULT_IMAGES)), default="demo", show_default=True)
@click.option("--images", type=int, help="Images to compare.  [default: 64 of demo, 8 of others]")
@click.option(
    "--precision", "precisions", multiple=True, type=click.Choice(list(BACKEND_OF)), help="[all]"
)
@click.option(
    "--folder", type=click.Path(path_type=Path), default=Path("engines/accuracy"), show_default=True
)
def main(model: str, images: int | None, precisions: tuple[str, ...], folder: Path) -> None:
    """Verifies bundles of every precision, and prints the table of docs/verification.md."""
    count = images or DEFAULT_IMAGES[model]
    table = Table("precision", *(title for _, title, _ in COLUMNS), "MB", "s an image", "verdict")
    try:
        for precision in precisions or BACKEND_OF:
            bundle = build(model, precision, folder)
            found = verify(bundle, count)
            values = (form.format(worst(found, metric)) for metric, _, form in COLUMNS)
            verdict = "passed" if found["passed"] else "FAILED"
            table.add_row(precision, *values, *room_and_time(bundle), verdict)
    finally:  # one that cannot be built must not lose the others
        Console(width=140).print(f"{model}, {count} images, against the PyTorch reference", table)


if __name__ == "__main__":
    main()
