"""What a verification leaves for Polygraphy's own command line: inputs and outputs of phases.

For each phase that is kept, `NAME.inputs.json` is a data loader's feed, `NAME.expected.json` and
`NAME.bundle.json` are run results, of one image. Does not know what they mean.
"""

from __future__ import annotations

import shlex
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.comparator import IterationResult, RunResults
from polygraphy.json import save_json

from lpd_export.accuracy.comparison import GUIDED, LOGITS, quiet
from lpd_export.accuracy.thresholds import Limits
from lpd_export.bundle.manifest import Manifest
from lpd_export.errors import UserError
from lpd_export.formats import BACKENDS

Arrays = Mapping[str, NDArray[Any]]

LARGE = 10**8
"""Bytes of a phase's files from which on fewer are kept unless the user asks for them."""
TEXT_SIZE = 4 / 3
"""Size of an array in Polygraphy's JSON, which is base64, over its size in memory."""
ALL, NONE = "all", "none"


def kept_phases(wanted: str | None, names: Sequence[str], phase_bytes: float) -> list[str]:
    """Which phases to keep files of, whatever the comparison finds.

    Args:
        wanted: names separated by commas, `all` or `none`; None is the first, the middle and the
            last step, of a large model the first alone, and the tokenizer's two.
        names: of all phases, in the order of computation.
        phase_bytes: what the files of one step take.

    Raises:
        UserError: for a name that is no phase.
    """
    if wanted is None:
        steps = names[:-2]
        chosen = [steps[0], steps[len(steps) // 2], steps[-1]]
        few = chosen if phase_bytes <= LARGE else chosen[:1]
        return list(dict.fromkeys([*few, *names[-2:]]))
    if wanted in (ALL, NONE):
        return list(names) if wanted == ALL else []
    chosen = list(dict.fromkeys(name.strip() for name in wanted.split(",")))
    for name in chosen:
        if name not in names:
            raise UserError(
                f"--save-phases {wanted}: there is no phase {name!r}; there are {names[0]} to "
                f"{names[-3]}, detokenize, tokenize, `all` and `none`"
            )
    return chosen


def phase_bytes(manifest: Manifest) -> float:
    """About what the files of one decode phase take: inputs and both outputs hold all caches."""
    model = manifest.model
    rows = manifest.phase_rows * model.heads * (model.cells + 1)
    return 3 * TEXT_SIZE * 4 * 2 * model.depth * rows * model.head_dim


class PolygraphyFiles:
    """Writes the files of phases, and the command lines that use them.

    Args:
        folder: where they go; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.saved: dict[str, dict[str, float]] = {}
        """The largest magnitude of each expected output, for each phase that was saved."""

    def save(self, phase: str, feed: Arrays, expected: Arrays, actual: Arrays) -> None:
        """Saves one iteration of a phase.

        feed: in the types of the graph's inputs.
        """
        self._folder.mkdir(exist_ok=True)
        with quiet():
            save_json([OrderedDict(feed)], str(self._folder / f"{phase}.inputs.json"))
            for name, outputs in (("expected", expected), ("bundle", actual)):
                # Guidance is no part of a graph.
                kept = OrderedDict((k, v) for k, v in outputs.items() if k != GUIDED)
                runs = RunResults()
                runs.append((name, [IterationResult(kept, runner_name=name)]))
                runs.save(str(self._folder / f"{phase}.{name}.json"))
        self.saved[phase] = {
            name: float(np.abs(values).max()) for name, values in expected.items() if name != GUIDED
        }

    def commands(self, bundle: Path, folder: Path, limits: Limits, backend: str) -> dict[str, str]:
        """For each saved phase, the line that shows the same difference with Polygraphy alone.

        folder: where the files will be.
        """
        lines = {}
        for phase, magnitudes in self.saved.items():
            setting, runner = BACKENDS[backend].polygraphy
            words = [
                *("polygraphy", "run", str(bundle / "onnx" / f"{phase}.onnx"), runner),
                *("--load-inputs", str(folder / f"{phase}.inputs.json")),
                *("--load-outputs", str(folder / f"{phase}.expected.json")),
                *_tolerances(phase, magnitudes, limits),
            ]
            lines[phase] = setting + shlex.join(words)
        return lines


def _tolerances(phase: str, magnitudes: Mapping[str, float], limits: Limits) -> list[str]:
    """Words for Polygraphy that ask about as much of a phase as the limits do."""
    if phase == "tokenize":
        equal = min(max(limits.limit("index_agreement"), 0.0), 1.0)
        return [
            *("--check-error-stat", "quantile", "--error-quantile", f"{equal:g}"),
            *("--atol", "0", "--rtol", "0"),
        ]
    if phase == "detokenize":
        # Of an image that has this PSNR, ten times the mean error.
        worst = max(limits.limit("image_psnr"), -6000.0)
        tolerances = [f"{20 * 10 ** (-worst / 20):.2g}"]
    else:
        # The caches, which are larger, must not lend the logits their tolerance.
        share, largest = limits.limit("logits_largest_error"), max(magnitudes.values())
        tolerances = [f"{share * largest:.2g}", f"{LOGITS}:{share * magnitudes[LOGITS]:.2g}"]
    return ["--check-error-stat", "max", "--atol", *tolerances, "--rtol", "0"]
