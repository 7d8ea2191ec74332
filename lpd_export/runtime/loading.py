"""Loading that begins before torch is imported, which takes a second.

A command that will open a bundle says so here first; what it opens then finds its graphs loaded,
or on their way. ONNX Runtime on the CPU alone: a GPU's stream is torch's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from lpd_export.bundle.manifest import Bundle
from lpd_export.errors import UserError
from lpd_export.formats import BACKENDS

if TYPE_CHECKING:
    import onnxruntime

WEIGHTS = "onnx/weights.data"
GRAPHS = ("decode", "detokenize")
"""What every image needs, in the order in which it is needed."""


class Begun(NamedTuple):
    """A bundle whose graphs are being loaded."""

    bundle: Bundle
    threads: int | None
    weights_verified: Callable[[], None]
    sessions: Mapping[str, Future[onnxruntime.InferenceSession]]


_begun: list[Begun] = []


def begin_loading(path: str | os.PathLike[str], device: str | None, threads: int | None) -> None:
    """Starts to verify a bundle's weights and to load its graphs, each in a thread.

    The next `take_begun` of that bundle has them. What is wrong with the files is said there.
    """
    try:
        bundle = Bundle.open(path)
        if BACKENDS[bundle.manifest.backend].compiles or device not in (None, "cpu"):
            return
        verified = bundle.verify_meanwhile(WEIGHTS)
    except UserError:
        return  # whoever opens the bundle finds the same
    from lpd_export.runtime.onnxruntime_session import PROVIDERS, load_session, session_options

    options = session_options(bundle.manifest.float_type, threads)
    provider: tuple[str, dict[str, Any]] = (PROVIDERS["cpu"], {})
    pool = ThreadPoolExecutor(1)
    files = {graph: bundle.path / f"onnx/{graph}.onnx" for graph in GRAPHS}
    sessions = {
        graph: pool.submit(load_session, file, options, provider) for graph, file in files.items()
    }
    pool.shutdown(wait=False)
    _begun.append(Begun(bundle, threads, verified, sessions))


def take_begun(bundle: Bundle, threads: int | None) -> Begun | None:
    """What was begun for this bundle as it is now and these threads, once; None if nothing was."""
    for begun in _begun:
        same = begun.bundle.path, begun.bundle.manifest, begun.threads
        if same == (bundle.path, bundle.manifest, threads):
            _begun.remove(begun)
            return begun
    return None
