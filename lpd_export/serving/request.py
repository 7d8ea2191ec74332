"""What a server is started with. Loads no torch, so that mistakes are told soon.

Knows the options and their bounds, and which bundles are served under which name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from lpd_export.bounds import Positive, Threads, checked
from lpd_export.bundle.manifest import Bundle
from lpd_export.errors import UserError

MOST_IMAGES = 10
"""Of one request to the server, as OpenAI has it."""
DEFAULT_BATCH = 4
"""Where the graphs take any batch: a CPU has most of what batching gives."""

Port = Annotated[int, Field(ge=0, le=65535)]
QueueLength = Annotated[int, Field(ge=MOST_IMAGES, le=1_000_000)]
Milliseconds = Annotated[float, Field(ge=0, le=60_000)]


@dataclass(frozen=True)
class ServeRequest:
    """What `lpd-export serve` was asked; see its `--help`."""

    bundles: tuple[Path, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    max_queue: int = 256
    batch: int | None = None
    max_wait: float = 5.0
    api_key: Path | None = None
    device: str | None = None
    threads: int | None = None
    replicas: int | None = None
    ray: bool = False

    @property
    def on_ray(self) -> bool:
        """Whether Ray Serve's replicas make the images."""
        return self.ray or self.replicas is not None

    def check(self) -> dict[str, Bundle]:
        """The bundles by the names that clients call them.

        Raises:
            UserError: for an option out of its bounds, or what is no bundle.
        """
        checked("--port", self.port, Port)
        checked("--max-queue", self.max_queue, QueueLength)
        checked("--batch", self.batch, Positive | None)
        checked("--max-wait", self.max_wait, Milliseconds)
        checked("--threads", self.threads, Threads | None)
        checked("--replicas", self.replicas, Positive | None)
        if self.on_ray and (self.device or "").startswith("cuda:"):
            raise UserError(f"Ray gives each replica a GPU: --device cuda, not {self.device}")
        return named_bundles(self.bundles, self.batch)

    def keys(self) -> frozenset[bytes]:
        """The API keys, one a line of the file; none if everybody may ask.

        Raises:
            UserError: if the file cannot be read, or holds no key.
        """
        if self.api_key is None:
            return frozenset()
        try:
            lines = self.api_key.read_bytes().splitlines()
        except OSError as error:
            raise UserError(f"cannot read {self.api_key}: {error.strerror or error}") from error
        keys = frozenset(key for line in lines if (key := line.strip()) and key[:1] != b"#")
        if not keys:
            raise UserError(f"{self.api_key} holds no key: write one a line")
        return keys


def named_bundles(paths: Sequence[Path], batch: int | None) -> dict[str, Bundle]:
    """Bundles by the names of their folders, as clients call them.

    Raises:
        UserError: for what is no bundle, a name that two have, or a batch that one does not take.
    """
    bundles: dict[str, Bundle] = {}
    for path in paths:
        name, bundle = path.resolve().name, Bundle.open(path)
        if name in bundles:
            raise UserError(
                f"{bundles[name].path} and {path} are both called {name}: clients choose a "
                "model by its folder's name, so rename one"
            )
        limit = bundle.manifest.max_batch
        if batch is not None and limit is not None and batch > limit:
            raise UserError(
                f"{path} takes batches of up to {limit} images, not {batch}: give a "
                f"smaller --batch, or build it with --max-batch {batch}"
            )
        bundles[name] = bundle
    return bundles


def batch_of(bundle: Bundle, batch: int | None) -> int:
    """How many images of a bundle are made together, if `batch` was asked for."""
    return batch or bundle.manifest.max_batch or DEFAULT_BATCH
