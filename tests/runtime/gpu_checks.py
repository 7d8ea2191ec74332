"""Whole generations on an NVIDIA GPU, in a process that drives one backend: see test_gpu.py.

Models are small and of random weights, so what is compared is tokens and pixels, not pictures. FP16
kernels differ with the batch and the backend, and a number that falls on the border of two tokens
may give either: tokens are compared by the share that is equal.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import save_small_weights
from lpd_export import Pipeline, UserError
from lpd_export.accuracy.request import VerifyRequest
from lpd_export.accuracy.verify import verify
from lpd_export.build.build import build
from lpd_export.build.request import BuildRequest
from lpd_export.bundle.manifest import Bundle
from lpd_export.formats import BACKENDS, ONNXRUNTIME, TENSORRT_RTX
from lpd_export.images import BLANK
from lpd_export.runtime.executor import Run
from lpd_export.runtime.requests import GeneratedImage
from lpd_export.runtime.tensorrt_executor import TensorRTExecutor

BACKEND = BACKENDS[os.environ["GPU_BACKEND"]]
pytestmark = pytest.mark.gpu
engines = pytest.mark.skipif(not BACKEND.compiles, reason="of engines")
onnxruntime = pytest.mark.skipif(BACKEND.compiles, reason="of ONNX Runtime")

MAX_BATCH = 4
CLASSES = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two heads: TensorRT-RTX has no fused attention for a single one."""
    return save_small_weights(tmp_path_factory.mktemp("weights"), heads=2)


def build_small(weights: Path, out: Path, backend: str) -> Path:
    return build(
        BuildRequest(
            checkpoint=str(weights / "lpd.pth"),
            tokenizer=str(weights / "vq.pt"),
            steps=4,
            precision="fp16",
            backend=backend,
            max_batch=MAX_BATCH,
            out=str(out),
        )
    )


@pytest.fixture(scope="module")
def bundle(two_heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle of engines in FP16."""
    return build_small(two_heads, tmp_path_factory.mktemp("gpu") / "small", BACKEND.name)


@pytest.fixture(scope="module")
def cpu_images(two_heads: Path, tmp_path_factory: pytest.TempPathFactory) -> list[GeneratedImage]:
    """What ONNX Runtime makes of the same model in FP16, on the CPU."""
    out = tmp_path_factory.mktemp("cpu") / "small"
    return Pipeline.open(build_small(two_heads, out, ONNXRUNTIME.name)).generate(CLASSES)


def open_pipeline(bundle: Path, runtime_cache: Path | None = None) -> Pipeline:
    """A pipeline with an executor of its own, which nothing else has recorded on."""
    opened = Bundle.open(bundle)
    engines = {
        graph: next((bundle / "engines").glob(f"{graph}.*")) for graph in ("decode", "detokenize")
    }
    executor = TensorRTExecutor(
        engines, "float16", opened.manifest.backend, runtime_cache=runtime_cache
    )
    return Pipeline(opened.manifest, opened.schedule(), executor)


def executor_of(pipeline: Pipeline) -> TensorRTExecutor:
    executor = pipeline._executor
    assert isinstance(executor, TensorRTExecutor)
    return executor


def equal_share(images: list[GeneratedImage], others: list[GeneratedImage]) -> float:
    pairs = zip(images, others, strict=True)
    return float(np.mean([one.token_ids == other.token_ids for one, other in pairs]))


def assert_same(images: list[GeneratedImage], others: list[GeneratedImage]) -> None:
    for one, other in zip(images, others, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.pixels, other.pixels)


# ------------------------------------------------------------------------------------ TensorRT


@engines
def test_engines_are_still_the_model(bundle: Path, tmp_path: Path) -> None:
    request = VerifyRequest(bundle, images=2, out=tmp_path / "report")
    verification = verify(request, lambda stage: None)
    assert verification.failures == []
    assert "cuda" in verification.ran


@engines
def test_images_are_those_of_the_cpu(bundle: Path, cpu_images: list[GeneratedImage]) -> None:
    images = Pipeline.open(bundle).generate(CLASSES)
    assert equal_share(images, cpu_images) > 0.9
    for image, expected in zip(images, cpu_images, strict=True):
        if np.array_equal(image.token_ids, expected.token_ids):
            difference = image.pixels.astype(int) - expected.pixels.astype(int)
            assert np.abs(difference).max() <= 4


@engines
def test_decoded_images_are_finite(bundle: Path) -> None:
    token_ids = np.random.default_rng(0).integers(0, 64, (MAX_BATCH, 16))
    image = Pipeline.open(bundle).detokenize(token_ids)
    assert np.isfinite(image).all()
    assert image.std() > 0


@engines
def test_a_trace_ends_in_the_image(bundle: Path) -> None:
    """Bit for bit, though the others are decoded one by one and the image was in a batch."""
    pipeline = Pipeline.open(bundle)
    for image in pipeline.generate(CLASSES, batch=MAX_BATCH):
        trace = pipeline.trace(image)
        assert len(trace) == 4
        np.testing.assert_array_equal(trace[-1], image.pixels)
        blank = [(picture == BLANK).all(axis=2).mean() for picture in trace]
        assert blank[0] > blank[1] > blank[2] > 0


@engines
def test_the_same_seed_gives_nearly_the_same_tokens_whatever_the_batch(bundle: Path) -> None:
    pipeline = Pipeline.open(bundle)
    alone = pipeline.generate(CLASSES, seed=3, batch=1)
    for batch in (2, 4):
        assert equal_share(alone, pipeline.generate(CLASSES, seed=3, batch=batch)) > 0.9
    # Buffers have grown meanwhile, and the small batch is bound and recorded anew.
    assert_same(alone, pipeline.generate(CLASSES, seed=3, batch=1))


@engines
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_replayed_recording_equals_plain_launches(bundle: Path, cfg: float) -> None:
    recorded, plain = open_pipeline(bundle), open_pipeline(bundle)
    executor_of(plain).records = False
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a capture that failed
        for seed in range(3):
            images = recorded.generate(CLASSES, seed=seed, batch=2, cfg=cfg)
            assert_same(images, plain.generate(CLASSES, seed=seed, batch=2, cfg=cfg))
    assert executor_of(recorded).records


@engines
def test_a_generation_is_recorded_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = open_pipeline(bundle)
    executor, recorded = executor_of(pipeline), []
    record = executor.record

    def count(work: Run) -> Run:
        recorded.append(work)
        return record(work)

    monkeypatch.setattr(executor, "record", count)
    first = pipeline.generate(CLASSES, seed=1, cfg=3.0)
    assert_same(first, pipeline.generate(CLASSES, seed=1, cfg=3.0))
    pipeline.generate(CLASSES, seed=2, cfg=5.0)
    assert len(recorded) == 1


@engines
def test_what_cannot_be_captured_is_launched_plainly(bundle: Path) -> None:
    pipeline, broken = open_pipeline(bundle), open_pipeline(bundle)
    executor = executor_of(broken)
    value = torch.ones(1, device=executor.device)

    def work() -> None:
        value.item()  # waits for the device, which no capture allows

    with executor.stream(), pytest.warns(RuntimeWarning, match="step by step"):
        assert executor.record(work) is work
    assert not executor.records
    steps: list[int] = []
    images = broken.generate(
        CLASSES, batch=4, progress=lambda progress: steps.append(progress.step)
    )
    assert steps == [1, 2, 3, 4]
    assert equal_share(images, pipeline.generate(CLASSES, batch=4)) > 0.9


@engines
def test_caches_are_updated_in_place(bundle: Path) -> None:
    pipeline = open_pipeline(bundle)
    engine = executor_of(pipeline).load("decode")
    for layer in range(pipeline.manifest.model.depth):
        for kind in ("key", "value"):
            updated = engine.get_aliased_input_tensor(f"present_{kind}_{layer}")
            assert updated == f"past_{kind}_{layer}"
    assert not engine.get_aliased_input_tensor("logits")


@engines
def test_too_large_a_batch_is_told(bundle: Path) -> None:
    with pytest.raises(UserError, match=r"--max-batch"):
        Pipeline.open(bundle).generate([0] * 8, batch=8)
    pipeline = open_pipeline(bundle)
    with pytest.raises(UserError, match=r"detokenize engine takes 4 rows at most .*, not 8"):
        pipeline.detokenize(np.zeros((8, 16), np.int64))


FIRST_IMAGE = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from gpu_checks import CLASSES, open_pipeline
pipeline = open_pipeline(Path(sys.argv[2]), Path(sys.argv[3]))
start = time.perf_counter()
pipeline.generate(CLASSES)
print(time.perf_counter() - start)
"""


def first_image_seconds(bundle: Path, runtime_cache: Path) -> float:
    """How long the first images take a new process, compiling included."""
    arguments = [str(Path(__file__).parent), str(bundle), str(runtime_cache)]
    command = [sys.executable, "-c", FIRST_IMAGE, *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(BACKEND != TENSORRT_RTX, reason="others compile kernels in the build")
def test_the_next_process_finds_the_compiled_kernels(bundle: Path, tmp_path: Path) -> None:
    runtime_cache = tmp_path / "kernels.cache"
    before = first_image_seconds(bundle, runtime_cache)
    assert runtime_cache.stat().st_size > 0
    assert first_image_seconds(bundle, runtime_cache) < before
    # A cache of something else is refused, and replaced.
    runtime_cache.write_bytes(b"no cache")
    first_image_seconds(bundle, runtime_cache)
    assert runtime_cache.stat().st_size > len(b"no cache")


# ------------------------------------------------------------------- ONNX Runtime through CUDA


@onnxruntime
def test_onnx_runtime_on_the_gpu(small_bundle: Path) -> None:
    cpu = Pipeline.open(small_bundle).generate(CLASSES, seed=1)
    pipeline = Pipeline.open(small_bundle, device="cuda")
    for batch in (1, 2, 4):
        images = pipeline.generate(CLASSES, seed=1, batch=batch)
        assert equal_share(images, cpu) > 0.95
    token_ids = np.stack([image.token_ids for image in cpu])
    image = pipeline.detokenize(token_ids)
    assert np.isfinite(image).all()
    np.testing.assert_allclose(image, Pipeline.open(small_bundle).detokenize(token_ids), atol=1e-2)
