"""What was measured of LPD's claims: the file that holds it, the table and the curves.

Knows what a measurement says and how it is shown; `claims.py` is how it comes about.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.axes import Axes

from lpd_export.errors import UserError
from lpd_export.files import write_atomically

COLOURS = {"raster": "#1b1b1b", "random": "#b35900", "locality": "#1a5fb4", "alone": "#c01c28"}


@dataclass(frozen=True)
class Variant:
    """One way to generate."""

    kind: str
    """raster, random or locality."""
    steps: int
    mutual_visibility: bool = True
    own_model: bool = False
    """Whether the model was trained for this, in raster order or without mutual visibility."""

    @property
    def name(self) -> str:
        alone, own = not self.mutual_visibility, self.own_model
        return f"{self.kind}-{self.steps}" + "-alone" * alone + "-own" * own

    @property
    def title(self) -> str:
        alone, own = not self.mutual_visibility, self.own_model
        return self.kind + ", each query alone" * alone + ", trained so" * own


@dataclass(frozen=True)
class Row:
    """What was measured of a variant."""

    variant: Variant
    frechet_distance: float
    frechet_distance_error: float
    """Standard error, by the jackknife over parts of the samples."""
    accuracy: float
    """Share of the images that the classifier sees as the class that was asked for."""
    nats: float
    """Mean negative log-likelihood of held-out images' tokens."""
    seconds: float
    """Median for one image alone."""


@dataclass(frozen=True)
class Floor:
    """How real images measure, for comparison."""

    halves_frechet_distance: float
    """Of one random half of the training images to the other."""
    reconstructed_frechet_distance: float
    """Of the training images to themselves after tokenizing and back."""
    reconstructed_accuracy: float
    held_out_accuracy: float
    """Of images that neither the model nor the classifier was trained on."""
    training_nats: float
    """As `Row.nats`, of as many training images, in the published order: what is memorized shows
    as the distance to the held-out images'."""


@dataclass(frozen=True)
class Claims:
    """The whole measurement, as claims.json holds it."""

    samples: int
    training_images: int
    held_out_images: int
    cfg: float
    rows: list[Row]
    floor: Floor

    def write(self, path: Path) -> None:
        write_atomically(path, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> Claims:
        """Raises UserError if there is no such file or it is another."""
        try:
            content = json.loads(path.read_text("utf-8"))
            rows = [Row(**{**row, "variant": Variant(**row["variant"])}) for row in content["rows"]]
            return cls(**{**content, "rows": rows, "floor": Floor(**content["floor"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} does not hold what scripts/claims.py writes: run it first"
            ) from error


def table(claims: Claims) -> str:
    """The result as a table in Markdown, for the docs and the terminal alike."""
    raster = claims.rows[0]
    published = Variant(claims.rows[-1].variant.kind, claims.rows[-1].variant.steps)
    lines = [
        "| order | steps | Fréchet distance | accuracy | nats a token | ms an image | faster |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in claims.rows:
        error = math.sqrt(row.accuracy * (1 - row.accuracy) / claims.samples)
        lines.append(
            f"| {row.variant.title} | {row.variant.steps} "
            f"| {row.frechet_distance:.2f} ± {row.frechet_distance_error:.2f} "
            f"| {row.accuracy:.1%} ± {error:.1%} | {row.nats:.3f} "
            f"| {row.seconds * 1000:.0f} | {raster.seconds / row.seconds:.1f} x |"
        )
    floor = claims.floor
    lines += [
        f"| training images, tokenized and back | | {floor.reconstructed_frechet_distance:.2f} "
        f"| {floor.reconstructed_accuracy:.1%} | | | |",
        f"| half of the training images to the other | | {floor.halves_frechet_distance:.2f} "
        "| | | | |",
        f"| held-out images | | | {floor.held_out_accuracy:.1%} | | | |",
        f"| training images, {published.title} | {published.steps} | | "
        f"| {floor.training_nats:.3f} | | |",
    ]
    return "\n".join(lines)


def draw_curves(claims: Claims, panels: list[Axes]) -> None:
    """Distance, likelihood and time over the number of steps, one in each panel."""
    metrics = (
        ("frechet_distance", "Fréchet distance (lower is better)", 1.0),
        ("nats", "nats a token, held out (lower is better)", 1.0),
        ("seconds", "milliseconds an image", 1000.0),
    )
    ticks = sorted({row.variant.steps for row in claims.rows})
    for axes, (metric, title, unit) in zip(panels, metrics, strict=True):
        for kind in ("random", "locality"):
            line = [row for row in claims.rows if row.variant.kind == kind]
            line = [row for row in line if row.variant.mutual_visibility]
            errors = [row.frechet_distance_error for row in line]
            axes.errorbar(
                [row.variant.steps for row in line],
                [unit * getattr(row, metric) for row in line],
                yerr=errors if metric == "frechet_distance" else None,
                marker="o",
                markersize=4,
                color=COLOURS[kind],
                label=f"{kind} order",
            )
        for row in claims.rows:
            alone = not row.variant.mutual_visibility
            if row.variant.kind == "raster" or alone:
                axes.plot(
                    row.variant.steps,
                    unit * getattr(row, metric),
                    "D" if not alone else "P" if row.variant.own_model else "X",
                    color=COLOURS["alone" if alone else "raster"],
                    label=row.variant.title,
                )
        if metric == "frechet_distance":
            axes.axhline(
                claims.floor.reconstructed_frechet_distance,
                color="grey",
                linestyle=":",
                label="training images, tokenized and back",
            )
            axes.legend(fontsize=7)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("steps")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if metric == "nats":  # from 0 on, all that differs would lie in one line
            axes.set_ylabel("axis does not start at 0", fontsize=8)
        else:
            axes.set_ylim(bottom=0)
