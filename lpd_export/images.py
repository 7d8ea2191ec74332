"""Pictures: pixels from the model's output, PNGs, contact sheets, drawings of schedules and traces.

This module knows Pillow and NumPy arrays. It does not know a model, a backend or a bundle; of a
schedule it uses the orders and the group sizes, to draw them.
"""

import io
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lpd_export.errors import NumericalError, UserError
from lpd_export.files import write_atomically
from lpd_export.schedule.orders import step_of_cell
from lpd_export.schedule.schedule_file import Schedule

Pixels = NDArray[np.uint8]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour = tuple[int, int, int]

_WHITE, _INK, _FAINT = (255, 255, 255), (32, 33, 36), (120, 124, 130)
_NOW = (214, 30, 84)
BLANK = (230, 232, 237)
"""The colour of a cell that is not generated yet."""

# Step colours run through these, from dark to light, so that their order can be seen at a glance.
_STEP_STOPS = [(46, 30, 105), (42, 92, 158), (28, 146, 150), (104, 192, 110), (247, 222, 92)]

_MARGIN = 24
_SHEET_CELL_LEAST = 96  # pixels: what smaller images are enlarged to
_SHEET_SIDE_LEAST = 384  # pixels: how wide a sheet of few small images becomes
_SHEET_SIDE = 1600  # pixels: about how wide a sheet of large images may become
_BOARD, _THUMBNAIL = 512, 192  # pixels: about how large a schedule's grid and its stages are drawn
_STAGES = 10
_HEAD = 24  # pixels: the line of text above the scale and the stages


# ------------------------------------------------------------------------------------ pixels


def to_uint8(image: NDArray[np.floating[Any]]) -> Pixels:
    """Model output in [-1, 1] to pixels: [3, H, W] or [B, 3, H, W] float -> uint8 [..., H, W, 3].

    Values beyond the range are clipped. Raises NumericalError if any is NaN or infinite, which is
    what a numeric overflow leaves, and UserError if the array is no image.
    """
    if image.ndim not in (3, 4) or image.shape[-3] != 3:
        raise UserError(
            "an image must have the shape [3, H, W] or [B, 3, H, W], but it has "
            f"{list(image.shape)}"
        )
    for name, bad in (("NaN", np.isnan(image)), ("infinite values", np.isinf(image))):
        if bad.any():
            raise NumericalError(
                f"the image holds {name} in {bad.sum()} of {bad.size} values: the model "
                "overflowed; use a precision with more range (bf16 or fp32)"
            )
    levels = np.rint(255 * np.clip((image.astype(np.float32) + 1) / 2, 0, 1))
    return np.moveaxis(levels.astype(np.uint8), -3, -1)


def save_png(pixels: Pixels, path: str | os.PathLike[str]) -> None:
    """Writes pixels [H, W, 3] uint8 as a PNG, whole or not at all.

    Raises UserError if they are not such an array, or the file cannot be written.
    """
    write_atomically(path, png_bytes(pixels))


def png_bytes(pixels: Pixels) -> bytes:
    """Pixels [H, W, 3] uint8 as a PNG. Raises UserError if they are not such an array."""
    _check_pixels(pixels)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _check_pixels(pixels: Pixels) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise UserError(
            f"pixels must be uint8 of shape [H, W, 3], but they are {pixels.dtype} of shape "
            f"{list(pixels.shape)}"
        )


# ------------------------------------------------------------------------------ contact sheet


def contact_sheet(
    images: Sequence[Pixels],
    labels: Sequence[str],
    columns: int | None = None,
    cell: int | None = None,
) -> Image.Image:
    """Images [H, W, 3] uint8 in a grid on white, each with its label under it.

    `cell` is the width in pixels that an image gets: an image of at most half that is enlarged by
    a whole factor, pixel by pixel, and a larger one is reduced. By default small images grow to
    about 96 pixels, more where they are few, and large ones shrink until the sheet is about 1600
    wide. `columns` is by default what makes the sheet about square. Long labels are wrapped, then
    cut with an ellipsis.

    Raises UserError for no images, a label too many or too few, or columns or cell below 1.
    """
    if len(images) == 0 or len(images) != len(labels):
        raise UserError(
            "a contact sheet takes at least one image and a label for each, but there are "
            f"{len(images)} images and {len(labels)} labels"
        )
    for pixels in images:
        _check_pixels(pixels)
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    widest = max(pixels.shape[1] for pixels in images)
    if cell is None:
        room = max(_SHEET_SIDE // max(columns, 1), _SHEET_CELL_LEAST)
        shown = max(min(columns, len(images)), 1)
        factors = math.ceil(_SHEET_CELL_LEAST / widest), _SHEET_SIDE_LEAST // shown // widest
        cell = min(widest * max(factors), room)
    if columns < 1 or cell < 1:
        raise UserError(f"columns and cell must be at least 1, but they are {columns} and {cell}")
    columns = min(columns, len(images))
    pictures = [_scaled(pixels, cell) for pixels in images]
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    font = _font(min(max(width // 14, 13), 18))
    line, gap = _line_height(font), max(12, width // 12)
    captions = [_wrapped(label, font, width, lines=2) for label in labels]
    rows = [
        range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)
    ]
    heights = [height + 6 + line * max(len(captions[i]) for i in row) + gap for row in rows]

    size = (columns * (width + gap) + gap, gap + sum(heights))
    sheet = Image.new("RGB", size, _WHITE)
    draw = ImageDraw.Draw(sheet)
    floor = gap + height  # where the pictures of a row stand, and their labels hang
    for row, row_height in zip(rows, heights, strict=True):
        for column, place in enumerate(row):
            picture, middle = pictures[place], gap + column * (width + gap) + width // 2
            sheet.paste(picture, (middle - picture.width // 2, floor - picture.height))
            for number, text in enumerate(captions[place]):
                draw.text((middle, floor + 6 + number * line), text, _INK, font, anchor="ma")
        floor += row_height
    return sheet


def _scaled(pixels: Pixels, width: int) -> Image.Image:
    """The image at about this width: enlarged by a whole factor, or reduced to it."""
    picture = Image.fromarray(pixels)
    if picture.width > width:
        height = max(1, round(picture.height * width / picture.width))
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    factor = width // picture.width
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


# -------------------------------------------------------------------------------------- text


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _line_height(font: Font) -> int:
    top, bottom = font.getbbox("Ag")[1::2]
    return math.ceil((bottom - top) * 1.35)


def _wrapped(text: str, font: Font, width: int, lines: int) -> list[str]:
    """The text in at most this many lines of this width in pixels, the last cut with an ellipsis.

    It breaks between words, and within a word that is wider than a line.
    """
    wrapped: list[str] = []
    rest = " ".join(text.split())
    while rest and len(wrapped) < lines - 1 and font.getlength(rest) > width:
        fits = _fitting(rest, font, width)
        space = rest.rfind(" ", 0, fits + 1)
        end = space if space > 0 else fits
        wrapped.append(rest[:end])
        rest = rest[end:].lstrip()
    if font.getlength(rest) > width:
        rest = rest[: _fitting(rest, font, width - font.getlength("…"))].rstrip() + "…"
    return [*wrapped, rest]


def _fitting(text: str, font: Font, width: float) -> int:
    """How many leading characters fit the width; at least one, so that wrapping gets on."""
    fits = 1
    while fits < len(text) and font.getlength(text[: fits + 1]) <= width:
        fits += 1
    return fits


# --------------------------------------------------------------------------- schedule drawing


def draw_schedule(schedule: Schedule, order_index: int = 0) -> Image.Image:
    """One order of a schedule: the grid coloured by step, and how the image fills up.

    On the left every cell has the colour, and where there is room the number, of the step that
    generates it, with a scale beside it. On the right is the grid after about ten evenly spaced
    steps: the cells of that step in red, earlier ones in their colour, the rest blank.

    Raises UserError if the schedule has no such order.
    """
    if not 0 <= order_index < schedule.count:
        raise UserError(
            f"there is no order {order_index}: the schedule has orders 0 to {schedule.count - 1}"
        )
    order = schedule.orders[order_index : order_index + 1]
    steps = step_of_cell(order, schedule.group_sizes).reshape(schedule.grid, schedule.grid)
    colours = step_colours(schedule.steps)

    board = _drawn_grid(colours[steps], max(_BOARD // schedule.grid, 1))
    _number_cells(board, steps, colours)
    scale = _drawn_scale(colours, board.height)
    stages = _drawn_stages(schedule, steps, colours)

    title, small = _font(22), _font(15)
    heading = _MARGIN + _line_height(title) + _line_height(small) + 14
    parts = [board, scale, stages]
    lefts = [_MARGIN, _MARGIN + board.width + 16, _MARGIN + board.width + scale.width + 44]
    right = lefts[-1] + stages.width
    subtitle = _settings(schedule, order_index)
    text_width = max(title.getlength(_title(schedule)), small.getlength(subtitle))
    size = (
        max(right, math.ceil(_MARGIN + text_width)) + _MARGIN,
        heading + max(part.height for part in parts) + _MARGIN,
    )
    drawing = Image.new("RGB", size, _WHITE)
    draw = ImageDraw.Draw(drawing)
    draw.text((_MARGIN, _MARGIN - 4), _title(schedule), _INK, title)
    draw.text((_MARGIN, _MARGIN + _line_height(title)), subtitle, _FAINT, small)
    for part, left in zip(parts, lefts, strict=True):
        drawing.paste(part, (left, heading))
    return drawing


def step_colours(steps: int) -> Pixels:
    """A colour a step, from dark to light: [steps, 3] uint8."""
    stops = np.array(_STEP_STOPS, float)
    at = np.linspace(0, len(stops) - 1, steps)
    channels = [np.interp(at, np.arange(len(stops)), stops[:, channel]) for channel in range(3)]
    colours: Pixels = np.rint(np.stack(channels, axis=1)).astype(np.uint8)
    return colours


def _title(schedule: Schedule) -> str:
    grid, steps = schedule.grid, schedule.steps
    plural = "" if steps == 1 else "s"
    return f"{schedule.kind.capitalize()} order, {grid}x{grid} grid, {steps} step{plural}"


def _settings(schedule: Schedule, order_index: int) -> str:
    settings = {
        "repulsion": schedule.repulsion,
        "proximity": schedule.proximity,
        "seed": schedule.seed,
    }
    known = [f"{name} {value:g}" for name, value in settings.items() if value is not None]
    return "  ·  ".join([f"order {order_index} of {schedule.count}", *known])


def _drawn_grid(colours: Pixels, cell: int) -> Image.Image:
    """Cells [G, G, 3] as squares of `cell` pixels, with a hairline between large ones."""
    pixels = colours.repeat(cell, axis=0).repeat(cell, axis=1)
    if cell >= 10:  # else the lines would wash the colours out
        pixels[cell - 1 :: cell] = pixels[:, cell - 1 :: cell] = 255
    return Image.fromarray(pixels)


def _number_cells(board: Image.Image, steps: NDArray[np.int32], colours: Pixels) -> None:
    """Writes each cell's step into it, unless the cells are too small to read it."""
    grid = len(steps)
    cell = board.width // grid
    font = _font(min(round(cell * 0.45), 22))
    if cell < 14 or font.getlength(str(steps.max() + 1)) > cell - 3:
        return
    draw = ImageDraw.Draw(board)
    brightness = colours @ np.array([0.3, 0.59, 0.11])
    for (row, column), step in np.ndenumerate(steps):
        ink = _INK if brightness[step] > 120 else _WHITE
        centre = ((column + 0.5) * cell - 0.5, (row + 0.5) * cell - 0.5)
        draw.text(centre, str(step + 1), ink, font, anchor="mm")


def _drawn_scale(colours: Pixels, height: int) -> Image.Image:
    """What colour is which step: a bar with step 1 at the top, some of the steps named."""
    font = _font(14)
    steps, bar = len(colours), 18
    image = Image.new("RGB", (bar + 40, height), _WHITE)
    draw = ImageDraw.Draw(image)
    draw.text((0, 0), "step", _FAINT, font)
    edges = np.linspace(_HEAD, height, steps + 1)
    for step, colour in enumerate(colours.tolist()):
        draw.rectangle((0, edges[step], bar - 1, edges[step + 1]), tuple(colour))
    for step in _evenly_spaced(steps, 9):
        middle = (edges[step] + edges[step + 1]) / 2
        middle = min(max(middle, _HEAD + 6), height - 7)  # the end labels stay inside
        draw.text((bar + 7, middle), str(step + 1), _INK, font, anchor="lm")
    return image


def _drawn_stages(schedule: Schedule, steps: NDArray[np.int32], colours: Pixels) -> Image.Image:
    """The grid after each of about ten evenly spaced steps, in two rows, with what was added."""
    font, faint = _font(14), _font(13)
    line = _line_height(font)
    shown = _evenly_spaced(schedule.steps, _STAGES)
    columns = math.ceil(len(shown) / 2)
    cell = max(_THUMBNAIL // schedule.grid, 1)
    side = cell * schedule.grid
    width = max(side, _THUMBNAIL)
    across, down = width + 20, side + 2 * line + 18
    rows = math.ceil(len(shown) / columns)
    image = Image.new("RGB", (columns * across - 20, _HEAD + rows * down), _WHITE)
    draw = ImageDraw.Draw(image)
    draw.text((0, 0), "red: this step's cells", _FAINT, font)
    progress = _progress_captions(schedule.group_sizes)
    for place, step in enumerate(shown):
        filled = np.where((steps <= step)[..., None], colours[steps], np.array(BLANK, np.uint8))
        filled[steps == step] = _NOW
        row, column = divmod(place, columns)
        left, top = column * across, _HEAD + row * down
        image.paste(_drawn_grid(filled, cell), (left, top))
        caption = _step_caption(step, int(schedule.group_sizes[step]))
        draw.text((left, top + side + 6), caption, _INK, font)
        draw.text((left, top + side + 6 + line), progress[step], _FAINT, faint)
    return image


# ------------------------------------------------------------------------------ trace drawing


def draw_trace(pictures: Pixels, group_sizes: NDArray[np.integer[Any]], title: str) -> Image.Image:
    """How an image filled in: its picture after each step, in rows from left to right.

    Each has the step and its cells under it, and how many are filled by then; the title is above
    them. Pictures [K, H, W, 3] uint8 are scaled as on a contact sheet, to about 192 pixels, less
    where there are many steps; group sizes are [K].

    Raises UserError if they are no pictures, or not as many as steps.
    """
    steps = len(group_sizes)
    if steps == 0 or len(pictures) != steps:
        raise UserError(f"there are {len(pictures)} pictures for {steps} steps: give one a step")
    for pixels in pictures:
        _check_pixels(pixels)
    # Wider than tall, with the last row as full as it can be.
    widths = range(math.ceil(math.sqrt(steps)), math.ceil(math.sqrt(2 * steps)) + 1)
    columns = min(widths, key=lambda width: (-steps % width, width))
    cell = min(max(_SHEET_SIDE // columns, _SHEET_CELL_LEAST), _THUMBNAIL)
    thumbnails = [_scaled(pixels, cell) for pixels in pictures]
    head, font, faint = _font(22), _font(14), _font(13)
    captions = [_step_caption(step, int(size)) for step, size in enumerate(group_sizes)]
    progress = _progress_captions(group_sizes)
    width = max(
        thumbnails[0].width,
        math.ceil(max(map(font.getlength, captions))),
        math.ceil(max(map(faint.getlength, progress))),
    )
    side, line = thumbnails[0].height, _line_height(font)
    across, down = width + 20, side + 2 * line + 18
    left, top = _MARGIN, _MARGIN + _line_height(head) + 14
    size = (
        max(left + columns * across - 20, left + math.ceil(head.getlength(title))) + _MARGIN,
        top + math.ceil(steps / columns) * down - 12 + _MARGIN,
    )
    drawing = Image.new("RGB", size, _WHITE)
    draw = ImageDraw.Draw(drawing)
    draw.text((left, _MARGIN - 4), title, _INK, head)
    for step, thumbnail in enumerate(thumbnails):
        row, column = divmod(step, columns)
        corner = left + column * across, top + row * down
        drawing.paste(thumbnail, corner)
        below = corner[1] + side + 6
        draw.text((corner[0], below), captions[step], _INK, font)
        draw.text((corner[0], below + line), progress[step], _FAINT, faint)
    return drawing


def _step_caption(step: int, cells: int) -> str:
    return f"step {step + 1}: {cells} cell{'' if cells == 1 else 's'}"


def _progress_captions(group_sizes: NDArray[np.integer[Any]]) -> list[str]:
    """For each step how many cells are done after it."""
    done = np.cumsum(group_sizes).tolist()
    return [f"{cells} of {done[-1]} done" for cells in done]


def _evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` of the indices below `count`, the first and the last among them."""
    return [round(place) for place in np.linspace(0, count - 1, min(count, most)).tolist()]
