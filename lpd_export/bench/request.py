"""What a benchmark can be asked. Knows the options and their bounds, not how anything is timed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lpd_export.accuracy.request import REFERENCE
from lpd_export.bounds import Positive, Threads, checked
from lpd_export.bundle.manifest import Bundle
from lpd_export.errors import UserError
from lpd_export.files import check_writable

REPORT, RECORD = "report.html", "report.json"
"""What a benchmark leaves in --out."""


@dataclass(frozen=True)
class BenchRequest:
    """What `lpd-export bench` was asked."""

    bundle: Path
    batches: tuple[int, ...] = (1,)
    against: tuple[str, ...] = ()
    """`reference`, or folders of other bundles."""
    checkpoint: str | None = None
    tokenizer: str | None = None
    """The reference's weights, instead of the files that the bundle was made from."""
    runs: int = 5
    """Timed rounds; one more warms up."""
    device: str | None = None
    threads: int | None = None
    seed: int = 0
    details: bool = True
    """Also profile operators, and start processes anew."""
    out: Path | None = None
    """The folder of a report."""

    def check(self) -> None:
        """Raises UserError for a request that cannot be met, before any work."""
        checked("--runs", self.runs, Positive)
        checked("--threads", self.threads, Threads | None)
        for option in ("checkpoint", "tokenizer"):
            if getattr(self, option) and REFERENCE not in self.against:
                raise UserError(f"--{option} is the reference's: add --against {REFERENCE}")
        for other in self.against:
            if other != REFERENCE:
                check_same_model(Bundle.open(self.bundle), Bundle.open(other))
        if self.out is not None:
            check_out(self.out)


def check_same_model(bundle: Bundle, other: Bundle) -> None:
    """Raises UserError unless two bundles make the same images, so that their times compare."""
    ours, theirs = bundle.manifest, other.manifest
    for what in ("model", "tokenizer"):
        if getattr(ours, what) != getattr(theirs, what):
            raise UserError(
                f"{other.path} is another model than {bundle.path} ({theirs.name} and "
                f"{ours.name}): times of different work do not compare"
            )


def check_out(folder: Path) -> None:
    """Raises UserError unless a report may be written to `folder`."""
    if folder.exists():
        if not folder.is_dir():
            raise UserError(f"--out {folder} is a file: give the name of a folder")
        foreign = {path.name for path in folder.iterdir()} - {REPORT, RECORD}
        if foreign:
            raise UserError(
                f"{folder} holds {min(foreign)}, which is no part of a report: move it away, or "
                "choose another --out"
            )
    check_writable(folder)


def read_batches(text: str, bundle: Bundle) -> tuple[int, ...]:
    """The batch sizes of `--batch 1,4,16`, each once, that the bundle takes.

    Raises:
        UserError: if it is not such a list.
    """
    sizes = []
    for word in text.split(","):
        if not word.strip().isdecimal():
            raise UserError(f"--batch must be whole numbers such as 1,4,16, but it is {text!r}")
        sizes.append(checked("--batch", int(word), Positive))
    limit = bundle.manifest.max_batch
    if limit is not None and max(sizes) > limit:
        raise UserError(
            f"{bundle.path} takes batches of up to {limit} images, not {max(sizes)}: build it with "
            f"--max-batch {max(sizes)}"
        )
    return tuple(dict.fromkeys(sizes))
