"""scripts/claims.py: what it measures, that it is right, and that stopping it loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from rich.progress import Progress
from safetensors.torch import load_file, save_file

import claims
import claims_results
import naming_sheet
import sweep_guidance
from lpd_export import Pipeline
from lpd_export.build.build import build
from lpd_export.build.request import BuildRequest
from lpd_export.evaluation.classifier import Classifier, ClassifierConfig, load
from lpd_export.evaluation.evaluate import evaluate
from lpd_export.evaluation.metrics import frechet_distance
from lpd_export.evaluation.request import EvaluateRequest
from lpd_export.runtime.onnxruntime_executor import OnnxRuntimeExecutor
from lpd_export.schedule.schedule_file import Schedule
from lpd_reference import load_lpd, load_tokenizer
from training.data import ImageSet, load_image_set, to_signed

pytestmark = pytest.mark.model

NAMES = ("red", "green", "blue", "white", "black")
REPULSION = 1
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
SCRIPT = Path(__file__).parents[2] / "scripts" / "claims.py"


@pytest.fixture(scope="module")
def parts(small_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle of a 4x4 grid, its weights, a classifier, and 16 px images."""
    folder = tmp_path_factory.mktemp("claims")
    models = folder / "models"
    models.mkdir()
    for source, name in (("lpd.pth", "lpd"), ("vq.pt", "vq")):
        state = torch.load(small_weights / source, weights_only=True)["model"]
        save_file(
            {key: value.contiguous() for key, value in state.items()},
            models / f"{name}.safetensors",
        )
    config = ClassifierConfig(classes=len(NAMES), resolution=16, widths=(16, 32))
    judge = Classifier(config, NAMES).initialize(0)
    weights = {key: value.contiguous() for key, value in judge.state_dict().items()}
    save_file(weights, models / "classifier.safetensors", judge.header())
    images, random = folder / "images", np.random.default_rng(0)
    for split, count in (("train", 7), ("validation", 3)):
        for label, name in enumerate(NAMES):
            (images / split / name).mkdir(parents=True)
            for number in range(count + label):
                pixels = random.integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(images / split / name / f"{number}.png")
    (images / "classes.json").write_text(json.dumps(NAMES))
    build(
        BuildRequest(
            checkpoint=str(models / "lpd.safetensors"),
            tokenizer=str(models / "vq.safetensors"),
            classes=str(images / "classes.json"),
            steps=4,
            repulsion=REPULSION,
            cfg=2.0,
            out=str(folder / "bundle"),
        )
    )
    return folder


def arguments(parts: Path, out: Path, **options: object) -> list[str]:
    given = {
        "bundle": parts / "bundle",
        "models": parts / "models",
        "images": parts / "images",
        "samples": 48,
        "steps": "8,4",
        "workers": 1,
        "out": out,
    } | options
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def measure(parts: Path, out: Path, **options: object) -> Result:
    return CliRunner().invoke(claims.main, arguments(parts, out, **options), catch_exceptions=False)


@pytest.fixture(scope="module")
def measured(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished measurement; leave it as it is."""
    out = tmp_path_factory.mktemp("measured") / "claims"
    result = measure(parts, out)
    assert result.exit_code == 0, result.output
    assert claims_results.table(claims_results.Claims.read(out / "claims.json")) in result.output
    return out


# ----------------------------------------------------------------------------- what is measured


def test_every_row_is_there(measured: Path) -> None:
    rows = claims_results.Claims.read(measured / "claims.json").rows
    assert [
        (row.variant.kind, row.variant.steps, row.variant.mutual_visibility) for row in rows
    ] == [
        ("raster", 16, True),
        ("random", 8, True),
        ("random", 4, True),
        ("locality", 8, True),
        ("locality", 4, True),
        ("locality", 8, False),
    ]
    for row in rows:
        assert row.frechet_distance > row.frechet_distance_error > 0
        assert 0 <= row.accuracy <= 1
        assert row.seconds > 0
    assert len({row.nats for row in rows}) == len(rows)


def test_time_of_a_row_is_of_its_own_steps(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by a second whenever a graph is run: each step once, no more."""
    ran: list[str] = []
    bind = OnnxRuntimeExecutor.bind

    def counting_bind(
        self: OnnxRuntimeExecutor, graph: str, tensors: Mapping[str, torch.Tensor]
    ) -> Callable[[], None]:
        run = bind(self, graph, tensors)

        def counted_run() -> None:
            run()
            ran.append(graph)

        return counted_run

    monkeypatch.setattr(OnnxRuntimeExecutor, "bind", counting_bind)
    monkeypatch.setattr(claims.time, "perf_counter", lambda: float(len(ran)))
    setting = claims.read_setting(
        parts / "bundle", None, None, parts / "images", parts / "models", 8, 0, 8, None, tmp_path
    )
    rows = setting.variants([8, 4])
    with Progress(disable=True) as progress:
        seconds = claims.measure_times(rows, setting, progress)
    assert seconds == {row: row.steps + 1 for row in rows}  # and one for the image
    assert ran.count("detokenize") == (claims.TIMED + 1) * len(rows)


def test_published_variants() -> None:
    assert claims.read_steps(claims.STEPS, 16) == [256, 64, 32, 20, 12, 8]
    assert claims.published_variant([256, 20]) == claims_results.Variant("locality", 20)
    assert claims.published_variant([8, 4]) == claims_results.Variant("locality", 8)


def test_models_of_their_own(parts: Path, tmp_path: Path) -> None:
    """What was trained for raster order, or without mutual visibility, is drawn from its bundle."""
    other = save_other_weights(parts / "models" / "lpd.safetensors", tmp_path / "other.safetensors")
    build(
        BuildRequest(
            checkpoint=str(other),
            tokenizer=str(parts / "models" / "vq.safetensors"),
            classes=str(parts / "images" / "classes.json"),
            steps=4,
            repulsion=REPULSION,
            out=str(tmp_path / "other"),
        )
    )
    out, own = tmp_path / "claims", tmp_path / "other"
    result = measure(parts, out, samples=8, steps="4", raster=own, alone=own)
    assert result.exit_code == 0, result.output
    rows = {row.variant.title: row for row in claims_results.Claims.read(out / "claims.json").rows}
    assert list(rows) == [
        "raster, trained so",
        "random",
        "locality",
        "locality, each query alone",
        "locality, each query alone, trained so",
    ]
    held_out = load_image_set(parts / "images", "validation")
    tokenizer = load_tokenizer(parts / "models" / "vq.safetensors").eval()
    model = load_lpd(other).eval()
    some = claims.shuffled(len(held_out), 0)
    with torch.inference_mode():
        ids = tokenizer.encode(to_signed(held_out.pixels[some]))
        raster = torch.arange(16).expand_as(ids)
        logits = model(ids, held_out.labels[some], raster, [1] * 16)
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    assert rows["raster, trained so"].nats == pytest.approx(float(nats), abs=1e-5)
    assert "trained so" in claims_results.table(claims_results.Claims.read(out / "claims.json"))
    stranger = measure(parts, tmp_path / "none", raster=parts / "nowhere")
    assert stranger.exit_code == 2


def save_other_weights(path: Path, other: Path) -> Path:
    """Those of a file, with others for the tokens of images."""
    weights = load_file(path)
    weights["token_emb.weight"] = weights["token_emb.weight"].flip(0)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, other)
    return other


def test_a_row_is_what_the_bundle_generates(parts: Path, measured: Path) -> None:
    """Distance and accuracy once more, from the images that Python gives for the same seed."""
    row = claims_results.Claims.read(measured / "claims.json").rows[4]
    training = load_image_set(parts / "images", "train")
    judge = load(parts / "models" / "classifier.safetensors")
    labels = claims.labels_of(training, 0, 48)
    images = Pipeline.open(parts / "bundle").generate(
        labels,
        seed=0,
        batch=8,
        schedule=Schedule.make(4, steps=4, repulsion=REPULSION, count=claims.ORDERS),
    )
    assert images[0].sampling.cfg == 2.0
    drawn = to_signed(torch.from_numpy(np.stack([image.pixels for image in images])))
    with torch.inference_mode():
        real = judge.features(to_signed(training.pixels))
        distance = frechet_distance(real, judge.features(drawn))
        seen = judge.logits(drawn).argmax(dim=1)
    assert row.frechet_distance == pytest.approx(distance, rel=1e-3)
    assert row.accuracy == pytest.approx(float((seen == torch.tensor(labels)).double().mean()))


def test_evaluate_says_the_same(parts: Path, measured: Path, tmp_path: Path) -> None:
    """Of the same images: the distance, its error, and the accuracy."""
    row = claims_results.Claims.read(measured / "claims.json").rows[4]
    labels = claims.labels_of(load_image_set(parts / "images", "train"), 0, 48)
    images = Pipeline.open(parts / "bundle").generate(
        labels,
        seed=0,
        batch=8,
        schedule=Schedule.make(4, steps=4, repulsion=REPULSION, count=claims.ORDERS),
    )
    drawn = tmp_path / "drawn.npz"
    np.savez(drawn, arr_0=np.stack([image.pixels for image in images]), arr_1=labels)
    against, features = parts / "images" / "train", parts / "models" / "classifier.safetensors"
    figures = evaluate(EvaluateRequest(drawn, against, features)).figures
    distance, accuracy = figures["frechet_distance"], figures["accuracy"]
    assert distance is not None
    assert accuracy is not None
    assert distance.value == pytest.approx(row.frechet_distance, rel=1e-3)
    assert distance.standard_error == pytest.approx(row.frechet_distance_error, rel=1e-3)
    assert accuracy.value == row.accuracy


@pytest.mark.parametrize("place", [0, 3, 5])
def test_likelihood_is_the_reference_s(parts: Path, measured: Path, place: int) -> None:
    """The exported graphs, step by step on caches, say the same of images that were held out."""
    row = claims_results.Claims.read(measured / "claims.json").rows[place]
    held_out = load_image_set(parts / "images", "validation")
    tokenizer = load_tokenizer(parts / "models" / "vq.safetensors").eval()
    model = load_lpd(parts / "models" / "lpd.safetensors").eval()
    some = claims.shuffled(len(held_out), 0)
    schedule = claims.schedule_of(row.variant, 4, REPULSION)
    orders = torch.from_numpy(schedule.orders.astype(np.int64))
    with torch.inference_mode():
        ids = tokenizer.encode(to_signed(held_out.pixels[some]))
        orders = orders[torch.arange(len(ids)) % len(orders)]
        sizes = schedule.group_sizes.tolist()
        mutual = row.variant.mutual_visibility
        logits = model(ids, held_out.labels[some], orders, sizes, mutual)
        targets = ids.gather(1, orders).flatten()
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
    assert row.nats == pytest.approx(float(nats), abs=1e-5)


def test_likelihood_of_training_images(parts: Path, measured: Path) -> None:
    """Of as many as were held out, in the order that is published, from the reference at once."""
    found = claims_results.Claims.read(measured / "claims.json")
    training = load_image_set(parts / "images", "train")
    some = claims.shuffled(len(training), 0)[: found.held_out_images]
    model = load_lpd(parts / "models" / "lpd.safetensors").eval()
    tokenizer = load_tokenizer(parts / "models" / "vq.safetensors").eval()
    schedule = claims.schedule_of(claims_results.Variant("locality", 8), 4, REPULSION)
    orders = torch.from_numpy(schedule.orders[: len(some)].astype(np.int64))
    with torch.inference_mode():
        token_ids = tokenizer.encode(to_signed(training.pixels[some]))
        sizes = schedule.group_sizes.tolist()
        logits = model(token_ids, training.labels[some], orders, sizes)
    targets = token_ids.gather(1, orders)
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert found.floor.training_nats == pytest.approx(float(nats), abs=1e-5)


def test_how_real_images_measure(parts: Path, measured: Path) -> None:
    floor = claims_results.Claims.read(measured / "claims.json").floor
    training = load_image_set(parts / "images", "train")
    judge = load(parts / "models" / "classifier.safetensors")
    tokenizer = load_tokenizer(parts / "models" / "vq.safetensors").eval()
    with torch.inference_mode():
        images = to_signed(training.pixels)
        again = tokenizer.decode(tokenizer.encode(images)).clamp(-1, 1)
        distance = frechet_distance(judge.features(images), judge.features(again))
    assert floor.reconstructed_frechet_distance == pytest.approx(distance, rel=1e-3)
    assert floor.halves_frechet_distance > 0


@given(
    count=st.integers(1, 300),
    cut=st.integers(0, 300),
    repeats=st.lists(st.integers(1, 9), min_size=1),
)
@hypothesis_settings(max_examples=50)
def test_labels_do_not_depend_on_how_many(count: int, cut: int, repeats: list[int]) -> None:
    labels = torch.arange(len(repeats)).repeat_interleave(torch.tensor(repeats))
    images = ImageSet(torch.zeros(len(labels), 1, 1, 3, dtype=torch.uint8), labels, ())
    whole = claims.labels_of(images, 0, count)
    cut = min(cut, count)
    assert claims.labels_of(images, 0, cut) + claims.labels_of(images, cut, count) == whole
    turn = claims.labels_of(images, 0, len(labels))
    assert sorted(turn) == labels.tolist()


# -------------------------------------------------------------------------------- the results


def test_the_table_says_what_was_measured(measured: Path) -> None:
    found = claims_results.Claims.read(measured / "claims.json")
    lines = claims_results.table(found).splitlines()
    assert len(lines) == 2 + len(found.rows) + 4
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| raster | 16 |")
    assert lines[2].endswith("| 1.0 x |")
    assert lines[7].startswith("| locality, each query alone | 8 |")
    assert f"{found.rows[5].nats:.3f}" in lines[7]


def test_curves_and_samples_are_drawn(measured: Path) -> None:
    assert Image.open(measured / "claims.png").width > 1000
    for name in ("raster-16", "random-8", "locality-8", "locality-8-alone"):
        assert Image.open(measured / f"{name}.png").width > 100
    figure = Figure()
    panels = list(figure.subplots(1, 3))
    claims_results.draw_curves(claims_results.Claims.read(measured / "claims.json"), panels)
    rows = claims_results.Claims.read(measured / "claims.json").rows
    heights = {float(y) for line in panels[1].get_lines() for y in line.get_ydata()}
    assert heights == {row.nats for row in rows}


# ---------------------------------------------------------------------------- stopping, going on


def kept(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("*.npz")}


def test_what_is_drawn_is_not_drawn_again(parts: Path, measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "claims"
    first = measure(parts, out, samples=44, steps="4")
    before = kept(out)
    lost = next(path for path in out.rglob("samples-000000-*.npz") if "random" in str(path))
    lost.unlink()
    second = measure(parts, out, samples=44, steps="4")
    changed = {name for name, when in kept(out).items() if before[name] != when}
    assert changed == {str(lost.relative_to(out))}
    rows = [claims_results.Claims.read(folder / "claims.json").rows for folder in (measured, out)]
    assert first.exit_code == second.exit_code == 0
    # More samples add to it: the first 40 are those of the longer measurement, not the 4 after.
    measure(parts, out, samples=48, steps="4")
    rows = [claims_results.Claims.read(folder / "claims.json").rows for folder in (measured, out)]
    assert {name for name in before if kept(out)[name] != before[name]} == changed
    assert rows[1][2].variant == rows[0][4].variant
    assert rows[1][2].frechet_distance == pytest.approx(rows[0][4].frechet_distance, rel=1e-9)


def start_long(parts: Path, out: Path) -> subprocess.Popen[str]:
    """A measurement of many samples in a process of its own, once some are drawn."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments(parts, out, samples=4000)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 300
    while not kept(out) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    return process


def worker_of(process: subprocess.Popen[str]) -> int:
    """The process that is at work for a measurement."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (worker,) = (
        int(child)
        for child in children
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    )
    return worker


@ON_LINUX
def test_worker_ends_with_a_killed_measurement(parts: Path, tmp_path: Path) -> None:
    process = start_long(parts, tmp_path / "claims")
    worker = worker_of(process)
    process.kill()
    process.communicate(timeout=300)  # ends only once nobody holds its output any more
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}/cmdline").exists() and time.monotonic() < deadline:
        if not Path(f"/proc/{worker}/cmdline").read_bytes():  # ended, and nobody's child
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{worker}").exists()


@ON_LINUX
def test_killed_worker_is_told(parts: Path, tmp_path: Path) -> None:
    out = tmp_path / "claims"
    process = start_long(parts, out)
    os.kill(worker_of(process), signal.SIGKILL)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "a process at work was killed" in errors
    assert "Traceback" not in errors
    assert said == ""
    assert not (out / "claims.json").exists()


def test_ctrl_c_keeps_what_is_drawn(parts: Path, tmp_path: Path) -> None:
    out = tmp_path / "claims"
    process = start_long(parts, out)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert "goes on from here" in errors
    assert "Traceback" not in errors
    assert said == ""
    assert kept(out)
    assert not list(out.rglob(".*.tmp"))
    assert not (out / "claims.json").exists()


# ------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": "17,4"}, "--steps '17,4' must be whole numbers from 1 to 16"),
        ({"steps": "four"}, "--steps 'four'"),
        ({"bundle": "nowhere"}, "nowhere"),
        ({"models": "nowhere"}, "there is no classifier nowhere"),
        ({"images": "nowhere"}, "cannot read nowhere/classes.json"),
    ],
)
def test_mistakes_are_told_in_a_line(
    parts: Path, tmp_path: Path, options: dict[str, str], words: str
) -> None:
    result = measure(parts, tmp_path / "claims", **options)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("claims: error: ")
    assert words in result.stderr
    assert not (tmp_path / "claims").exists()


def test_parts_of_different_models_are_refused(
    parts: Path, emoji_bundle: Path, tmp_path: Path
) -> None:
    result = measure(parts, tmp_path / "claims", bundle=emoji_bundle)
    assert result.exit_code == 2
    assert "give what belongs together" in result.stderr


def test_a_folder_that_cannot_be_written(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = measure(parts, tmp_path / "file" / "claims")
    assert result.exit_code == 2
    assert "cannot write" in result.stderr


def test_other_files_are_no_claims(tmp_path: Path) -> None:
    from lpd_export.errors import UserError

    for content in ("", "{}", '{"rows": [{}]}', "[]"):
        (tmp_path / "claims.json").write_text(content)
        with pytest.raises(UserError, match="run it first"):
            claims_results.Claims.read(tmp_path / "claims.json")


# ------------------------------------------------------------------------- guidance, and naming


def test_sweep_measures_each_setting_as_the_claims_do(
    parts: Path, measured: Path, tmp_path: Path
) -> None:
    common = [
        word for name in ("bundle", "models", "images") for word in (f"--{name}", str(parts / name))
    ]
    options = [*common, "--cfg=1,30", "--temperature=0.5,1", "--guidance=linear", "--samples=48"]
    said = CliRunner().invoke(sweep_guidance.main, [*options, f"--out={tmp_path}"])
    assert said.exit_code == 0, said.output
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert [(row["cfg"], row["temperature"]) for row in rows] == [
        (1, 0.5),
        (1, 1),
        (30, 0.5),
        (30, 1),
    ]
    assert len({row["distance"] for row in rows}) == 4
    of_the_bundle = Pipeline.open(parts / "bundle").generate(
        claims.labels_of(load_image_set(parts / "images", "train"), 0, 48),
        seed=0,
        cfg=30.0,
        guidance="linear",
    )
    judge = load(parts / "models" / "classifier.safetensors")
    training = load_image_set(parts / "images", "train")
    drawn = to_signed(torch.from_numpy(np.stack([image.pixels for image in of_the_bundle])))
    with torch.inference_mode():
        real, features = judge.features(to_signed(training.pixels)), judge.features(drawn)
    assert rows[3]["distance"] == pytest.approx(frechet_distance(real, features), rel=1e-3)
    before = kept(tmp_path)
    assert CliRunner().invoke(sweep_guidance.main, [*options, f"--out={tmp_path}"]).exit_code == 0
    assert kept(tmp_path) == before
    wrong = CliRunner().invoke(sweep_guidance.main, [*common, "--cfg=much", f"--out={tmp_path}"])
    assert wrong.exit_code == 2
    assert wrong.stderr == ("sweep_guidance: error: --cfg 'much' must be numbers such as 1,2.5,4\n")


def test_naming_sheet_shows_each_class_once_and_judges(parts: Path, tmp_path: Path) -> None:
    options = ["--bundle", str(parts / "bundle"), "--seed=3"]
    said = CliRunner().invoke(naming_sheet.main, [*options, f"--out={tmp_path}"])
    assert said.exit_code == 0, said.output
    answers = tmp_path / "answers.csv"
    lines = answers.read_text().splitlines()
    assert lines == [*(f"# {name}" for name in NAMES), "1,", "2,", "3,", "4,", "5,"]
    order = naming_sheet.shuffled(NAMES, 3)
    assert sorted(order) == sorted(NAMES)
    assert order != list(NAMES)
    assert Image.open(tmp_path / "sheet.png").width > 300
    answers.write_text("\n".join(f"{n},{name}" for n, name in enumerate(order[:4], 1)) + "\n5,\n")
    judged = CliRunner().invoke(naming_sheet.main, [*options, "--judge", str(answers)])
    assert judged.output == f"5: nothing, not {order[4]}\n4 of 5 right, 80%\n"
    answers.write_text("one,two,three\n")
    judged = CliRunner().invoke(naming_sheet.main, [*options, "--judge", str(answers)])
    assert judged.exit_code == 2
    assert judged.stderr.startswith(f"naming_sheet: error: cannot read {answers}: ")
