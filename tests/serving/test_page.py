"""The page in a real browser: what it shows is what the server made, by pointer and by keyboard."""

from __future__ import annotations

import base64
import io
import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect, sync_playwright

from commandline import answer
from lpd_export import Pipeline
from lpd_export.schedule.schedule_file import Schedule
from lpd_export.serving.request import ServeRequest
from server_process import Running, running

pytestmark = [pytest.mark.model, pytest.mark.slow]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
EVIL = "<img src=x onerror=\"document.title='broken'\"><b>'$(touch broken)'"


@pytest.fixture(scope="module")
def pipeline(small_bundle: Path) -> Pipeline:
    """A grid of 4x4 cells of 4 pixels, in 4 steps of 1, 3, 5 and 7 cells."""
    return Pipeline.open(small_bundle, threads=1)


@pytest.fixture(scope="module")
def served(small_bundle: Path) -> Iterator[Running]:
    with running(ServeRequest((small_bundle,), threads=1)) as found:
        found.server.models["small"].manifest.class_names[4][0] = EVIL
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        # Its sandbox wants a user who is not root.
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, browser: Browser, served: Running) -> Iterator[Page]:
    """The page when it is ready; at the end nothing was wrong or fetched from elsewhere."""
    width, height = request.param
    with browser.new_context(viewport={"width": width, "height": height}) as context:
        page, wrong = context.new_page(), []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda m: wrong.append(m.text) if is_fault(m) else None)
        page.on("request", lambda r: None if ours(r.url, served) else wrong.append(r.url))
        page.goto(served.url)
        expect(page.locator("#state")).to_have_text("Ready")
        yield page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.title() == "lpd-export"
        assert wrong == []


def is_fault(message: ConsoleMessage) -> bool:
    """Whether it is one of the page: a browser tells refused requests as well."""
    return message.type == "error" and "status of 400" not in message.text


def ours(url: str, served: Running) -> bool:
    return url.startswith((served.url, "data:", "blob:"))


def pixels(image: Locator) -> NDArray[np.uint8]:
    source = image.get_attribute("src") or ""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def test_steps_fill_in_and_can_be_gone_through(page: Page, pipeline: Pipeline) -> None:
    """By keyboard alone: from the class on by Tab and Enter."""
    page.get_by_label("Class").focus()
    press(page, "Control+a")
    page.keyboard.type("ice-cream")
    page.get_by_label("Seed", exact=True).fill("7")
    press(page, "Enter")
    expect(page.locator(".told")).to_contain_text("ice-cream, seed 7: 4 steps in")
    (made,) = pipeline.generate([1], seed=7)
    trace = pipeline.trace(made)
    shown, step = page.locator(".image"), page.get_by_role("slider", name="Step")
    np.testing.assert_array_equal(pixels(shown), made.pixels)
    step.focus()
    for number in (3, 2, 1):
        press(page, "ArrowLeft")
        filled = made.schedule.group_sizes[:number].sum()
        np.testing.assert_array_equal(pixels(shown), trace[number - 1])
        grid = page.get_by_role("img", name=f"4 by 4 cells in 4 steps, dark to light; {filled} are")
        expect(grid).to_be_visible()


def test_two_settings_side_by_side(page: Page, pipeline: Pipeline) -> None:
    page.get_by_role("button", name="Compare").click()
    other = page.locator(".lane").nth(1)
    other.get_by_label("Steps").fill("6")
    other.get_by_label("Order").select_option("random")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#gallery li")).to_have_count(2)
    schedule = Schedule.make(4, 6, "random")
    for lane, chosen in ((0, None), (1, schedule)):
        (made,) = pipeline.generate([0], seed=0, schedule=chosen)
        np.testing.assert_array_equal(pixels(page.locator(".image").nth(lane)), made.pixels)
    page.get_by_role("button", name="Compare").click()
    expect(page.locator(".lane")).to_have_count(1)


def test_a_mask_is_painted_and_the_image_edited(page: Page, pipeline: Pipeline) -> None:
    page.get_by_role("button", name="Generate").click()
    page.locator("#gallery").get_by_role("button", name="Edit").click()
    mask = page.get_by_role("application")
    expect(mask).to_be_focused()
    press(page, "ArrowRight", "ArrowRight", " ", "ArrowDown", " ")  # two cells by keyboard
    expect(page.locator("#mask-state")).to_have_text("2 of 16 cells are painted")
    page.locator("#brush").fill("1")
    box = mask.bounding_box()
    assert box
    at = [(box["x"] + box["width"] * s, box["y"] + box["height"] * 0.9) for s in (0.1, 0.4)]
    page.mouse.move(*at[0])
    page.mouse.down()
    page.mouse.move(*at[1], steps=4)
    page.mouse.up()
    expect(page.locator("#mask-state")).to_have_text("4 of 16 cells are painted")
    page.get_by_role("button", name="Make it anew").click()
    expect(page.locator("#gallery li")).to_have_count(2)
    new = np.zeros((4, 4), np.bool_)
    new[[0, 1], 1], new[3, :2] = True, True
    (whole,) = pipeline.generate([0], seed=0)
    (expected,) = pipeline.edit(whole.pixels, new, [0], seed=0)
    np.testing.assert_array_equal(pixels(page.locator(".image")), expected.pixels)


def test_what_the_gallery_copies_makes_the_same_images(
    page: Page, small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.get_by_label("Class").fill("1")
    page.get_by_label("Steps").fill("5")
    page.get_by_text("More").click()
    page.get_by_label("Top-k").fill("9")
    page.get_by_role("button", name="Generate").click()
    card = page.locator("#gallery li")
    shown = pixels(card.locator("img"))
    card.get_by_role("button", name="Copy curl").click()
    typed = shlex.split(card.locator("textarea").input_value())
    said = subprocess.run([*typed, "--silent"], capture_output=True, check=True).stdout
    content = base64.b64decode(json.loads(said)["data"][0]["b64_json"])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), shown)
    card.get_by_role("button", name="Copy command").click()
    monkeypatch.chdir(tmp_path)
    Path("engines").mkdir()
    Path("engines/small").symlink_to(small_bundle)
    for command in card.locator("textarea").input_value().split(" && "):
        program, *arguments = shlex.split(command)
        assert program == "lpd-export"
        assert answer(*arguments).code == 0
    np.testing.assert_array_equal(np.asarray(Image.open("images/00000_ice-cream.png")), shown)


def test_names_and_mistakes_are_text(page: Page) -> None:
    page.get_by_label("Class").fill(EVIL)
    page.get_by_role("button", name="Generate").click()
    card = page.locator("#gallery li")
    expect(card.locator("p")).to_contain_text(EVIL)
    card.get_by_role("button", name="Copy command").click()
    assert EVIL in shlex.split(card.locator("textarea").input_value())
    page.get_by_label("Class").fill("<b>nothing</b>")
    page.get_by_role("button", name="Generate").click()
    told = page.get_by_role("alert")
    expect(told).to_contain_text("there is no class '<b>nothing</b>'")
    assert page.locator("main b, main img[src=x]").count() == 0
