"""Schedules: published group sizes, the rules that orders obey, phases, masks and the file."""

import io
import json
import math
import subprocess
import sys
import time
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpd_export.errors import UserError
from lpd_export.files import write_atomically
from lpd_export.schedule.orders import (
    KINDS,
    edit_orders,
    locality_orders,
    locality_statistics,
    make_orders,
    step_of_cell,
)
from lpd_export.schedule.phases import attention_mask, group_sizes, phase_table
from lpd_export.schedule.schedule_file import FOREIGN, Schedule

PUBLISHED_SIZES = {
    (16, 20): "1 2 4 5 7 8 10 11 12 14 15 16 17 18 18 19 19 20 20 20",
    (16, 32): "1 1 2 2 3 3 4 5 5 6 6 7 7 8 8 9 9 10 10 10 11 11 11 11 12 12 12 12 12 12 12 12",
    (16, 12): "1 7 11 15 19 22 25 28 30 32 33 33",
    (16, 8): "1 15 24 32 40 45 49 50",
    (32, 48): "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 23 24 25 26 26 27 28 28 "
    "29 29 30 30 31 31 32 32 32 33 33 33 33 33 33 33 34",
    (32, 32): "1 4 6 9 11 13 16 18 20 23 25 27 29 31 33 35 36 38 40 41 42 44 45 46 47 48 48 49 49 "
    "50 50 50",
}

# The first orders of grid 4, 5 steps, seed 0: what a seed gives must not change.
PINNED_LOCALITY = [1, 5, 15, 6, 12, 0, 14, 10, 3, 4, 13, 9, 2, 11, 8, 7]
PINNED_EDIT = [1, 12, 5, 13, 0, 9, 4, 8, 6, 15, 10, 3, 7, 2, 14, 11]
PINNED_RANDOM_EDIT = [1, 12, 5, 13, 0, 9, 4, 8, 6, 2, 14, 7, 10, 11, 15, 3]
PINNED_RANDOM = [10, 14, 1, 15, 8, 4, 2, 7, 9, 13, 5, 11, 6, 0, 3, 12]

grids_and_steps = st.integers(1, 9).flatmap(
    lambda grid: st.tuples(st.just(grid), st.integers(1, grid * grid))
)
size_lists = st.integers(1, 7).flatmap(
    lambda grid: st.sets(st.integers(1, max(1, grid * grid - 1))).map(
        lambda cuts: np.diff([0, *sorted(cuts - {grid * grid}), grid * grid]).tolist()
    )
)


# ------------------------------------------------------------------------------- group sizes


@pytest.mark.parametrize(("grid", "steps"), PUBLISHED_SIZES)
def test_published_group_sizes(grid: int, steps: int) -> None:
    sizes = group_sizes(grid * grid, steps)
    assert sizes.dtype == np.int32
    assert sizes.tolist() == [int(size) for size in PUBLISHED_SIZES[grid, steps].split()]


@given(st.integers(1, 1500).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_group_sizes_fill_any_grid_in_any_number_of_steps(cells_and_steps: tuple[int, int]) -> None:
    cells, steps = cells_and_steps
    sizes = group_sizes(cells, steps)
    assert len(sizes) == steps
    assert sizes.sum() == cells
    assert sizes[0] == (1 if steps > 1 else cells)
    assert sizes.min() >= 1
    assert (np.diff(sizes) >= 0).all()


@given(st.integers(20, 64), st.data())
def test_group_sizes_stay_near_the_cosine(grid: int, data: st.DataObject) -> None:
    cells, steps = grid * grid, data.draw(st.integers(12, 2 * grid))
    cosine = -np.diff(cells * np.cos(np.pi / 2 * np.arange(steps + 1) / steps))
    sizes = group_sizes(cells, steps)
    assert np.abs(sizes - cosine)[1:].max() <= 2 + cosine[0] / 2


@pytest.mark.parametrize(
    ("cells", "steps", "message"),
    [
        (256, 257, "257 steps are too many for 256 cells"),
        (256, 0, "number of steps must be a whole number from 1 to 2147483647, but it is 0"),
        (256, -3, "-3"),
        (0, 1, "number of cells must be a whole number from 1"),
        (256, 2.5, "whole number from 1 to .*, but it is 2.5"),
    ],
)
def test_impossible_group_sizes(cells: int, steps: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        group_sizes(cells, steps)


# ------------------------------------------------------------------------------------ orders


@given(grids_and_steps, st.sampled_from(KINDS), st.integers(0, 2**64 - 1), st.integers(0, 5))
def test_every_order_is_a_permutation(
    grid_and_steps: tuple[int, int], kind: str, seed: int, repulsion: int
) -> None:
    grid, steps = grid_and_steps
    orders = make_orders(grid, group_sizes(grid * grid, steps), kind, 3, seed, repulsion)
    assert orders.dtype == np.int32
    assert orders.shape == (3, grid * grid)
    assert (np.sort(orders, axis=1) == np.arange(grid * grid)).all()


@given(
    size_lists,
    st.integers(0, 2**32),
    st.integers(0, 4),
    st.sampled_from([0.0, 0.7, 1.0, 1.5, 2.5, 9.0]),
)
@settings(max_examples=60)
def test_locality_orders_obey_the_rules_step_by_step(
    sizes: list[int], seed: int, repulsion: int, proximity: float
) -> None:
    """Replays orders cell by cell with the rule written out plainly."""
    grid = math.isqrt(sum(sizes))
    orders, by_proximity = locality_orders(grid, sizes, range(2), seed, repulsion, proximity)
    for order, walked in zip(orders, by_proximity, strict=True):
        replay_locality(order.tolist(), walked.tolist(), sizes, grid, repulsion, proximity)


def replay_locality(
    order: list[int],
    walked: list[bool] | None,
    sizes: list[int],
    grid: int,
    repulsion: int,
    proximity: float,
    kept: int = 0,
) -> None:
    """`kept`: so many cells of the order are there already; sizes are of the others."""

    def gaps(one: int, other: int) -> tuple[int, int]:
        return abs(one // grid - other // grid), abs(one % grid - other % grid)

    def score(cell: int) -> float:
        near = [gaps(cell, other) for other in generated if max(gaps(cell, other)) == 1]
        return sum(1 / math.hypot(*gap) for gap in near)

    generated = order[:kept]
    for size in sizes:
        free = set(range(grid * grid)) - set(generated)
        scores = {cell: score(cell) for cell in free}
        near_enough = {cell for cell in free if scores[cell] >= proximity - 1e-9}
        taken: list[int] = []
        for cell in order[len(generated) : len(generated) + size]:
            open_cells = {
                candidate
                for candidate in near_enough & free
                if all(max(gaps(candidate, other)) > repulsion for other in taken)
            }
            if walked is not None:
                assert walked[len(generated) + len(taken)] == bool(open_cells)
            if open_cells:
                assert cell in open_cells
                assert scores[cell] == pytest.approx(max(scores[other] for other in open_cells))
            elif taken:
                room = {c: min(math.hypot(*gaps(c, other)) for other in taken) for c in free}
                assert room[cell] == pytest.approx(max(room.values()))
            taken.append(cell)
            free.remove(cell)
        generated += taken


@given(size_lists, st.integers(0, 2**32), st.integers(0, 4), st.floats(0, 1), st.booleans())
@settings(max_examples=60)
def test_edit_orders_have_the_kept_cells_first_and_grow_from_them(
    sizes: list[int], seed: int, repulsion: int, share: float, locality: bool
) -> None:
    """The rule of the paper, with what is kept as what is generated, in the schedule's groups."""
    cells, kind = sum(sizes), "locality" if locality else "random"
    kept = np.random.default_rng(seed).random(cells) < share
    kept[0] = False
    count, keys = int(kept.sum()), [(seed, 0), (seed, 7), (seed + 1, 7)]
    orders = edit_orders(sizes, kept, keys, kind, repulsion)
    assert (np.sort(orders, axis=1) == np.arange(cells)).all()
    assert kept[orders[:, :count]].all()
    alone = edit_orders(sizes, kept, keys[1:2], kind, repulsion)
    assert (alone[0] == orders[1]).all()
    ends = np.cumsum(sizes)
    new = [
        int(min(size, end - count)) for size, end in zip(sizes, ends, strict=True) if end > count
    ]
    for order in orders:
        if locality:
            replay_locality(
                order.tolist(), None, new, math.isqrt(cells), repulsion, 1.0, kept=count
            )
        # Those of the step that makes the first new cells, which they do not see, are far away.
        unseen = count - max((int(end) for end in ends if end <= count), default=0)
        down, right = np.abs(
            np.array(np.divmod(order[:count, None], math.isqrt(cells)))
            - np.array(np.divmod(order[None, count:], math.isqrt(cells)))
        )
        distance = np.hypot(down, right).min(axis=1)
        if 0 < unseen < count:
            assert distance[count - unseen :].min() >= distance[: count - unseen].max() - 1e-9


def test_edit_orders_do_not_change_between_versions() -> None:
    kept = np.arange(16) % 4 < 2
    for kind, pinned in (("locality", PINNED_EDIT), ("random", PINNED_RANDOM_EDIT)):
        assert edit_orders([1, 2, 3, 4, 6], kept, [(1, 2)], kind)[0].tolist() == pinned


@given(grids_and_steps, st.integers(0, 1000), st.integers(0, 4))
def test_cells_picked_by_proximity_repel_each_other(
    grid_and_steps: tuple[int, int], seed: int, repulsion: int
) -> None:
    grid, steps = grid_and_steps
    sizes = group_sizes(grid * grid, steps)
    orders, by_proximity = locality_orders(grid, sizes, range(2), seed, repulsion)
    for order, walked in zip(orders, by_proximity, strict=True):
        for end, size in zip(np.cumsum(sizes), sizes, strict=True):
            group = slice(end - size, end)
            rows, columns = np.divmod(order[group][walked[group]], grid)
            distance = np.maximum(np.abs(rows[:, None] - rows), np.abs(columns[:, None] - columns))
            np.fill_diagonal(distance, grid + repulsion + 1)
            assert (distance > repulsion).all()


def test_proximity_picks_most_cells() -> None:
    _, by_proximity = locality_orders(16, group_sizes(256, 20), range(16), seed=0)
    assert 0.75 < by_proximity.mean() < 0.85
    assert not by_proximity[:, 0].any()


def test_the_first_cell_is_uniform() -> None:
    first = make_orders(4, [1, 15], "locality", 4096, seed=5)[:, 0]
    counts = np.bincount(first, minlength=16)
    assert (np.abs(counts - 256) < 5 * math.sqrt(256)).all()


@pytest.mark.parametrize(
    ("kind", "isolated", "distance"), [("locality", 0.038, 3.53), ("random", 0.138, 2.51)]
)
def test_published_statistics(kind: str, isolated: float, distance: float) -> None:
    default = Schedule.make(grid=16, steps=20, kind=kind)
    statistics = locality_statistics(default.orders, default.group_sizes)
    assert statistics.isolated_share == pytest.approx(isolated, rel=0.05)
    assert statistics.group_distance == pytest.approx(distance, rel=0.05)

    # 64 orders scatter by about 2 %; many more show where the rule itself lies.
    many = make_orders(16, default.group_sizes, kind, 768, seed=1)
    statistics = locality_statistics(many, default.group_sizes)
    assert statistics.isolated_share == pytest.approx(isolated, rel=0.03)
    assert statistics.group_distance == pytest.approx(distance, rel=0.01)


def test_statistics_by_hand() -> None:
    # Steps: 0 . 1     Without an earlier neighbour: both of step 1, and the corner of step 2.
    #        . . .     Distances: 2 and 2 in step 1, 1 for each of the six of step 2.
    #        . . 1
    orders = np.array([[0, 8, 2, 1, 3, 4, 5, 6, 7]])
    statistics = locality_statistics(orders, [1, 2, 6])
    assert statistics.isolated_share == pytest.approx(3 / 8)
    assert statistics.group_distance == pytest.approx(10 / 8)


def test_statistics_of_nothing_to_count() -> None:
    assert math.isnan(locality_statistics(np.arange(9)[None], [9]).isolated_share)
    assert math.isnan(locality_statistics(np.arange(4)[None], [1, 1, 1, 1]).group_distance)


def test_raster_orders_go_row_by_row() -> None:
    assert make_orders(3, [1, 8], "raster", 2, seed=7).tolist() == [list(range(9))] * 2


def test_step_of_cell() -> None:
    assert step_of_cell(np.array([[3, 0, 2, 1]]), [1, 2, 1]).tolist() == [[1, 2, 1, 0]]


@pytest.mark.parametrize("kind", ["locality", "random"])
def test_an_order_depends_on_seed_and_index_alone(kind: str) -> None:
    sizes = group_sizes(64, 9)
    many = make_orders(8, sizes, kind, 130, seed=3)  # beyond one batch of orders
    assert (make_orders(8, sizes, kind, 130, seed=3) == many).all()
    assert (make_orders(8, sizes, kind, 5, seed=3) == many[:5]).all()
    assert (make_orders(8, sizes, kind, 65, seed=3) == many[:65]).all()
    assert len(np.unique(many, axis=0)) == 130
    assert (make_orders(8, sizes, kind, 130, seed=4) != many).any(axis=1).all()
    if kind == "locality":
        alone, _ = locality_orders(8, sizes, [97], seed=3)
        assert (alone[0] == many[97]).all()


def test_orders_do_not_change_between_versions() -> None:
    assert Schedule.make(4, 5).orders[0].tolist() == PINNED_LOCALITY
    assert Schedule.make(4, 5, "random").orders[0].tolist() == PINNED_RANDOM


def test_orders_are_made_fast() -> None:
    started = time.process_time()
    make_orders(32, group_sizes(1024, 48), "locality", 64, seed=0, repulsion=4)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "spiral"}, "no order kind 'spiral'.*locality, random, raster"),
        ({"count": 0}, "number of orders must be a whole number from 1"),
        ({"grid": 0}, "grid must be a whole number from 1"),
        ({"seed": -1}, "seed must be a whole number from 0 .*, but it is -1"),
        ({"seed": 2**64}, "seed must be a whole number from 0"),
        ({"seed": "abc"}, "seed must be a whole number from 0 .*, but it is 'abc'"),
        ({"repulsion": -1}, "repulsion threshold must be a whole number from 0"),
        ({"repulsion": 1.5}, "repulsion threshold must be a whole number"),
        ({"proximity": math.nan}, "proximity threshold must be a number, but it is nan"),
        ({"steps": 17}, "17 steps are too many for 16 cells"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Schedule.make(**{"grid": 4, "steps": 5, **settings})


def test_importing_schedules_does_not_import_torch() -> None:
    program = "import sys, lpd_export.schedule.schedule_file; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# --------------------------------------------------------------------------- phases and masks


@given(size_lists)
def test_phases_write_the_cache_from_the_first_row_to_the_last(sizes: list[int]) -> None:
    phases = phase_table(sizes)
    assert [phase.index for phase in phases] == list(range(len(sizes)))
    assert [phase.queries for phase in phases] == sizes
    assert [phase.context for phase in phases] == [1, *sizes[:-1]]
    assert [phase.first_cell for phase in phases] == [sum(sizes[:k]) for k in range(len(sizes))]
    assert phases[0].write_index == 0
    for before, after in pairwise(phases):
        assert after.write_index == before.write_index + before.context
        # The queries of a step sit where the context of the next one does.
        assert after.write_index + after.context == before.write_index + before.tokens
    assert phases[-1].write_index + phases[-1].tokens == sum(sizes) + 1


@given(size_lists, st.sampled_from([-math.inf, -1e4, -1.0]))
def test_masks_show_what_the_rule_allows(sizes: list[int], masked: float) -> None:
    """Runs a cache of labels through the phases and asks of every row who may see it."""
    cells = sum(sizes)
    cache: list[tuple[str, int] | None] = [None] * (cells + 1)
    for step, phase in enumerate(phase_table(sizes)):
        mask = attention_mask(phase, cells, masked)
        assert mask.dtype == np.float32
        assert mask.shape == (phase.tokens, cells + 1)
        # A token carries the step that sampled it; the condition comes before them all.
        written = [("token", step - 1)] * phase.context + [("query", step)] * phase.queries
        cache[phase.write_index : phase.write_index + phase.tokens] = written
        for row, (kind, _) in zip(mask, written, strict=True):
            for value, seen in zip(row, cache, strict=True):
                is_token = seen is not None and seen[0] == "token"
                is_companion = kind == "query" and seen == ("query", step)
                assert value == (0 if is_token or is_companion else np.float32(masked))


def test_a_mask_by_hand() -> None:
    phase = phase_table([1, 2, 1])[1]  # one context token in row 1, two queries in rows 2 and 3
    assert attention_mask(phase, 4, -9).tolist() == [
        [0, 0, -9, -9, -9],
        [0, 0, 0, 0, -9],
        [0, 0, 0, 0, -9],
    ]
    assert attention_mask(phase, 4, -9, mutual_visibility=False).tolist() == [
        [0, 0, -9, -9, -9],
        [0, 0, 0, -9, -9],
        [0, 0, -9, 0, -9],
    ]


# ---------------------------------------------------------------------------------- the file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("schedules")


@given(grids_and_steps, st.sampled_from(KINDS), st.integers(0, 2**64 - 1), st.integers(0, 4))
@settings(max_examples=40)
def test_a_saved_schedule_loads_unchanged(
    folder: Path, grid_and_steps: tuple[int, int], kind: str, seed: int, repulsion: int
) -> None:
    grid, steps = grid_and_steps
    made = Schedule.make(grid, steps, kind, repulsion, proximity=1.5, count=2, seed=seed)
    made.save(folder / "round_trip.npz")
    for loaded in (
        Schedule.load(folder / "round_trip.npz"),
        Schedule.load(str(folder / "round_trip.npz"), steps=steps),
    ):
        assert (loaded.group_sizes == made.group_sizes).all()
        assert (loaded.orders == made.orders).all()
        assert loaded.orders.dtype == loaded.group_sizes.dtype == np.int32
        assert (loaded.kind, loaded.seed) == (kind, made.seed)
        assert (loaded.repulsion, loaded.proximity) == (made.repulsion, made.proximity)
        assert (loaded.grid, loaded.cells, loaded.steps, loaded.count) == (grid, grid**2, steps, 2)


def test_the_file_is_as_documented(tmp_path: Path) -> None:
    Schedule.make(4, 5, repulsion=1, count=3, seed=9).save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert sorted(archive.files) == ["group_sizes", "meta", "orders"]
        assert archive["group_sizes"].dtype == archive["orders"].dtype == np.int32
        assert (archive["group_sizes"].shape, archive["orders"].shape) == ((5,), (3, 16))
        assert json.loads(str(archive["meta"])) == {
            "kind": "locality",
            "grid": 4,
            "repulsion": 1,
            "proximity": 1.0,
            "seed": 9,
        }


def test_the_same_schedule_makes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        Schedule.make(8, 9, count=4).save(tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_settings_that_mean_nothing_are_not_recorded() -> None:
    random, raster = Schedule.make(4, 5, "random", seed=3), Schedule.make(4, 5, "raster", seed=3)
    assert (random.repulsion, random.proximity, random.seed) == (None, None, 3)
    assert (raster.repulsion, raster.proximity, raster.seed) == (None, None, None)


def test_the_authors_format(tmp_path: Path) -> None:
    orders = make_orders(16, group_sizes(256, 20), "locality", 3, seed=1)
    path = tmp_path / "res256_steps20_repulsion2.json"
    path.write_text(json.dumps(orders.tolist()))
    schedule = Schedule.load(path, steps=20)
    assert schedule.kind == FOREIGN
    assert (schedule.orders == orders).all()
    assert (schedule.group_sizes == group_sizes(256, 20)).all()
    with pytest.raises(UserError, match="pass --steps"):
        Schedule.load(path)
    with pytest.raises(UserError, match="257 steps are too many"):
        Schedule.load(path, steps=257)
    schedule.save(tmp_path / "converted.npz")
    assert Schedule.load(tmp_path / "converted.npz").kind == FOREIGN


def test_steps_that_contradict_the_file(tmp_path: Path) -> None:
    Schedule.make(4, 5).save(tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"a\.npz: this schedule has 5 steps, but --steps 6"):
        Schedule.load(tmp_path / "a.npz", steps=6)


def test_a_schedule_for_another_grid() -> None:
    schedule = Schedule.make(8, 9, count=1)
    schedule.check_grid(8)
    with pytest.raises(UserError, match="is for a 8x8 grid, the model's is 16x16"):
        schedule.check_grid(16)


GOOD_ORDERS = [[3, 1, 0, 2], [0, 1, 2, 3]]
BAD_ARRAYS: list[tuple[Any, Any, str]] = [
    ([1, 3], [[3, 1, 0, 2], [0, 1, 2, 1]], "order 1 .* repeats cell 1 and misses cell 3"),
    ([1, 3], [[3, 1, 0, 4], [0, 1, 2, 3]], "order 0 holds cell 4, .* 2x2 grid are 0 to 3"),
    ([1, 3], [[3, 1, 0, -1]], "order 0 holds cell -1"),
    ([1, 4], GOOD_ORDERS, "sum to 5, but the grid has 4 cells"),
    ([1, 2], GOOD_ORDERS, "sum to 3, but the grid has 4 cells"),
    ([0, 4], GOOD_ORDERS, "step 1 has 0 cells"),
    ([5, -1], GOOD_ORDERS, "step 2 has -1 cells"),
    ([], GOOD_ORDERS, "group sizes must be a non-empty list"),
    ([[1, 3]], GOOD_ORDERS, "group sizes must be .* shape \\[1, 2\\]"),
    ([1.0, 3.0], GOOD_ORDERS, "group sizes must be .* float64"),
    ([1, 4], [[0, 1, 2, 3, 4]], "5 cells, which is no square grid"),
    ([1, 3], np.array(GOOD_ORDERS, float), "orders must be .* float64"),
    ([1, 3], np.array(GOOD_ORDERS, bool), "orders must be .* bool"),
    ([1, 3], [0, 1, 2, 3], "orders must be .* shape \\[4\\]"),
    ([1, 3], np.empty((0, 4), int), "orders must be a non-empty table"),
]


@pytest.mark.parametrize(("sizes", "orders", "message"), BAD_ARRAYS)
def test_arrays_that_are_no_schedule(tmp_path: Path, sizes: Any, orders: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Schedule(np.array(sizes), np.array(orders), "random")
    meta = json.dumps({"kind": "random", "grid": 2, "seed": 0})
    np.savez(tmp_path / "a.npz", group_sizes=sizes, orders=orders, meta=meta)
    with pytest.raises(UserError, match=rf"a\.npz: .*{message}"):
        Schedule.load(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"kind": "spiral", "grid": 2}, "no order kind 'spiral'"),
        ({"kind": "random", "grid": 16}, "meta says a grid of 16, its orders are for 2"),
        ({"kind": "locality", "grid": 2, "repulsion": "two"}, "repulsion threshold must be"),
        ({"kind": "locality", "grid": 2, "proximity": "one"}, "proximity threshold must be"),
        ({"kind": "random", "grid": 2, "seed": -4}, "seed must be a whole number from 0"),
        ({"kind": "random"}, "damaged or not a schedule"),
        ({"kind": "random", "grid": 2, "colour": "red"}, "damaged or not a schedule"),
        (["random"], "damaged or not a schedule"),
    ],
)
def test_bad_meta(tmp_path: Path, meta: Any, message: str) -> None:
    arrays = {"group_sizes": [1, 3], "orders": GOOD_ORDERS, "meta": json.dumps(meta)}
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        Schedule.load(tmp_path / "a.npz")


@pytest.mark.parametrize("missing", ["group_sizes", "orders", "meta"])
def test_an_incomplete_npz(tmp_path: Path, missing: str) -> None:
    meta = json.dumps({"kind": "random", "grid": 2})
    arrays = {"group_sizes": [1, 3], "orders": GOOD_ORDERS, "meta": meta}
    del arrays[missing]
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="damaged or not a schedule"):
        Schedule.load(tmp_path / "a.npz")


class Trap:
    """Pickled into a file, it would run code when loaded."""

    sprung = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Trap, "sprung", True)


def test_a_pickle_in_the_file_is_not_run(tmp_path: Path) -> None:
    meta = json.dumps({"kind": "random", "grid": 2})
    orders = np.array([[Trap()] * 4], object)
    np.savez(tmp_path / "a.npz", group_sizes=[1, 3], orders=orders, meta=meta)
    with pytest.raises(UserError, match="damaged or not a schedule"):
        Schedule.load(tmp_path / "a.npz")
    assert not Trap.sprung


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither an .npz schedule nor a complete JSON list"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "neither an .npz"),
        (b"[[0, 1, 2, 3], [0, 1", "neither an .npz"),
        (b"[" * 100_000, "neither an .npz"),
        (b"PK\x03\x04 and then nothing", "damaged or not a schedule"),
        (b"[[0, 1, 2, 3], [0, 1]]", "list of equally long orders"),
        (b'{"orders": [[0, 1, 2, 3]]}', "orders must be a non-empty table"),
        (b"[]", "orders must be a non-empty table"),
        (b"[0, 1, 2, 3]", "one order a row"),
        (b"[[0.5, 1, 2, 3]]", "whole numbers"),
        (b'[["a", "b", "c", "d"]]', "whole numbers"),
        (b"[[0, 1, 2, 99999999999999999999999]]", "whole numbers"),
        (b"[[0, 1, 2, 2]]", "repeats cell 2 and misses cell 3"),
        (b"[[0, 1, 2]]", "no square grid"),
    ],
)
def test_foreign_and_truncated_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "schedule.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        Schedule.load(path, steps=2)
    assert str(raised.value).startswith(str(path))


@given(st.data())
@settings(max_examples=150)
def test_a_damaged_npz_is_told_or_harmless(folder: Path, data: st.DataObject) -> None:
    path = folder / "damaged.npz"
    whole = Schedule.make(4, 5, count=2)
    whole.save(path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="truncate"):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        loaded = Schedule.load(path)
    except UserError:
        return
    assert (loaded.orders == whole.orders).all()  # the damage hit a byte that carries nothing


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the schedule .*gone\.npz: No such file"):
        Schedule.load(tmp_path / "gone.npz")
    with pytest.raises(UserError, match=r"cannot read the schedule .*: Is a directory"):
        Schedule.load(tmp_path)


def test_saving_where_nothing_can_be_saved(tmp_path: Path) -> None:
    schedule = Schedule.make(2, 2)
    (tmp_path / "a_file").touch()
    (tmp_path / "a_folder").mkdir()
    for path in ("missing/a.npz", "a_file/a.npz", "a_folder"):
        with pytest.raises(UserError, match="cannot write"):
            schedule.save(tmp_path / path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a_file", "a_folder"]


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.npz"
    write_atomically(path, b"old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_schedule_cannot_be_changed() -> None:
    orders = np.array(GOOD_ORDERS)
    schedule = Schedule(np.array([1, 3]), orders, "random")
    orders[0] = 0  # the caller's array is the caller's
    assert schedule.orders.tolist() == GOOD_ORDERS
    with pytest.raises(ValueError, match="read-only"):
        schedule.orders[0, 0] = 1
    with pytest.raises(AttributeError):
        schedule.kind = "raster"  # type: ignore[misc]


@pytest.mark.parametrize("name", ["group_sizes", "orders", "meta"])
def test_an_array_too_large_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    # Two gigabytes by the header alone: nothing that is read may depend on what follows it.
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i4", "fortran_order": False, "shape": (2**20, 512)}
    )
    Schedule.make(4, 5).save(tmp_path / "good.npz")
    with (
        zipfile.ZipFile(tmp_path / "good.npz") as good,
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for member in good.namelist():
            content = good.read(member)
            if member == f"{name}.npy":
                content = header.getvalue()
            archive.writestr(member, content)
    with pytest.raises(UserError, match=rf"its {name} of shape \[1048576, 512\] take 2.15 GB"):
        Schedule.load(tmp_path / "a.npz")
