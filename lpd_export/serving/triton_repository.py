"""Model repositories for NVIDIA's Triton Inference Server: bundles with what it wants beside them.

Knows the form of a repository and of `config.pbtxt`. Loads neither torch nor anything of Triton's:
what runs in the server is `triton_backend`.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from lpd_export.bounds import Positive, Threads, checked
from lpd_export.bundle.manifest import MANIFEST, Bundle
from lpd_export.errors import UserError
from lpd_export.files import check_writable, new_folder
from lpd_export.formats import BACKENDS
from lpd_export.serving.request import Milliseconds, batch_of, named_bundles

BUNDLE = "bundle"
"""The folder of the bundle, beside model.py."""
MODEL = '''"""For Triton's Python backend: serves the bundle beside this file."""

from lpd_export.serving.triton_backend import TritonPythonModel  # noqa: F401
'''
CONFIG = """\
# Written by lpd-export: {bundle}.
backend: "python"
max_batch_size: {batch}
input [
  {{ name: "class" data_type: TYPE_INT64 dims: [ 1 ] }},
  {{ name: "seed" data_type: TYPE_UINT64 dims: [ 1 ] optional: true }},
  {{ name: "index" data_type: TYPE_UINT64 dims: [ 1 ] optional: true }},
  {{ name: "cfg" data_type: TYPE_FP64 dims: [ 1 ] optional: true }},
  {{ name: "temperature" data_type: TYPE_FP64 dims: [ 1 ] optional: true }},
  {{ name: "top_k" data_type: TYPE_INT64 dims: [ 1 ] optional: true }},
  {{ name: "top_p" data_type: TYPE_FP64 dims: [ 1 ] optional: true }},
  {{ name: "given" data_type: TYPE_INT64 dims: [ {cells} ] optional: true }}
]
output [
  {{ name: "images" data_type: TYPE_UINT8 dims: [ {side}, {side}, 3 ] }},
  {{ name: "token_ids" data_type: TYPE_INT64 dims: [ {cells} ] }}
]
dynamic_batching {{
  max_queue_delay_microseconds: {delay}
  default_queue_policy {{ max_queue_size: {queue} }}
}}
instance_group [ {{ count: {instances} kind: {kind} }} ]
"""
"""Filters are left out as a top_k of 0 and a top_p of 1; a class of -1 is none."""
THREADS = 'parameters {{ key: "threads" value {{ string_value: "{threads}" }} }}\n'

Instances = Annotated[int, Field(ge=1, le=1024)]


@dataclass(frozen=True)
class RepositoryRequest:
    """What `lpd-export triton` was asked; see its `--help`."""

    bundles: tuple[Path, ...]
    out: Path
    batch: int | None = None
    instances: int = 1
    max_queue: int = 256
    max_wait: float = 5.0
    device: str | None = None
    threads: int | None = None

    def check(self) -> dict[str, Bundle]:
        """The bundles by the names that models get.

        Raises:
            UserError: for an option out of its bounds, what is no bundle, or a device that a
                bundle does not run on.
        """
        checked("--batch", self.batch, Positive | None)
        checked("--instances", self.instances, Instances)
        checked("--max-queue", self.max_queue, Positive)
        checked("--max-wait", self.max_wait, Milliseconds)
        checked("--threads", self.threads, Threads | None)
        bundles = named_bundles(self.bundles, self.batch)
        for bundle in bundles.values():
            on_gpu = BACKENDS[bundle.manifest.backend].compiles
            if on_gpu and (self.device == "cpu" or self.threads is not None):
                raise UserError(
                    f"{bundle.path} holds {bundle.manifest.backend} engines, which run on a GPU: "
                    "leave out --device cpu and --threads"
                )
        self.check_destination()
        return bundles

    def check_destination(self) -> None:
        """Raises UserError unless the repository can be written."""
        if os.path.lexists(self.out):
            raise UserError(f"{self.out} exists: choose another --out, or move it away")
        check_writable(self.out.absolute().parent)

    def config(self, bundle: Bundle) -> str:
        """The `config.pbtxt` of a bundle's model."""
        manifest = bundle.manifest
        device = self.device or ("cuda" if BACKENDS[manifest.backend].compiles else "cpu")
        kind, _, number = device.partition(":")
        text = CONFIG.format(
            bundle=ascii(manifest.name)[1:-1],
            batch=batch_of(bundle, self.batch),
            cells=manifest.model.cells,
            side=manifest.resolution,
            delay=round(self.max_wait * 1000),
            queue=self.max_queue,
            instances=self.instances,
            kind=("KIND_CPU" if kind == "cpu" else "KIND_GPU")
            + (f" gpus: [ {number} ]" if number else ""),
        )
        return text if self.threads is None else text + THREADS.format(threads=self.threads)


def write_repository(request: RepositoryRequest) -> Path:
    """Writes a model repository, whole or not at all; bundles are verified and copied into it.

    Returns:
        Where it is.

    Raises:
        UserError: if the request is wrong, a bundle is damaged, or it cannot be written.
    """
    bundles = request.check()
    taken = f"another process is writing {request.out}: wait for it to end"
    with new_folder(request.out, taken=taken, check=request.check_destination) as folder:
        for name, bundle in bundles.items():
            version = folder / name / "1"
            version.mkdir(parents=True)
            (folder / name / "config.pbtxt").write_text(request.config(bundle), encoding="ascii")
            (version / "model.py").write_text(MODEL, encoding="ascii")
            for path in (bundle.path / MANIFEST, *bundle.files()):
                copy = version / BUNDLE / path.relative_to(bundle.path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
    return request.out
