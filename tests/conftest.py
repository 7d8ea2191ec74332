"""Bundles that several test files use, each built once a run, whichever worker needs it first."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

# Before anything imports Triton, which looks at it once: its kernels run without a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest
import torch

import damage
import exported
from lpd_export.build.build import build
from lpd_export.build.request import BuildRequest, read_recipe
from lpd_export.precision import calibration
from lpd_reference import LPD, VQTokenizer
from lpd_reference.lpd import LPDConfig
from lpd_reference.vq import VQConfig

EMOJI_RECIPE = Path(__file__).parent / "data" / "lpd-emoji32" / "recipe.toml"
DEMO_RECIPE = Path(__file__).parents[1] / "engines" / "demo.toml"
SMALL_NAMES = [["red panda", "firefox"], "ice-cream", "crane", ["Crane", "bird"], "monkey-face"]
KINDS = ("model", "engine", "slow", "gpu", "triton")
MODEL_FIXTURES = {
    "broken_bundle",
    "demo_bundle",
    "demo_int8_bundle",
    "emoji_bundle",
    "emoji_fp16_bundle",
    "emoji_int8_bundle",
    "lifelike_bundle",
    "small_bundle",
}
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")


def pytest_configure() -> None:
    """Gives each of as many workers as there are cores one for itself and what it starts."""
    # A busy machine is no fault of what is tested.
    hypothesis.settings.register_profile("patient", deadline=None)
    hypothesis.settings.load_profile("patient")
    if not WORKER or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == int(os.environ["PYTEST_XDIST_WORKER_COUNT"]):
        os.sched_setaffinity(0, {cores[int(WORKER.removeprefix("gw"))]})
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what takes a built bundle, and as unit tests all that bears no other mark."""
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if MODEL_FIXTURES & {*getattr(item, "fixturenames", ()), *map(str, parameters)}:
            item.add_marker("model")
        if not any(item.get_closest_marker(kind) for kind in KINDS):
            item.add_marker("unit")
    # The longest first: what is begun last, one worker does alone.
    items.sort(key=lambda item: "demo_bundle" not in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run share."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if WORKER else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(shared_folder: Path) -> Iterator[Path]:
    """Measurements are kept where no other run sees them, and made once a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(shared_folder / "cache"))
        yield shared_folder / "cache" / "lpd-export"


MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def made_once(shared_folder: Path) -> MadeOnce:
    """Gives a path in the shared folder, made by the first worker that asks for it."""
    return partial(exported.made_once, shared_folder)


@pytest.fixture(scope="session", autouse=True)
def exported_once(shared_folder: Path) -> Iterator[None]:
    """The same weights are exported once a run; `commandline.start` exports anew if not told."""
    with exported.exported_once(shared_folder):
        yield


FEW_ARE_MEASURED = mock.patch.object(calibration, "MOST_IMAGES", calibration.FEWEST_IMAGES)
"""On as few images as a model of 256 px needs: the tests' limits hold with them too."""


@pytest.fixture
def few_are_measured() -> Iterator[None]:
    """A build measures as few images as it may."""
    with FEW_ARE_MEASURED:
        yield


def build_recipe(recipe: Path, out: Path, **settings: object) -> Path:
    """Builds a recipe's bundle, with other settings beside the recipe's."""
    return build(BuildRequest(**(read_recipe(recipe) | {"out": str(out)} | settings)))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def emoji_bundle(made_once: MadeOnce) -> Path:
    """The bundle of a small trained model: 32 px emoji, 20 steps; leave it as it is."""
    return made_once("emoji32", lambda out: build_recipe(EMOJI_RECIPE, out))


@pytest.fixture(scope="session")
@FEW_ARE_MEASURED
def emoji_fp16_bundle(made_once: MadeOnce) -> Path:
    """`emoji_bundle` in FP16; leave it as it is."""
    return made_once("emoji32-fp16", lambda out: build_recipe(EMOJI_RECIPE, out, precision="fp16"))


@pytest.fixture(scope="session")
@FEW_ARE_MEASURED
def emoji_int8_bundle(made_once: MadeOnce) -> Path:
    """`emoji_bundle` in INT8; leave it as it is."""
    return made_once("emoji32-int8", lambda out: build_recipe(EMOJI_RECIPE, out, precision="int8"))


@pytest.fixture(scope="session")
def demo_bundle(made_once: MadeOnce) -> Path:
    """The bundle of `make demo`; leave it as it is."""
    return made_once("demo", lambda out: build_recipe(DEMO_RECIPE, out))


@pytest.fixture(scope="session")
def demo_int8_bundle(made_once: MadeOnce) -> Path:
    """The demo in INT8, the layers of its decoder of images chosen; leave it as it is."""

    def write(out: Path) -> None:
        kept = out.with_suffix(".json")
        kept.write_text(json.dumps({"decode": ["head/MatMul"], "tokenize": []}))
        build_recipe(DEMO_RECIPE, out, precision="int8", keep_layers=str(kept))

    return made_once("demo-int8", write)


def save_small_weights(folder: Path, heads: int) -> Path:
    """Writes lpd.pth (a 4x4 grid, 5 classes, heads of 64), vq.pt (16 px) and classes.json."""
    config = LPDConfig(dim=64 * heads, depth=2, heads=heads, grid=4, num_classes=5, vocab_size=64)
    torch.save({"model": LPD(config).initialize(0).state_dict()}, folder / "lpd.pth")
    tokenizer = VQTokenizer(
        VQConfig(
            channels=32,
            channel_multipliers=(1, 1, 2),
            num_res_blocks=1,
            z_channels=32,
            codebook_size=64,
        )
    )
    torch.save({"model": tokenizer.initialize(0).state_dict()}, folder / "vq.pt")
    (folder / "classes.json").write_text(json.dumps(SMALL_NAMES))
    return folder


@pytest.fixture(scope="session")
def small_weights(made_once: MadeOnce) -> Path:
    """A folder of small weights with one head (see `save_small_weights`); leave it be."""

    def write(folder: Path) -> None:
        folder.mkdir()
        save_small_weights(folder, heads=1)

    return made_once("small-weights", write)


@pytest.fixture(scope="session")
def small_bundle(small_weights: Path, made_once: MadeOnce) -> Path:
    """A bundle of `small_weights` in 4 steps; shared, so leave it as it is."""
    return made_once(
        "small",
        lambda out: build(
            BuildRequest(
                checkpoint=str(small_weights / "lpd.pth"),
                tokenizer=str(small_weights / "vq.pt"),
                steps=4,
                out=str(out),
            )
        ),
    )


@pytest.fixture(scope="session")
def lifelike_weights(made_once: MadeOnce) -> Path:
    """A folder with `damage.lifelike_weights`, and files of the layers that INT8 leaves out.

    Rounding would decide what just meets its target. Leave it as it is.
    """

    def write(folder: Path) -> None:
        folder.mkdir()
        damage.lifelike_weights(folder)
        for name, kept in (("kept", {}), ("kept_but_tokenize", {"tokenize": []})):
            layers = {"decode": ["head/MatMul"]} | kept
            (folder / f"{name}.json").write_text(json.dumps(layers))

    return made_once("lifelike-weights", write)


LifelikeBundle = Callable[..., Path]


@pytest.fixture(scope="session")
def lifelike_bundle(lifelike_weights: Path, made_once: MadeOnce) -> LifelikeBundle:
    """Gives the bundle of `lifelike_weights` in 5 steps, by precision and backend; leave it."""

    def bundle(precision: str = "fp32", backend: str = "onnxruntime", **settings: object) -> Path:
        name = "-".join(["lifelike", precision, backend, *map(str, settings)])
        request = {
            "checkpoint": str(lifelike_weights / "lpd.pth"),
            "tokenizer": str(lifelike_weights / "vq.pt"),
            "steps": 5,
            "cfg": 2.0,
            "precision": precision,
            "backend": backend,
            "keep_layers": str(lifelike_weights / "kept.json") if precision == "int8" else None,
        }
        return made_once(name, lambda out: build(BuildRequest(**request | settings, out=str(out))))  # type: ignore[arg-type]

    return bundle
