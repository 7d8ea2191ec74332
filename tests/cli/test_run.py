"""Runs: images, their records and the contact sheet, whatever is asked for and whenever it ends."""

import json
import re
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

from commandline import Answer, answer, end, entries, mistake, sentence, start, wait_for
from lpd_export.bulk.containers import is_whole
from lpd_export.bundle.manifest import Bundle
from lpd_export.errors import UserError
from lpd_export.images import BLANK, save_png
from lpd_export.run import generate_images
from lpd_export.run_request import RunRequest
from lpd_export.runtime.pipeline import Pipeline
from lpd_export.schedule.orders import step_of_cell
from lpd_export.schedule.schedule_file import Schedule

pytestmark = pytest.mark.model

SHEET, RECORDS, LOCK = "contact_sheet.png", "images.jsonl", ".run.lock"


def run(bundle: Path, out: Path, *options: object) -> list[dict[str, Any]]:
    """The records of a run that must succeed."""
    said = answer("run", bundle, "--out", out, *options)
    assert said.code == 0, said
    return records(out)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RECORDS).read_text().splitlines()]


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.mode == "RGB"
        return np.asarray(picture)


def pictures(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("0*.png")}


# ----------------------------------------------------------------------------- what is written


def test_what_a_run_of_the_demo_writes(emoji_bundle: Path, tmp_path: Path) -> None:
    out, tokens = tmp_path / "a/images", tmp_path / "tokens.npy"
    options = ["--class", "heart", "Monkey Face", "7", "--class", "none", "-n", 2]
    rows = run(emoji_bundle, out, *options, "--seed", 5, "--save-tokens", tokens)
    names = ["heart", "none", "monkey-face", "face-negative"]  # each --class, then what follows
    assert sorted(row["class_name"] for row in rows[:4]) == sorted(names)
    assert [row["class_name"] for row in rows[4:]] == [row["class_name"] for row in rows[:4]]
    files = [f"{index:05d}_{row['class_name']}.png" for index, row in enumerate(rows)]
    assert [row["file"] for row in rows] == files
    assert sorted(entries(out)) == sorted([*files, SHEET, RECORDS])
    assert sorted(entries(tmp_path)) == sorted(
        ["a", "a/images", "tokens.npy", *(f"a/images/{name}" for name in entries(out))]
    )
    manifest = Bundle.open(emoji_bundle).manifest
    schedule = Bundle.open(emoji_bundle).schedule()
    for index, row in enumerate(rows):
        assert row["index"] == index
        label = row["class_id"]
        name = "none" if label is None else manifest.class_names[label][0]
        assert row["class_name"] == name
        assert row["seed"] == 5
        assert (row["cfg"], row["guidance"], row["temperature"]) == (3.0, "linear", 1.0)
        assert (row["top_k"], row["top_p"], row["steps"]) == (None, None, 20)
        assert 0 <= row["order"] < schedule.count
        assert row["bundle"] == str(emoji_bundle)
        assert pixels(out / row["file"]).shape == (32, 32, 3)
    drawn = [pixels(out / name) for name in files]
    assert len({image.tobytes() for image in drawn}) == len(files)
    sheet = pixels(out / SHEET)
    assert sheet.shape[0] > 2 * 32
    assert sheet.shape[1] > 2 * 32
    ids = np.load(tokens)
    assert ids.dtype == np.int64
    assert ids.shape == (8, 256)
    assert ids.tolist() == [row["token_ids"] for row in rows]
    assert ids.min() >= 0
    assert ids.max() < manifest.model.vocab_size


def test_the_settings_of_a_run_are_recorded(small_bundle: Path, tmp_path: Path) -> None:
    options = ["--cfg", 1.5, "--guidance", "constant", "--temperature", 0.5, "--top-k", 9]
    (row,) = run(small_bundle, tmp_path / "a", "--class", "0", *options, "--top-p", 0.9)
    assert (row["cfg"], row["guidance"], row["temperature"]) == (1.5, "constant", 0.5)
    assert (row["top_k"], row["top_p"]) == (9, 0.9)


def test_all_and_none(small_bundle: Path, tmp_path: Path) -> None:
    rows = run(small_bundle, tmp_path / "a", "--class", "all", "--class", "none")
    assert [row["class_id"] for row in rows] == [0, 1, 2, 3, 4, None]
    assert rows[-1]["file"] == "00005_none.png"


def test_an_empty_folder_will_do(small_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert len(run(small_bundle, tmp_path / "a", "--class", "0")) == 1


def test_tokens_beside_the_images(small_bundle: Path, tmp_path: Path) -> None:
    run(small_bundle, tmp_path / "a", "--class", "0", "--save-tokens", tmp_path / "a/ids.npy")
    assert np.load(tmp_path / "a/ids.npy").shape == (1, 16)
    assert len(entries(tmp_path / "a")) == 4


def test_a_long_run_has_a_sheet_of_its_first_images(small_bundle: Path, tmp_path: Path) -> None:
    rows = run(small_bundle, tmp_path / "a", "--class", "all", "-n", 21, "--batch", 21)
    assert len(rows) == 105
    assert len(pictures(tmp_path / "a")) == 105
    pixels(tmp_path / "a" / SHEET)


# ------------------------------------------------------------------------------------- traces


def traces(out: Path) -> dict[str, bytes]:
    """All files of the traces, by path."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in (out / "trace").rglob("*")
        if path.is_file()
    }


def trace_files(rows: list[dict[str, Any]], steps: int) -> list[str]:
    """All that belongs to the traces of these images."""
    folders = [f"trace/{Path(row['file']).stem}" for row in rows]
    names = [f"step_{step:02d}.png" for step in range(1, steps + 1)]
    pictures = [f"{folder}/{name}" for folder in folders for name in names]
    return sorted(["trace", *folders, *pictures, *(f"{folder}.png" for folder in folders)])


def test_a_trace_shows_how_each_image_fills_in(emoji_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    rows = run(emoji_bundle, out, "--class", "heart", "none", "-n", 2, "--batch", 3, "--trace")
    files = [row["file"] for row in rows]
    assert sorted(entries(out)) == sorted([*files, SHEET, RECORDS, *trace_files(rows, 20)])
    schedule = Bundle.open(emoji_bundle).schedule()
    for row in rows:
        image, folder = pixels(out / row["file"]), out / "trace" / Path(row["file"]).stem
        steps = step_of_cell(schedule.orders[[row["order"]]], schedule.group_sizes)
        of_pixel = steps.reshape(16, 16).repeat(2, axis=0).repeat(2, axis=1)
        for step in range(20):
            picture = pixels(folder / f"step_{step + 1:02d}.png")
            assert (picture[of_pixel > step] == BLANK).all()
            assert (picture[of_pixel <= step] != BLANK).any(axis=1).mean() > 0.8
        assert (picture == image).all()
        drawing = pixels(out / "trace" / row["file"])
        assert drawing.shape[0] > 4 * 192  # 5 x 4 pictures of 192 pixels, with words
        assert drawing.shape[1] > 5 * 192
    (last,) = Pipeline.open(emoji_bundle).generate(["heart"])
    expected = Pipeline.open(emoji_bundle).trace(last)
    for step, picture in enumerate(expected, 1):
        assert (pixels(out / f"trace/00000_heart/step_{step:02d}.png") == picture).all()


def test_a_trace_follows_a_schedule_of_ones_own(emoji_bundle: Path, tmp_path: Path) -> None:
    Schedule.make(16, 102, kind="raster", count=1).save(tmp_path / "102.npz")
    options = ["--class", "heart", "--schedule", tmp_path / "102.npz", "--trace"]
    (row,) = run(emoji_bundle, tmp_path / "a", *options)
    folder = tmp_path / "a/trace/00000_heart"
    # As many digits as the last step has, so that names sort by step.
    assert entries(folder) == [f"step_{step:03d}.png" for step in range(1, 103)]
    assert (pixels(folder / "step_102.png") == pixels(tmp_path / "a" / row["file"])).all()
    first = pixels(folder / "step_001.png")
    assert (first[:2, :2] != BLANK).any()
    assert (first[2:] == BLANK).all()


def test_neither_the_batch_nor_the_trace_changes_the_other(
    small_bundle: Path, tmp_path: Path
) -> None:
    classes = ["--class", "0", "1", "none", "-n", 2, "--seed", 3]
    run(small_bundle, tmp_path / "plain", *classes)
    for batch in (1, 4):
        out = tmp_path / f"by_{batch}"
        run(small_bundle, out, *classes, "--batch", batch, "--trace")
        assert records(out) == records(tmp_path / "plain")
        assert pictures(out) == pictures(tmp_path / "plain")
        assert (out / SHEET).read_bytes() == (tmp_path / "plain" / SHEET).read_bytes()
    assert traces(tmp_path / "by_1") == traces(tmp_path / "by_4")


def test_a_resumed_run_makes_the_traces_that_are_missing(
    small_bundle: Path, tmp_path: Path
) -> None:
    classes = ["--class", "all", "--seed", 3]
    run(small_bundle, tmp_path / "whole", *classes, "--trace")
    whole, out = traces(tmp_path / "whole"), tmp_path / "a"
    assert len(whole) == 5 * 5

    run(small_bundle, out, *classes)
    assert not (out / "trace").exists()
    run(small_bundle, out, *classes, "--trace")
    assert traces(out) == whole

    (out / "trace/00000_red-panda/step_02.png").unlink()
    (out / "trace/00000_red-panda/note.txt").write_text("mine")
    (out / "trace/00001_ice-cream.png").unlink()
    shutil.rmtree(out / "trace/00002_crane")
    damaged = out / "trace/00003_crane/step_03.png"
    damaged.write_bytes(damaged.read_bytes()[:-60])
    (out / "00004_monkey-face.png").unlink()
    leftover = out / "trace/.0123456789abcdef.tmp"
    leftover.mkdir()
    (leftover / "step_00.png").write_bytes(b"half a PNG")
    said = answer("run", small_bundle, "--out", out, *classes, "--trace")
    assert said.code == 0, said
    assert said.err.count("drawing the steps of") == 5
    assert traces(out) == whole | {"trace/00000_red-panda/note.txt": b"mine"}
    assert not leftover.exists()
    assert pictures(out) == pictures(tmp_path / "whole")

    again = answer("run", small_bundle, "--out", out, *classes, "--trace", "--json")
    assert "drawing the steps" not in again.err  # all are there
    result = json.loads(again.out)
    assert result["made"] == 0
    assert result["traces"] == [str(out / "trace" / row["file"]) for row in records(out)]


TRACED = ["--class", "all", "-n", 8, "--batch", 4, "--seed", 4, "--trace"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_no_half_trace(
    small_bundle: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run(small_bundle, tmp_path / "whole", *TRACED)
    whole, out = traces(tmp_path / "whole"), tmp_path / "images"
    process = start("run", small_bundle, *TRACED, "--out", out)
    wait_for(process, "drawing the steps of 00006")
    process.send_signal(number)
    said = end(process)
    rows = records(out)
    assert 7 <= len(rows) < 40
    found = traces(out)
    if number == signal.SIGINT:
        assert said.code == 130, said
        assert f"{len(rows)} of 40 images are in {out}, the same command makes" in said.err
        drawn = [row for row in rows if f"trace/{row['file']}" in found]
        assert len(drawn) in (len(rows) - 1, len(rows))
        names = {name for name in entries(out) if name.startswith("trace")}
        # The last may have its pictures without the drawing, or nothing.
        assert set(trace_files(drawn, 4)) <= names <= set(trace_files(rows, 4))
        assert len(found) in (5 * len(drawn), 5 * len(drawn) + 4)
    found = {name: content for name, content in found.items() if "/." not in name}
    assert found.items() <= whole.items()
    run(small_bundle, out, *TRACED)
    assert traces(out) == whole
    assert entries(out) == entries(tmp_path / "whole")


def test_a_trace_that_cannot_be_written(small_bundle: Path, tmp_path: Path) -> None:
    run(small_bundle, tmp_path / "a", "--class", "0")
    (tmp_path / "a/trace").write_text("mine")
    before = entries(tmp_path)
    options = ["--class", "0", "--out", tmp_path / "a", "--trace"]
    said = mistake("run", small_bundle, *options)
    assert said == f"cannot write to {tmp_path}/a/trace: File exists"
    (tmp_path / "a/trace").unlink()
    (tmp_path / "a/trace").mkdir()
    (tmp_path / "a/trace/00000_red-panda").write_text("mine")
    said = mistake("run", small_bundle, *options)
    assert said == f"cannot write {tmp_path}/a/trace/00000_red-panda: Not a directory"
    assert entries(tmp_path) == [*before, "a/trace/00000_red-panda"]


# -------------------------------------------------------------------------- what does not matter


def test_the_same_command_takes_the_tokens_that_it_saved(
    small_bundle: Path, tmp_path: Path
) -> None:
    out, tokens = tmp_path / "a", tmp_path / "a.npy"
    for count in (2, 2, 3):  # as it is started again, and with more of the same
        run(small_bundle, out, "--class", 0, "-n", count, "--save-tokens", tokens)
        assert len(np.load(tokens)) == count
    for content in (np.zeros((3, 16), np.int64), np.int64(3)):
        np.save(tokens, content)
        said = mistake(
            *("run", small_bundle, "--class", 0, "-n", 3, "--out", out, "--save-tokens", tokens)
        )
        assert f"{tokens} exists and is not this run's" in said
        assert np.array_equal(np.load(tokens), content)


@pytest.mark.parametrize("cfg", [1, 3])
def test_batches_and_numbers_of_images_change_nothing(
    small_bundle: Path, tmp_path: Path, cfg: int
) -> None:
    classes = ["--class", "red panda", "none", "bird", "--cfg", cfg, "--seed", 3]
    whole = tmp_path / "whole"
    expected = run(small_bundle, whole, *classes, "-n", 3, "--save-tokens", tmp_path / "whole.npy")
    ids = np.load(tmp_path / "whole.npy")
    assert len(np.unique(ids, axis=0)) == 9
    for batch, count in ((1, 3), (2, 2), (3, 3), (5, 3), (9, 1)):
        out, tokens = tmp_path / f"by_{batch}", tmp_path / f"by_{batch}.npy"
        options = ["--batch", batch, "-n", count, "--save-tokens", tokens]
        assert run(small_bundle, out, *classes, *options) == expected[: 3 * count]
        assert np.array_equal(np.load(tokens), ids[: 3 * count])
        assert pictures(out).items() <= pictures(whole).items()
        assert len(pictures(out)) == 3 * count


def test_the_demo_is_the_same_in_any_batch(emoji_bundle: Path, tmp_path: Path) -> None:
    for batch in (1, 5):
        options = ["--batch", batch, "--save-tokens", tmp_path / f"{batch}.npy"]
        run(emoji_bundle, tmp_path / f"by_{batch}", "--class", "heart", "-n", 5, *options)
        assert np.array_equal(np.load(tmp_path / f"{batch}.npy"), np.load(tmp_path / "1.npy"))
        for name in pictures(tmp_path / "by_1"):
            other = pixels(tmp_path / f"by_{batch}" / name).astype(int)
            assert np.abs(other - pixels(tmp_path / "by_1" / name)).max() <= 1
    assert not np.array_equal(*np.load(tmp_path / "1.npy")[:2])


def test_another_seed_is_another_image(small_bundle: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2), ("d", 2**64 - 1)):
        run(small_bundle, tmp_path / name, "--class", "1", "--seed", seed)
    a, b, c, d = (pictures(tmp_path / name)["00000_ice-cream.png"] for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3


# -------------------------------------------------------------------------------- other schedules


def test_a_schedule_of_ones_own(small_bundle: Path, tmp_path: Path) -> None:
    Schedule.make(4, 7, repulsion=0, count=2).save(tmp_path / "7.npz")
    orders = tmp_path / "orders.json"
    orders.write_text(json.dumps([list(range(16))]))
    for number, (options, steps) in enumerate(
        [
            (["--schedule", tmp_path / "7.npz"], 7),
            (["--schedule", tmp_path / "7.npz", "--steps", 7], 7),
            (["--schedule", orders, "--steps", 5], 5),
            (["--schedule", orders], 4),  # as many as the bundle's own
        ]
    ):
        (row,) = run(small_bundle, tmp_path / str(number), "--class", "0", *options)
        assert row["steps"] == steps
    assert "this schedule has 7 steps, but --steps 8 was asked for" in mistake(
        *("run", small_bundle, "--class", "0", "--schedule", tmp_path / "7.npz", "--steps", 8),
        *("--out", tmp_path / "a"),
    )
    assert not (tmp_path / "a").exists()


# ------------------------------------------------------------------------------- wrong requests


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "say what to draw with --class NAME or --class ID; `lpd-export inspect "),
        ("--class ice-crem", "there is no class 'ice-crem'; did you mean 'ice-cream' (1)"),
        ("--class CRANE", "'CRANE' is the name of several classes: give the number, 2 (crane) or"),
        ("--class xqzzy", "there is no class 'xqzzy': it has 5, listed by `lpd-export inspect"),
        ("--class 5", "there is no class 5: the classes are 0 to 4"),
        ("--class -1", "there is no class -1: the classes are 0 to 4"),
        ("--class " + "9" * 5000, "there is no class '9999"),
        ("--class 0 bird icecream", "there is no class 'icecream'; did you mean 'ice-cream' (1)"),
        ("--class 0 -n 0", "-n must be a whole number from 1 to 2147483647, but it is 0"),
        ("--class 0 -n 1000000000000", "-n must be a whole number from 1 to 2147483647, but it is"),
        ("--class 0 -n 1000000000", "asks for 1000000000 images, a run makes 1000000 at most"),
        ("--class 0 -n 1.5", "'1.5' is not a valid integer"),
        ("--class 0 --batch -1", "--batch must be a whole number from 1 to 2147483647, but it is"),
        ("--class 0 --threads 0", "--threads must be a whole number from 1 to "),
        ("--class 0 --threads 100000", "but it is 100000"),
        ("--class 0 --seed -1", "--seed must be a whole number from 0 to 2^64 - 1, but it is -1"),
        (f"--class 0 --seed {2**64}", "--seed must be a whole number from 0 to 2^64 - 1, but it"),
        ("--class 0 --cfg -1", "--cfg must be a number from 0 to 1000, but it is -1"),
        ("--class 0 --cfg nan", "--cfg must be a number from 0 to 1000, but it is nan"),
        ("--class 0 --cfg 1e308", "--cfg must be a number from 0 to 1000, but it is 1e+308"),
        ("--class 0 --temperature 0", "--temperature must be a number from 0.001 to 1000, but it"),
        ("--class 0 --temperature inf", "--temperature must be a number from 0.001 to 1000, but"),
        ("--class 0 --top-k 0", "--top-k must be a whole number from 1 to 2147483647, but it is 0"),
        ("--class 0 --top-p 0", "--top-p must be a number above 0 and at most 1, but it is 0"),
        ("--class 0 --top-p 1.1", "--top-p must be a number above 0 and at most 1, but it is 1.1"),
        ("--class 0 --top-p nan", "--top-p must be a number above 0 and at most 1, but it is nan"),
        ("--class 0 --guidance cosine", "'cosine' is not one of 'linear', 'constant'"),
        ("--class 0 --steps 4", "--steps says how to read a --schedule; alone it has no meaning"),
        ("--class 0 --schedule gone.npz", "cannot read the schedule gone.npz: No such file"),
        ("--class 0 --schedule 8x8.npz", "is for a 8x8 grid, the model's is 4x4"),
        ("--class 0 --schedule cut.npz", "cut.npz: this .npz is damaged or not a schedule"),
        ("--class 0 --schedule 8x8.json", "is for a 8x8 grid, the model's is 4x4"),
        ("--class 0 --schedule orders.txt", "pass --steps"),
        ("--class 0 --schedule 8x8.json --steps 65", "65 steps are too many for 64 cells"),
        ("--class 0 --save-tokens 8x8.npz", "8x8.npz exists: choose another --save-tokens"),
        ("--class 0 --save-tokens gone/a.npy", "cannot write gone/a.npy: its folder does not ex"),
        ("--class 0 --save-tokens 8x8.npz --resume", "8x8.npz exists: choose another --save-tok"),
        ("--class 0 --temperature 1e-300", "--temperature must be a number from 0.001 to 1000"),
    ],
)
def test_requests_that_cannot_be_met(
    small_bundle: Path,
    options: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    schedule = Schedule.make(8, 4, count=1)
    schedule.save("8x8.npz")
    Path("cut.npz").write_bytes(Path("8x8.npz").read_bytes()[:-9])
    Path("8x8.json").write_text(json.dumps(schedule.orders.tolist()))
    Path("orders.txt").write_text(json.dumps([list(range(16))]))
    before = entries(tmp_path)
    assert message in mistake("run", small_bundle, *options.split(), "--out", "a/b")
    assert entries(tmp_path) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there(small_bundle: Path, tmp_path: Path, device: str) -> None:
    options = ["--class", "0", "--device", device, "--out", tmp_path / "a/b"]
    said = mistake("run", small_bundle, *options)
    assert re.search("ONNX Runtime has no CUDAExecutionProvider here|torch sees no CUDA GPU", said)
    assert "use the CPU" in said
    assert entries(tmp_path) == []
    assert answer("run", small_bundle, *options[:-1], tmp_path / "a", "--device", "cpu").code == 0


def test_where_images_cannot_go(small_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    (tmp_path / "link").symlink_to("nowhere")
    run(small_bundle, tmp_path / "images", "--class", "0")
    before = entries(tmp_path)
    for out, message in (
        ("file", f"{tmp_path}/file is not a folder"),
        ("file/a/b", f"{tmp_path}/file is not a folder"),
        ("link", f"{tmp_path}/link is not a folder"),
        ("full", "full exists and is not empty: choose another --out"),
        ("a" * 300, "File name too long"),
    ):
        assert message in mistake("run", small_bundle, "--class", "0", "--out", tmp_path / out)
        assert entries(tmp_path) == before
    assert "full exists and is not empty" in mistake(
        "run", small_bundle, "--class", "0", "--out", tmp_path / "full", "--resume"
    )
    assert "Missing option '--out'" in mistake("run", small_bundle, "--class", "0")


def test_no_permission(small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    said = mistake("run", small_bundle, "--class", "0", "--out", tmp_path / "a/b")
    assert said == f"cannot write {tmp_path / 'a/b'}: no permission to write in {tmp_path}"
    assert entries(tmp_path) == []


def test_a_folder_that_turns_out_unwritable(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    said = mistake("run", small_bundle, "--class", "0", "--out", tmp_path / "a")
    assert said == f"cannot write to {tmp_path / 'a'}: Read-only file system"


# ------------------------------------------------------------------------- runs that do not end

MANY = ["--class", "all", "-n", 30, "--batch", 2, "--seed", 4]


@pytest.fixture(scope="module")
def uninterrupted(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(small_bundle, out, *MANY)
    return out


def assert_same(out: Path, expected: Path) -> None:
    assert entries(out) == entries(expected)
    assert records(out) == records(expected)
    assert pictures(out) == pictures(expected)
    assert (out / SHEET).read_bytes() == (expected / SHEET).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on(
    small_bundle: Path, tmp_path: Path, uninterrupted: Path, number: signal.Signals
) -> None:
    out = tmp_path / "images"
    process = start("run", small_bundle, *MANY, "--out", out)
    wait_for(process, "images ")
    process.send_signal(number)
    said = end(process)
    assert said.code == 130, said
    rows = records(out)
    assert 0 < len(rows) < 150
    assert said.err.splitlines()[-1] == (
        f"lpd-export: interrupted: {len(rows)} of 150 images are in {out}, the same command "
        "makes the rest"
    )
    assert "Traceback" not in said.err
    # What is there is whole and recorded.
    assert rows == records(uninterrupted)[: len(rows)]
    assert pictures(out).items() <= pictures(uninterrupted).items()
    assert {row["file"] for row in rows} <= set(pictures(out))
    assert set(entries(out)) == {RECORDS, *pictures(out)}

    resumed = answer("run", small_bundle, *MANY, "--out", out, "--json")
    assert json.loads(resumed.out)["made"] == 150 - len(rows)
    assert_same(out, uninterrupted)


def test_a_run_that_is_stopped_before_its_first_image(small_bundle: Path, tmp_path: Path) -> None:
    process = start("run", small_bundle, *MANY, "--batch", 150, "--out", tmp_path / "a/images")
    wait_for(process, "generating")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    said = end(process)
    assert said.code == 130, said
    assert said.err.splitlines()[-1] == "lpd-export: interrupted"
    assert entries(tmp_path) == []


def test_a_killed_run_goes_on(small_bundle: Path, tmp_path: Path, uninterrupted: Path) -> None:
    out = tmp_path / "images"
    process = start("run", small_bundle, *MANY, "--out", out)
    wait_for(process, "images ")
    process.kill()
    end(process)
    assert (out / LOCK).exists()  # a lock of the dead locks nobody out
    # What a kill at a worse moment would leave besides.
    with open(out / RECORDS, "a") as file:
        file.write((uninterrupted / RECORDS).read_text().splitlines()[-1][:-20])
    (out / ".0123456789abcdef.tmp").write_bytes(b"half a PNG")
    last = sorted(pictures(out))[-1]
    (out / last).write_bytes((out / last).read_bytes()[:-30])
    assert run(small_bundle, out, *MANY) == records(uninterrupted)
    assert_same(out, uninterrupted)


def test_two_runs_do_not_write_to_one_folder(
    small_bundle: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    out = tmp_path / "images"
    process = start("run", small_bundle, *MANY, "--out", out)
    wait_for(process, "images ")
    said = mistake("run", small_bundle, *MANY, "--out", out)
    assert said == (f"another run is writing to {out}: wait for it to end, or choose another --out")
    assert process.poll() is None  # it was told while the other ran
    assert end(process).code == 0
    assert_same(out, uninterrupted)


def test_of_two_runs_that_start_together_one_goes_on(
    small_bundle: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    out = tmp_path / "a/images"
    processes = [start("run", small_bundle, *MANY, "--out", out) for _ in range(2)]
    answers = sorted((end(process) for process in processes), key=lambda said: said.code)
    assert [said.code for said in answers] == [0, 2], answers
    assert str(out) in sentence(answers[1])
    assert_same(out, uninterrupted)


def test_a_lock_that_a_kill_left_is_no_obstacle(small_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / LOCK).touch()
    run(small_bundle, tmp_path / "a", "--class", "0")
    assert LOCK not in entries(tmp_path / "a")
    # It does not make a folder of somebody else's ours, nor vanish while it is held.
    (tmp_path / "b").mkdir()
    (tmp_path / "b/mine").touch()
    with FileLock(tmp_path / "b" / LOCK):
        said = mistake("run", small_bundle, "--class", "0", "--out", tmp_path / "b")
        assert said.startswith(f"another run is writing to {tmp_path / 'b'}: ")
        assert (tmp_path / "b" / LOCK).exists()
    said = mistake("run", small_bundle, "--class", "0", "--out", tmp_path / "b")
    assert said == f"{tmp_path / 'b'} exists and is not empty: choose another --out"
    assert entries(tmp_path / "b") == ["mine"]


def test_a_run_inside_a_run_is_told_too(small_bundle: Path, tmp_path: Path) -> None:
    """From Python, in one process and one thread."""
    request = RunRequest(small_bundle, ["0"], tmp_path / "a")
    told = []

    def advance(_: object) -> None:
        with pytest.raises(UserError, match="another run is writing to") as error:
            generate_images(request)
        told.append(str(error.value))

    assert generate_images(request, advance=advance).made == 1
    assert len(told) == 4
    assert entries(tmp_path / "a") == sorted(["00000_red-panda.png", SHEET, RECORDS])


def test_a_resumed_run_saves_the_tokens_of_all_images(
    small_bundle: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    expected = np.array([row["token_ids"] for row in records(uninterrupted)])
    assert expected.shape == (150, 16)
    out, tokens = tmp_path / "images", tmp_path / "ids.npy"
    process = start("run", small_bundle, *MANY, "--out", out, "--save-tokens", tokens)
    wait_for(process, "images ")
    process.send_signal(signal.SIGINT)
    said = end(process)
    assert said.err.splitlines()[-1].endswith("the same command makes the rest")
    assert not tokens.exists()
    earlier = records(out)
    assert 0 < len(earlier) < 150
    run(small_bundle, out, *MANY, "--save-tokens", tokens)
    assert np.load(tokens).dtype == np.int64
    assert (np.load(tokens) == expected).all()
    assert_same(out, uninterrupted)
    # A run that saved none has them too.
    run(small_bundle, out, *MANY, "--save-tokens", out / "later.npy")
    assert (np.load(out / "later.npy") == expected).all()


def test_the_saved_tokens_of_earlier_images_are_those_they_were_made_of(
    small_bundle: Path, tmp_path: Path
) -> None:
    """They are read, not made again: tokens that were altered come back altered."""
    run(small_bundle, tmp_path / "a", "--class", "0", "1")
    lines = (tmp_path / "a" / RECORDS).read_text().splitlines()
    row = json.loads(lines[0])
    row["token_ids"] = row["token_ids"][::-1]
    (tmp_path / "a" / RECORDS).write_text("\n".join([json.dumps(row), *lines[1:], ""]))
    options = ["--class", "0", "1", "-n", 2, "--save-tokens", tmp_path / "ids.npy"]
    run(small_bundle, tmp_path / "a", *options)
    assert np.load(tmp_path / "ids.npy")[0].tolist() == row["token_ids"]
    assert len(np.load(tmp_path / "ids.npy")) == 4


@pytest.mark.parametrize(
    "value", [None, [], [1] * 15, [64] * 16, [-1] * 16, [1.0] * 16, [True] * 16, "1" * 16]
)
def test_an_image_whose_tokens_are_lost_is_made_again(
    small_bundle: Path, tmp_path: Path, value: object
) -> None:
    rows = run(small_bundle, tmp_path / "a", "--class", "0", "1")
    row = {key: entry for key, entry in rows[0].items() if key != "token_ids"}
    if value is not None:
        row["token_ids"] = value
    lines = [json.dumps(line) + "\n" for line in (row, rows[1])]
    (tmp_path / "a" / RECORDS).write_text("".join(lines))
    options = ["--class", "0", "1", "--out", tmp_path / "a", "--resume", "--json"]
    assert json.loads(answer("run", small_bundle, *options).out)["made"] == 1
    assert records(tmp_path / "a") == rows


def test_more_images_for_a_finished_run(small_bundle: Path, tmp_path: Path) -> None:
    run(small_bundle, tmp_path / "a", "--class", "0", "1", "-n", 2)
    before = pictures(tmp_path / "a")
    assert len(run(small_bundle, tmp_path / "a", "--class", "0", "1", "-n", 3)) == 6
    assert before.items() <= pictures(tmp_path / "a").items()
    for name in list(before)[:2]:
        (tmp_path / "a" / name).unlink()  # made again
    run(small_bundle, tmp_path / "a", "--class", "0", "1", "-n", 3)
    assert before.items() <= pictures(tmp_path / "a").items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("0 2 4 -n 2 --seed 1", "line 1: made with seed 0, this run has 1: repeat the first run's"),
        ("0 2 4 -n 2 --cfg 2", "line 1: made with cfg 3.0, this run has 2.0"),
        ("0 2 4 -n 2 --temperature 0.9", "made with temperature 1.0, this run has 0.9"),
        ("0 2 4 -n 2 --schedule 4x4.npz", "made with steps 4, this run has 6"),
        ("0 2 3 -n 2", "line 3: made with class_id 4, this run has 3"),
        ("0 2 4 -n 1", "image 3 is not among the 3 of this run"),
    ],
)
def test_a_run_is_not_resumed_as_another(
    small_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Schedule.make(4, 6, repulsion=0, count=1).save("4x4.npz")
    run(small_bundle, tmp_path / "a", "--class", "0", "2", "4", "-n", 2)
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    again = ["--class", *options.split(), "--out", "a"]
    assert message in mistake("run", small_bundle, *again)
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_a_run_is_not_resumed_with_another_bundle(
    small_bundle: Path, emoji_bundle: Path, tmp_path: Path
) -> None:
    run(small_bundle, tmp_path / "a", "--class", "0")
    assert "made with" in mistake(
        "run", emoji_bundle, "--class", "0", "--out", tmp_path / "a", "--resume"
    )
    shutil.copytree(small_bundle, tmp_path / "moved")  # the same one elsewhere is no other
    run(tmp_path / "moved", tmp_path / "a", "--class", "0")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("position", True),
        ("position", -1),
        ("cfg", "3"),
        ("cfg", 1e308),
        ("steps", 4.5),
        ("order", []),
    ],
)
def test_a_record_that_was_altered_is_told(
    small_bundle: Path, tmp_path: Path, key: str, value: object
) -> None:
    (row,) = run(small_bundle, tmp_path / "a", "--class", "0")
    (tmp_path / "a" / RECORDS).write_text(json.dumps(row | {key: value}) + "\n")
    said = mistake("run", small_bundle, "--class", "0", "--out", tmp_path / "a")
    assert f"{RECORDS}, line 1: not a record of `lpd-export run` ({key}: Input should be" in said


def test_a_request_from_python_is_checked_too(tmp_path: Path) -> None:
    for wrong, message in (
        ({"seed": "1"}, "--seed must be a whole number from 0 to 2^64 - 1, but it is '1'"),
        ({"count": 1.5}, "-n must be a whole number from 1 to 2147483647, but it is 1.5"),
        ({"classes": "heart"}, "--class must be a list of texts in quotes, but it is 'heart'"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            RunRequest(**{"bundle": tmp_path, "classes": ["0"], "out": tmp_path / "a", **wrong})


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("[" * 100_000, id="deep"),
        '{"text": "mine"}',
        "[]",
        "mine",
        "\udcff",
        '{"index": "x"}',
    ],
)
def test_a_foreign_file_of_records_is_left_alone(
    small_bundle: Path, tmp_path: Path, line: str
) -> None:
    (tmp_path / RECORDS).write_text(line + "\n", encoding="utf-8", errors="surrogateescape")
    before = (tmp_path / RECORDS).read_bytes()
    said = mistake("run", small_bundle, "--class", "0", "--out", tmp_path)
    assert f"{tmp_path / RECORDS}, line 1: " in said
    assert entries(tmp_path) == [RECORDS]
    assert (tmp_path / RECORDS).read_bytes() == before


def run_with_little_disk(bundle: Path, out: Path, largest_file: int) -> Answer:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return end(start("run", bundle, *MANY, "--out", out, preexec_fn=limit))


def test_a_disk_that_fills_up(small_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    said = run_with_little_disk(small_bundle, out, 3000)
    assert sentence(said) == f"cannot write {out / RECORDS}: File too large"
    # The images so far stay, whole and recorded but for the last batch.
    assert (out / RECORDS).read_bytes().endswith(b"}\n")
    assert len(pictures(out)) == len(records(out)) + 2
    assert set(entries(out)) == {RECORDS, *pictures(out)}
    said = run_with_little_disk(small_bundle, tmp_path / "none", 100)
    assert "cannot write" in sentence(said)
    assert not (tmp_path / "none").exists()


def test_a_broken_image_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    assert not is_whole(path)
    save_png(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), path)
    assert is_whole(path)
    whole = path.read_bytes()
    for size in (0, 7, 30, len(whole) // 2):
        path.write_bytes(whole[:size])
        assert not is_whole(path)
