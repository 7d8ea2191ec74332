"""Builds: what comes out of one, and every way in which one is refused, fails or is stopped."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image

import lpd_export.build.build
import lpd_export.build.check
import lpd_export.build.settings
from commandline import Answer, answer, end, entries, mistake, sentence, start, wait_for
from lpd_export.accuracy.reference_side import find_weights
from lpd_export.build.build import build
from lpd_export.build.published import PublishedSettings
from lpd_export.build.request import BuildRequest
from lpd_export.bundle.manifest import MANIFEST, Bundle
from lpd_export.errors import UserError
from lpd_export.files import sha256
from lpd_export.machine.doctor import can_build
from lpd_export.schedule.schedule_file import Schedule
from lpd_reference.checkpoint import CheckpointError

pytestmark = pytest.mark.model

EMOJI_WEIGHTS = Path(__file__).parents[1] / "data" / "lpd-emoji32"


@pytest.fixture
def weights(small_weights: Path) -> list[object]:
    """Options of the small model."""
    checkpoint, tokenizer = small_weights / "lpd.pth", small_weights / "vq.pt"
    return ["--checkpoint", checkpoint, "--tokenizer", tokenizer, "--steps", 4]


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a build gets as far as exporting."""

    def unreachable(*_: object) -> None:
        raise AssertionError("exported")

    monkeypatch.setattr(lpd_export.build.build, "write_exact_graphs", unreachable)


def save(path: Path, state: dict[str, Any]) -> Path:
    torch.save({"model": state}, path)
    return path


def request_of(weights: Path, out: Path) -> BuildRequest:
    files = {"checkpoint": str(weights / "lpd.pth"), "tokenizer": str(weights / "vq.pt")}
    return BuildRequest(**files, steps=4, out=str(out))


def state_of(path: Path) -> dict[str, Any]:
    return dict(torch.load(path)["model"])


# ------------------------------------------------------------------------------- what is built


def test_what_a_build_settles_by_itself(small_bundle: Path, small_weights: Path) -> None:
    manifest = Bundle.open(small_bundle).manifest
    assert manifest.name == "small"
    assert (manifest.model.dim, manifest.model.depth, manifest.model.heads) == (64, 2, 1)
    assert (manifest.model.grid, manifest.resolution, manifest.tokenizer.stride) == (4, 16, 4)
    assert (manifest.cfg, manifest.guidance, manifest.max_batch) == (3.0, "linear", None)
    assert manifest.class_names == [
        [name] if isinstance(name, str) else name
        for name in json.loads((small_weights / "classes.json").read_text())
    ]
    assert manifest.made["checkpoint"]["source"] == str(small_weights / "lpd.pth")
    schedule = Bundle.open(small_bundle).schedule()
    assert (schedule.steps, schedule.count, schedule.kind) == (4, 64, "locality")


def test_a_build_leaves_the_bundle_alone(small_bundle: Path) -> None:
    # What a build works with lies hidden beside its bundle, where the tests' shared files are too.
    assert list(small_bundle.parent.glob(f".{small_bundle.name}.*")) == []
    assert sorted(path.name for path in small_bundle.iterdir()) == [
        MANIFEST,
        "onnx",
        "schedule.npz",
    ]


def test_a_recipe_with_options_over_it(
    lifelike_weights: Path, small_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(lifelike_weights, tmp_path / "weights")
    shutil.copy(small_weights / "classes.json", tmp_path / "weights")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/wide.toml").write_text(
        """
        checkpoint = "../weights/lpd.pth"
        tokenizer = "../weights/vq.pt"
        res = 16
        steps = 60
        orders = 3
        cfg = 2
        max-batch = 4
        """
    )
    said = answer(
        *("build", tmp_path / "recipes/wide.toml", "--res", 32, "--steps", 5, "--cfg", 1, "--json"),
        *("--guidance", "constant"),
    )
    assert said.code == 0, said
    out = tmp_path / "recipes/wide"
    printed = json.loads(said.out)
    assert printed["bundle"] == str(out)
    manifest = Bundle.open(out).manifest
    assert printed["manifest"]["files"].keys() == manifest.files.keys()
    # The positions were resized: twice the resolution of the weights.
    assert (manifest.model.grid, manifest.resolution) == (8, 32)
    assert len(manifest.phases) == 5
    assert (manifest.cfg, manifest.guidance, manifest.max_batch) == (1.0, "constant", 4)
    assert manifest.phase_rows == 1  # no guidance, no null row
    assert Bundle.open(out).schedule().count == 3
    assert {path.name for path in out.parent.iterdir()} == {"wide", "wide.toml"}
    images = tmp_path / "images"
    assert answer("run", out, "--class", "bird", "-n", 5, "--out", images).code == 0
    with Image.open(images / "00004_crane.png") as picture:
        assert picture.size == (32, 32)
    assert "takes batches of up to 4 images, not 5" in mistake(
        "run", out, "--class", "bird", "--batch", 5, "--out", tmp_path / "more"
    )


def test_the_default_name_and_force(
    weights: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    orders = tmp_path / "orders.json"
    orders.write_text(json.dumps([list(range(16)), list(range(16))[::-1]]))
    out = Path("engines/lpd-16-fp32")
    out.mkdir(parents=True)
    (out / MANIFEST).touch()  # all that a broken bundle needs in order to be replaced
    assert "engines/lpd-16-fp32 exists" in mistake("build", *weights)
    said = answer("build", *weights, "--schedule", orders, "--force")
    assert said.code == 0, said
    assert said.out.startswith(f"{out}: ")
    manifest = Bundle.open(out).manifest
    assert manifest.name == "lpd-16-fp32"
    assert Bundle.open(out).schedule().orders.tolist()[1] == list(range(16))[::-1]
    assert [path.name for path in out.parent.iterdir()] == ["lpd-16-fp32"]


def test_what_res_alone_means(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def locate_all(sources: list[str]) -> list[Path]:
        asked.extend(sources)
        raise CheckpointError("no hub here")

    monkeypatch.setattr(lpd_export.build.settings, "locate_all", locate_all)
    for options, repository in (
        (["--res", 256], "mit-han-lab/lpd_l_256"),
        (["--model", "lpd-xxl"], "mit-han-lab/lpd_xxl_256"),
        (["--res", 512, "--model", "lpd-xl", "--steps", 48], "mit-han-lab/lpd_xl_512"),
    ):
        asked.clear()
        assert mistake("build", *options, "--out", tmp_path / "a") == "no hub here"
        assert asked == ["hf:FoundationVision/LlamaGen/vq_ds16_c2i.pt", f"hf:{repository}"]
    assert entries(tmp_path) == []


FIND_AGAIN = """
import json, sys
from lpd_export.accuracy.reference_side import find_weights
from lpd_export.build.build import describe_making
from lpd_export.build.request import BuildRequest
from lpd_export.build.settings import load

request = BuildRequest(res=256)
made = describe_making(request, load(request, lambda stage: None))
remarks = []
files = [find_weights(f"--{key}", None, made[key], remarks) for key in ("checkpoint", "tokenizer")]
print(json.dumps([made["checkpoint"], made["tokenizer"], *map(str, files), remarks]))
"""


def test_published_weights_are_found_again(small_weights: Path, tmp_path: Path) -> None:
    commit, cached = "0123456789abcdef0123456789abcdef01234567", []
    for repository, file, small in (
        ("mit-han-lab/lpd_l_256", "lpd_l_256.pth", "lpd.pth"),
        ("FoundationVision/LlamaGen", "vq_ds16_c2i.pt", "vq.pt"),
    ):
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        cached.append(folder / "snapshots" / commit / file)
        cached[-1].parent.mkdir(parents=True)
        shutil.copy(small_weights / small, cached[-1])
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text(commit)
    finished = subprocess.run(
        [sys.executable, "-c", FIND_AGAIN],
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    checkpoint, tokenizer, *files, remarks = json.loads(finished.stdout)
    assert checkpoint == {
        "source": f"hf:mit-han-lab/lpd_l_256@{commit}/lpd_l_256.pth",
        "sha256": sha256(cached[0]),
    }
    assert tokenizer == {
        "source": f"hf:FoundationVision/LlamaGen@{commit}/vq_ds16_c2i.pt",
        "sha256": sha256(cached[1]),
    }
    assert files == [str(path) for path in cached]
    assert remarks == []


def test_weights_of_a_relative_path_are_found_from_anywhere(
    small_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_weights)
    request = BuildRequest(checkpoint="lpd.pth", tokenizer=f"../{small_weights.name}/vq.pt")
    source = lpd_export.build.build.load(request, print)
    made, remarks = lpd_export.build.build.describe_making(request, source), list[str]()
    monkeypatch.chdir(tmp_path)
    for key, name in (("checkpoint", "lpd.pth"), ("tokenizer", "vq.pt")):
        found = find_weights(f"--{key}", None, made[key], remarks)
        assert str(found) == made[key]["source"] == str(small_weights.resolve() / name)
    assert remarks == []


def test_a_pinned_revision_is_part_of_where_the_weights_are() -> None:
    pinned = PublishedSettings("lpd-xl", 512, 48, 6.0, 4, 2.10, 326.0, revision="abc")
    assert pinned.checkpoint == "hf:mit-han-lab/lpd_xl_512@abc"


@pytest.mark.usefixtures("no_export")
def test_a_dry_run_makes_nothing(
    weights: list[object], small_weights: Path, small_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a/small"
    said = answer("build", *weights, "--out", out, "--dry-run")
    assert said.code == 0, said
    assert said.out.startswith(f"would build {out} (nothing is made or fetched)")
    assert "width 64, 2 blocks, 1 heads, 5 classes; 16 px, a grid of 4x4" in said.out
    assert f"from       {small_weights / 'lpd.pth'}\n" in said.out
    assert "4 steps, 64 orders, locality" in said.out
    planned = json.loads(answer("build", *weights, "--out", out, "--dry-run", "--json").out)
    manifest = Bundle.open(small_bundle).manifest
    assert set(planned["files"]) == {MANIFEST, *manifest.files}
    size = manifest.files["onnx/weights.data"].size
    assert size * 0.9 < planned["weight_bytes"] < size * 1.1
    assert entries(tmp_path) == []
    assert "17 steps are too many" in mistake("build", *weights, "--steps", 17, "--dry-run")
    assert "exists: choose another --out" in mistake(
        "build", *weights, "--out", small_bundle, "--dry-run"
    )


@pytest.mark.usefixtures("no_export")
def test_a_dry_run_fetches_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    said = answer("build", "lpd-l-256", "--backend", "onnxruntime", "--dry-run")
    assert said.code == 0, said
    assert "would build engines/lpd-l-256 (nothing is made" in said.out
    assert "lpd-l: width 1024, 24 blocks, 16 heads, 1000 classes; 256 px" in said.out
    assert "from       hf:mit-han-lab/lpd_l_256, which would be fetched\n" in said.out
    assert "20 steps, 64 orders, locality" in said.out
    assert (
        "read off the weights: fetch hf:org/model and hf:FoundationVision/LlamaGen/vq"
        in mistake("build", "--checkpoint", "hf:org/model", "--dry-run")
    )
    assert entries(tmp_path) == []


# --------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "say what to build: --res 256 (the published lpd-l), --checkpoint FILE"),
        ("--steps 4", "say what to build"),
        (
            "--res 256 --precision bf16",
            "cannot build bf16 for onnxruntime here: ONNX Runtime's CPU",
        ),
        ("--res 256 --precision int3", "'int3' is not one of 'fp32', 'bf16', 'fp16', 'int8'"),
        ("--res 256 --precision fp8", "no kernels for fp8 products: use int8, or tensorrt or"),
        (
            "--res 256 --precision fp8 --backend tensorrt --hardware-compatible",
            "from compute capability 8.0 on, and fp8 needs 8.9: leave it out",
        ),
        ("--res 256 --workspace 64", "--workspace is for engines: it needs --backend tensorrt or"),
        ("--res 256 --compute-capability 8.9", "--compute-capability is for engines"),
        ("--res 256 --backend tensorrt-rtx --compute-capability 1.0", "not for '1.0'"),
        ("--res 256 --backend tvm", "'tvm' is not one of"),
        ("--model lpd-s", "there is no model 'lpd-s': the published ones are lpd-l, lpd-xl, lpd-x"),
        ("--model lpd-xxl --res 512", "lpd-xxl was not published at 512 px: give a --checkpoint"),
        ("--res 384", "lpd-l was not published at 384 px"),
        ("--res 250 --random-weights", "--res 250 is not a multiple of the tokenizer's stride"),
        ("--res big", "'big' is not a valid integer"),
        ("--random-weights --checkpoint a", "--random-weights goes with neither --checkpoint nor"),
        ("--random-weights --tokenizer a", "--random-weights goes with neither --checkpoint nor"),
        ("--tokenizer a", "--tokenizer needs --checkpoint"),
        ("--res 256 --heads 16", "--heads needs --checkpoint"),
        ("--res 256 --cfg nan", "--cfg must be a number from 0 to 1000, but it is nan"),
        (
            f"--res 256 --repulsion {'9' * 23}",
            f"--repulsion must be a whole number from 0 to 1024, but it is {'9' * 23}",
        ),
        (
            f"--res 256 --seed {2**64}",
            "--seed must be a whole number from 0 to 2^64 - 1, but it is 18446744",
        ),
        ("--checkpoint hf:nothing --tokenizer a", "there is no checkpoint a"),
    ],
)
@pytest.mark.usefixtures("no_export")
def test_requests_that_cannot_be_met(
    options: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in mistake("build", *options.split(), "--out", "a/bundle")
    assert entries(tmp_path) == []


SLIPS = """
import sys
from lpd_export.cli.main import run_command

for line in sys.stdin.read().splitlines():
    assert run_command(["build", *line.split()]) == 2, line
assert "torch" not in sys.modules, "torch"
"""


def test_slips_are_told_before_torch_is_loaded(small_bundle: Path) -> None:
    """And by a dry run in the same words: it does not describe what cannot be built here."""
    slips = [
        "",
        "engines/gone.toml",
        "--res 384",
        "--res 256 --precision bf16",
        "--res 256 --workspace 64",
        "--res 256 --precision int4",
        "--checkpoint gone.pth",
        "--res 256 --schedule gone.npz",
        f"--random-weights --out {small_bundle}",
    ]
    if why_not := can_build("fp16", "tensorrt"):
        slips.append("--res 256 --precision fp16 --backend tensorrt")
    lines = [f"{slip}{dry}" for slip in slips for dry in ("", " --dry-run")]
    done = subprocess.run(
        [sys.executable, "-c", SLIPS], input="\n".join(lines), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("lpd-export: error: ")]
    assert told[::2] == told[1::2]
    assert len(told) == len(lines)
    assert not why_not or told[-1].endswith(f"cannot build fp16 for tensorrt here: {why_not}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model lpd-l", "lpd.pth is not lpd-l: it has width 64, 2 blocks and 1 heads"),
        ("--heads 5", "the model's width 64 does not divide into 5 heads"),
        ("--res 18", "--res 18 is not a multiple of the tokenizer's stride of 4 pixels"),
        ("--res 2", "--res 2 is not a multiple of the tokenizer's stride of 4 pixels"),
        ("--steps 17", "17 steps are too many for 16 cells"),
        ("--schedule gone.npz", "cannot read the schedule gone.npz: No such file or directory"),
        ("--schedule 8x8.npz", "the schedule is for a 8x8 grid, the model's is 4x4"),
        ("--schedule 5.npz", "this schedule has 5 steps, but --steps 4 was asked for"),
        ("--schedule classes.json", "neither an .npz schedule nor a complete JSON list"),
        ("--schedule short.json", "no square grid"),
        ("--classes gone.json", "cannot read the class names gone.json: No such file"),
        ("--classes classes.json", "the class names classes.json are not JSON"),
        ("--classes short.json", "the class names short.json have no name for class 0"),
    ],
)
@pytest.mark.usefixtures("no_export")
def test_settings_that_do_not_fit_the_weights(
    weights: list[object],
    options: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Schedule.make(8, 4, count=1).save("8x8.npz")
    Schedule.make(4, 5, count=1).save("5.npz")
    Path("classes.json").write_text("nothing")
    Path("short.json").write_text("[[0, 1, 2]]")
    before = entries(tmp_path)
    assert message in mistake("build", *weights, *options.split(), "--out", "a/bundle")
    assert entries(tmp_path) == before


@pytest.mark.usefixtures("no_export")
def test_names_beside_the_checkpoint_of_another_model(small_weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(small_weights, folder)
    (folder / "classes.json").write_text('["cat"]')
    options = ["--checkpoint", folder / "lpd.pth", "--tokenizer", folder / "vq.pt"]
    said = mistake("build", *options, "--out", tmp_path / "bundle")
    assert f"the class names {folder / 'classes.json'} are for 1 classes, the model has 5" in said
    assert not (tmp_path / "bundle").exists()


# ----------------------------------------------------------------------------------- bad weights


def without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda state: state.pop(key)


def of_shape(key: str, *shape: int) -> Callable[[dict[str, Any]], object]:
    return lambda state: state.update({key: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("class_emb.weight"), "the key class_emb.weight is missing"),
        (without("blocks.1.attn.qkv.bias"), "the key blocks.1.attn.qkv.bias is missing"),
        (of_shape("head.weight", 64, 32), "head.weight has shape [64, 32], expected [64, 64]"),
        (of_shape("pos_embed", 1, 18, 64), "pos_embed has 18 rows, which is not 1 + a square grid"),
        (of_shape("pos_embed", 17, 64), "pos_embed has shape [17, 64], where 3 dimensions"),
        (of_shape("extra", 1), "unexpected key extra"),
        (lambda s: s["head.weight"].fill_(np.nan), "head.weight holds NaN or infinite values"),
    ],
)
@pytest.mark.usefixtures("no_export")
def test_foreign_checkpoints(
    small_weights: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    state = state_of(small_weights / "lpd.pth")
    change(state)
    checkpoint = save(tmp_path / "changed.pth", state)
    options = ["--checkpoint", checkpoint, "--tokenizer", small_weights / "vq.pt"]
    said = mistake("build", *options, "--out", tmp_path / "bundle")
    assert said.startswith(f"{checkpoint} is not an LPD checkpoint: ")
    assert message in said
    assert entries(tmp_path) == ["changed.pth"]


@pytest.mark.parametrize(
    ("checkpoint", "tokenizer", "message"),
    [
        ("vq.pt", "vq.pt", "vq.pt is not an LPD checkpoint: the key class_emb.weight is missing"),
        ("lpd.pth", "lpd.pth", "is not a VQ tokenizer: the key encoder.conv_in.weight is missing"),
        ("lpd.pth", EMOJI_WEIGHTS / "vq_emoji32.pt", "64 tokens, the tokenizer's codebook"),
    ],
)
@pytest.mark.usefixtures("no_export")
def test_weights_that_do_not_belong_together(
    small_weights: Path, tmp_path: Path, checkpoint: str, tokenizer: str | Path, message: str
) -> None:
    files = ["--checkpoint", small_weights / checkpoint, "--tokenizer", small_weights / tokenizer]
    assert message in mistake("build", *files, "--out", tmp_path / "a")
    assert entries(tmp_path) == []


@pytest.mark.parametrize("which", ["--checkpoint", "--tokenizer"])
@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"hello", b"\x80\x02}q\x00.", "truncated", "folder", "gone"]
)
@pytest.mark.usefixtures("no_export")
def test_weights_that_cannot_be_read(
    small_weights: Path, tmp_path: Path, which: str, content: bytes | str
) -> None:
    files = {"--checkpoint": small_weights / "lpd.pth", "--tokenizer": small_weights / "vq.pt"}
    path = tmp_path / "weights.pth"
    if content == "folder":
        path.mkdir()
    elif content == "truncated":
        whole = files[which].read_bytes()
        path.write_bytes(whole[: len(whole) * 2 // 3])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    before = entries(tmp_path)
    options = [part for option in (files | {which: path}).items() for part in option]
    said = mistake("build", *options, "--out", tmp_path / "bundle")
    expected = {"folder": "is a folder", "gone": "there is no checkpoint"}
    assert expected.get(str(content), "") in said
    assert str(path) in said
    assert entries(tmp_path) == before


# ------------------------------------------------------------------------------ bad destinations


@pytest.mark.usefixtures("no_export")
def test_destinations_are_checked_before_any_work(
    weights: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(lpd_export.build.build, "load", unreachable)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/mine").touch()
    before = entries(tmp_path)
    for options, message in (
        (["--out", tmp_path / "file"], "file exists: choose another --out, or replace it with"),
        (["--out", tmp_path / "folder"], "folder exists: choose another --out"),
        (["--out", tmp_path / "folder", "--force"], "is not a bundle: --force replaces bundles"),
        (["--out", tmp_path / "file", "--force"], "is not a bundle: --force replaces bundles"),
        (["--out", tmp_path / "file/bundle"], f"{tmp_path / 'file'} is not a folder"),
        (["--out", tmp_path / "file/a/bundle"], f"{tmp_path / 'file'} is not a folder"),
    ):
        assert message in mistake("build", *weights, *options)
    assert entries(tmp_path) == before


@pytest.mark.usefixtures("no_export")
def test_a_name_that_is_too_long(weights: list[object], tmp_path: Path) -> None:
    for name in ("a" * 300, "a" * 250, "a" * 300 + "/bundle"):
        assert "File name too long" in mistake("build", *weights, "--out", tmp_path / name)
    assert entries(tmp_path) == []


@pytest.mark.usefixtures("no_export")
def test_a_disk_without_room(
    weights: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage._replace(free=1_000_000))
    said = mistake("build", *weights, "--out", tmp_path / "a/b")
    assert said.startswith("the build needs ")
    assert f"and {tmp_path} has 1 MB free: make room, or choose another --out" in said
    assert entries(tmp_path) == []


# ----------------------------------------------------------------------- builds that do not end


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


@pytest.mark.usefixtures("small_bundle")  # its graphs are exported
def test_a_disk_that_fills_up(weights: list[object], shared_folder: Path, tmp_path: Path) -> None:
    command = ["build", *weights, "--out", tmp_path / "a/b"]
    said = end(start(*command, exports=shared_folder, preexec_fn=limit_file_size))
    assert sentence(said).startswith(f"cannot write {tmp_path / 'a/b'}: ")
    assert entries(tmp_path) == []


class ReadWeights(ir.passes.InPlacePass):
    """A pass that maps the weights, as the real ones do."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for value in model.graph.initializers.values():
            assert value.const_value is not None
            value.const_value.numpy()
        return ir.passes.PassResult(model, modified=False)


def map_more_than_there_is(folder: Path) -> None:
    """Maps a file of 1 GB where the process may have 256 MB more; onnx_ir wraps what happens."""
    size = 2**30
    with open(folder / "weights.data", "wb") as file:
        file.truncate(size)
    tensor = ir.ExternalTensor(
        *("weights.data", 0, size, ir.DataType.UINT8),
        shape=ir.Shape([size]),
        name="weight",
        base_dir=folder,
    )
    weight = ir.Value(name="weight", const_value=tensor)
    graph = ir.Graph([], [], nodes=[], initializers=[weight], opset_imports={"": 20})
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28, hard))
    try:
        ir.passes.Sequential(ReadWeights())(ir.Model(graph, ir_version=10))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize(
    ("shortage", "error"),
    [
        (lambda folder: torch.empty(2**55), RuntimeError),
        (lambda folder: np.empty(2**55), MemoryError),
        (map_more_than_there_is, ir.passes.PassError),
    ],
)
def test_memory_that_runs_out(
    small_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shortage: Callable[[Path], object],
    error: type[Exception],
) -> None:
    def write_some_graphs(folder: Path, *_: object) -> None:
        folder.mkdir()
        with pytest.raises(error) as raised:
            shortage(folder)
        raise raised.value

    monkeypatch.setattr(lpd_export.build.build, "write_exact_graphs", write_some_graphs)
    with pytest.raises(UserError, match=r"^memory ran out during the build: end other programs"):
        build(request_of(small_weights, tmp_path / "a/b"))
    assert entries(tmp_path) == []


def test_a_bundle_that_computes_something_else(
    small_bundle: Path, small_weights: Path, tmp_path: Path
) -> None:
    for change, message in (
        ("head.weight", "the logits of step 1 differ from the reference's by"),
        ("token_emb.weight", "the logits of step 2 differ"),  # no tokens before the first step
        (None, ""),
    ):
        state = state_of(small_weights / "lpd.pth")
        if change:
            state[change] = state[change].flip(0)
        request = BuildRequest(
            checkpoint=str(save(tmp_path / "lpd.pth", state)),
            tokenizer=str(small_weights / "vq.pt"),
            steps=4,
        )
        source = lpd_export.build.build.load(request, print)
        settings = lpd_export.build.build.settle(request, source)
        check = lpd_export.build.check.reference_check(source, settings)
        manifest, told = Bundle.open(small_bundle).manifest, list[str]()
        compare = partial(
            lpd_export.build.check.compare_with_reference,
            *(small_bundle / "onnx", manifest, settings, check, told.append),
        )
        if change is None:
            compare()
            assert told == ["comparing the graphs with the reference"]
            continue
        with pytest.raises(UserError, match=f"^the bundle was not written: {message}"):
            compare()


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (UserError("no"), UserError),
        (OSError(28, "No space left on device"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("a bug"), RuntimeError),
    ],
)
def test_a_failure_in_the_middle_leaves_nothing(
    small_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    expected: type[BaseException],
) -> None:
    def write_some_graphs(folder: Path, *_: object) -> None:
        folder.mkdir()
        (folder / "decode.onnx").touch()
        raise failure

    monkeypatch.setattr(lpd_export.build.build, "write_exact_graphs", write_some_graphs)
    with pytest.raises(expected):
        build(request_of(small_weights, tmp_path / "a/b"))
    assert entries(tmp_path) == []


@pytest.mark.parametrize(
    ("stage", "signals"),
    [
        ("loading torch", [signal.SIGINT]),
        ("reading", [signal.SIGHUP]),
        ("exporting decode", [signal.SIGINT]),
        # An impatient user's.
        ("comparing", [signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGTERM]),
    ],
)
def test_a_stopped_build_leaves_nothing(
    weights: list[object],
    shared_folder: Path,
    tmp_path: Path,
    stage: str,
    signals: list[signal.Signals],
) -> None:
    # What stops in the exporter must be in it; what stops after it need not have been.
    exports = shared_folder if stage == "comparing" else None
    process = start("build", *weights, "--out", tmp_path / "a/b", exports=exports)
    wait_for(process, stage)
    for number in signals:
        process.send_signal(number)
    said = end(process)
    assert said.code == 130, said
    assert said.err.splitlines()[-1] == "lpd-export: interrupted"
    assert "Traceback" not in said.err
    assert said.out == ""
    assert entries(tmp_path) == []


def ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_a_build_in_the_background_can_be_ended(weights: list[object], tmp_path: Path) -> None:
    # A script's `&` starts commands that ignore Ctrl-C, but kill must still end them.
    process = start("build", *weights, "--out", tmp_path / "a", preexec_fn=ignore_interrupt)
    wait_for(process, "loading torch")
    process.send_signal(signal.SIGINT)
    wait_for(process, "exporting decode")
    process.send_signal(signal.SIGTERM)
    assert end(process).code == 130
    assert entries(tmp_path) == []


def test_after_a_killed_build(weights: list[object], shared_folder: Path, tmp_path: Path) -> None:
    command = ["build", *weights, "--out", tmp_path / "bundle"]
    killed = start(*command, exports=shared_folder)
    wait_for(killed, "exporting detokenize")
    killed.send_signal(signal.SIGSTOP)
    refused = answer(*command)
    assert "another build is writing" in sentence(refused)
    killed.kill()
    assert end(killed).code == -signal.SIGKILL
    assert ".bundle.partial" in entries(tmp_path)
    assert not (tmp_path / "bundle").exists()
    said: Answer = answer(*command)
    assert said.code == 0, said
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert len(Bundle.open(tmp_path / "bundle").files()) == 9
