"""Checkpoints: the released formats, damaged and foreign files, resizing, and the hub."""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import os
import pickle
import random
import resource
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lpd_reference import (
    LPD,
    CheckpointError,
    LPDConfig,
    VQConfig,
    VQTokenizer,
    generate,
    load_lpd,
    load_tokenizer,
)
from lpd_reference.checkpoint import (
    choose_weight_file,
    locate,
    locate_all,
    read_state_dict,
    resize_positions,
)

MODELS = Path(__file__).parents[1] / "data" / "lpd-emoji32"
EMOJI_LPD = MODELS / "lpd_emoji32.pth"
EMOJI_VQ = MODELS / "vq_emoji32.pt"

SMALL_LPD = LPDConfig(64, 2, 1, 4, num_classes=3, vocab_size=10)
SMALL_VQ = VQConfig(32, (1, 2), 1, 32, 16, 4)

State = dict[str, Tensor]
Loader = Callable[[Path], object]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small are not worth waking another core for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def lpd_state(seed: int = 0) -> State:
    return dict(LPD(SMALL_LPD).initialize(seed).state_dict())


def vq_state(seed: int = 0) -> State:
    return dict(VQTokenizer(SMALL_VQ).initialize(seed).state_dict())


def write(path: Path, content: Any, legacy: bool = False) -> Path:
    """A file as `torch.save` writes it, in the zip format or the one before PyTorch 1.6."""
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def write_safetensors(path: Path, state: State) -> Path:
    """The same weights in the format that is the quickest to write and read."""
    safetensors.torch.save_file(state, path)
    return path


def released(state: State) -> dict[str, Any]:
    """Weights among what the authors' training script saves beside them."""
    return {
        "model": state,
        "optimizer": {"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.ones(7)}}},
        "epoch": 12,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="lpd_small", lr=1e-4, label_drop_prob=0.1),
    }


def same(model: LPD | VQTokenizer, state: State) -> bool:
    loaded = model.state_dict()
    return all(loaded[key].equal(state[key].float()) for key in loaded)


def refusal(load: Loader, path: Path) -> str:
    """What a loader says of a file that it must refuse: one sentence that names the file."""
    with pytest.raises(CheckpointError) as raised:
        load(path)
    message = str(raised.value)
    assert str(path) in message
    assert "\n" not in message
    assert not message.endswith(".")
    return message


# ------------------------------------------------------------------------- the released formats


def test_the_released_lpd_file() -> None:
    model = load_lpd(EMOJI_LPD)
    assert model.config == LPDConfig(256, 6, 4, 16, num_classes=15, vocab_size=1024)
    assert model.config.mlp_dim == 1024
    assert same(model, torch.load(EMOJI_LPD, weights_only=False)["model"])
    assert not model.training
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad


def test_the_released_tokenizer_file() -> None:
    tokenizer = load_tokenizer(str(EMOJI_VQ))
    assert tokenizer.config == VQConfig(32, (1, 2), 1, 64, 1024, 8)
    assert tokenizer.config.stride == 2
    state = torch.load(EMOJI_VQ, weights_only=True)["model"]
    assert "quantize.codebook_used" in state
    assert same(tokenizer, state)
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())


def test_released_weights_make_pictures_on_white() -> None:
    model, tokenizer = load_lpd(EMOJI_LPD), load_tokenizer(EMOJI_VQ)
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(256, generator=generator) for _ in range(4)])
    uniform = torch.rand(4, 256, generator=generator, dtype=torch.float64)
    tokens = generate(
        model, torch.tensor([0, 4, 9, 14]), orders, [1, 15, 40, 80, 120], uniform, cfg=3.0
    ).token_ids
    images = tokenizer.decode(tokens)
    assert images.shape == (4, 3, 32, 32)
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.median() > 0.9
    assert images[:, :, 12:20, 12:20].mean() < 0.7


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [released, dict, lambda state: {"model": state}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_pickled_form(
    tmp_path: Path, wrap: Callable[[State], Any], legacy: bool, dtype: torch.dtype
) -> None:
    state = {key: value.to(dtype) for key, value in lpd_state().items()}
    model = load_lpd(write(tmp_path / "small.pth", wrap(state), legacy))
    assert model.config == SMALL_LPD
    assert same(model, state)
    state = {key: value.to(dtype) for key, value in vq_state().items()}
    tokenizer = load_tokenizer(write(tmp_path / "small.pt", wrap(state), legacy))
    assert tokenizer.config == SMALL_VQ
    assert same(tokenizer, state)


def test_safetensors(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "lpd.safetensors", lpd_state())
    assert same(load_lpd(path), lpd_state())
    path = write_safetensors(tmp_path / "vq.safetensors", vq_state())
    assert same(load_tokenizer(path), vq_state())


def test_weights_outlive_their_file(tmp_path: Path) -> None:
    path = write(tmp_path / "small.pth", released(lpd_state()))
    model = load_lpd(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert same(model, lpd_state())


def test_heads_are_told_or_read_off_the_width(tmp_path: Path) -> None:
    path = write(tmp_path / "small.pth", lpd_state())
    assert load_lpd(path).config.heads == 1
    model = load_lpd(path, heads=4)
    assert model.config.heads == 4
    tokens, orders = torch.zeros(1, 16, dtype=torch.int64), torch.arange(16)[None]
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(20)
        one = LPD(SMALL_LPD)
        one.load_state_dict(model.state_dict())
        difference = one(tokens, None, orders, [4, 12]) - model(tokens, None, orders, [4, 12])
    assert difference.abs().max() > 1e-4


def test_an_optimizer_beside_the_weights_is_not_read(tmp_path: Path) -> None:
    """A released file is three times its weights; only these may come into memory."""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads the peak of the memory from /proc")
    megabytes = 200
    checkpoint = released(lpd_state())
    checkpoint["optimizer"] = torch.ones(megabytes << 20, dtype=torch.uint8)
    path = write(tmp_path / "large.pth", checkpoint)
    del checkpoint
    program = """
import sys
from lpd_reference import load_lpd

def peak_kilobytes():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

load_lpd(sys.argv[1])
before = peak_kilobytes()
load_lpd(sys.argv[2])
assert "torch._dynamo" not in sys.modules  # nobody needs it, and importing it takes 2 s
print((peak_kilobytes() - before) // 1024)
"""
    small = write(tmp_path / "small.pth", released(lpd_state()))
    try:
        answer = subprocess.run(
            [sys.executable, "-c", program, small, path], capture_output=True, text=True, check=True
        )
    finally:
        path.unlink()
    assert int(answer.stdout) < megabytes / 4


# ----------------------------------------------------------------------------- files that attack


class SystemCall:
    """Pickled into a file, it would leave a marker when loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


class Evaluation(SystemCall):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.marker)!r}, 'w')",)


class Opening(SystemCall):
    def __reduce__(self) -> tuple[Any, ...]:
        return io.open, (str(self.marker), "w")


@pytest.mark.parametrize("attack", [SystemCall, Evaluation, Opening])
@pytest.mark.parametrize("place", ["alone", "beside the weights", "among the weights"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_not_run(
    tmp_path: Path, attack: type[SystemCall], place: str, form: str
) -> None:
    marker, path = tmp_path / "marker", tmp_path / "attack.pth"
    content: Any = attack(marker)
    if place == "beside the weights":
        content = {"model": lpd_state(), "optimizer": content}
    elif place == "among the weights":
        content = {"model": {**lpd_state(), "head.bias": content}}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        write(path, content, legacy=form == "legacy")
    for load in (load_lpd, load_tokenizer):
        message = refusal(load, path)
        assert not marker.exists()
        if form != "pickle" or place == "alone":
            assert "could run code, and was not loaded" in message
    if place == "alone":  # the trap is a real one
        if form == "pickle":
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
        assert marker.exists()


def test_the_training_arguments_hold_no_code(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    checkpoint = released(lpd_state())
    checkpoint["args"].hook = SystemCall(marker)
    path = write(tmp_path / "attack.pth", checkpoint)
    assert "could run code" in refusal(load_lpd, path)
    assert not marker.exists()


# ----------------------------------------------------------------------------------- bad files


def test_files_that_are_not_there(tmp_path: Path) -> None:
    loaders: list[Loader] = [load_lpd, load_tokenizer, locate]
    for load in loaders:
        assert refusal(load, tmp_path / "gone.pth").startswith("there is no checkpoint")
        assert "is a folder; give the checkpoint file inside it" in refusal(load, tmp_path)


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "small.pth", lpd_state())
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert "Permission denied" in refusal(load_lpd, path)


@pytest.mark.parametrize("name", ["small.pth", "legacy.pth", "small.safetensors"])
@given(data=st.data())
@settings(max_examples=40)
def test_a_truncated_file(folder: Path, name: str, data: st.DataObject) -> None:
    whole = folder / name
    if not whole.exists():
        if whole.suffix == ".safetensors":
            write_safetensors(whole, lpd_state())
        else:
            write(whole, released(lpd_state()), legacy=whole.stem == "legacy")
    content = whole.read_bytes()
    length = data.draw(
        st.one_of(st.integers(0, 300), st.integers(0, len(content) - 1), st.just(len(content) - 1))
    )
    cut = folder / f"cut_{name}"
    cut.write_bytes(content[:length])
    message = refusal(load_lpd, cut)
    # Cut within a type's name, a file of the old format seems to ask for an unknown type.
    assert "is truncated or is not a" in message or (
        whole.stem == "legacy" and "holds Python objects" in message
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"A text file.\n",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1337\n",
        b"<!DOCTYPE html><html><body>404</body></html>",
        b"PK\x03\x04 and then nothing",
        b"\x80",
        b"\x80\x02\x8a",
        b"0",
        b"r\xe4f\x94A",
        b".",
        b'{"weights": [1, 2, 3]}',
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ""])
def test_files_of_other_formats(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    kind = "safetensors file" if suffix == ".safetensors" else "PyTorch checkpoint"
    assert refusal(load_lpd, path) == f"{path} is truncated or is not a {kind}"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@given(st.binary(max_size=60), st.sampled_from([".pth", ".safetensors"]))
@settings(max_examples=300)
def test_random_bytes(folder: Path, content: bytes, suffix: str) -> None:
    path = folder / f"random{suffix}"
    path.write_bytes(content)
    refusal(load_lpd, path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_with_a_flipped_byte_is_told_or_loads(tmp_path: Path, legacy: bool) -> None:
    path = write(
        tmp_path / "small.pth", {"model": {"a": torch.ones(3), "b": torch.ones(2)}}, legacy
    )
    content, random_numbers = path.read_bytes(), random.Random(0)
    outcomes = set()
    for _ in range(400):
        damaged = bytearray(content)
        damaged[random_numbers.randrange(len(content))] ^= random_numbers.randint(1, 255)
        path.write_bytes(damaged)
        try:
            read_state_dict(path)
            outcomes.add("loaded")
        except CheckpointError as error:
            outcomes.add(type(error.__cause__).__name__)
    assert (
        {"loaded", "UnpicklingError", "IndexError"} if legacy else {"loaded", "BadZipFile"}
    ) <= (outcomes)


@pytest.mark.parametrize(
    "content",
    [{}, {"model": {}}, {"epoch": 3}, {"model": {"name": "x"}}, [torch.ones(2)], torch.ones(2), 7],
)
def test_files_without_named_weights(tmp_path: Path, content: Any) -> None:
    path = write(tmp_path / "empty.pth", content)
    assert refusal(load_lpd, path) == f"{path} holds no named weights"


# ------------------------------------------------------------------------------- foreign weights


def test_a_foreign_checkpoint(tmp_path: Path) -> None:
    resnet = {
        "conv1.weight": torch.zeros(64, 3, 7, 7),
        "bn1.weight": torch.zeros(64),
        "layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1),
        "fc.weight": torch.zeros(1000, 64),
    }
    path = write(tmp_path / "resnet.pth", {"model": resnet, "epoch": 90})
    holds = r"(it holds conv1.weight, bn1.weight, layer1.0.conv1.weight, ...)"
    assert refusal(load_lpd, path) == (
        f"{path} is not an LPD checkpoint: the key class_emb.weight is missing {holds}"
    )
    assert refusal(load_tokenizer, path) == (
        f"{path} is not a VQ tokenizer: the key encoder.conv_in.weight is missing {holds}"
    )


def test_model_and_tokenizer_swapped() -> None:
    message = refusal(load_lpd, EMOJI_VQ)
    assert message.startswith(f"{EMOJI_VQ} is not an LPD checkpoint: the key class_emb.weight")
    message = refusal(load_tokenizer, EMOJI_LPD)
    assert message.startswith(f"{EMOJI_LPD} is not a VQ tokenizer: the key encoder.conv_in.weight")


def both_models() -> list[tuple[Loader, str, State]]:
    return [
        (load_lpd, "an LPD checkpoint", lpd_state()),
        (load_tokenizer, "a VQ tokenizer", vq_state()),
    ]


@pytest.fixture
def _made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules without weights are the same for all files of an architecture that are refused."""
    for model in (LPD, VQTokenizer):
        monkeypatch.setattr(f"lpd_reference.checkpoint.{model.__name__}", functools.cache(model))


@pytest.mark.usefixtures("_made_once")
def test_each_key_is_missed(tmp_path: Path) -> None:
    for load, kind, state in both_models():
        for key in state:
            rest = {other: value for other, value in state.items() if other != key}
            message = refusal(load, write_safetensors(tmp_path / "part.safetensors", rest))
            assert f"is not {kind}: the key {key} is missing" in message


def test_many_keys_are_missed_in_one_sentence(tmp_path: Path) -> None:
    rest = {key: value for key, value in lpd_state().items() if not key.startswith("blocks.1.attn")}
    message = refusal(load_lpd, write(tmp_path / "part.pth", rest | {"blocks.1.x": torch.ones(1)}))
    assert message.endswith("the key blocks.1.attn.qkv.weight is missing and 3 more")


@pytest.mark.usefixtures("_made_once")
def test_each_wrong_size_is_told(tmp_path: Path) -> None:
    # Numbers of classes and of codebook rows are the checkpoint's to choose.
    free = {("class_emb.weight", 0), ("quantize.embedding.weight", 0)}
    for load, kind, state in both_models():
        for key, value in state.items():
            # Of a convolution the widths; a kernel's size is no different from these.
            for axis in range(2 if value.dim() == 4 else value.dim()):
                longer = torch.cat([value, value.narrow(axis, 0, 1)], dim=axis)
                path = write_safetensors(tmp_path / "a.safetensors", {**state, key: longer})
                if (key, axis) in free:
                    load(path)
                else:
                    message = refusal(load, path)
                    assert f"is not {kind}: " in message or "not a multiple of 64" in message


@pytest.mark.usefixtures("_made_once")
def test_each_wrong_number_of_dimensions_is_told(tmp_path: Path) -> None:
    for load, kind, state in both_models():
        for key, value in state.items():
            path = write_safetensors(tmp_path / "a.safetensors", {**state, key: value[None]})
            message = refusal(load, path)
            assert f"is not {kind}: {key} has shape {[1, *value.shape]}, " in message


@pytest.mark.parametrize(
    ("key", "shape", "ending"),
    [
        ("norm.weight", (63,), "norm.weight has shape [63], expected [64]"),
        ("head.weight", (10, 32), "head.weight has shape [10, 32], expected [10, 64]"),
        ("pos_embed", (1, 16, 64), "pos_embed has 16 rows, which is not 1 + a square grid"),
        ("pos_embed", (1, 1, 64), "pos_embed has 1 rows, which is not 1 + a square grid"),
        ("pos_embed", (1, 0, 64), "pos_embed has 0 rows, which is not 1 + a square grid"),
        ("pos_embed", (17, 64), "pos_embed has shape [17, 64], where 3 dimensions are expected"),
    ],
)
def test_shapes_that_do_not_fit(
    tmp_path: Path, key: str, shape: tuple[int, ...], ending: str
) -> None:
    path = write(tmp_path / "wrong.pth", {**lpd_state(), key: torch.ones(shape)})
    assert refusal(load_lpd, path) == f"{path} is not an LPD checkpoint: {ending}"


@pytest.mark.parametrize("channels", [0, 16, 48])
def test_a_tokenizer_whose_channels_make_no_groups(tmp_path: Path, channels: int) -> None:
    state = {**vq_state(), "encoder.conv_in.weight": torch.ones(channels, 3, 3, 3)}
    message = refusal(load_tokenizer, write(tmp_path / "wrong.pt", state))
    assert message.endswith(f"{channels} channels, not a multiple of 32")


def test_unexpected_keys(tmp_path: Path) -> None:
    for load, kind, state in both_models():
        path = write(tmp_path / "more.pth", {**state, "head.bias": torch.ones(10)})
        assert refusal(load, path) == f"{path} is not {kind}: unexpected key head.bias"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_values(tmp_path: Path, value: float) -> None:
    for load, kind, state in both_models():
        key = list(state)[-2]
        state[key].flatten()[-1] = value
        path = write(tmp_path / "broken.pth", state)
        assert refusal(load, path) == f"{path} is not {kind}: {key} holds NaN or infinite values"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda weight: weight.to(torch.complex64), "is a tensor of complex64"),
        (lambda weight: weight.to(torch.int32), "is a tensor of int32"),
        (lambda weight: weight > 0, "is a tensor of bool"),
        (lambda weight: weight.to(torch.float8_e4m3fn), "is a tensor of float8_e4m3fn"),
        (lambda weight: weight.to_sparse(), "is a sparse_coo tensor of float32"),
        (lambda weight: weight.to("meta"), "is a tensor of float32; weights must be dense"),
        (
            lambda weight: torch.zeros(1).expand(10**6, *weight.shape[1:]),
            "has shape [1000000, 64], of which the file has a part alone",
        ),
    ],
)
def test_weights_that_are_no_dense_floats(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], told: str
) -> None:
    for key in ("class_emb.weight", "norm.weight"):  # one that tells the architecture, one that not
        state = lpd_state()
        path = write(tmp_path / "odd.pth", {"model": state | {key: change(state[key])}})
        said = refusal(load_lpd, path)
        if "of which" in told and key == "norm.weight":
            assert f"{key} has shape [1000000], expected" in said
        else:
            assert said.startswith(f"{path} is not an LPD checkpoint: {key} {told}")


def test_weights_that_share_one_memory(tmp_path: Path) -> None:
    # As many blocks as one likes, all the same bytes of the file.
    state = {k: v for k, v in lpd_state().items() if not k.startswith("blocks.")}
    block = {k.removeprefix("blocks.0."): v for k, v in lpd_state().items() if "blocks.0." in k}
    state |= {f"blocks.{i}.{key}": weight for i in range(40) for key, weight in block.items()}
    said = refusal(load_lpd, write(tmp_path / "shared.pth", {"model": state}))
    assert "its weights share" in said


@pytest.mark.parametrize("place", ["pickle", "zip"])
def test_memory_that_is_not_in_the_file(tmp_path: Path, place: str) -> None:
    # torch's unpickler would call bytearray with any number.
    attack = b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x0f\x85R."
    path = tmp_path / "attack.pth"
    if place == "pickle":
        path.write_bytes(attack)
    else:
        whole = write(tmp_path / "whole.pth", {"model": lpd_state()})
        with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as archive:
            for name in source.namelist():
                pickled = name.endswith("data.pkl")
                archive.writestr(name, attack if pickled else source.read(name))
    assert refusal(load_lpd, path) == (
        f"{path} asks for memory beside its weights, and was not loaded"
    )


def test_a_compressed_checkpoint(tmp_path: Path) -> None:
    whole, path = write(tmp_path / "whole.pth", {"model": lpd_state()}), tmp_path / "small.pth"
    with (
        zipfile.ZipFile(whole) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    assert refusal(load_lpd, path) == f"{path} is compressed, as no PyTorch checkpoint is"


def test_a_storage_larger_than_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "legacy.pth", {"model": {"a": torch.ones(3)}}, legacy=True)
    # After the device stands how many values the storage has: 3 becomes 2**45.
    content = path.read_bytes()
    at = content.index(b"K\x03", content.index(b"cpu"))
    number = b"\x8a\x06" + (2**45).to_bytes(6, "little")
    path.write_bytes(content[:at] + number + content[at + 2 :])
    assert refusal(load_lpd, path) == f"{path} is truncated or is not a PyTorch checkpoint"


@pytest.mark.parametrize("heads", [0, -1, 3, 5, 128])
def test_heads_that_do_not_divide_the_width(tmp_path: Path, heads: int) -> None:
    path = write(tmp_path / "small.pth", lpd_state())
    message = refusal(lambda path: load_lpd(path, heads=heads), path)
    assert message == f"{path}: the model's width 64 does not divide into {heads} heads"


def test_a_width_that_does_not_tell_the_heads(tmp_path: Path) -> None:
    config = LPDConfig(96, 1, 3, 2, num_classes=3, vocab_size=10)
    path = write(tmp_path / "wide.pth", LPD(config).initialize(0).state_dict())
    assert refusal(load_lpd, path) == (
        f"{path}: the model's width 96 is not a multiple of 64: say how many attention heads it has"
    )
    assert load_lpd(path, heads=3).config == config


# ------------------------------------------------------------------------ resizing the positions


def cubic_weights(length: int, target: int) -> np.ndarray:
    """[target, length] weights of cubic convolution with a = -0.75, the edge repeated."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    weights = np.zeros((target, length))
    for i in range(target):
        place = (i + 0.5) * length / target - 0.5
        for tap in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            weights[i, min(max(tap, 0), length - 1)] += kernel(place - tap)
    return weights


@pytest.mark.parametrize(("old", "new"), list(itertools.product([4, 5, 8], [2, 3, 6, 8, 16])))
def test_positions_are_resized_by_cubic_convolution(old: int, new: int) -> None:
    positions = torch.randn(1, old * old + 1, 6, generator=torch.Generator().manual_seed(old))
    resized = resize_positions({"pos_embed": positions}, new)["pos_embed"]
    assert resized.shape == (1, new * new + 1, 6)
    assert resized[:, 0].equal(positions[:, 0])
    weights = cubic_weights(old, new)
    field = positions[0, 1:].double().numpy().reshape(old, old, 6)
    expected = np.einsum("ir,jc,rcd->ijd", weights, weights, field).reshape(-1, 6)
    np.testing.assert_allclose(resized[0, 1:].numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("new", [4, 6, 8, 12, 16, 32])
def test_flat_and_sloping_fields_keep_their_form(new: int) -> None:
    old = 16
    row, column = torch.meshgrid(torch.arange(old), torch.arange(old), indexing="ij")
    field = torch.stack([torch.full((old, old), 3.0), row, column], dim=-1).flatten(0, 1)
    condition = torch.tensor([[7.0, 8.0, 9.0]])
    state = {"pos_embed": torch.cat([condition, field])[None], "other": torch.ones(1)}
    resized = resize_positions(state, new)
    assert resized["other"] is state["other"]
    assert resized["pos_embed"][:, 0].equal(condition)
    flat, rows, columns = resized["pos_embed"][0, 1:].unflatten(0, (new, new)).unbind(-1)
    torch.testing.assert_close(flat, torch.full((new, new), 3.0))
    place = (torch.arange(new) + 0.5) * old / new - 0.5
    inside = (place >= 1) & (place <= old - 3)
    assert inside.any()
    # Cubic convolution with a = -0.75 bends a slope by up to 0.0481 of a cell between two cells.
    tolerance = 1e-4 if old % new == 0 else 0.0482
    for ramp in (rows, columns.T):
        assert (ramp[inside] - place[inside, None]).abs().max() < tolerance
        assert (ramp.diff(dim=0) > 0).all()


def test_the_same_grid_changes_nothing(tmp_path: Path) -> None:
    state = lpd_state()
    assert resize_positions(state, 4)["pos_embed"] is state["pos_embed"]
    assert same(load_lpd(write(tmp_path / "small.pth", state), grid=4), state)


@pytest.mark.parametrize("grid", [2, 6])
def test_a_resized_model_generates(tmp_path: Path, grid: int) -> None:
    state = {key: value.half() for key, value in lpd_state().items()}
    model = load_lpd(write(tmp_path / "small.pth", released(state)), grid=grid)
    assert (model.config.grid, model.config.heads) == (grid, 1)
    cells = grid * grid
    orders = torch.randperm(cells, generator=torch.Generator().manual_seed(0)).expand(2, -1)
    uniform = torch.full((2, cells), 0.5, dtype=torch.float64)
    result = generate(model, torch.tensor([0, 2]), orders, [1, cells - 1], uniform, cfg=2.0)
    assert result.token_ids.shape == (2, cells)
    assert result.logits.isfinite().all()
    # Everything but the positions is as it was.
    resized = model.state_dict()
    assert all(resized[key].equal(state[key].float()) for key in state if key != "pos_embed")


# ---------------------------------------------------------------------------------------- the hub


@pytest.mark.parametrize(
    "source",
    [
        "hf:",
        "hf:name",
        "hf:/name",
        "hf:org/",
        "hf:org/name/",
        "hf:org//file.pth",
        "hf:org/name/../file.pth",
        "hf:org name/model",
        "hf:-org/name",
        "hf:org/na--me",
        "hf:org/name.git",
        "hf:org/na?me",
        "hf:org/name@",
        "hf:org/name@/file.pth",
    ],
)
def test_names_that_are_no_repository(source: str) -> None:
    for load in (load_lpd, load_tokenizer):
        with pytest.raises(
            CheckpointError, match=r"is not (of the form hf:ORG/NAME|a Hugging Face)"
        ):
            load(source)


def test_choosing_a_weight_file() -> None:
    only = ["README.md", ".gitattributes", "config.json", "model.pth"]
    assert choose_weight_file("org/lpd", only) == "model.pth"
    assert choose_weight_file("org/lpd", ["folder/model.safetensors"]) == "folder/model.safetensors"
    several = ["ema.pth", "lpd_l.pth", "lpd_l_256.pth", "x.pt", "y.safetensors"]
    assert choose_weight_file("org/lpd_l_256", several) == "lpd_l_256.pth"
    assert choose_weight_file("org/x", several) == "x.pt"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "org/name holds no .pth / .pt / .safetensors file"),
        (["README.md", "model.bin", "pth"], "org/name holds no .pth / .pt / .safetensors file"),
        (
            ["b.pth", "a.pt", "README.md"],
            "org/name holds 2 weight files (a.pt, b.pth): name one as hf:org/name/FILE",
        ),
        (
            ["name.pth", "name.safetensors"],
            "org/name holds 2 weight files (name.pth, name.safetensors): "
            "name one as hf:org/name/FILE",
        ),
        (
            [f"{i}.pth" for i in range(10)],
            "org/name holds 10 weight files (0.pth, 1.pth, 2.pth, 3.pth, 4.pth, 5.pth, 6.pth, "
            "7.pth): name one as hf:org/name/FILE",
        ),
    ],
)
def test_repositories_without_an_obvious_weight_file(files: list[str], message: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        choose_weight_file("org/name", files)
    assert str(raised.value) == message


COMMIT = "0123456789abcdef0123456789abcdef01234567"

Repositories = dict[str, dict[str, bytes]]


class Hub(ThreadingHTTPServer):
    """As much of the Hugging Face hub as downloading a file needs, on this machine."""

    daemon_threads = True

    def __init__(self, repositories: Repositories) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.repositories = repositories
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubRequest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append((self.command, path))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.tree("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        elif len(parts) > 4 and parts[2] == "resolve":
            self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.reply(200, b"hub")

    def tree(self, repository: str, revision: str) -> None:
        """The list of a repository's files."""
        if not self.allow(repository, revision):
            return
        files = [
            {"type": "file", "path": name, "size": len(content), "oid": f"{len(name):040x}"}
            for name, content in self.server.repositories[repository].items()
        ]
        self.reply(200, json.dumps(files).encode(), {"Content-Type": "application/json"})

    def file(self, repository: str, revision: str, name: str) -> None:
        if not self.allow(repository, revision):
            return
        content = self.server.repositories[repository].get(name)
        if content is None:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            etag = f'"{len(content):x}-{name.replace("/", "-")}"'
            self.reply(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def allow(self, repository: str, revision: str) -> bool:
        if repository.endswith("/gated"):
            self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        elif repository.endswith("/private"):
            self.reply(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif repository not in self.server.repositories:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", COMMIT):
            self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif repository.endswith("/broken"):
            self.reply(500, b"")
        else:
            return True
        return False

    def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Keeps the test's output clean."""


LOAD_SOURCES = """
import json, sys, time
from lpd_reference import CheckpointError, load_lpd, load_tokenizer
from lpd_reference.checkpoint import lasting_source, locate

answers = {}
for source in sys.argv[1:]:
    load = load_tokenizer if "vq" in source else load_lpd
    started, again = time.monotonic(), None
    try:
        again = lasting_source(source, locate(source))
        answer = sum(value.double().sum().item() for value in load(source).state_dict().values())
    except CheckpointError as error:
        answer = str(error)
    answers[source] = [answer, time.monotonic() - started, again]
print(json.dumps(answers))
"""

IMPATIENT = "import time; time.sleep = lambda seconds: None"
"""The hub's library waits 23 seconds between its questions to a server that fails."""

Answers = dict[str, tuple[float | str, float, str | None]]


def load_from_hub(
    endpoint: str,
    home: Path,
    sources: list[str],
    offline: bool = False,
    prepare: Callable[[], None] | None = None,
    patient: bool = True,
) -> tuple[Answers, str]:
    """Loads in a fresh process, as the hub's address is read once.

    Gives of each source the sum of its weights or the error, the seconds it took, and the source
    by which it is found again; and standard error.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k}
    environment = {
        **{k: v for k, v in clean.items() if "PROXY" not in k},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": str(int(offline)),
    }
    finished = subprocess.run(
        [sys.executable, "-c", ("" if patient else IMPATIENT) + LOAD_SOURCES, *sources],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        preexec_fn=prepare,
    )
    return json.loads(finished.stdout), finished.stderr


def pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def total(state: State) -> float:
    return sum(value.double().sum().item() for value in state.values())


HUB_SOURCES = [
    "hf:org/lpd_small",
    "hf:org/lpd_small/lpd_small.pth",
    "hf:org/lpd_small/other/ema.safetensors",
    "hf:org/lpd_small/vq.pt",
    "hf:org/lpd_small/gone.pth",
    "hf:org/several",
    "hf:org/without",
    "hf:org/missing",
    "hf:org/missing/file.pth",
    "hf:org/private",
    "hf:org/gated",
    "hf:org/gated/file.pth",
    "hf:org/damaged",
    "hf:org/broken/file.pth",
    f"hf:org/lpd_small@{COMMIT}",
    "hf:org/lpd_small@main/lpd_small.pth",
    "hf:org/lpd_small@v9",
    "hf:org/lpd_small@v9/lpd_small.pth",
]


@pytest.fixture(scope="module")
def hub_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub_answers(hub_home: Path) -> Iterator[tuple[Answers, list[tuple[str, str]]]]:
    """What loading each of HUB_SOURCES gives, and what was asked of the hub."""
    hub = Hub(
        {
            "org/lpd_small": {
                "README.md": b"A small model.",
                "lpd_small.pth": pickled(released(lpd_state(1))),
                "other/ema.safetensors": safetensors.torch.save(lpd_state(2)),
                "vq.pt": pickled({"model": vq_state(3)}),
            },
            "org/several": {"a.pth": b"", "b.pth": b""},
            "org/without": {"README.md": b""},
            "org/broken": {"file.pth": b""},
            "org/damaged": {"weights.pth": pickled(lpd_state())[:1000]},
        }
    )
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield load_from_hub(hub.url, hub_home, HUB_SOURCES, patient=False)[0], hub.requests
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "state"),
    [
        ("hf:org/lpd_small/lpd_small.pth", lpd_state(1)),
        ("hf:org/lpd_small/other/ema.safetensors", lpd_state(2)),
        ("hf:org/lpd_small/vq.pt", vq_state(3)),
    ],
)
def test_a_file_is_downloaded(
    hub_answers: tuple[Answers, list[tuple[str, str]]], source: str, state: State
) -> None:
    answers, requests = hub_answers
    assert answers[source][0] == pytest.approx(total(state), rel=1e-9)
    file = source.removeprefix("hf:org/lpd_small/")
    assert requests.count(("GET", f"/org/lpd_small/resolve/main/{file}")) == 1
    assert answers[source][2] == f"hf:org/lpd_small@{COMMIT}/{file}"


@pytest.mark.slow
def test_a_repository_alone_means_its_namesake(
    hub_answers: tuple[Answers, list[tuple[str, str]]], hub_home: Path
) -> None:
    answers, _ = hub_answers
    for source in ("hf:org/lpd_small", f"hf:org/lpd_small@{COMMIT}"):
        assert answers[source][0] == pytest.approx(total(lpd_state(1)), rel=1e-9)
        assert answers[source][2] == f"hf:org/lpd_small@{COMMIT}/lpd_small.pth"
    assert [path.name for path in hub_home.rglob("lpd_small.pth")] == ["lpd_small.pth"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:org/lpd_small/gone.pth", "org/lpd_small holds no file gone.pth"),
        (
            "hf:org/several",
            "org/several holds 2 weight files (a.pth, b.pth): name one as hf:org/several/FILE",
        ),
        ("hf:org/without", "org/without holds no .pth / .pt / .safetensors file"),
        ("hf:org/missing", "the Hugging Face hub has no repository org/missing"),
        ("hf:org/missing/file.pth", "the Hugging Face hub has no repository org/missing"),
        ("hf:org/private", "the Hugging Face hub has no repository org/private"),
        ("hf:org/lpd_small@v9", "org/lpd_small has no revision v9"),
        ("hf:org/lpd_small@v9/lpd_small.pth", "org/lpd_small has no revision v9"),
        *(
            (
                source,
                "org/gated asks for a login on the Hugging Face hub: accept its terms there and "
                "run `hf auth login`",
            )
            for source in ("hf:org/gated", "hf:org/gated/file.pth")
        ),
    ],
)
def test_what_the_hub_does_not_give(
    hub_answers: tuple[Answers, list[tuple[str, str]]], source: str, message: str
) -> None:
    assert hub_answers[0][source][0] == message


@pytest.mark.slow
def test_a_damaged_download(hub_answers: tuple[Answers, list[tuple[str, str]]]) -> None:
    message = hub_answers[0]["hf:org/damaged"][0]
    assert str(message).endswith("weights.pth is truncated or is not a PyTorch checkpoint")


CACHED = [
    "hf:org/lpd_small/lpd_small.pth",
    f"hf:org/lpd_small@{COMMIT}/lpd_small.pth",
    "hf:org/lpd_small",
]
UNKNOWN = {
    "hf:mit-han-lab/lpd_l_256": "`hf download mit-han-lab/lpd_l_256`",
    "hf:mit-han-lab/lpd_l_256@v1/a.pth": (
        "`hf download mit-han-lab/lpd_l_256 a.pth --revision v1`"
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("hub_answers")
@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_out_of_reach(hub_home: Path, offline: bool) -> None:
    cached = CACHED if offline else CACHED[:2]
    with socket.socket() as closed:  # bound, so that it stays closed, and not listened on
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        answers, noise = load_from_hub(endpoint, hub_home, [*cached, *UNKNOWN], offline)
    for source in cached:
        assert answers[source][0] == pytest.approx(total(lpd_state(1)), rel=1e-9)
        assert answers[source][2] == f"hf:org/lpd_small@{COMMIT}/lpd_small.pth"
    reason = (
        "HF_HUB_OFFLINE keeps this process offline"
        if offline
        else "the Hugging Face hub cannot be reached from here"
    )
    for source, command in UNKNOWN.items():
        message, seconds, _ = answers[source]
        assert message == (
            f"cannot fetch {source}: {reason}; where the hub can be reached run {command}, and "
            f"bring the cache here ({hub_home / 'hub'}) or give the files' paths"
        )
        assert seconds < 30
    assert "Retrying" not in noise


@pytest.mark.slow
def test_a_hub_that_fails(hub_answers: tuple[Answers, list[tuple[str, str]]]) -> None:
    message = str(hub_answers[0]["hf:org/broken/file.pth"][0])
    assert message.startswith("cannot fetch hf:org/broken/file.pth: the Hugging Face hub ")


def test_all_files_out_of_reach_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sources = ["hf:org/gone_vq/vq.pt", str(EMOJI_LPD), "hf:org/gone_lpd"]
    with pytest.raises(CheckpointError) as raised:
        locate_all(sources)
    said = str(raised.value)
    assert said.startswith("cannot fetch hf:org/gone_vq/vq.pt and hf:org/gone_lpd: HF_HUB_OFFLINE")
    assert "run `hf download org/gone_vq vq.pt` and `hf download org/gone_lpd`, and" in said
    assert locate_all([str(EMOJI_LPD)]) == [EMOJI_LPD]


def small_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))


def test_a_download_that_does_not_fit(tmp_path: Path) -> None:
    """A limit on a file's size stands for a full disk: the system's error differs in its number."""
    hub = Hub({"org/lpd_small": {"lpd_small.pth": pickled(released(lpd_state(1)))}})
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    source = "hf:org/lpd_small/lpd_small.pth"
    try:
        message = load_from_hub(hub.url, tmp_path, [source], prepare=small_disk)[0][source][0]
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
    assert message == (
        f"cannot keep {source} in {tmp_path / 'hub'}: File too large; make room there, or set "
        "HF_HOME to a folder where there is"
    )
