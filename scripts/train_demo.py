"""Makes lpd-emoji from nothing: its images, tokenizer, LPD and classifier, each where it left off.

    python scripts/train_demo.py
    OMP_NUM_THREADS=1 nice -n 19 python scripts/train_demo.py --runs ~/runs/emoji-artwork

It takes a day on one CPU core. It can be stopped or killed at any time: the same command goes on
from the last checkpoint of what was being trained, a few minutes back. What is finished is not
done again. The folder of --runs then holds tokenizer.safetensors, lpd.safetensors and
classifier.safetensors beside the runs; data/emoji-artwork has classes.json and licences.md.
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
    "--steps=24000",
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
LPD = ("--steps=40000", "--dim=256", "--depth=9", "--heads=4", "--patience=6")
CLASSIFIER = ("--steps=2000",)
# 1.9, 9.3 and 0.7 M parameters: 24 MB in float16.


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
def main(data: Path, runs: Path, tarballs: Path | None) -> None:
    """Makes lpd-emoji from nothing, or goes on with it."""
    if not data.exists():
        given = [] if tarballs is None else [f"--tarballs={tarballs}"]
        call(prepare_artwork.main, f"--out={data}", *given)
    tokenizer, lpd = runs / "tokenizer", runs / "lpd"
    call(train_tokenizer.main, data, f"--run={tokenizer}", *TOKENIZER)
    weights = runs / "tokenizer.safetensors"
    call(train_tokenizer.main, data, f"--run={tokenizer}", f"--export={weights}")
    call(train_lpd.main, data, f"--run={lpd}", f"--tokenizer={weights}", *LPD)
    call(train_lpd.main, data, f"--run={lpd}", f"--export={runs / 'lpd.safetensors'}")
    classifier = runs / "classifier"
    call(
        train_classifier.main,
        data,
        f"--run={classifier}",
        f"--out={runs / 'classifier.safetensors'}",
        *CLASSIFIER,
    )


def call(command: click.Command, *arguments: str | os.PathLike[str]) -> None:
    """Runs another script's command in this process; it exits as that does where that fails."""
    command.main([os.fspath(argument) for argument in arguments], standalone_mode=False)


if __name__ == "__main__":
    main()
