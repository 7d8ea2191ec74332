"""`lpd-export evaluate`: what it measures, of whatever holds images; stopping it loses nothing."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from commandline import answer, end, mistake, start
from lpd_export import Pipeline
from lpd_export.evaluation import evaluate as evaluation
from lpd_export.evaluation.classifier import Classifier, ClassifierConfig
from lpd_export.evaluation.evaluate import evaluate
from lpd_export.evaluation.features import ClassifierExtractor, open_extractor
from lpd_export.evaluation.metrics import (
    Figure,
    Moments,
    distance_figure,
    inside_manifold,
    score_figure,
    share_figure,
)
from lpd_export.evaluation.request import EvaluateRequest
from lpd_export.evaluation.statistics import Statistics, read_statistics, write_statistics

NAMES = ("red panda", "ice-cream", "crane", "Crane", "monkey-face")
"""Of the small bundle, in its words."""
COUNT = 40
Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of 16 px images with 16 features."""
    path = tmp_path_factory.mktemp("features") / "classifier.safetensors"
    network = Classifier(ClassifierConfig(len(NAMES), 16, (16, 16)), NAMES).initialize(0)
    torch.nn.init.normal_(network.head.weight, generator=torch.Generator().manual_seed(1))
    weights = {key: value.contiguous() for key, value in network.state_dict().items()}
    save_file(weights, path, network.header())
    return path


@pytest.fixture(scope="module")
def extractor(classifier: Path) -> ClassifierExtractor:
    opened = open_extractor(classifier)
    assert isinstance(opened, ClassifierExtractor)
    return opened


def pictures(count: int = COUNT, side: int = 16, seed: int = 0) -> Pixels:
    """Coarse noise, [count, side, side, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, side // 4, side // 4, 3))
    return coarse.repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 images, in folders of classes."""
    folder = tmp_path_factory.mktemp("photos")
    for number, pixels in enumerate(pictures(seed=1)):
        (folder / str(number % 2)).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / str(number % 2) / f"{number:03d}.png")
    return folder


def save_npz(path: Path, pixels: Pixels, compress: bool = False, **more: object) -> Path:
    (np.savez_compressed if compress else np.savez)(path, arr_0=pixels, **more)  # type: ignore[arg-type]
    return path


def measured(images: Path, **options: object) -> dict[str, Figure | None]:
    return evaluate(EvaluateRequest(images, **options)).figures  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ what is measured


def test_the_figures_are_those_of_what_is_seen(
    tmp_path: Path, photos: Path, classifier: Path, extractor: ClassifierExtractor
) -> None:
    drawn = pictures(60)
    labels = np.arange(60) % len(NAMES)
    path = save_npz(tmp_path / "drawn.npz", drawn, compress=True, arr_1=labels)
    read = np.stack([np.asarray(Image.open(file)) for file in sorted(photos.rglob("*.png"))])
    real, seen = extractor.see(read), extractor.see(drawn)
    figures = measured(path, against=photos, features=classifier)
    expected = {
        "frechet_distance": distance_figure(Moments.of(real.features), seen.features),
        "score": score_figure(seen.logits),
        "precision": share_figure(inside_manifold(seen.features, real.features)),
        "recall": share_figure(inside_manifold(real.features, seen.features)),
        "accuracy": share_figure(seen.logits.argmax(dim=1) == torch.from_numpy(labels)),
    }
    assert set(figures) == set(expected)
    for name, figure in expected.items():
        # Seen in other chunks, images are rounded otherwise.
        assert figures[name] == pytest.approx(figure, rel=1e-4, abs=1e-6), name


def test_images_are_the_same_wherever_they_lie(
    tmp_path: Path, photos: Path, classifier: Path
) -> None:
    """In an .npz, in tars, in a folder of a run, of which what it recorded counts."""
    drawn = pictures()
    folder, shards = tmp_path / "folder", tmp_path / "shards"
    (folder / "trace").mkdir(parents=True)
    shards.mkdir()
    records = []
    for first in (0, 25):
        with tarfile.open(shards / f"{first:05d}.tar", "w") as tar:
            for number in range(first, min(first + 25, COUNT)):
                file = io.BytesIO()
                Image.fromarray(drawn[number]).save(file, "png")
                for suffix, content in (("png", file.getvalue()), ("json", b"{}")):
                    info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                (folder / f"{number:05d}.png").write_bytes(file.getvalue())
                records.append({"file": f"{number:05d}.png", "index": number, "class_id": 1})
    Image.fromarray(pictures(1, 64)[0]).save(folder / "contact_sheet.png")
    Image.fromarray(pictures(1, 32)[0]).save(folder / "trace" / "00000.png")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "images.jsonl").write_text(lines)
    options = {"against": photos, "features": classifier}
    alike = measured(save_npz(tmp_path / "a.npz", drawn, arr_1=np.ones(COUNT, int)), **options)
    assert alike["accuracy"] is not None
    assert measured(folder, **options) == alike
    assert measured(shards, **options) == {**alike, "accuracy": None}


def test_a_run_s_folder_is_the_same_in_every_format(
    small_bundle: Path, tmp_path: Path, photos: Path, classifier: Path
) -> None:
    figures = []
    for kind in ("png", "tar", "npz"):
        out = tmp_path / kind
        made = answer(
            "run", small_bundle, "--class", "all", "-n", 8, "--format", kind, "--out", out
        )
        assert made.code == 0, made.err
        figures.append(measured(out, against=photos, features=classifier))
    assert figures[0] == figures[1] == figures[2]
    assert figures[0]["accuracy"] is not None
    next((tmp_path / "png").glob("00011_*.png")).unlink()
    said = mistake("evaluate", tmp_path / "png", "--against", photos, "--features", classifier)
    assert said.endswith(
        "39 of the 40 images that its images.jsonl records: run the command that makes them to its "
        "end"
    )


def test_a_bundle_s_images_are_generated(
    small_bundle: Path, tmp_path: Path, photos: Path, classifier: Path
) -> None:
    """As many of each class, in the order of the classes, and the same as `Pipeline`'s."""
    out, own = tmp_path / "result.json", tmp_path / "own.npz"
    said = answer(
        *("evaluate", small_bundle, "--against", photos, "--features", classifier, "--json"),
        *("--per-class", 8, "--seed", 3, "--cfg", 2.5, "--batch", 4),
        *("--save-statistics", own, "--out", out),
    )
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found == json.loads(out.read_text())
    labels = [label for label in range(5) for _ in range(8)]
    images = Pipeline.open(small_bundle).generate(labels, seed=3, cfg=2.5, batch=4)
    drawn = save_npz(
        tmp_path / "drawn.npz", np.stack([image.pixels for image in images]), arr_1=labels
    )
    same = evaluate(EvaluateRequest(drawn, photos, classifier)).as_json()
    assert found["figures"] == same["figures"]
    assert found["figures"]["accuracy"] is not None
    assert found["count"] == same["count"] == 40
    assert found["generation"] == {
        "per_class": 8,
        "seed": 3,
        "cfg": 2.5,
        "guidance": "linear",
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
        "batch": 4,
        "steps": 4,
        "orders": found["generation"]["orders"],
    }
    # Statistics of the images themselves are at no distance.
    again = measured(drawn, against=own, features=classifier)
    assert again["frechet_distance"] is not None
    assert again["frechet_distance"].value == pytest.approx(0, abs=1e-6)
    assert again["precision"] is None


def test_what_lies_beside_the_checkpoint_is_the_default(
    small_bundle: Path,
    small_weights: Path,
    classifier: Path,
    extractor: ClassifierExtractor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beside = {"classifier.safetensors": classifier}
    monkeypatch.setattr(EvaluateRequest, "beside", lambda self, name: beside.get(name))
    said = mistake("evaluate", small_bundle)
    assert said.startswith("nothing says what the images are compared with: give --against")
    path = classifier.parent / "statistics.npz"
    write_statistics(
        path,
        Statistics(path, Moments.of(extractor.see(pictures()).features), extractor.sha256, COUNT),
    )
    beside["statistics.npz"] = path
    told = answer("evaluate", small_bundle, "--per-class", 4)
    assert told.code == 0, told.err
    assert f"20 images of {small_bundle} against {path} (40 images), by 16 features of" in told.out
    lines = [line.split()[0] for line in told.out.splitlines()]
    assert lines[2:] == ["Fréchet", "classifier", "accuracy", "precision"]
    monkeypatch.undo()
    assert EvaluateRequest(small_bundle).beside("lpd.pth") == small_weights / "lpd.pth"
    assert "nothing says what sees the images: give --features" in mistake("evaluate", small_bundle)


# ------------------------------------------------------------------------------------ references


def test_files_of_the_adm_suite(
    tmp_path: Path, photos: Path, classifier: Path, extractor: ClassifierExtractor
) -> None:
    """Mean and covariance alone, or beside images, of which they need not be."""
    real, drawn = extractor.see(pictures(60, seed=4)).features, extractor.see(pictures()).features
    moments = Moments.of(real)
    arrays = {"mu": moments.mean.numpy(), "sigma": moments.covariance.numpy()}
    np.savez(tmp_path / "alone.npz", **arrays)
    suite = save_npz(
        tmp_path / "suite.npz", pictures(seed=1), **arrays, mu_s=arrays["mu"], sigma_s=arrays["mu"]
    )
    images = save_npz(tmp_path / "images.npz", pictures(seed=1))
    path = save_npz(tmp_path / "drawn.npz", pictures())
    alone, both, of_images = (
        measured(path, against=against, features=classifier)
        for against in (tmp_path / "alone.npz", suite, images)
    )
    expected = distance_figure(moments, drawn)
    for figures in (alone, both):
        assert figures["frechet_distance"] == pytest.approx(expected, rel=1e-4)
    assert alone["precision"] is alone["recall"] is None
    assert both["precision"] == of_images["precision"] != None  # noqa: E711
    assert both["recall"] == of_images["recall"]
    assert of_images["frechet_distance"] != both["frechet_distance"]


def test_statistics_of_another_file_are_refused(
    tmp_path: Path, extractor: ClassifierExtractor
) -> None:
    path = tmp_path / "statistics.npz"
    moments = Moments.of(extractor.see(pictures()).features)
    write_statistics(path, Statistics(path, moments, "0" * 64, COUNT))
    assert read_statistics(path).count == COUNT
    drawn = save_npz(tmp_path / "drawn.npz", pictures())
    said = mistake("evaluate", drawn, "--against", path, "--features", extractor.path)
    assert said.startswith(f"{path} holds statistics of the features of another file than")


# ---------------------------------------------------------------------------- stopping, going on


def test_what_was_seen_is_not_made_again(
    small_bundle: Path, photos: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after some chunks, and with more images; what is damaged on the disk is made again."""
    made: list[int] = []
    generate = evaluation.BundleImages._generate

    def counted(self: evaluation.BundleImages, requests: list[object]) -> Pixels:
        made.append(len(requests))
        if len(made) == stop:
            raise KeyboardInterrupt
        return generate(self, requests)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation.BundleImages, "_generate", counted)
    options = ("--against", photos, "--features", classifier, "--batch", 25, "--seed", 7)
    stop = 3
    said = answer("evaluate", small_bundle, *options, "--per-class", 25)
    assert said.code == 130
    assert said.err.splitlines()[-1] == (
        f"lpd-export: interrupted: 100 of 125 images of {small_bundle} are seen, the same command "
        "goes on from there"
    )
    stop = 0
    made.clear()
    first = answer("evaluate", small_bundle, *options, "--per-class", 25)
    assert made == [25]
    again = answer("evaluate", small_bundle, *options, "--per-class", 25)
    assert made == [25]
    assert first.out == again.out
    for path in (evaluation.cache_folder() / evaluation.KEPT).glob("*.npz"):
        path.write_bytes(path.read_bytes()[:-40])
    damaged = answer("evaluate", small_bundle, *options, "--per-class", 25)
    assert made == [25, 50, 50, 25]
    assert damaged.out == first.out


def test_killed_and_started_again_it_measures_the_same(
    small_bundle: Path, photos: Path, classifier: Path, tmp_path: Path
) -> None:
    """By SIGKILL, in a process of its own; what was seen before is taken as it is."""
    asked = ("evaluate", small_bundle, "--against", photos, "--features", classifier, "--json")
    asked += ("--per-class", 100, "--batch", 5)  # type: ignore[assignment]

    def command(cache: str) -> subprocess.Popen[str]:
        return start(*asked, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / cache)})

    whole = end(command("whole"))
    assert whole.code == 0, whole
    process = command("cut")
    kept = tmp_path / "cut" / "lpd-export" / evaluation.KEPT
    while process.poll() is None and len(list(kept.glob("*.npz"))) < 3:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in kept.glob("*.npz")}
    again = end(command("cut"))
    assert again.code == 0, again
    assert again.out == whole.out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert 3 <= len(before) < len(list(kept.glob("*.npz"))) == 11


# -------------------------------------------------------------------------------------- mistakes


@pytest.fixture
def told(tmp_path: Path, photos: Path, classifier: Path) -> Callable[..., str]:
    """Gives the sentence that answers images with these options."""

    def ask(images: Path, **options: object) -> str:
        given = {"against": photos, "features": classifier} | options
        words = [word for name, value in given.items() for word in (f"--{name}", value)]
        return mistake("evaluate", images, *words)

    return ask


def test_mistakes_are_a_sentence(
    tmp_path: Path, photos: Path, classifier: Path, told: Callable[..., str]
) -> None:
    drawn = save_npz(tmp_path / "drawn.npz", pictures())
    few = save_npz(tmp_path / "few.npz", pictures(16))
    assert told(few).startswith(
        f"{few} gives 16 images, and a distance over 16 features takes more than 16 (published "
        "ones 50,000): give more"
    )
    large = save_npz(tmp_path / "large.npz", pictures(side=32))
    assert told(large).startswith(
        f"the images of {large} are of 32 pixels, and {classifier} sees images of 16: give"
    )
    (tmp_path / "mixed").mkdir()
    for number in range(COUNT):
        side = 16 if number < COUNT - 1 else 32
        Image.fromarray(pictures(1, side)[0]).save(tmp_path / "mixed" / f"{number:02d}.png")
    mixed = tmp_path / "mixed"
    assert told(mixed) == (
        f"{mixed}/39.png is 32x32 pixels, where {mixed}/00.png is 16x16: images must be of one size"
    )
    (mixed / "39.png").write_bytes(b"nothing")
    assert told(mixed).startswith(f"{mixed / '39.png'} is no image of a known format")
    assert told(tmp_path / "nothing").startswith(f"there is no {tmp_path / 'nothing'}: give a")
    (tmp_path / "empty").mkdir()
    assert "holds no images" in told(tmp_path / "empty")
    assert "is not a bundle, a folder of images, or an .npz" in told(classifier)
    assert told(drawn, features=tmp_path / "x.pth").startswith(
        f"there is no file of features {tmp_path / 'x.pth'}: give --features weights-inception-"
    )
    assert told(drawn, features=photos.parent / "no.safetensors").startswith("there is no file of")
    assert told(drawn, seed=1) == (
        f"--seed says how images are generated, and {drawn} is no bundle"
    )
    assert told(drawn, threads=0).startswith("--threads must be a whole number from 1")
    assert told(drawn, out=tmp_path).endswith("is a folder: give the name of a file")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(8), "sigma": np.eye(8)}, "statistics of 8 features, and .* gives 16"),
        ({"mu": np.zeros(16)}, r"holds mu, not the mean and covariance of features"),
        ({"mu": np.zeros(16), "sigma": np.eye(8)}, r"holds mu float64 \[16\] and sigma float64"),
        ({"mu": np.zeros(16), "sigma": np.full((16, 16), np.nan)}, "NaN or infinity"),
        ({"mu": np.zeros(16), "sigma": np.triu(np.ones((16, 16)))}, "not symmetric"),
        ({"mu": np.zeros(16), "sigma": np.array([[object()] * 16] * 16)}, "sigma object"),
    ],
)
def test_wrong_statistics_are_refused(
    tmp_path: Path, told: Callable[..., str], arrays: dict[str, NDArray[np.float64]], words: str
) -> None:
    np.savez(tmp_path / "statistics.npz", **arrays)  # type: ignore[arg-type]
    drawn = save_npz(tmp_path / "drawn.npz", pictures())
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(told(drawn, against=tmp_path / "statistics.npz"))


@pytest.mark.parametrize(
    "record",
    [
        {"file": "../photos.npz", "class_id": 1},
        {"file": ["images.npz"], "class_id": 1},
        {"file": 3, "class_id": 1},
        {"file": "00.png", "class_id": "heart"},
        ["00.png"],
    ],
)
def test_records_lead_nowhere_else(
    tmp_path: Path, told: Callable[..., str], record: object
) -> None:
    save_npz(tmp_path / "photos.npz", pictures())
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "images.jsonl").write_text(json.dumps(record) + "\n")
    said = told(folder)
    assert "line 1: not a record of `lpd-export run`" in said or "holds no images" in said


@pytest.mark.parametrize("damage", ["floats", "flat", "cut", "no zip", "short", "bits", "endless"])
def test_wrong_images_are_refused(tmp_path: Path, told: Callable[..., str], damage: str) -> None:
    path, drawn = tmp_path / "drawn.npz", pictures()
    words = {
        "floats": "which are not images",
        "flat": "which are not images",
        "cut": "is not an .npz of NumPy's, or is damaged",
        "no zip": "is not an .npz of NumPy's, or is damaged",
        "short": "is damaged: image 0 and what comes after are missing",
        "bits": "damaged: ",
        "endless": "which are not images",
    }
    if damage == "floats":
        np.savez(path, arr_0=drawn.astype(np.float32))
    elif damage == "flat":
        np.savez(path, arr_0=drawn.reshape(COUNT, -1))
    else:
        save_npz(path, drawn, compress=damage == "bits")
    if damage == "bits":
        content = bytearray(path.read_bytes())
        content[60:160] = bytes(100)
        path.write_bytes(content)
    elif damage == "endless":
        header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (10**15, 16, 16, 3)}\n"
        header = header.replace(b"10**15", b"1" + 15 * b"0")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", b"\x93NUMPY\1\0" + bytes([len(header), 0]) + header)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "no zip":
        path.write_bytes(b"images")
    elif damage == "short":
        with zipfile.ZipFile(path) as archive:
            whole = archive.read("arr_0.npy")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", whole[:-1000])
    assert words[damage] in told(path)
