"""`lpd-export` in a process of its own, with graphs that an earlier test exported.

    python tests/exported.py FOLDER ARGUMENTS...

Exporting is most of the time of a small build: the same weights are exported once a run.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from unittest import mock

import onnx_ir as ir
from filelock import FileLock

from lpd_export.bundle.manifest import GRAPH_NAMES
from lpd_export.cli.main import main
from lpd_export.graphs import export
from lpd_reference import LPD, VQTokenizer


def made_once(folder: Path, name: str, write: Callable[[Path], object]) -> Path:
    """A path in a folder, made by whichever process asks for it first."""
    path = folder / name
    with FileLock(folder / f"{name}.lock"):
        if not path.exists():
            write(path)
    return path


@contextmanager
def exported_once(folder: Path) -> Iterator[None]:
    """Graphs are exported into a folder, or taken from it."""

    def once(name: str, export_anew: Callable[..., ir.Model]) -> Callable[..., ir.Model]:
        def exported(model: LPD | VQTokenizer, *grid: int) -> ir.Model:
            key = hashlib.sha256(repr((model.config, grid)).encode())
            for weight in model.state_dict().values():
                key.update(weight.contiguous().numpy().data)

            def write(path: Path) -> None:
                # Some tests kill the process that does this.
                partial = Path(mkdtemp(dir=folder))
                export.write_models({name: export_anew(model, *grid)}, partial)
                partial.rename(path)

            made = made_once(folder, f"{name}-{key.hexdigest()}", write)
            return ir.load(made / f"{name}.onnx")

        return exported

    functions = {graph: getattr(export, f"export_{graph}") for graph in GRAPH_NAMES}
    with mock.patch.multiple(export, **{f"export_{g}": once(g, f) for g, f in functions.items()}):
        yield


if __name__ == "__main__":
    with exported_once(Path(sys.argv[1])):
        main(sys.argv[2:])
