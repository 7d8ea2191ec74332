"""Grows the demo model to lpd-l's width and depth, for accuracy figures at full width.

    python scripts/grow_demo.py engines/accuracy/grown.safetensors

Random weights make ties of everything, so they cannot tell what a precision does to a real model;
the published ones are not always at hand. A grown model computes what the demo computes, with
four times the width and three times the depth:

- Every value of the residual stream stands there four times, and so does every head and every
  neuron. Normalizations do not change by that.
- A weight W becomes W / 4 for each copy of its input, and noise that sums to zero over the copies,
  as large as makes the whole as large as trained weights of that width are (~ 1 / sqrt(width)).
- Two of three blocks are new: their output matrices are that noise alone, so they add nothing.

Then every weight is perturbed a little, so that the copies part, and some channels of the
normalizations get large, with the columns that read them smaller by as much.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import torch
from safetensors.torch import save
from torch import Tensor

from lpd_export.files import write_atomically
from lpd_reference import CheckpointError
from lpd_reference.checkpoint import load_lpd
from lpd_reference.lpd import LPD, LPDConfig

ROOT = Path(__file__).parents[1]
OUTPUTS = ("attn.proj", "mlp.fc2")
READERS = {"norm1": "attn.qkv", "norm2": "mlp.fc1"}
OUTLIER_CHANNELS = 4


class Growth:
    """Draws the noise of one growth by `copies`."""

    def __init__(self, copies: int, seed: int) -> None:
        self.copies = copies
        self._generator = torch.Generator().manual_seed(seed)

    def noise(self, like: Tensor) -> Tensor:
        """Normal, with the rows' and columns' own sizes of a matrix `like` [out, in]."""
        squares = like.square()
        rows, columns = squares.mean(1, keepdim=True), squares.mean(0, keepdim=True)
        scale = (rows * columns / squares.mean().clamp_min(1e-12)).sqrt()
        return scale * torch.randn(like.shape, generator=self._generator)

    def inputs(self, weight: Tensor, keep: bool = True) -> Tensor:
        """[out, in] -> [out, copies * in], the same function of a repeated input, or 0 of it."""
        share = weight / self.copies
        parts = [self.noise(share) for _ in range(self.copies)]
        mean = torch.stack(parts).mean(0)
        # Taking the mean away takes 1 / copies of the variance; trained weights keep
        # (copies - 1) times that of the share.
        parts = [(part - mean) * self.copies**0.5 for part in parts]
        return torch.cat([part + share if keep else part for part in parts], dim=1)

    def matrix(self, weight: Tensor, keep: bool = True) -> Tensor:
        """As `inputs`, with every output repeated too, each with noise of its own."""
        return torch.cat([self.inputs(weight, keep) for _ in range(self.copies)])

    def vector(self, value: Tensor) -> Tensor:
        """[..., n] -> [..., copies * n]."""
        return value.repeat(*[1] * (value.dim() - 1), self.copies)

    def block(self, weights: dict[str, Tensor], new: bool) -> dict[str, Tensor]:
        """One block of a checkpoint; a new one adds nothing to the residual stream."""
        grown = {}
        for name, value in weights.items():
            layer = name.rpartition(".")[0]
            adds_nothing = new and layer in OUTPUTS
            if layer == "attn.qkv":  # its rows are queries, then keys, then values
                grow = self.matrix if value.dim() == 2 else self.vector
                grown[name] = torch.cat([grow(part) for part in value.chunk(3)])
            elif value.dim() == 2:
                grown[name] = self.matrix(value, keep=not adds_nothing)
            else:
                grown[name] = self.vector(value) * (0 if adds_nothing else 1)
        return grown

    def perturb(self, model: LPD, amount: float) -> None:
        """Adds noise of `amount` times its size to every matrix, and to the normalizations."""
        for value in model.state_dict().values():
            matrix = value.flatten(0, -2) if value.dim() > 1 else value[None]
            matrix += amount * self.noise(matrix)

    def add_outliers(self, model: LPD, factor: float) -> None:
        """Makes channels of every block's normalizations `factor` times larger, undone after."""
        weights = model.state_dict()
        for index in range(model.config.depth):
            for norm, reader in READERS.items():
                channels = torch.randperm(model.config.dim, generator=self._generator)
                channels = channels[:OUTLIER_CHANNELS]
                for name in ("weight", "bias"):
                    weights[f"blocks.{index}.{norm}.{name}"][channels] *= factor
                weights[f"blocks.{index}.{reader}.weight"][:, channels] /= factor


@torch.no_grad()
def grow(model: LPD, growth: Growth, depth_factor: int) -> LPD:
    """A model of the same function, `growth.copies` times as wide and `depth_factor` as deep."""
    config, weights = model.config, model.state_dict()
    grown = LPD(
        LPDConfig(
            dim=config.dim * growth.copies,
            depth=config.depth * depth_factor,
            heads=config.heads * growth.copies,
            grid=config.grid,
            num_classes=config.num_classes,
            vocab_size=config.vocab_size,
            mlp_dim=config.mlp_dim * growth.copies,
            norm_eps=config.norm_eps,
        )
    )
    state = {
        name: growth.inputs(value) if name == "head.weight" else growth.vector(value)
        for name, value in weights.items()
        if not name.startswith("blocks.")
    }
    for index in range(grown.config.depth):
        source = f"blocks.{index // depth_factor}."
        block = {
            name.removeprefix(source): value
            for name, value in weights.items()
            if name.startswith(source)
        }
        for name, value in growth.block(block, new=index % depth_factor > 0).items():
            state[f"blocks.{index}.{name}"] = value
    grown.load_state_dict(state)
    return grown.eval()


@click.command()
@click.argument("output", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--checkpoint", default=str(ROOT / "models/lpd-emoji/lpd.safetensors"))
@click.option("--copies", type=click.IntRange(1, 16), default=4, show_default=True)
@click.option("--depth-factor", type=click.IntRange(1, 8), default=3, show_default=True)
@click.option("--perturbation", type=click.FloatRange(0, 1), default=0.03, show_default=True)
@click.option("--outliers", type=click.FloatRange(1, 1e4), default=50.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    output: Path,
    checkpoint: str,
    copies: int,
    depth_factor: int,
    perturbation: float,
    outliers: float,
    seed: int,
) -> None:
    """Writes a checkpoint at full width that draws what the demo draws."""
    try:
        model = load_lpd(checkpoint)
    except CheckpointError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    growth = Growth(copies, seed)
    with torch.no_grad():
        grown = grow(model, growth, depth_factor)
        growth.perturb(grown, perturbation)
        growth.add_outliers(grown, outliers)
    output.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in grown.state_dict().items()}
    write_atomically(output, save(weights))
    count = sum(value.numel() for value in weights.values())
    click.echo(f"{output}: {grown.config}, {count / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
