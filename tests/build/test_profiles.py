"""The shapes that engines are compiled for: every run has a profile, and profiles are few."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpd_export.build.profiles import (
    PROFILE_SPREAD,
    AxisRange,
    Profile,
    decode_profiles,
    input_shapes,
    tokenizer_profiles,
)
from lpd_export.errors import UserError
from lpd_export.runtime.tensorrt_engine import ShapeRange, choose_profile
from lpd_export.schedule.phases import Phase, group_sizes, phase_table


def shape_of(axes: Sequence[int | str], sizes: dict[str, int]) -> list[int]:
    return [sizes[axis] if isinstance(axis, str) else axis for axis in axes]


DECODE_INPUTS: dict[str, list[int | str]] = {
    "token_ids": ["rows", "context_tokens"],
    "positions": ["rows", "tokens"],
    "attention_mask": ["tokens", 17],
    "write_index": ["rows"],
    "past_key_0": ["rows", 2, 17, 64],
}


def decode_shapes(phase: Phase, rows: int) -> dict[str, list[int]]:
    sizes = {"rows": rows, "context_tokens": phase.context, "tokens": phase.tokens}
    return {name: shape_of(axes, sizes) for name, axes in DECODE_INPUTS.items()}


def ranges(profiles: Sequence[Profile]) -> list[dict[str, ShapeRange]]:
    """Profiles as an engine tells them when it is run."""
    every = [input_shapes(DECODE_INPUTS, profile) for profile in profiles]
    return [{name: ShapeRange(*ends) for name, ends in shapes.items()} for shapes in every]


def check_profiles(phases: tuple[Phase, ...], max_batch: int) -> None:
    """Whatever may run is in its profile, for every input, and profiles are few.

    One image with guidance has a profile that is tuned for it, and is run with that one.
    """
    profiles = decode_profiles(phases, max_batch)
    tokens = [phase.tokens for phase in phases]
    groups = len(profiles) // min(2, max_batch)
    assert groups <= 1 + math.log(max(tokens) / min(tokens), PROFILE_SPREAD)
    ends = [input_shapes(DECODE_INPUTS, profile) for profile in profiles]
    for end in ends:
        for least, tuned, most in end.values():
            assert all(a <= b <= c for a, b, c in zip(least, tuned, most, strict=True))
        for corner in range(3):  # TensorRT tries all three, where there must be a query
            assert end["token_ids"][corner][1] < end["positions"][corner][1]
            assert end["positions"][corner][1] == end["attention_mask"][corner][0]
    for phase in phases:
        for rows in range(1, 2 * max_batch + 1):
            shapes = decode_shapes(phase, rows)
            chosen = ends[choose_profile("decode", ranges(profiles), shapes)]
            for name, actual in shapes.items():
                least, _, most = chosen[name]
                assert all(a <= b <= c for a, b, c in zip(least, actual, most, strict=True)), name
            assert chosen["token_ids"][1][0] == (2 if rows <= 2 else 2 * max_batch)


@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=60), max_batch=st.integers(1, 4))
def test_no_run_is_out_of_profile(sizes: list[int], max_batch: int) -> None:
    check_profiles(phase_table(sizes), max_batch)


@pytest.mark.parametrize(
    ("cells", "steps", "count"),
    [(256, 20, 2), (256, 32, 2), (1024, 48, 2), (256, 1, 1), (256, 256, 1), (1024, 1024, 1)],
)
def test_published_and_extreme_schedules_need_few_profiles(
    cells: int, steps: int, count: int
) -> None:
    phases = phase_table(group_sizes(cells, steps))
    check_profiles(phases, max_batch=2)
    assert len(decode_profiles(phases, max_batch=1)) == count
    assert len(decode_profiles(phases, max_batch=2)) == 2 * count


def test_the_tokenizer_is_tuned_for_one_image_and_for_the_largest_batch() -> None:
    ranges = [profile["batch"] for profile in tokenizer_profiles(8)]
    assert ranges == [AxisRange(1, 1, 1), AxisRange(2, 8, 8)]
    assert [profile["batch"] for profile in tokenizer_profiles(1)] == [AxisRange(1, 1, 1)]


def test_what_no_profile_takes_is_told() -> None:
    profiles = ranges(decode_profiles(phase_table([1, 3, 5, 7]), max_batch=2))
    phase = phase_table([1, 3, 5, 7])[1]
    assert choose_profile("decode", profiles, decode_shapes(phase, rows=4)) == 1
    with pytest.raises(UserError, match=r"takes 4 rows at most .* not 5: .*--batch, .*--max-batch"):
        choose_profile("decode", profiles, decode_shapes(phase, rows=5))
    whole = phase_table([16])[0]
    with pytest.raises(UserError, match=r"of \[1, 2\] to \[2, 12\], not \[1, 17\]: .*--schedule"):
        choose_profile("decode", profiles, decode_shapes(whole, rows=1))
