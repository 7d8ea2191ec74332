"""Makes lpd-emoji from nothing: its images, tokenizer, LPD and classifier, each where it left off.

    python scripts/train_demo.py
    nice -n 19 python scripts/train_demo.py --runs ~/runs/emoji-artwork
    python scripts/train_demo.py --tokenizer vq.safetensors    # on one that is trained already

It takes ten hours to a day on two CPU cores; OMP_NUM_THREADS=1 would leave it one. It can be
stopped or killed at any time: the same command goes on from the last checkpoint of what was being
trained, a few minutes back. What is finished is not done again. The folder of --runs then holds,
beside the runs, tokenizer.safetensors, lpd.safetensors and classifier.safetensors, and three
small LPDs to compare: small.safetensors, small-raster.safetensors, which was trained for raster
order, and small-alone.safetensors, whose queries cannot see one another.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

import prepare_artwork
import train_classifier
import train_lpd
import train_tokenizer

TOKENIZER = (
    "--steps=46000",
    "--batch-size=8",
    "--learning-rate=8e-4",
    "--warmup-steps=200",
    "--stable=0.5",
    "--average-decay=0.999",
    "--multipliers=1,2,3",
    "--codebook-size=4096",
    "--codebook-start=400",
    "--revive-every=100",
    "--validate-every=1000",
)
CLASSIFIER = ("--steps=6000",)
SMALL = ("--steps=6000", "--dim=256", "--depth=4", "--heads=4", "--patience=6")
LPDS = {
    "lpd": (
        "--steps=14000",
        "--dim=256",
        "--depth=8",
        "--heads=4",
        "--patience=6",
        "--plain-share=0.5",
        "--orders=random:1,locality:2",
    ),
    "small": SMALL,
    "small-raster": (*SMALL, "--orders=raster:1", "--schedules=256:1"),
    "small-alone": (*SMALL, "--each-query-alone"),
}
# Tokenizer, classifier and lpd have 1.9, 0.7 and 8.5 M parameters: 22 MB in float16.


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=Path("data/emoji-artwork"),
    show_default=True,
    help="The images; made if they are not there.",
)
@click.option(
    "--runs",
    type=click.Path(path_type=Path),
    default=Path("runs/emoji-artwork"),
    show_default=True,
    help="The folder of the runs and of the weights.",
)
@click.option("--tarballs", type=click.Path(path_type=Path), help="As prepare_artwork.py takes it.")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="Weights to train LPDs on; by default those of a tokenizer that is trained first.",
)
def main(data: Path, runs: Path, tarballs: Path | None, tokenizer: Path | None) -> None:
    """Makes lpd-emoji from nothing, or goes on with it."""
    if not data.exists():
        given = [] if tarballs is None else [f"--tarballs={tarballs}"]
        call(prepare_artwork.main, f"--out={data}", *given)
    if tokenizer is None:
        run, tokenizer = f"--run={runs / 'tokenizer'}", runs / "tokenizer.safetensors"
        call(train_tokenizer.main, data, run, *TOKENIZER)
        call(train_tokenizer.main, data, run, f"--export={tokenizer}")
    for name, options in LPDS.items():
        run = f"--run={runs / name}"
        call(train_lpd.main, data, run, f"--tokenizer={tokenizer}", *options)
        call(train_lpd.main, data, run, f"--export={runs / name}.safetensors")
    run, out = f"--run={runs / 'classifier'}", f"--out={runs / 'classifier.safetensors'}"
    call(train_classifier.main, data, run, out, *CLASSIFIER)


def call(command: click.Command, *arguments: str | os.PathLike[str]) -> None:
    """Runs another script's command in this process; it exits as that does where that fails."""
    command.main([os.fspath(argument) for argument in arguments], standalone_mode=False)


if __name__ == "__main__":
    main()
