"""What an evaluation can be asked. Loads no torch, so that a mistake is told at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpd_export.bounds import (
    Cfg,
    GuidanceSchedule,
    Positive,
    Probability,
    Seed,
    Temperature,
    Threads,
    checked,
)
from lpd_export.bundle.manifest import MANIFEST, Bundle
from lpd_export.errors import UserError
from lpd_export.files import check_writable

CLASSIFIER, STATISTICS = "classifier.safetensors", "statistics.npz"
"""What may lie beside the checkpoint that a bundle was made from, and is then the default."""
PER_CLASS = 50
"""Images of each class: with ImageNet's 1000, the 50,000 of published figures."""
DEFAULT_BATCH = 4
"""Where a CPU has most of what batching gives, without much more memory."""
GENERATION: dict[str, Any] = {
    "seed": Seed | None,
    "cfg": Cfg | None,
    "guidance": GuidanceSchedule | None,
    "temperature": Temperature | None,
    "top_k": Positive | None,
    "top_p": Probability | None,
    "per_class": Positive | None,
    "batch": Positive | None,
}
"""What is asked of a bundle alone, and its bounds."""


@dataclass(frozen=True)
class EvaluateRequest:
    """What `lpd-export evaluate` was asked."""

    images: Path
    """A bundle, a folder of images, or an `.npz`."""
    against: Path | None = None
    """An `.npz` of statistics or images, or a folder; None for what lies beside the checkpoint."""
    features: Path | None = None
    """Weights of what sees the images; None for what lies beside the checkpoint."""
    per_class: int | None = None
    seed: int | None = None
    cfg: float | None = None
    guidance: GuidanceSchedule | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    batch: int | None = None
    schedule: str | None = None
    device: str | None = None
    threads: int | None = None
    save_statistics: Path | None = None
    """An `.npz` for the statistics of the images, as `against` takes them."""
    out: Path | None = None
    """A file for the result as JSON."""

    @property
    def of_bundle(self) -> bool:
        """Whether the images are generated."""
        return (self.images / MANIFEST).is_file()

    def check(self) -> None:
        """Raises UserError for a request that cannot be met, before any work."""
        for name, kind in GENERATION.items():
            option = f"--{name.replace('_', '-')}"
            checked(option, getattr(self, name), kind)
            if not self.of_bundle and getattr(self, name) is not None:
                raise UserError(
                    f"{option} says how images are generated, and {self.images} is no bundle"
                )
        checked("--threads", self.threads, Threads | None)
        if self.schedule is not None and not self.of_bundle:
            raise UserError(
                f"--schedule says how images are generated, and {self.images} is no bundle"
            )
        for path in (self.out, self.save_statistics):
            if path is not None:
                check_writable(path.parent)
                if path.is_dir():
                    raise UserError(f"{path} is a folder: give the name of a file")

    def beside(self, name: str) -> Path | None:
        """A file in the folder of the checkpoint that the bundle was made from, if it is there."""
        if not self.of_bundle:
            return None
        origin = Bundle.open(self.images).manifest.made["checkpoint"]
        path = None if origin is None else Path(origin["source"]).parent / name
        return path if path is not None and path.is_file() else None
