"""Editing: what is kept stays, what is new is what the reference makes of it, in any picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import lpd_reference
from lpd_export import Pipeline, UserError
from lpd_export.images import BLANK
from lpd_export.pictures import fit_mask, fit_picture, read_mask, read_picture
from lpd_export.runtime.requests import GeneratedImage
from lpd_reference import LPD

pytestmark = pytest.mark.model

RED = (200, 10, 10)


@pytest.fixture(scope="module")
def pipeline(small_bundle: Path) -> Pipeline:
    """A grid of 4x4 cells of 4 pixels, in 4 steps of 1, 3, 5 and 7 cells."""
    return Pipeline.open(small_bundle)


@pytest.fixture(scope="module")
def reference(small_weights: Path) -> LPD:
    return lpd_reference.load_lpd(small_weights / "lpd.pth")


@pytest.fixture(scope="module")
def image(pipeline: Pipeline) -> GeneratedImage:
    return pipeline.generate([1], seed=8)[0]


# ------------------------------------------------------------------------------ the new cells

MASKS: dict[str, Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]]] = {
    "left half": lambda down, right: right < 2,
    "centre": lambda down, right: (down % 3 != 0) & (right % 3 != 0),
    "border": lambda down, right: (down % 3 == 0) | (right % 3 == 0),
    "one cell": lambda down, right: (down == 2) & (right == 1),
    "all but one": lambda down, right: (down != 2) | (right != 1),
}


@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("order", ["locality", "random"])
def test_an_edit_is_the_references(
    pipeline: Pipeline, reference: LPD, image: GeneratedImage, where: str, order: str
) -> None:
    """Kept tokens are the image's; new ones and their logits the reference's, given the kept."""
    mask = MASKS[where](*np.divmod(np.arange(16), 4)).reshape(4, 4)
    settings: dict[str, Any] = {"cfg": 3.0, "temperature": 0.8}
    classes = [1, 3, None]
    edits = pipeline.edit(image, mask, classes, order=order, seed=5, batch=3, **settings)
    kept = ~mask.reshape(-1)
    given = np.where(kept, image.token_ids, -1)
    for edited, label in zip(edits, classes, strict=True):
        np.testing.assert_array_equal(edited.token_ids[kept], image.token_ids[kept])
        assert kept[edited.order[: kept.sum()]].all()
        expected = lpd_reference.generate(
            reference,
            None if label is None else torch.tensor([label]),
            torch.from_numpy(edited.order[None]),
            edited.schedule.group_sizes.tolist(),
            torch.from_numpy(edited.request.chance(edited.schedule).uniform[None]),
            given=torch.from_numpy(given[None]),
            **settings,
        )
        np.testing.assert_array_equal(edited.token_ids, expected.token_ids[0].numpy())
        logits = pipeline.teacher_forced_logits([edited])
        np.testing.assert_allclose(logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_the_references_edit_is_its_teacher_forced_pass(
    pipeline: Pipeline, reference: LPD, image: GeneratedImage
) -> None:
    """Two ways to the logits of new cells: step by step with given tokens, and all at once."""
    (edited,) = pipeline.edit(image, box=(8, 0, 16, 16), classes=[3], cfg=1.0)
    order, sizes = torch.from_numpy(edited.order[None]), edited.schedule.group_sizes.tolist()
    given = edited.request.given
    assert given is not None
    stepwise = lpd_reference.generate(
        reference,
        torch.tensor([3]),
        order,
        sizes,
        torch.from_numpy(edited.request.chance(edited.schedule).uniform[None]),
        given=torch.from_numpy(given[None]),
    )
    with torch.inference_mode():
        at_once = reference(stepwise.token_ids, torch.tensor([3]), order, sizes)
    torch.testing.assert_close(stepwise.logits, at_once, atol=1e-4, rtol=1e-4)


def test_an_edit_that_keeps_nothing_is_a_run(pipeline: Pipeline, image: GeneratedImage) -> None:
    everything = np.ones((4, 4), np.bool_)
    edited = pipeline.edit(image, everything, [2, None], seed=3, batch=2)
    for one, other in zip(edited, pipeline.generate([2, None], seed=3, batch=2), strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.pixels, other.pixels)
        assert one.order_index == other.order_index
    assert "those of a run" in pipeline.prepare_edit(image, everything).notes[-1]


def test_edits_of_different_masks_share_a_batch(pipeline: Pipeline, image: GeneratedImage) -> None:
    """And are what they are alone, beside a plain image too."""
    schedule, sampling = pipeline.choose_schedule(None), pipeline.sampling()
    requests = [
        request
        for mask in MASKS.values()
        for request in pipeline.prepare_edit(
            image, mask(*np.divmod(np.arange(16), 4)).reshape(4, 4)
        ).requests([0, None], 4, sampling, schedule)
    ]
    requests.append(image.request)
    alone = [next(pipeline.stream([request])) for request in requests]
    for edited in pipeline.stream(requests[::-1], batch=4):
        expected = alone[[id(r) for r in requests].index(id(edited.request))]
        np.testing.assert_array_equal(edited.token_ids, expected.token_ids)


def test_a_trace_has_the_kept_cells_from_the_first_step(
    pipeline: Pipeline, image: GeneratedImage
) -> None:
    (edited,) = pipeline.edit(image, box=(8, 0, 16, 16), paste=False)
    trace = pipeline.trace(edited)
    assert (trace[0, :, 8:] == BLANK).all()
    assert (trace[:, :, :8] != BLANK).any(axis=-1).mean() > 0.9
    assert (trace[-1] == edited.pixels).all()


# --------------------------------------------------------------------------------- the picture


def test_kept_pixels_are_the_originals(pipeline: Pipeline) -> None:
    """New cells are the decoder's, and over half a cell beside them the two mix."""
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    box = (8, 0, 16, 16)
    (edited,) = pipeline.edit(picture, box=box, classes=[2])
    (decoded,) = pipeline.edit(picture, box=box, classes=[2], paste=False)
    np.testing.assert_array_equal(edited.pixels[:, :6], picture[:, :6])
    np.testing.assert_array_equal(edited.pixels[:, 8:], decoded.pixels[:, 8:])
    seam = [edited.pixels[:, 6:8], decoded.pixels[:, 6:8], picture[:, 6:8]]
    mixed, one, other = (pixels.astype(int) for pixels in seam)
    assert ((mixed >= np.minimum(one, other) - 1) & (mixed <= np.maximum(one, other) + 1)).all()
    assert not np.array_equal(mixed, other)
    assert not np.array_equal(decoded.pixels[:, :6], picture[:, :6])


def test_a_cell_is_new_if_any_of_its_pixels_is(pipeline: Pipeline) -> None:
    picture = np.zeros((400, 400, 3), np.uint8)
    mask = np.zeros((400, 400), np.bool_)
    mask[399, 0] = mask[150, 250] = True  # a hair of a large picture is not lost
    kept = pipeline.prepare_edit(picture, mask).kept.reshape(4, 4)
    assert np.argwhere(~kept).tolist() == [[1, 2], [3, 0]]


def test_outpainting_keeps_the_middle(pipeline: Pipeline) -> None:
    picture = np.full((32, 32, 3), RED, np.uint8)
    edit = pipeline.prepare_edit(picture, outpaint=4)
    assert np.argwhere(edit.kept.reshape(4, 4)).tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert (edit.original == RED).all()
    assert (edit.masked[:4] == BLANK).all()
    halves = np.full((16, 16, 3), RED, np.uint8)
    halves[:, 8:] = 0
    np.testing.assert_array_equal(pipeline.prepare_edit(halves, outpaint=4).picture, halves)
    uneven = pipeline.prepare_edit(picture, outpaint=3)  # cells that are kept in part are new
    np.testing.assert_array_equal(uneven.kept, edit.kept)


def test_fitting() -> None:
    picture = np.full((10, 30, 3), RED, np.uint8)
    picture[:, 10:20] = (0, 0, 255)
    read = read_picture(picture)
    assert (fit_picture(read, 10, "crop")[:, 1:9] == (0, 0, 255)).all()
    padded = fit_picture(read, 9, "pad")
    assert (padded[:3] == 255).all()
    np.testing.assert_allclose(padded[3:6, 0], np.tile(RED, (3, 1)), atol=2)  # it rings
    assert (padded[6:] == 255).all()
    stretched = fit_picture(read, 9, "stretch")
    assert (stretched[:, 4] == (0, 0, 255)).all()
    np.testing.assert_allclose(stretched[:, 0], np.tile(RED, (9, 1)), atol=2)
    mask = np.zeros((10, 30), np.bool_)
    mask[0, 29] = True
    assert not fit_mask(mask, 8, "crop").any()
    assert np.argwhere(fit_mask(mask, 9, "pad")).tolist() == [[3, 8]]
    assert np.argwhere(fit_mask(mask, 9, "stretch")).tolist() == [[0, 8]]
    with pytest.raises(UserError, match="fit must be crop or pad or stretch, but it is 'cut'"):
        fit_picture(read, 8, "cut")  # type: ignore[arg-type]


def test_pictures_of_all_modes_are_read(tmp_path: Path) -> None:
    """Orientation, transparency on white, CMYK, palettes and 16 bits a pixel."""
    red = Image.new("RGB", (4, 2), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    red.save(tmp_path / "turned.png", exif=exif)
    assert read_picture(tmp_path / "turned.png").size == (2, 4)
    clear = Image.new("RGBA", (2, 2), (*RED, 0))
    clear.putpixel((0, 0), (*RED, 255))
    clear.save(tmp_path / "clear.png")
    found = np.asarray(read_picture(str(tmp_path / "clear.png")))
    assert (found[0, 0] == RED).all()
    assert (found[1] == 255).all()
    assert not read_mask(clear)[1].any()  # of a mask, what is transparent is kept
    red.convert("CMYK").save(tmp_path / "cmyk.tiff")
    np.testing.assert_allclose(np.asarray(read_picture(tmp_path / "cmyk.tiff"))[0, 0], RED, atol=2)
    red.quantize(4).save(tmp_path / "palette.gif")
    np.testing.assert_allclose(
        np.asarray(read_picture(tmp_path / "palette.gif"))[0, 0], RED, atol=2
    )
    deep = Image.fromarray(np.full((2, 2), 65535, np.uint16))
    deep.save(tmp_path / "deep.png")
    assert (np.asarray(read_picture(tmp_path / "deep.png")) == 255).all()
    assert (np.asarray(read_picture(np.full((2, 2), 7, np.uint8))) == 7).all()


def test_images_are_tokenized_from_whatever_holds_them(
    pipeline: Pipeline, image: GeneratedImage, tmp_path: Path
) -> None:
    image.picture().save(tmp_path / "image.png")
    rows = pipeline.tokenize([tmp_path / "image.png", image.picture(), image.pixels])
    signed = image.pixels.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1
    expected = pipeline.tokenize(signed)[0]
    for row in rows:
        np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("kind", ["image", "array", "file"])
def test_tokens_are_taken_as_they_are(
    pipeline: Pipeline, image: GeneratedImage, tmp_path: Path, kind: str
) -> None:
    np.save(tmp_path / "tokens.npy", image.token_ids.reshape(4, 4).astype(np.int32))
    source = {"image": image, "array": image.token_ids, "file": tmp_path / "tokens.npy"}[kind]
    edit = pipeline.prepare_edit(source, box=(0, 0, 4, 4))
    np.testing.assert_array_equal(edit.token_ids, image.token_ids)
    np.testing.assert_array_equal(edit.original, image.pixels)


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "say what is to be made anew"),
        ({"mask": np.ones((4, 4), np.bool_), "outpaint": 4}, "by one of"),
        ({"mask": np.zeros((4, 4), np.bool_)}, "keeps all of the image, there is nothing to do"),
        ({"mask": np.zeros((4, 4))}, "must be uint8 or bool, .* float64 of shape"),
        ({"mask": "no.png"}, "cannot read the image no.png: No such file"),
        ({"box": (0, 0, 17, 4)}, "0,0,17,4 is not inside the image, which is 16 x 16"),
        ({"box": (4, 0, 4, 4)}, "not inside the image"),
        ({"box": (0, 0, 1)}, "a box is X0,Y0,X1,Y1"),
        ({"box": (0, 0, 1.5, 3)}, "an edge of the box must be a whole number"),
        ({"outpaint": 0}, "outpaint must be from 1 to 4 pixels of the model's 16, but it is 0"),
        ({"outpaint": 5}, "outpaint must be from 1 to 4"),
        ({"box": (0, 0, 4, 4), "order": "raster"}, "order of new cells must be locality or random"),
        ({"box": (0, 0, 4, 4), "fit": "cut", "image": np.zeros((9, 9, 3), np.uint8)}, "fit must"),
        (
            {"box": (0, 0, 4, 4), "image": np.full(16, 64)},
            "token 64 is not in the model's codebook",
        ),
        ({"box": (0, 0, 4, 4), "image": np.arange(9)}, "one for each of the model's 16 cells"),
        ({"box": (0, 0, 4, 4), "image": None}, "must be a file, a Pillow image or an array"),
        (
            {"box": (0, 0, 1, 9), "image": np.zeros((9, 90, 3), np.uint8)},
            "lies outside of what fit",
        ),
    ],
)
def test_wrong_edits_are_answered(
    pipeline: Pipeline, image: GeneratedImage, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        pipeline.edit(**({"image": image} | arguments))


def test_a_mask_of_another_shape_is_fitted_and_said(pipeline: Pipeline) -> None:
    mask = np.zeros((4, 8), np.bool_)
    mask[:, 2:4] = True  # of the middle square, the left half
    edit = pipeline.prepare_edit(np.zeros((32, 32, 3), np.uint8), mask)
    np.testing.assert_array_equal(~edit.kept.reshape(4, 4), np.arange(4)[None].repeat(4, 0) < 2)
    assert edit.notes == (
        "the mask is 8 x 4, the image 32 x 32: both are made 16 x 16 in the same way",
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("empty", "is no image of a known format: AVIF, "),
        ("cut", "cannot read the image .*truncated"),
        ("altered", "cannot read the image .*: unrecognized data stream"),
        ("bomb", "too large: an image may have 100 pixels"),
    ],
)
def test_unreadable_images_are_answered(
    tmp_path: Path, content: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    Image.fromarray(chance).save(tmp_path / "image.png")
    whole = (tmp_path / "image.png").read_bytes()
    if content == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    else:
        contents = {"cut": whole[:9999], "altered": whole[:9999] + whole[10099:]}
        (tmp_path / "image.png").write_bytes(contents.get(content, b""))
    with pytest.raises(UserError, match=words):
        read_picture(tmp_path / "image.png")
