"""The shapes that each graph is compiled for.

Knows the phases and how far one kernel can be from the shape it was tuned for. Does not know what
compiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lpd_export.graphs import contract
from lpd_export.schedule.phases import Phase

PROFILE_SPREAD = 8
"""A decode profile's longest phase has at most this many times the tokens of its shortest.

That is 2 groups for the published schedules. Each profile adds its own kernels to the engine, 6 MB
in fp16 and 20 MB in int8 for lpd-l, and seconds to the build: one a phase takes 107 s and 800 MB,
one for all 5 s and 680 MB. All are fused into the same layers; but one profile would tune the
prefill of 2 tokens as if it had 40.
"""


@dataclass(frozen=True)
class AxisRange:
    """The sizes that a dynamic axis may have, and the one that the engine is tuned for."""

    minimum: int
    optimum: int
    maximum: int


Profile = Mapping[str, AxisRange]
"""An optimization profile: the range of each dynamic axis, by its name in the ONNX file."""


def decode_profiles(phases: Sequence[Phase], max_batch: int) -> tuple[Profile, ...]:
    """The profiles of decode.onnx: together every phase at every batch, guidance on or off.

    Phases of a similar number of tokens are a group, see PROFILE_SPREAD. A group has a profile
    tuned for one image with guidance, the most frequent run, and one for the largest batch. Each
    end of a profile, and what it is tuned for, is itself a possible shape: its tokens are more
    than its context.

    Args:
        phases: the phase table; any group sizes, in any order.
        max_batch: images, at most; each has one row, or two with guidance.
    """
    batches = _batches(2, max_batch)
    left = sorted(phases, key=lambda phase: (phase.tokens, phase.context))
    profiles: list[Profile] = []
    while left:
        longest = left[-1]
        group = [phase for phase in left if phase.tokens * PROFILE_SPREAD >= longest.tokens]
        left = left[: -len(group)]
        contexts = [phase.context for phase in group]
        context = AxisRange(min(contexts), longest.context, max(contexts))
        tokens = AxisRange(group[0].tokens, longest.tokens, longest.tokens)
        profiles += (
            {contract.ROWS: rows, contract.CONTEXT_TOKENS: context, contract.TOKENS: tokens}
            for rows in batches
        )
    return tuple(profiles)


def _batches(rows: int, max_batch: int) -> list[AxisRange]:
    """One image of up to `rows` rows, and all that is more, tuned for the largest batch."""
    one, most = AxisRange(1, rows, rows), max_batch * rows
    return [one] if max_batch == 1 else [one, AxisRange(rows + 1, most, most)]


def tokenizer_profiles(max_batch: int) -> tuple[Profile, ...]:
    """The profiles of detokenize.onnx and tokenize.onnx: one image, and 2 to `max_batch`."""
    return tuple({contract.BATCH: images} for images in _batches(1, max_batch))


InputAxes = Mapping[str, Sequence[int | str]]
"""The axes of an ONNX file's inputs: a size, or the name of a dynamic axis."""
ShapeEnds = dict[str, list[tuple[int, ...]]]
"""The least, tuned and greatest shape of each input."""


def input_shapes(inputs: InputAxes, profile: Profile) -> ShapeEnds:
    """The shapes that a profile gives a file's inputs."""

    def shape(axes: Sequence[int | str], end: str) -> tuple[int, ...]:
        return tuple(getattr(profile[a], end) if isinstance(a, str) else a for a in axes)

    ends = ("minimum", "optimum", "maximum")
    return {name: [shape(axes, end) for end in ends] for name, axes in inputs.items()}
