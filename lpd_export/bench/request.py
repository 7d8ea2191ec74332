"""What a benchmark can be asked. Knows the options and their bounds, not how anything is timed."""

from __future__ import annotations

from lpd_export.bounds import Positive, checked
from lpd_export.bundle.manifest import Bundle
from lpd_export.errors import UserError


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
