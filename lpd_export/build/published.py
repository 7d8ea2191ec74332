"""The published LPD models: where they are, and the settings they were evaluated with.

Source: the tables of arXiv 2507.01957 and the authors' release.
"""

from __future__ import annotations

from dataclasses import dataclass

TOKENIZER = "hf:FoundationVision/LlamaGen/vq_ds16_c2i.pt"
NUM_CLASSES = 1000
VOCAB_SIZE = 16384


@dataclass(frozen=True)
class PublishedSettings:
    """A row of the published table: guidance is linear, no top-k, no top-p, temperature 1."""

    model: str
    resolution: int
    steps: int
    cfg: float
    repulsion: int
    fid: float
    """FID of 50,000 images, as published."""
    inception_score: float
    revision: str | None = None
    """The commit of the weights in their repository; None, where none is pinned, is the newest."""

    @property
    def checkpoint(self) -> str:
        """Where its weights are."""
        pinned = f"@{self.revision}" if self.revision else ""
        return f"hf:mit-han-lab/{self.model.replace('-', '_')}_{self.resolution}{pinned}"


PUBLISHED = (
    PublishedSettings("lpd-l", 256, 20, 4.8, 2, 2.40, 284.5),
    PublishedSettings("lpd-xl", 256, 20, 4.9, 2, 2.10, 326.7),
    PublishedSettings("lpd-xxl", 256, 20, 5.9, 3, 2.00, 337.6),
    PublishedSettings("lpd-l", 256, 32, 5.4, 2, 2.29, 282.7),
    PublishedSettings("lpd-xl", 256, 32, 5.0, 2, 1.92, 319.4),
    PublishedSettings("lpd-l", 512, 48, 7.3, 4, 2.54, 292.2),
    PublishedSettings("lpd-xl", 512, 48, 6.0, 4, 2.10, 326.0),
)


def published_settings(
    model: str | None, resolution: int, steps: int | None = None
) -> PublishedSettings | None:
    """The row of a model at a resolution: that of `steps` if there is one, else the first."""
    rows = [row for row in PUBLISHED if (row.model, row.resolution) == (model, resolution)]
    return next((row for row in rows if row.steps == steps), rows[0] if rows else None)
