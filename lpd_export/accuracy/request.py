"""What a verification can be asked, and where its report may be written.

Knows the options and the folder. Does not know how anything is compared.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lpd_export.accuracy.thresholds import Limits
from lpd_export.bounds import Positive, Seed, Threads, checked
from lpd_export.bundle.manifest import Bundle
from lpd_export.errors import UserError
from lpd_export.files import check_writable, new_folder
from lpd_export.formats import PRECISIONS, ROUNDING_ACTIVATIONS

DEFAULT_IMAGES = 8
REFERENCE = "reference"
"""What a bundle is compared with unless another bundle is named."""
REPORT, RECORD, IMAGES = "report.html", "report.json", "images"
POLYGRAPHY = "polygraphy"
"""In the report's folder, what `PolygraphyFiles` writes."""
KEPT_LAYERS = "keep_layers.json"
"""In the report's folder, what `build --keep-layers` takes."""
REPORT_CONTENT = frozenset({REPORT, RECORD, IMAGES, POLYGRAPHY, KEPT_LAYERS})
"""All that there may be in a report's folder."""


@dataclass(frozen=True)
class VerifyRequest:
    """What `lpd-export verify` was asked."""

    bundle: Path
    against: str = REFERENCE
    """`reference`, or the folder of another bundle."""
    checkpoint: str | None = None
    tokenizer: str | None = None
    """Instead of the files that the bundle was made from."""
    device: str | None = None
    threads: int | None = None
    onnx: bool = False
    """Run the ONNX graphs on the CPU, whatever the bundle's backend."""
    images: int = DEFAULT_IMAGES
    seed: int = 0
    thresholds: tuple[str, ...] = ()
    """METRIC=LIMIT."""
    by_layer: bool = False
    bisect: bool = False
    save_phases: str | None = None
    """See `polygraphy_files.kept_phases`."""
    out: Path | None = None

    @property
    def folder(self) -> Path:
        """Where the report goes."""
        bundle = self.bundle.resolve() if self.bundle.name in ("", "..") else self.bundle
        return self.out or bundle.parent / f"{bundle.name}-verification"

    def check(self) -> None:
        """Raises UserError for a request that cannot be met, before any work."""
        bundle = Bundle.open(self.bundle)
        precision = bundle.manifest.precision
        checked("--images", self.images, Positive)
        checked("--seed", self.seed, Seed)
        checked("--threads", self.threads, Threads | None)
        Limits.of([precision], self.thresholds)
        if self.onnx and self.device == "cuda":
            raise UserError("--onnx runs the graphs on the CPU: it does not go with --device cuda")
        if self.against != REFERENCE:
            Bundle.open(self.against)
            for option in ("checkpoint", "tokenizer", "by_layer", "bisect"):
                if getattr(self, option):
                    raise UserError(
                        f"--{option.replace('_', '-')} needs the reference: it does not go with "
                        "--against"
                    )
        if self.bisect and not PRECISIONS[precision].rounds_activations:
            raise UserError(
                "--bisect finds the layers whose activations must not be rounded, and "
                f"{bundle.path} is {precision}: build one with --precision "
                f"{' or '.join(ROUNDING_ACTIVATIONS)}"
            )
        check_report_folder(self.folder)


def check_report_folder(folder: Path) -> None:
    """Raises UserError unless a report may be written to `folder`."""
    if folder.name in ("", ".."):
        raise UserError(
            f"--out {folder} does not name a folder: give the name that the report gets"
        )
    if folder.is_symlink():
        raise UserError(f"{folder} is a symbolic link: give --out the folder that it leads to")
    content = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if content and not (folder / RECORD).is_file():
        raise UserError(
            f"{folder} exists and is not an earlier verification's: choose another --out"
        )
    # Many programs call a file report.json; nothing that is not a verification's may be lost.
    foreign = content - REPORT_CONTENT
    if foreign:
        raise UserError(
            f"{folder} holds {min(foreign)}, which is no part of a report: move it away, or choose "
            "another --out"
        )
    check_writable(folder)


def new_report(folder: Path) -> contextlib.AbstractContextManager[Path]:
    """A folder to write a report in, which takes the name `folder` when the block ends well.

    An earlier report there is then replaced; if the block fails it stays, and nothing else does.

    Raises:
        UserError: as `check_report_folder`, or if another verification is writing the same report.
    """
    return new_folder(
        folder,
        taken=f"another verification is writing {folder}: wait for it to end, or choose another "
        "--out",
        check=partial(check_report_folder, folder),
    )
