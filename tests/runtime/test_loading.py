"""Graphs that are loaded while torch is imported: once, and as they would be otherwise."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lpd_export.bundle.manifest import Bundle
from lpd_export.errors import UserError
from lpd_export.runtime import onnxruntime_session
from lpd_export.runtime.backends import open_executor
from lpd_export.runtime.loading import GRAPHS, begin_loading, take_begun
from lpd_export.runtime.pipeline import Pipeline


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs that ONNX Runtime loads from here on."""
    graphs = []
    session = onnxruntime_session.onnxruntime.InferenceSession

    def load(file: Path, *arguments: object, **options: object) -> object:
        graphs.append(file.stem)
        return session(file, *arguments, **options)

    monkeypatch.setattr(onnxruntime_session.onnxruntime, "InferenceSession", load)
    return graphs


def test_a_graph_is_loaded_once_and_computes_the_same(
    small_bundle: Path, loaded: list[str]
) -> None:
    [expected] = Pipeline.open(small_bundle, threads=1).generate([0])
    loaded.clear()
    begin_loading(small_bundle, None, 1)
    [image] = Pipeline.open(small_bundle, threads=1).generate([0])
    assert loaded == list(GRAPHS)
    np.testing.assert_array_equal(image.pixels, expected.pixels)
    # It was for one pipeline: the next one's sessions are its own.
    Pipeline.open(small_bundle, threads=1)
    assert loaded == [*GRAPHS, *GRAPHS]


def test_what_was_begun_is_for_that_bundle_and_these_threads(
    small_bundle: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    begin_loading(copied, "cpu", 1)
    assert take_begun(Bundle.open(small_bundle), 1) is None
    assert take_begun(Bundle.open(copied), None) is None
    assert take_begun(Bundle.open(copied), 1) is not None
    assert take_begun(Bundle.open(copied), 1) is None


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_nothing_is_begun_for_a_gpu(small_bundle: Path, device: str) -> None:
    begin_loading(small_bundle, device, None)
    assert take_begun(Bundle.open(small_bundle), None) is None


def test_altered_weights_are_no_more_used_than_otherwise(
    small_bundle: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    weights = copied / "onnx/weights.data"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    begin_loading(copied, None, None)
    executor = open_executor(Bundle.open(copied), None, None)
    for _ in range(2):
        with pytest.raises(UserError, match=r"weights\.data was altered"):
            executor.load("decode")


@pytest.mark.parametrize("missing", ["manifest.json", "onnx/weights.data", "onnx/decode.onnx"])
def test_what_is_missing_is_said_by_whoever_opens_it(
    small_bundle: Path, tmp_path: Path, missing: str
) -> None:
    copied = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    (copied / missing).unlink()
    begin_loading(copied, None, None)
    with pytest.raises(UserError, match=missing.split("/")[-1]):
        Pipeline.open(copied)


def test_loading_begins_without_torch() -> None:
    code = "import sys, lpd_export.cli.run as _, lpd_export.runtime.onnxruntime_session as _; "
    done = subprocess.run([sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"])
    assert done.returncode == 0
