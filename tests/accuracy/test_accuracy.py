"""`lpd-export verify`: its metrics and limits, the reference that it runs, and what a user sees."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from polygraphy.comparator import Comparator, RunResults

import golden
import lpd_export.build.build
from commandline import answer, end, entries, mistake, start, wait_for
from lpd_export.accuracy.comparison import (
    LEFT_ALONE,
    MEANS,
    Comparison,
    comparable,
    image_psnr,
    index_agreement,
    kl_divergence,
    psnr,
    relative_error,
    top_1_agreement,
)
from lpd_export.accuracy.polygraphy_files import kept_phases
from lpd_export.accuracy.reference_side import Reference, past_rows
from lpd_export.accuracy.request import VerifyRequest, new_report
from lpd_export.accuracy.sides import FunctionRunner, Task, decode_inputs, in_shape
from lpd_export.accuracy.thresholds import JUDGED, LIMITS, METRICS, REPORTED, Limits
from lpd_export.build.build import build
from lpd_export.build.request import BuildRequest
from lpd_export.bundle.manifest import MANIFEST, Bundle, ModelDescription
from lpd_export.errors import UserError
from lpd_export.formats import PRECISIONS, QUANTIZED
from lpd_export.graphs.contract import cache_names, cache_shape
from lpd_export.runtime.sampler import Sampling
from lpd_export.schedule.phases import phase_table
from lpd_export.schedule.schedule_file import Schedule
from lpd_reference import LPD, VQTokenizer
from lpd_reference.lpd import LPDConfig
from lpd_reference.vq import VQConfig

pytestmark = pytest.mark.model

PHASES = ["phase_00", "phase_01", "phase_02", "phase_03", "detokenize", "tokenize"]
PHASE_FILES = [f"{phase}.onnx" for phase in PHASES[:4]]
TABLE = [*PHASES, "sequence", "generation"]
JUDGED_NAMES = [metric.name for metric in JUDGED]
LOOSEST = [f"{m.name}={-1e300 if m.higher_is_better else 1e300!r}" for m in JUDGED]
BIN = Path(sys.executable).parent
PAGE = Path(__file__).parents[2] / "docs" / "verification.md"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

FloatArray = NDArray[np.float32]


@pytest.fixture(scope="module")
def fp16_bundle(
    small_bundle: Path, small_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`small_bundle` in FP16, of the graphs that it has exported; leave it as it is."""

    def copy_graphs(folder: Path, *_: object) -> None:
        shutil.copytree(small_bundle / "onnx", folder, ignore=lambda *_: PHASE_FILES)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lpd_export.build.build, "write_exact_graphs", copy_graphs)
        return build(
            BuildRequest(
                checkpoint=str(small_weights / "lpd.pth"),
                tokenizer=str(small_weights / "vq.pt"),
                steps=4,
                precision="fp16",
                out=str(tmp_path_factory.mktemp("fp16") / "half"),
            )
        )


@pytest.fixture(scope="module")
def other_weights(small_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of `small_weights`, of the same architectures, with other weights."""
    folder = tmp_path_factory.mktemp("other")
    for name in ("lpd.pth", "vq.pt"):
        state = torch.load(small_weights / name)["model"]
        torch.save({"model": {key: weight.flip(0) for key, weight in state.items()}}, folder / name)
    return folder


def altered(bundle: Path, copy: Path, **changes: Any) -> Path:
    """A copy of a bundle whose manifest says something else, and is whole."""
    shutil.copytree(bundle, copy)
    manifest = dataclasses.replace(Bundle.open(bundle).manifest, **changes)
    (copy / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return copy


def verified(bundle: Path, out: Path, *options: object, code: int = 0) -> dict[str, Any]:
    """What `verify --json` says; of one image, by one thread, unless the options say otherwise."""
    usual = ["--images", 1, "--threads", 1, "--json"]
    said = answer("verify", bundle, "--out", out, *usual, *options)
    assert said.code == code, said
    result = cast(dict[str, Any], json.loads(said.out))
    assert result["passed"] == (code == 0)
    return result


def values(result: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    """The measured values by phase, tensor and metric; infinite ones are None."""
    return {(m["phase"], m["tensor"], m["metric"]): m["value"] for m in result["measurements"]}


# --------------------------------------------------------------------------------- the metrics

NUMBERS = st.floats(-1e6, 1e6, width=32)
SHAPES = arrays.array_shapes(min_dims=2, max_dims=3, min_side=2, max_side=6)


def float_arrays(shape: Any, elements: st.SearchStrategy[float] = NUMBERS) -> Any:
    return arrays.arrays(np.float32, shape, elements=elements)


def pairs(elements: st.SearchStrategy[float] = NUMBERS) -> st.SearchStrategy[Any]:
    """Two arrays of one shape."""
    return SHAPES.flatmap(lambda shape: st.tuples(*[float_arrays(shape, elements)] * 2))


@given(pairs(), st.integers(-60, 60))
def test_a_relative_error_has_no_unit(pair: tuple[FloatArray, FloatArray], power: int) -> None:
    expected, actual = (array.astype(np.float64) for array in pair)
    error = relative_error(expected, actual)
    length = math.sqrt(float(np.sum(expected**2)))
    difference = math.sqrt(float(np.sum((actual - expected) ** 2)))
    assert error == pytest.approx(difference / length if length else difference, rel=1e-12)
    if length:
        # A power of two, so that nothing is rounded.
        assert relative_error(expected * 2.0**power, actual * 2.0**power) == error


@given(pairs(st.floats(-30, 30, width=32)), st.floats(-100, 100))
def test_kl_divergence_is_never_negative_and_ignores_a_shift(
    pair: tuple[FloatArray, FloatArray], shift: float
) -> None:
    expected, actual = (array.astype(np.float64) for array in pair)
    p, q = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (expected, actual))
    divergence = kl_divergence(expected, actual)
    assert divergence >= -1e-12
    assert divergence == pytest.approx(np.sum(p * np.log(p / q), -1).mean(), rel=1e-9, abs=1e-9)
    assert kl_divergence(expected, expected.copy()) == 0
    assert kl_divergence(expected, expected + shift) == pytest.approx(0, abs=1e-12)
    assert kl_divergence(expected, actual + shift) == pytest.approx(divergence, rel=1e-9, abs=1e-12)


@given(pairs())
def test_top_1_is_about_the_largest_logit_alone(pair: tuple[FloatArray, FloatArray]) -> None:
    expected, actual = pair
    same = [a.argmax() == b.argmax() for a, b in zip(*map(rows, pair), strict=True)]
    assert top_1_agreement(expected, actual) == sum(same) / len(same)
    largest = expected == expected.max(-1, keepdims=True)
    assert top_1_agreement(expected, np.where(largest, expected, -np.float32(1e7))) == 1


def rows(logits: FloatArray) -> FloatArray:
    return logits.reshape(-1, logits.shape[-1])


@given(pairs(st.floats(-1, 1, width=32)), st.floats(1e-3, 1), st.sampled_from([1.0, 2.0, 255.0]))
def test_psnr_is_in_decibels(
    pair: tuple[FloatArray, FloatArray], error: float, peak: float
) -> None:
    expected, actual = (array.astype(np.float64) for array in pair)
    assert psnr(expected, expected + error, peak) == pytest.approx(20 * math.log10(peak / error))
    assert psnr(expected, expected.copy(), peak) == math.inf
    if np.any(np.abs(actual - expected) > 1e-6):
        halved = psnr(expected, (expected + actual) / 2, peak)
        assert halved - psnr(expected, actual, peak) == pytest.approx(20 * math.log10(2))


def test_pixels_beyond_the_range_count_as_they_are_shown() -> None:
    expected = np.array([[-1.0, 1.0, 0.5]], np.float32)
    assert image_psnr(expected, np.array([[-1.5, 3.0, 0.5]], np.float32)) == math.inf
    assert image_psnr(expected, np.array([[-1.5, 3.0, 0.0]], np.float32)) == pytest.approx(
        10 * math.log10(4 / (0.25 / 3))
    )


# --------------------------------------------------------------- the comparison, by Polygraphy


def outputs(seed: int, error: float = 0.0) -> dict[str, NDArray[Any]]:
    """What a decode phase gives as it is compared; with another error other values."""
    generator = np.random.default_rng(seed)
    shapes = {"present_key_0": (2, 3, 4, 5), "present_value_0": (2, 3, 4, 5)}
    shapes |= {"logits": (2, 4, 11), "guided_logits": (1, 4, 11)}
    made: dict[str, NDArray[Any]] = {LEFT_ALONE: np.zeros(2, np.float32)}
    for name, shape in shapes.items():
        exact, noise = generator.standard_normal((2, *shape), np.float32)
        made[name] = exact + np.float32(error) * noise
    return made


@given(st.integers(0, 1000), st.floats(1e-6, 2))
def test_polygraphy_measures_what_numpy_does(seed: int, error: float) -> None:
    expected, actual = outputs(seed), outputs(seed, error)
    actual[LEFT_ALONE] = np.array([0.0, error], np.float32)
    comparison = Comparison(Limits.of(["fp32"]))
    comparison.add("phase_00", expected, actual)
    found = {(m.tensor, m.metric): m.value for m in comparison.measurements()}
    one, two = (side["logits"].astype(np.float64).ravel() for side in (expected, actual))
    direct = {
        (LEFT_ALONE, "rows_left_alone"): error,
        ("logits", "logits_error"): np.linalg.norm(one - two) / np.linalg.norm(one),
        ("logits", "logits_largest_error"): np.abs(one - two).max() / np.abs(one).max(),
    }
    for name in ("present_key_0", "present_value_0"):
        error_of = np.linalg.norm((expected[name] - actual[name]).ravel())
        direct[name, "cache_error"] = error_of / np.linalg.norm(expected[name].ravel())
    p, q = (np.exp(side["guided_logits"].astype(np.float64)) for side in (expected, actual))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    direct["guided_logits", "kl"] = np.mean(np.sum(p * np.log(p / q), axis=-1))
    assert found == pytest.approx(direct, rel=1e-4, abs=1e-9)


def test_polygraphy_is_what_compares(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its runners are run and its comparator judges, once for each phase of each image."""
    calls: Counter[str] = Counter()
    runners = set()
    run, compare = Comparator.run, Comparator.compare_accuracy

    def counted_run(sides: list[Any], *args: Any, **kwargs: Any) -> Any:
        calls["run"] += 1
        runners.add(tuple(runner.name for runner in sides))
        return run(sides, *args, **kwargs)

    def counted_compare(*args: Any, **kwargs: Any) -> Any:
        calls["compare"] += 1
        return compare(*args, **kwargs)

    monkeypatch.setattr(Comparator, "run", staticmethod(counted_run))
    monkeypatch.setattr(Comparator, "compare_accuracy", staticmethod(counted_compare))
    options = ["--images", 2, "--save-phases", "none", "--threshold", "cache_error=0"]
    result = verified(small_bundle, tmp_path / "out", *options, code=1)
    assert result["saved_phases"] == []
    assert not (tmp_path / "out/polygraphy").exists()
    assert calls == {"run": 2 * len(PHASES), "compare": 2 * len(PHASES)}
    assert runners == {("reference", str(small_bundle))}


@pytest.mark.filterwarnings("error::RuntimeWarning")  # it would be shown to the user
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("overrides", [[], LOOSEST])
def test_what_is_not_finite_never_passes(overrides: list[str], bad: float) -> None:
    """In a single place of any output, whatever the limits."""
    limits = Limits.of(["int8"], overrides)
    assert not any(limits.met(metric, math.nan) for metric in JUDGED_NAMES)
    for tensor in outputs(0):
        actual = outputs(0)
        actual[tensor].ravel()[3 % actual[tensor].size] = bad
        comparison = Comparison(limits)
        comparison.add("phase_00", outputs(0), actual)
        assert {m.tensor for m in comparison.measurements() if not m.passed} == {tensor}


@pytest.mark.parametrize("sides", [(0, 1), (1, 0), (1, 1)])
def test_indices_that_are_none_never_agree(sides: tuple[int, int]) -> None:
    """Not even where both sides have none."""
    indices = np.arange(8).reshape(2, 4)
    assert index_agreement(indices, indices) == 1
    assert index_agreement(indices, indices + 1) == 0
    expected, actual = (np.where(none, -1, indices) for none in sides)
    assert math.isnan(index_agreement(expected, actual))


def test_an_image_that_is_not_a_number_never_passes() -> None:
    image = np.zeros((1, 3, 4, 4), np.float32)
    broken = image.copy()
    broken[0, 1, 2, 3] = np.nan
    comparison = Comparison(Limits.of(["int8"]))
    comparison.add("detokenize", {"image": image}, {"image": broken})
    comparison.add("detokenize", {"image": image}, {"image": image})
    (measured,) = comparison.measurements()
    assert math.isnan(measured.value)
    assert not measured.passed


def test_over_images_the_mean_of_means_and_the_worst_of_others_count() -> None:
    comparison = Comparison(Limits.of(["fp16"]))
    for metric in METRICS:
        for value in (0.5, 0.25, 0.75):
            comparison.note("phase_00", "tensor", metric, value)
    judged, reported = comparison.measurements(), comparison.figures()
    assert [entry.metric for entry in judged] == JUDGED_NAMES
    assert [entry.metric for entry in reported] == [metric.name for metric in REPORTED]
    for entry in (*judged, *reported):
        worst = 0.25 if METRICS[entry.metric].higher_is_better else 0.75
        assert entry.value == (0.5 if entry.metric in MEANS else worst), entry.metric
    for entry in judged:
        assert entry.passed == comparison.limits.met(entry.metric, entry.value)


@given(st.integers(1, 6), st.integers(0, 10_000), st.data())
@settings(max_examples=40)
def test_rows_are_compared_where_a_phase_writes_and_must_stay_elsewhere(
    steps: int, seed: int, data: st.DataObject
) -> None:
    cells, depth = 9, 2
    of_row = cache_shape(1, cells, 4, data.draw(st.booleans(), "fused"))
    phase = data.draw(st.sampled_from(phase_table(Schedule.make(3, steps, count=1).group_sizes)))
    generator = np.random.default_rng(seed)
    feed = {
        name: generator.standard_normal((2, *of_row), np.float32)
        for name in cache_names("past", depth)
    }
    presents = {name.replace("past", "present"): past.copy() for name, past in feed.items()}
    written = range(phase.write_index, phase.write_index + phase.tokens)
    for present in presents.values():
        shape = present[..., written, :].shape
        present[..., written, :] = generator.standard_normal(shape, np.float32)
    row = data.draw(st.integers(0, cells))
    presents["present_value_1"][1, ..., row, 2] += 8
    logits = {
        name: np.zeros((1, phase.queries, 5), np.float32) for name in ("logits", "guided_logits")
    }
    compared = comparable({**presents, **logits}, feed, phase)
    assert [name for name in compared if "present" in name] == [
        "present_key_0", "present_value_0", "present_key_1", "present_value_1"
    ]  # fmt: skip
    for name, present in presents.items():
        np.testing.assert_array_equal(compared[name], present[..., written, :])
    largest = compared[LEFT_ALONE].max()
    assert largest == (0 if row in written else pytest.approx(8, rel=1e-5))


# ------------------------------------------------------------------------------ the thresholds


def test_the_table_is_complete() -> None:
    assert len(METRICS) == len(JUDGED) + len(REPORTED)
    assert set(LIMITS) == set(PRECISIONS)
    assert all(text.strip() for metric in METRICS.values() for text in metric[:4])
    for row in LIMITS.values():
        assert set(row) == set(JUDGED_NAMES)
        assert all(math.isfinite(limit) for limit in row.values())


def test_a_lower_precision_is_never_judged_more_strictly() -> None:
    pairs = [*itertools.pairwise(("fp32", "fp16", "bf16")), *(("fp16", name) for name in QUANTIZED)]
    for finer, coarser in pairs:
        for metric in JUDGED:
            strict, loose = LIMITS[finer][metric.name], LIMITS[coarser][metric.name]
            assert strict >= loose if metric.higher_is_better else strict <= loose, metric.name


@given(st.lists(st.sampled_from([*LIMITS]), min_size=1, max_size=3), st.floats(-200, 200))
def test_the_loosest_of_the_precisions_counts(precisions: list[str], value: float) -> None:
    together, alone = Limits.of(precisions), [Limits.of([name]) for name in precisions]
    assert together.by_metric == Limits.of(precisions[::-1]).by_metric
    assert together.by_metric == LIMITS.get(together.precision, together.by_metric)
    assert all(name in precisions for name in together.precision.split(" and "))
    for metric in JUDGED_NAMES:
        assert together.met(metric, value) == any(each.met(metric, value) for each in alone)


@given(
    st.sampled_from(JUDGED_NAMES),
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_a_limit_of_the_user_counts_instead(metric: str, first: float, limit: float) -> None:
    limits = Limits.of(["fp32"], [f"{metric}={first!r}", f"{metric}={limit!r}"])
    assert limits.met(metric, limit)
    assert limits.by_metric == LIMITS["fp32"] | {metric: limit}
    own = LIMITS["fp32"][metric]
    assert limits.overridden == ({} if limit == own else {metric: own})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "speed=1",
            "speed=1 is not METRIC=LIMIT with one of the metrics rows_left_alone, ",
        ),
        ("token_agreement=1", "token_agreement=1 is not METRIC=LIMIT"),
        ("kl", "kl is not METRIC=LIMIT with one of the metrics"),
        ("=1", "=1 is not METRIC=LIMIT"),
        ("", " is not METRIC=LIMIT"),
        ("KL=1", "KL=1 is not METRIC=LIMIT"),
        ("kl=", "kl=: '' is not a finite number"),
        ("kl=low", "kl=low: 'low' is not a finite number"),
        ("kl=nan", "kl=nan: 'nan' is not a finite number"),
        ("kl=-inf", "kl=-inf: '-inf' is not a finite number"),
        ("kl=1=2", "kl=1=2: '1=2' is not a finite number"),
    ],
)
def test_thresholds_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--threshold {message}")):
        Limits.of(["fp32"], [text])


# --------------------------------------------------------------------------- the reference runs


@pytest.fixture(scope="module")
def golden_model() -> LPD:
    return golden.lpd(golden.read("lpd_grid4"))


def golden_task(model: LPD, steps: int, cfg: float, seed: int) -> Task:
    """One image of a golden-sized model."""
    grid, cells = model.config.grid, model.config.cells
    return Task(
        schedule=Schedule.make(grid, steps, count=2, seed=seed % 1000, kind="random"),
        labels=[seed % model.config.num_classes],
        order_indices=[seed % 2],
        uniform=np.zeros((1, cells)),
        sampling=Sampling(cfg=cfg),
        seed=seed,
    )


Feeds = list[tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]]


def run_phases(
    model: LPD,
    task: Task,
    token_ids: NDArray[np.int64],
    noise: float = 1.0,
    fused_attention: bool = True,
) -> Feeds:
    """Feeds and outputs of all phases of a task's image, each on the caches of the one before.

    The mask is not a number and the write index lies elsewhere: the reference must not look.
    """
    reference = Reference(model, cast(VQTokenizer, None))
    config = model.config
    generator = np.random.default_rng(task.seed)
    of_row = cache_shape(config.heads, config.cells, config.head_dim, fused_attention)
    shape = (task.rows, *of_row)
    caches = {
        name: np.float32(noise) * generator.standard_normal(shape, np.float32)
        for name in cache_names("past", config.depth)
    }
    order = task.orders[0]
    condition = config.vocab_size + np.array([[task.labels[0]], [config.num_classes]])
    content = np.concatenate(
        [condition[: task.rows], np.tile(token_ids[order], (task.rows, 1))], axis=1
    )
    positions = np.concatenate([[0], order + 1])
    done: Feeds = []
    for phase in task.phases:
        first, last = phase.write_index, phase.write_index + phase.tokens
        feed = {
            "token_ids": content[:, first : first + phase.context],
            "positions": np.tile(positions[first:last], (task.rows, 1)),
            "attention_mask": np.full((phase.tokens, config.cells + 1), np.nan, np.float32),
            "write_index": np.full(task.rows, generator.integers(config.cells)),
            **caches,
        }
        outputs = reference.decode(task, phase, feed)
        done.append((feed, outputs))
        caches = {name: outputs[name.replace("past", "present")] for name in caches}
    return done


@given(st.integers(1, 16), st.sampled_from([1.0, 3.5]), st.integers(0, 10_000))
@settings(max_examples=25)
def test_phase_by_phase_the_reference_is_its_teacher_forced_pass(
    golden_model: LPD, steps: int, cfg: float, seed: int
) -> None:
    model, task = golden_model, golden_task(golden_model, steps, cfg, seed)
    config = model.config
    token_ids = np.random.default_rng(seed).integers(config.vocab_size, size=config.cells)
    phases = run_phases(model, task, token_ids)
    tokens, orders = torch.from_numpy(token_ids[None]), torch.from_numpy(task.orders)
    sizes = task.schedule.group_sizes.tolist()
    with torch.inference_mode():
        expected = [model(tokens, torch.tensor(task.labels), orders, sizes)]
        if task.sampling.guided:
            expected.append(model(tokens, None, orders, sizes))
    logits = np.concatenate([outputs["logits"] for _, outputs in phases], axis=1)
    np.testing.assert_allclose(logits, torch.cat(expected).numpy(), rtol=1e-4, atol=1e-4)
    guided = np.concatenate([outputs["guided_logits"] for _, outputs in phases], axis=1)
    sequence = Reference(model, cast(VQTokenizer, None)).sequence_logits(task, token_ids[None])
    np.testing.assert_allclose(guided, sequence.numpy(), rtol=1e-4, atol=1e-3)
    if not task.sampling.guided:
        np.testing.assert_array_equal(guided, logits)


def test_a_cache_has_the_same_rows_in_both_shapes() -> None:
    by_heads = np.arange(2 * 3 * 5 * 4).reshape(2, 3, 5, 4)
    by_rows = in_shape(by_heads, (5, 12))
    for row, head in itertools.product(range(5), range(3)):
        np.testing.assert_array_equal(
            by_rows[:, row, 4 * head : 4 * head + 4], by_heads[:, head, row]
        )
    np.testing.assert_array_equal(in_shape(by_rows, (3, 5, 4)), by_heads)
    assert in_shape(by_heads, (3, 5, 4)) is by_heads
    assert in_shape(by_rows, (5, 12)) is by_rows


@given(st.integers(1, 16), st.sampled_from([1.0, 3.5]), st.integers(0, 10_000), st.booleans())
@settings(max_examples=15)
def test_the_reference_writes_its_rows_and_leaves_the_others(
    golden_model: LPD, steps: int, cfg: float, seed: int, fused_attention: bool
) -> None:
    model, task = golden_model, golden_task(golden_model, steps, cfg, seed)
    token_ids = np.random.default_rng(seed).integers(
        model.config.vocab_size, size=model.config.cells
    )
    phases = run_phases(model, task, token_ids, fused_attention=fused_attention)
    cells = model.config.cells
    for phase, (feed, outputs) in zip(task.phases, phases, strict=True):
        assert past_rows(task, phase) == phase.write_index
        written = range(phase.write_index, phase.write_index + phase.tokens)
        others = [row for row in range(cells + 1) if row not in written]
        for name in cache_names("past", model.config.depth):
            past, present = feed[name], outputs[name.replace("past", "present")]
            np.testing.assert_array_equal(present[..., others, :], past[..., others, :])
            assert (present[..., written, :] != past[..., written, :]).any(axis=-1).all()
    # What is left in the end is what the model itself keeps.
    cache = model.new_cache()
    with torch.inference_mode():
        for feed, _ in phases:
            content = torch.cat(
                [model.token_emb.weight, model.class_emb.weight, model.fake_latent]
            )[torch.from_numpy(feed["token_ids"])]
            model.decode_step(content, torch.from_numpy(feed["positions"]), cache)
    last, config = phases[-1][1], model.config
    by_heads = cache_shape(config.heads, cells, config.head_dim, fused_attention=True)
    for number, layer in enumerate(cache):
        for kind, kept in (("key", layer.key), ("value", layer.value)):
            assert kept is not None
            present = in_shape(last[f"present_{kind}_{number}"], by_heads)
            np.testing.assert_array_equal(present[:, :, : len(layer)], kept.numpy())


def test_what_was_in_a_cache_before_does_not_matter(golden_model: LPD) -> None:
    """Nor does it if it is not a number: rows of no step are never looked at."""
    task = golden_task(golden_model, 5, 3.5, 7)
    token_ids = np.arange(golden_model.config.cells) % golden_model.config.vocab_size
    for noise in (0.0, math.nan):
        for (_, one), (_, two) in zip(
            run_phases(golden_model, task, token_ids),
            run_phases(golden_model, task, token_ids, noise),
            strict=True,
        ):
            np.testing.assert_array_equal(one["guided_logits"], two["guided_logits"])


def test_polygraphy_checks_what_a_runner_is_fed(golden_model: LPD) -> None:
    task = golden_task(golden_model, 4, 3.5, 1)
    token_ids = np.zeros(golden_model.config.cells, np.int64)
    reference = Reference(golden_model, cast(VQTokenizer, None))
    feed, outputs = run_phases(golden_model, task, token_ids)[2]
    phase, described = task.phases[2], cast(ModelDescription, golden_model.config)
    of_row = feed["past_key_0"].shape[1:]
    wanted = decode_inputs(phase, task.rows, described, of_row, np.float32)
    with FunctionRunner("reference", wanted, partial(reference.decode, task, phase)) as runner:
        given_back = runner.infer(feed)
        for name, output in outputs.items():
            np.testing.assert_array_equal(given_back[name], output)
        metadata = runner.get_input_metadata(use_numpy_dtypes=False)
        assert {name: tuple(entry.shape) for name, entry in metadata.items()} == {
            name: tuple(shape) for name, (_, shape) in wanted.items()
        }
        for name in feed:
            with pytest.raises(Exception, match=name):
                runner.infer({**feed, name: feed[name][..., :0]})


# -------------------------------------------------------------------------------- a good bundle


@pytest.fixture(scope="module")
def report(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on `small_bundle`, made in a process of its own, with `stdout.json` beside it."""
    out = tmp_path_factory.mktemp("verified") / "a report"
    options = ["--images", 3, "--save-phases", "all", "--threads", 1]
    said = end(start("verify", small_bundle, *options, "--out", out, "--json"))
    assert said.code == 0, said
    assert "Traceback" not in said.err
    assert "\x1b" not in said.err
    assert not any(line.startswith("[") for line in said.err.splitlines()), "Polygraphy's lines"
    out.with_name("stdout.json").write_text(said.out)
    return out


def strict(text: str) -> dict[str, Any]:
    """JSON that every reader takes."""
    read = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    return cast(dict[str, Any], read)


def test_json_of_a_good_bundle(report: Path, small_bundle: Path) -> None:
    result = strict(report.with_name("stdout.json").read_text())
    assert result == strict((report / "report.json").read_text())
    assert result["passed"] is True
    assert result["first_failure"] is None
    said = {key: result[key] for key in ("bundle", "name", "precision", "backend", "against")}
    assert said == {
        "bundle": str(small_bundle),
        "name": "small",
        "precision": "fp32",
        "backend": "onnxruntime",
        "against": "reference",
    }
    assert (result["images"], result["seed"], result["remarks"]) == (3, 0, [])
    assert result["saved_phases"] == PHASES
    assert list(dict.fromkeys(m["phase"] for m in result["measurements"])) == TABLE
    assert all(m["passed"] for m in result["measurements"])
    assert {m["metric"]: m["limit"] for m in result["measurements"]} == LIMITS["fp32"]
    assert [figure["metric"] for figure in result["reported"]] == [m.name for m in REPORTED]
    groups = Bundle.open(small_bundle).schedule().group_sizes.tolist()
    assert [(step["step"], step["cells"]) for step in result["steps"]] == [*enumerate(groups, 1)]


def test_a_report_is_whole(report: Path) -> None:
    files = [
        f"{phase}.{kind}.json" for phase in PHASES for kind in ("bundle", "expected", "inputs")
    ]
    pictures = [
        f"pair_{number:02d}_{side}.png"
        for number in range(3)
        for side in ("actual", "difference", "expected")
    ]
    assert entries(report) == sorted(
        ["report.html", "report.json", "images", "polygraphy"]
        + [f"images/{name}" for name in pictures]
        + [f"polygraphy/{name}" for name in files]
    )
    assert entries(report.parent) == sorted(
        ["a report", "stdout.json", *(f"a report/{name}" for name in entries(report))]
    )


def test_the_table_names_every_phase(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the terminal; and nothing but the report is left, nor is the bundle touched."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    before = entries(small_bundle)
    said = answer("verify", small_bundle, "--images", 1, "--out", tmp_path / "a/b")
    assert said.code == 0, said
    begun = [word for line in said.out.splitlines() for word in line.split()[:2]]
    assert [word for word in dict.fromkeys(begun) if word in TABLE] == TABLE
    assert "\npassed: every threshold of fp32 holds for 1 image\n" in said.out
    assert said.out.endswith(f"\nreport: {tmp_path / 'a/b/report.html'}\n")
    assert said.err.splitlines()[0] == "loading torch and Polygraphy"
    assert said.err.splitlines()[-1] == "writing the report"
    assert entries(tmp_path / "scratch") == []
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b"]
    assert entries(small_bundle) == before
    Bundle.open(small_bundle).files()


def test_the_seed_decides_what_is_measured(small_bundle: Path, tmp_path: Path) -> None:
    """And nothing else does; a report is written over an earlier one."""

    def measured(*options: object) -> dict[str, Any]:
        result = verified(small_bundle, tmp_path / "out", "--save-phases", "none", *options)
        return {k: v for k, v in result.items() if k not in ("seconds", "time")}

    first = measured("--seed", 5)
    assert measured("--seed", 5) == first
    assert (first["seed"], first["images"]) == (5, 1)
    other = measured("--seed", 2**64 - 1)
    assert values(other) != values(first)
    assert values(other).keys() == values(first).keys()
    assert len(list((tmp_path / "out/images").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_report_lies_beside_the_bundle(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small_bundle, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    said = answer("verify", "mine/", "--images", 1, "--save-phases", "none")
    assert said.out.endswith("\nreport: mine-verification/report.html\n")
    assert (tmp_path / "mine-verification/report.html").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine-verification"]
    monkeypatch.chdir("mine/onnx")
    for bundle, folder in (
        (Path(), tmp_path / "mine/onnx-verification"),
        (Path(".."), tmp_path / "mine-verification"),
        (Path("/"), Path("/-verification")),
        (tmp_path / "mine", tmp_path / "mine-verification"),
    ):
        assert VerifyRequest(bundle).folder == folder


def test_limits_of_the_user_decide(small_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--threshold", "sequence_kl=-1", "--threshold", "cache_error=0"]
    result = verified(small_bundle, out, *options, "--save-phases", "tokenize", code=1)
    first = result["first_failure"]
    assert (first["phase"], first["metric"], first["limit"]) == ("phase_00", "cache_error", 0)
    failed = {m["metric"] for m in result["measurements"] if not m["passed"]}
    assert failed == {"cache_error", "sequence_kl"}
    # The first to fail is left for Polygraphy though it was not asked for.
    assert result["saved_phases"] == ["phase_00", "tokenize"]
    assert "phase_00.inputs.json" in entries(out / "polygraphy")
    # As wide as can be.
    options = [word for limit in LOOSEST for word in ("--threshold", limit)]
    verified(small_bundle, out, *options)


# ---------------------------------------------------------------------- Polygraphy by itself


def commands(report: Path) -> dict[str, str]:
    """The lines that a report gives, by phase."""
    page = (report / "report.html").read_text(encoding="utf-8")
    lines = re.findall(r"(?:POLYGRAPHY\w+=1 )?polygraphy run [^<\n]*", page)
    assert lines
    return {
        Path(shlex.split(line.partition("run ")[2])[0]).stem: line
        for line in map(html.unescape, lines)
    }


def polygraphy(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line as a user runs it, where lpd-export is not known of."""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.run(
        line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("phase", ["phase_02", "detokenize", "tokenize"])
def test_polygraphy_alone_finds_the_same(report: Path, tmp_path: Path, phase: str) -> None:
    assert list(commands(report)) == PHASES
    said = polygraphy(commands(report)[phase], tmp_path)
    assert said.returncode == 0, said
    assert "PASSED | Runtime" in said.stdout
    assert "FAILED" not in said.stdout
    outputs = {"detokenize": "'image'", "tokenize": "'indices'"}.get(phase, "'logits'")
    assert f"PASSED | Output: {outputs}" in said.stdout
    assert entries(tmp_path) == []


def test_polygraphy_alone_with_relative_paths_and_fp16(
    fp16_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle, out = Path(os.path.relpath(fp16_bundle)), Path("out")
    result = verified(bundle, out, "--save-phases", " phase_01,tokenize , phase_01")
    assert result["saved_phases"] == ["phase_01", "tokenize"]
    line = commands(out)["phase_01"]
    assert line.startswith(
        f"polygraphy run {bundle}/onnx/phase_01.onnx --onnxrt --load-inputs out/"
    )
    said = polygraphy(line, tmp_path)
    assert said.returncode == 0, said
    assert re.search(r"past_key_0 \[dtype=float16", said.stdout)


@pytest.mark.parametrize(
    ("phase", "output", "error"),
    [
        ("phase_02", "logits", 1e-2),
        ("detokenize", "image", 1e-2),
        ("tokenize", "indices", 1),
    ],
)
def test_polygraphy_alone_sees_other_outputs(
    report: Path, tmp_path: Path, phase: str, output: str, error: float
) -> None:
    """One value of one output."""
    copy = tmp_path / "report"
    shutil.copytree(report, copy)
    file = copy / "polygraphy" / f"{phase}.expected.json"
    runs = RunResults.load(str(file))
    ((_, (result,)),) = runs.items()
    changed = result[output].copy()
    changed.ravel()[-1] += error
    result[output] = changed
    runs.save(str(file))
    line = commands(report)[phase].replace(str(report), str(copy))
    said = polygraphy(line, tmp_path)
    assert said.returncode == 1, said
    assert set(re.findall(r"FAILED \| Output: '(\w+)'", said.stdout)) == {output}


def block_of_the_page(words: str) -> list[str]:
    """The commands of the block of docs/verification.md that holds these words."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    (block,) = (block for block in blocks if words in block)
    return block.replace("\\\n", " ").splitlines()


def test_the_page_s_own_lines(emoji_bundle: Path, tmp_path: Path) -> None:
    """The one that verifies and the one that needs Polygraphy alone, as they stand there."""
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines/demo").symlink_to(emoji_bundle)
    verifying, alone = block_of_the_page("polygraphy run")
    program, *arguments = shlex.split(verifying)
    assert program == "lpd-export"
    with contextlib.chdir(tmp_path):
        said = answer(*arguments, "--images", 1, "--threads", 1)
    assert said.code == 0, said
    said = polygraphy(alone, tmp_path)
    assert said.returncode == 0, said
    assert "PASSED | Output: 'logits'" in said.stdout
    assert "FAILED" not in said.stdout


def test_which_phases_are_kept() -> None:
    names = [*(f"phase_{number:02d}" for number in range(20)), "detokenize", "tokenize"]
    assert kept_phases(None, names, 2e7) == [
        "phase_00",
        "phase_10",
        "phase_19",
        "detokenize",
        "tokenize",
    ]
    assert kept_phases(None, names[19:], 2e7) == ["phase_19", "detokenize", "tokenize"]
    # Of lpd-l, a step takes hundreds of MB.
    assert kept_phases(None, names, 4e8) == ["phase_00", "detokenize", "tokenize"]
    assert kept_phases("all", names, 2e9) == names
    assert kept_phases("none", names, 0) == []
    assert kept_phases("tokenize, phase_07,tokenize", names, 2e9) == ["tokenize", "phase_07"]
    for wanted, unknown in (("phase_20", "phase_20"), ("all,phase_00", "all"), ("", "")):
        with pytest.raises(
            UserError, match=f"there is no phase '{unknown}'; there are phase_00 to"
        ):
            kept_phases(wanted, names, 0)


# ------------------------------------------------------------------------ against other bundles


def test_fp16_against_fp32(small_bundle: Path, fp16_bundle: Path, tmp_path: Path) -> None:
    """The looser limits count, whichever of the two is verified."""
    limits = LIMITS["fp16"]
    for bundle, other in ((fp16_bundle, small_bundle), (small_bundle, fp16_bundle)):
        result = verified(bundle, tmp_path / "out", "--against", other)
        assert result["against"] == str(other)
        assert {m["metric"]: m["limit"] for m in result["measurements"]}.items() <= limits.items()
        error = values(result)["phase_02", "logits", "logits_error"]
        assert LIMITS["fp32"]["logits_error"] < error < limits["logits_error"]


def test_a_bundle_is_itself(small_bundle: Path, tmp_path: Path) -> None:
    result = verified(small_bundle, tmp_path / "out", "--against", small_bundle, "--images", 2)
    perfect = {"index_agreement": 1, "sequence_top_1": 1, "token_agreement": 1, "equal_images": 1}
    perfect |= {"image_psnr": None, "generation_psnr": None}
    for measured in [*result["measurements"], *result["reported"]]:
        exact = perfect.get(measured["metric"], 0)
        assert measured["value"] == (exact if exact is None else pytest.approx(exact, abs=1e-6))
        if measured["metric"].endswith("_error"):
            assert measured["value"] == 0


def test_bundles_that_cannot_be_compared(small_bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(small_bundle).manifest
    model = dataclasses.replace(manifest.model, dim=128, heads=2)
    other = altered(small_bundle, tmp_path / "other", model=model)
    before = entries(tmp_path)
    verify = ["verify", small_bundle, "--out", tmp_path / "out", "--against"]
    assert mistake(*verify, other) == (
        f"{small_bundle} and {other} are different models: model with dim 64 and 128, heads 1 and 2"
    )
    gone = tmp_path / "gone"
    assert mistake(*verify, gone) == f"there is no bundle {gone}; `lpd-export build` makes one"
    assert mistake(*verify, tmp_path).startswith(f"{tmp_path} is not a bundle: it has no manifest")
    for option in (["--checkpoint", "a"], ["--tokenizer", "a"], ["--by-layer"], ["--bisect"]):
        said = mistake(*verify, small_bundle, *option)
        assert said == f"{option[0]} needs the reference: it does not go with --against"
    assert entries(tmp_path) == before


# ------------------------------------------------------------------- where the reference's from


def test_the_same_weights_elsewhere(
    small_bundle: Path, small_weights: Path, tmp_path: Path
) -> None:
    for name in ("lpd.pth", "vq.pt"):
        shutil.copy(small_weights / name, tmp_path / f"my {name}")
    options = ["--checkpoint", tmp_path / "my lpd.pth", "--tokenizer", tmp_path / "my vq.pt"]
    result = verified(small_bundle, tmp_path / "out", *options, "--save-phases", "none")
    assert result["remarks"] == []


@pytest.mark.parametrize(
    ("option", "name", "failing"),
    [("--checkpoint", "lpd.pth", "phase_00"), ("--tokenizer", "vq.pt", "detokenize")],
)
def test_other_weights_fail_and_are_remarked(
    small_bundle: Path, other_weights: Path, tmp_path: Path, option: str, name: str, failing: str
) -> None:
    out, file = tmp_path / "out", other_weights / name
    result = verified(small_bundle, out, option, file, "--save-phases", "none", code=1)
    remark = f"{file} is not the file that the bundle was made from: its content differs"
    assert result["remarks"] == [remark]
    assert remark in html.unescape((out / "report.html").read_text(encoding="utf-8"))
    assert result["first_failure"]["phase"] == failing
    assert not {m["phase"] for m in result["measurements"] if not m["passed"]} <= {failing}


def test_weights_of_another_architecture(
    small_bundle: Path, small_weights: Path, tmp_path: Path
) -> None:
    wide, deep = tmp_path / "wide.pth", tmp_path / "deep.pth"
    config = LPDConfig(dim=128, depth=2, heads=2, grid=4, num_classes=5, vocab_size=64)
    torch.save({"model": LPD(config).initialize(0).state_dict()}, wide)
    config = LPDConfig(dim=64, depth=3, heads=1, grid=4, num_classes=5, vocab_size=64)
    torch.save({"model": LPD(config).initialize(0).state_dict()}, deep)
    coarse = tmp_path / "coarse.pt"
    vq_config = VQConfig(
        channels=32, channel_multipliers=(1, 2), num_res_blocks=1, z_channels=32, codebook_size=64
    )
    torch.save({"model": VQTokenizer(vq_config).initialize(0).state_dict()}, coarse)
    before = entries(tmp_path)
    verify = ["verify", small_bundle, "--out", tmp_path / "out"]
    another = "is another model than the bundle's: its"
    assert f"{deep} {another} depth is 3, the bundle's 2" in mistake(*verify, "--checkpoint", deep)
    assert f"{wide} " in mistake(*verify, "--checkpoint", wide)
    said = mistake(*verify, "--tokenizer", coarse)
    assert f"{coarse} {another} channel_multipliers is (1, 2), the bundle's (1, 1, 2)" in said
    for options, message in (
        (["--checkpoint", "gone.pth"], "gone.pth"),
        (["--tokenizer", small_weights / "lpd.pth"], f"{small_weights / 'lpd.pth'} is not a VQ"),
        (["--checkpoint", small_weights / "vq.pt"], f"{small_weights / 'vq.pt'} is not an LPD"),
        (["--checkpoint", small_weights], f"{small_weights} is a folder"),
        (["--checkpoint", small_bundle / MANIFEST], str(small_bundle / MANIFEST)),
    ):
        said = mistake(*verify, *options)
        assert message in said
        assert "say with --" not in said, "it was said"
    assert entries(tmp_path) == before


def test_recorded_weights_that_are_gone(
    small_bundle: Path, small_weights: Path, tmp_path: Path
) -> None:
    made = Bundle.open(small_bundle).manifest.made
    moved = {what: {**made[what], "source": f"gone {what}"} for what in ("checkpoint", "tokenizer")}
    bundle = altered(small_bundle, tmp_path / "bundle", made=made | moved)
    options: list[object] = []
    for what, name in (("checkpoint", "lpd.pth"), ("tokenizer", "vq.pt")):
        said = mistake("verify", bundle, "--out", tmp_path / "out", *options)
        assert f"gone {what}; it is what the bundle was made from: say with --{what} where" in said
        options += [f"--{what}", small_weights / name]
    assert not (tmp_path / "out").exists()
    result = verified(bundle, tmp_path / "out", *options, "--save-phases", "none")
    assert result["remarks"] == []


def test_random_weights_are_drawn_again(small_bundle: Path, tmp_path: Path) -> None:
    """The small bundle's weights are those of seed 0, as if it were built --random-weights."""
    made = Bundle.open(small_bundle).manifest.made | {"checkpoint": None, "tokenizer": None}
    bundles = [
        altered(small_bundle, tmp_path / f"{seed}", made=made | {"random_weights_seed": seed})
        for seed in (0, 1)
    ]
    out = tmp_path / "out"
    assert verified(bundles[0], out, "--save-phases", "none")["remarks"] == []
    assert verified(bundles[1], out, code=1)["first_failure"]["phase"] == "phase_00"
    said = mistake("verify", bundles[0], "--out", out, "--checkpoint", "lpd.pth")
    assert "lpd.pth" in said
    said = mistake("verify", bundles[0], "--out", out, "--tokenizer", "vq.pt")
    assert said == "the bundle has random weights of a seed: --checkpoint must be given as well"


# ------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--images 0", "--images must be a whole number from 1 to 2147483647, but it is 0"),
        ("--images few", "'few' is not a valid integer"),
        ("--seed -1", "--seed must be a whole number from 0 to 2^64 - 1, but it is -1"),
        ("--threads 0", "--threads must be a whole number from 1 to "),
        ("--threads 100000", "but it is 100000"),
        ("--device tpu", "'tpu' is not cpu, cuda, or a GPU by its number such as cuda:1"),
        ("--device cuda --onnx", "--onnx runs the graphs on the CPU: it does not go with --device"),
        ("--threshold kl=low", "--threshold kl=low: 'low' is not a finite number"),
        ("--save-phases phase_04", "there is no phase 'phase_04'; there are phase_00 to phase_03"),
        ("--save-phases phase_00,", "there is no phase ''"),
        ("--bisect", "--bisect finds the layers whose activations must not be rounded, and"),
        ("--out taken", "taken exists and is not an earlier verification's: choose another --out"),
        ("--out mine", "mine holds notes.txt, which is no part of a report: move it away, or"),
        ("--out link", "link is a symbolic link: give --out the folder that it leads to"),
        ("--out taken/notes.txt", "taken/notes.txt is not a folder"),
        ("--out taken/notes.txt/a", "cannot write taken/notes.txt/a: "),
        ("--out .", "--out . does not name a folder: give the name that the report gets"),
        ("--out taken/..", "--out taken/.. does not name a folder"),
        ("--out /", "--out / does not name a folder"),
        ("--out /proc/a", "cannot write /proc/a: "),
        (f"--out {'a' * 300}", "File name too long"),
        ("extra", "Got unexpected extra argument (extra) (see `lpd-export verify --help`)"),
    ],
)
def test_requests_that_cannot_be_met(
    small_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("taken", "mine"):
        Path(folder).mkdir()
        Path(folder, "notes.txt").write_text("mine")
    Path("mine/report.json").write_text("{}")
    Path("link").symlink_to("mine")
    before = entries(tmp_path)
    out = [] if "--out" in options else ["--out", "new/out"]
    assert message in mistake("verify", small_bundle, *options.split(), *out)
    assert entries(tmp_path) == before


def test_bundles_that_cannot_be_verified(small_bundle: Path, tmp_path: Path) -> None:
    gone, copy = tmp_path / "gone", tmp_path / "copy"
    assert mistake("verify", gone) == f"there is no bundle {gone}; `lpd-export build` makes one"
    assert "Missing argument 'BUNDLE'" in mistake("verify")
    shutil.copytree(small_bundle, copy)
    for damaged in ("onnx/weights.data", "onnx/decode.onnx", "onnx/tokenize.onnx", "schedule.npz"):
        content = (copy / damaged).read_bytes()
        (copy / damaged).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        said = mistake("verify", copy, "--out", tmp_path / "out")
        assert said == f"{copy / damaged} was altered after it was built: build the bundle again"
        (copy / damaged).write_bytes(content)
    assert entries(tmp_path) == ["copy", *(f"copy/{name}" for name in entries(copy))]


@NO_GPU
def test_engines_need_a_gpu_or_their_graphs(
    lifelike_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle, out = lifelike_bundle("bf16", "tensorrt-rtx"), tmp_path / "out"
    assert mistake("verify", bundle, "--out", out) == (
        f"{bundle} holds tensorrt-rtx engines and there is no GPU to run them: verify it on its "
        "GPU, or with --onnx the graphs that they were compiled from"
    )
    coarse = ("--threshold", "sequence_top_1=0.9", "--threshold", "index_agreement=0.8")
    result = verified(bundle, out, "--onnx", "--save-phases", "phase_01", *coarse)
    assert result["ran"].startswith("its ONNX graphs on ONNX Runtime ")
    setting, *words = shlex.split(commands(out)["phase_01"])
    assert setting == "POLYGRAPHY_USE_TENSORRT_RTX=1"
    assert words[:4] == ["polygraphy", "run", str(bundle / "onnx/phase_01.onnx"), "--trt"]


# -------------------------------------------------------------------- verifications cut short


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """What an earlier verification left."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "report.json").write_text("{}")
    (folder / "report.html").write_text("an earlier one")
    return folder


@pytest.mark.parametrize(
    ("stage", "number", "out"),
    [
        ("loading the reference", signal.SIGTERM, "new/folder"),
        ("comparing the phases: image 2", signal.SIGINT, "out"),
    ],
)
def test_a_stopped_verification_leaves_what_was_there(
    small_bundle: Path,
    tmp_path: Path,
    earlier: Path,
    stage: str,
    number: signal.Signals,
    out: str,
) -> None:
    before = entries(tmp_path)
    process = start("verify", small_bundle, "--images", 20, "--out", tmp_path / out)
    wait_for(process, stage)
    process.send_signal(number)
    said = end(process)
    assert said.code == 130, said
    assert said.out == ""
    assert said.err.splitlines()[-1] == "lpd-export: interrupted"
    assert "Traceback" not in said.err
    assert entries(tmp_path) == before
    assert (earlier / "report.html").read_text() == "an earlier one"


@pytest.mark.parametrize("largest_file", [20_000, 60_000], ids=["a phase", "the page"])
def test_a_disk_that_fills_up(
    small_bundle: Path, tmp_path: Path, earlier: Path, largest_file: int
) -> None:
    before = entries(tmp_path)
    usual, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, most))
    try:
        said = mistake("verify", small_bundle, "--images", 1, "--out", earlier)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (usual, most))
    assert said.startswith(f"cannot write {tmp_path}/")
    assert "File too large" in said
    assert entries(tmp_path) == before
    assert (earlier / "report.html").read_text() == "an earlier one"


def test_a_report_replaces_nothing_but_a_report(tmp_path: Path) -> None:
    """Even if it comes there meanwhile."""
    out = tmp_path / "out"

    def report_while_somebody_writes() -> None:
        with new_report(out) as new:
            (new / "report.json").write_text("[]")
            out.mkdir()
            (out / "notes.txt").write_text("mine")

    with pytest.raises(UserError, match="exists and is not an earlier verification's"):
        report_while_somebody_writes()
    assert entries(tmp_path) == ["out", "out/notes.txt"]
