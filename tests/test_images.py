"""Pictures: exact pixels where they are data, size and colour where they are drawings."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lpd_export.errors import UserError
from lpd_export.images import (
    _font,
    _wrapped,
    contact_sheet,
    draw_schedule,
    draw_trace,
    save_png,
    step_colours,
    to_uint8,
)
from lpd_export.schedule.orders import KINDS, step_of_cell
from lpd_export.schedule.schedule_file import Schedule

RED = (214, 30, 84)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    shape = (height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def count_colour(image: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(image) == colour).all(axis=2).sum())


# ------------------------------------------------------------------------------------ pixels


def test_pixel_values() -> None:
    values = [-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 7.0]
    expected = [0, 0, 64, 128, 191, 255, 255]
    image = np.tile(np.array(values, np.float32), (3, 1, 1))
    pixels = to_uint8(image)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (1, 7, 3)
    assert pixels[0, :, 0].tolist() == expected


@given(st.sampled_from([(), (1,), (4,)]), st.integers(1, 5), st.integers(1, 5))
def test_channels_become_last(batch: tuple[int, ...], height: int, width: int) -> None:
    levels = np.random.default_rng(height).integers(0, 256, (*batch, height, width, 3))
    image = np.moveaxis(levels / np.float32(127.5) - 1, -1, -3).astype(np.float32)
    assert (to_uint8(image) == levels).all()


@pytest.mark.parametrize(("value", "name"), [(np.nan, "NaN"), (np.inf, "infinite values")])
def test_an_overflowed_image_is_told(value: float, name: str) -> None:
    image = np.zeros((2, 3, 4, 4), np.float32)
    image[1, 2, 3, 0] = value
    with pytest.raises(UserError, match=f"the image holds {name} in 1 of 96 values"):
        to_uint8(image)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3), (1, 1, 3, 4, 4), (1, 4, 8, 8)])
def test_what_is_no_image(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="must have the shape"):
        to_uint8(np.zeros(shape, np.float32))


def test_a_png_holds_the_pixels(tmp_path: Path) -> None:
    pixels = noise(5, 7)
    save_png(pixels, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert (np.asarray(image) == pixels).all()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_png_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        save_png(noise(2, 2), tmp_path / "missing" / "a.png")
    with pytest.raises(UserError, match=r"uint8 of shape \[H, W, 3\], but they are float32"):
        save_png(np.zeros((2, 2, 3), np.float32), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------ contact sheet


def test_small_images_are_enlarged_pixel_by_pixel() -> None:
    images = [noise(32, 32, seed) for seed in range(3)]
    sheet = np.asarray(contact_sheet(images, ["a", "b", "c"], columns=2, cell=96))
    enlarged = [image.repeat(3, axis=0).repeat(3, axis=1) for image in images]
    gap = 12
    second = gap + 96 + gap
    assert (sheet[gap : gap + 96, gap : gap + 96] == enlarged[0]).all()
    assert (sheet[gap : gap + 96, second : second + 96] == enlarged[1]).all()
    below = np.flatnonzero((sheet[gap + 96 :, gap : gap + 96] != 255).any(axis=(1, 2)))
    assert below.size  # the label and, in the next row, the third image
    assert (sheet[:gap] == 255).all()
    assert (sheet[:, :gap] == 255).all()
    assert (sheet[gap + 96 + gap + 30 :, second:] == 255).all()  # no fourth image


@pytest.mark.parametrize(
    ("count", "side", "shown"),
    [(1, 16, 384), (1, 64, 384), (1, 90, 360), (1, 256, 256), (2, 64, 192), (9, 32, 128)],
)
def test_few_small_images_are_large_enough_to_see(count: int, side: int, shown: int) -> None:
    image = np.full((side, side, 3), 90, np.uint8)
    sheet = contact_sheet([image] * count, ["a"] * count)
    assert count_colour(sheet, (90, 90, 90)) == count * shown**2


def test_large_images_are_reduced() -> None:
    sheet = contact_sheet([np.full((512, 512, 3), 90, np.uint8)] * 16, ["label"] * 16)
    assert 1500 < sheet.width < 1900
    assert sheet.height < 2100
    assert count_colour(sheet, (90, 90, 90)) == 16 * 400 * 400


def test_the_cell_is_as_wide_as_asked() -> None:
    image = np.full((64, 64, 3), 90, np.uint8)
    assert count_colour(contact_sheet([image], ["a"], cell=200), (90, 90, 90)) == 192**2
    assert count_colour(contact_sheet([image], ["a"], cell=50), (90, 90, 90)) == 50**2


def test_images_of_different_shapes_share_a_sheet() -> None:
    tall, wide = np.full((64, 32, 3), 50, np.uint8), np.full((32, 96, 3), 90, np.uint8)
    sheet = contact_sheet([tall, wide], ["tall", "wide"])
    assert count_colour(sheet, (50, 50, 50)) == 4 * 192 * 96
    assert count_colour(sheet, (90, 90, 90)) == 4 * 32 * 96


def test_each_label_is_under_its_image() -> None:
    image = np.full((96, 96, 3), 255, np.uint8)
    sheet = np.asarray(contact_sheet([image] * 4, ["", "seed 1", "", "seed 3"], columns=2))
    ink = sheet.max(axis=2) < 128
    rows, columns = np.nonzero(ink)
    middle, gap = sheet.shape[1] // 2, 12
    assert columns.min() > middle  # only the second column is labelled
    assert rows.min() > gap + 96
    upper, lower = ink[: sheet.shape[0] // 2 + 10].sum(), ink.sum()
    assert 0 < upper < lower


@given(st.text(st.characters(codec="latin-1"), max_size=120), st.integers(40, 300))
def test_labels_are_wrapped_to_the_width(text: str, width: int) -> None:
    font = _font(14)
    lines = _wrapped(text, font, width, lines=2)
    assert 1 <= len(lines) <= 2
    assert all(font.getlength(line) <= width for line in lines)
    whole = "".join(text.split())
    shown = "".join("".join(lines).split())
    if shown != whole:
        assert shown.endswith("…")
        assert whole.startswith(shown[:-1])


def test_labels_break_between_words() -> None:
    assert _wrapped("golden retriever, seed 3", _font(14), 110, lines=2) == [
        "golden retriever,",
        "seed 3",
    ]


@pytest.mark.parametrize(
    ("count", "labels", "columns", "message"),
    [
        (0, [], None, "at least one image"),
        (2, ["a"], None, "2 images and 1 labels"),
        (1, ["a"], 0, "must be at least 1, but they are 0"),
    ],
)
def test_sheets_that_cannot_be(
    count: int, labels: list[str], columns: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        contact_sheet([noise(4, 4)] * count, labels, columns)


# --------------------------------------------------------------------------- schedule drawing


@pytest.mark.parametrize(("grid", "steps"), [(1, 1), (2, 4), (4, 5), (16, 20), (32, 48), (64, 30)])
@pytest.mark.parametrize("kind", KINDS)
def test_schedules_are_drawn_at_a_reasonable_size(grid: int, steps: int, kind: str) -> None:
    drawing = draw_schedule(Schedule.make(grid, steps, kind, count=2), order_index=1)
    assert drawing.mode == "RGB"
    assert 700 < drawing.width < 1800
    assert 600 < drawing.height < 700


def test_the_board_has_the_colour_of_each_step() -> None:
    schedule = Schedule.make(8, 9, count=2)
    drawing = np.asarray(draw_schedule(schedule, order_index=1))
    colours = step_colours(9)
    expected = colours[step_of_cell(schedule.orders[1:], schedule.group_sizes)[0]].reshape(8, 8, 3)
    cell = 64
    # The board's corner: the first pixel of the colour of its own first cell.
    top, left = np.argwhere((drawing == expected[0, 0]).all(axis=2))[0]
    corners = drawing[top + 3 : top + 8 * cell : cell, left + 3 : left + 8 * cell : cell]
    assert (corners == expected).all()


def test_every_stage_shows_its_step_in_red() -> None:
    schedule = Schedule.make(4, 5, count=1)  # few enough steps for all to be shown
    drawing = draw_schedule(schedule)
    inside = (192 // 4 - 1) ** 2  # a cell of a stage, without its hairlines
    assert count_colour(drawing, RED) == schedule.cells * inside
    one_step = draw_schedule(Schedule.make(4, 1, count=1))
    assert count_colour(one_step, RED) == 16 * inside


def test_about_ten_stages_are_shown() -> None:
    schedule = Schedule.make(32, 48, count=1)
    shown = [0, 5, 10, 16, 21, 26, 31, 37, 42, 47]
    red = count_colour(draw_schedule(schedule), RED)
    assert red == 6 * 6 * schedule.group_sizes[shown].sum()


def test_different_orders_look_different() -> None:
    schedule = Schedule.make(8, 9, count=2)
    first, second = (np.asarray(draw_schedule(schedule, index)) for index in (0, 1))
    assert first.shape == second.shape
    assert (first != second).any(axis=2).mean() > 0.1


@given(st.integers(2, 200))
def test_step_colours_go_from_dark_to_light(steps: int) -> None:
    colours = step_colours(steps)
    assert colours.shape == (steps, 3)
    brightness = colours @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(brightness) > -0.6).all()  # rounding to whole levels apart
    assert brightness[-1] - brightness[0] > 150


@pytest.mark.parametrize("index", [-1, 2])
def test_an_order_that_is_not_there(index: int) -> None:
    with pytest.raises(UserError, match=f"no order {index}: the schedule has orders 0 to 1"):
        draw_schedule(Schedule.make(4, 5, count=2), index)


# ------------------------------------------------------------------------------ trace drawing


def steps_in_colours(steps: int, side: int) -> np.ndarray:
    """A picture of one colour a step, no two alike."""
    colours = np.array([(40 + step // 100, 90 + step % 100, 200) for step in range(steps)])
    return np.broadcast_to(colours[:, None, None], (steps, side, side, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("steps", "side", "columns", "cell"),
    [
        (1, 32, 1, 192),
        (4, 16, 2, 192),
        (20, 32, 5, 192),
        (20, 256, 5, 192),
        (48, 512, 8, 192),
        (13, 160, 5, 160),
        (256, 8, 16, 96),
    ],
)
def test_a_trace_is_drawn_step_by_step(steps: int, side: int, columns: int, cell: int) -> None:
    pictures = steps_in_colours(steps, side)
    drawing = np.asarray(draw_trace(pictures, np.full(steps, 3), "a title"))
    codes = (drawing @ np.array((1 << 16, 1 << 8, 1))).ravel()
    by_code = np.argsort(codes, kind="stable")
    lefts, tops = [], []
    for picture in pictures:
        code = picture[0, 0] @ (1 << 16, 1 << 8, 1)
        start, end = np.searchsorted(codes, [code, code + 1], sorter=by_code)
        rows, across = np.unravel_index(by_code[start:end], drawing.shape[:2])
        assert len(rows) == cell**2
        assert np.ptp(rows) == np.ptp(across) == cell - 1
        tops.append(int(rows.min()))
        lefts.append(int(across.min()))
    # From left to right, then down, in rows as full as they can be.
    assert sorted(range(steps), key=lambda step: (tops[step], lefts[step])) == list(range(steps))
    assert len(set(lefts)) == columns
    assert len(set(tops)) == -(-steps // columns)
    title = drawing[: tops[0]].min(axis=2) < 128
    assert title.any()


def test_the_words_of_a_trace_say_how_many_cells_are_filled() -> None:
    pictures = np.full((2, 32, 32, 3), 255, np.uint8)

    def ink(sizes: list[int]) -> list[np.ndarray]:
        """What is written under each of two pictures."""
        drawing = np.asarray(draw_trace(pictures, np.array(sizes), "")).min(axis=2) < 200
        middle = 24 + 192 + 10
        return [drawing[:, :middle], drawing[:, middle:]]

    (one, rest), (three, last) = ink([1, 3]), ink([3, 1])
    assert not np.array_equal(one, three)
    assert not np.array_equal(rest, last)
    assert np.array_equal(ink([1, 3])[0], one)
    # Singular and plural: the words of three cells are longer than those of one.
    assert three.any(axis=0).nonzero()[0].max() > one.any(axis=0).nonzero()[0].max()


def test_a_long_title_widens_the_drawing() -> None:
    pictures = steps_in_colours(1, 32)
    assert draw_trace(pictures, np.array([4]), "title").width < 250
    assert draw_trace(pictures, np.array([4]), "a very long title " * 5).width > 500


@pytest.mark.parametrize(
    ("pictures", "sizes", "message"),
    [
        (steps_in_colours(2, 8), [1], "there are 2 pictures for 1 steps"),
        (steps_in_colours(1, 8)[:0], [], "there are 0 pictures for 0 steps"),
        (steps_in_colours(1, 8).astype(np.float32), [1], "pixels must be uint8"),
    ],
)
def test_traces_that_cannot_be_drawn(pictures: np.ndarray, sizes: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        draw_trace(pictures, np.array(sizes, int), "")
