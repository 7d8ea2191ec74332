"""The runtime gives the reference's tokens and images, whatever the batch and the settings."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import golden
import lpd_reference
from lpd_export import Pipeline, UserError
from lpd_export.build.build import described
from lpd_export.bundle.manifest import ModelDescription
from lpd_export.graphs import contract, export
from lpd_export.machine.facts import Memory
from lpd_export.runtime.arrays import Array, address_of
from lpd_export.runtime.executor import Run
from lpd_export.runtime.generator import Generator
from lpd_export.runtime.onnxruntime_executor import OnnxRuntimeExecutor
from lpd_export.runtime.pipeline import Progress
from lpd_export.runtime.randomness import image_randomness
from lpd_export.runtime.requests import ImageRequest
from lpd_export.runtime.sampler import Sampling, SamplingRows, guide, sample
from lpd_export.schedule.phases import phase_table
from lpd_export.schedule.schedule_file import Schedule
from lpd_reference import LPD, VQTokenizer
from lpd_reference.generate import draw, filter_logits, guidance_scale

pytestmark = pytest.mark.model

MODELS = Path(__file__).parents[1] / "data" / "lpd-emoji32"


def make_generator(
    folder: Path,
    model: LPD,
    tokenizer: VQTokenizer,
    sizes: list[int],
    nan: Mapping[str, int] | None = None,
) -> Generator:
    """`nan` names a row of weights of the decode graph that is to be broken."""
    config = model.config
    models = {
        "decode": export.export_decode(model),
        "detokenize": export.export_detokenize(tokenizer, config.grid),
    }
    for name, row in (nan or {}).items():
        weight = models["decode"].graph.initializers[name]
        assert weight.const_value is not None
        content = weight.const_value.numpy().copy()
        content[row] = np.nan
        weight.const_value = ir.tensor(content, name=name)
    export.write_models(models, folder)
    executor = OnnxRuntimeExecutor({name: folder / f"{name}.onnx" for name in models})
    resolution = config.grid * tokenizer.config.stride
    of_row = contract.cache_shape(config.heads, config.cells, config.head_dim, True)
    described_model = described(ModelDescription, config)
    return Generator(executor, described_model, of_row, resolution, phase_table(sizes))


@pytest.fixture(scope="module")
def demo_reference() -> tuple[LPD, VQTokenizer]:
    return (
        lpd_reference.load_lpd(MODELS / "lpd_emoji32.pth"),
        lpd_reference.load_tokenizer(MODELS / "vq_emoji32.pt"),
    )


@pytest.fixture(scope="module")
def pipeline(emoji_bundle: Path) -> Pipeline:
    return Pipeline.open(emoji_bundle)


def asked(labels: dict[int, int | None], seed: int, sampling: Sampling) -> list[ImageRequest]:
    """Requests of these classes by index."""
    return [ImageRequest(label, seed, index, sampling) for index, label in labels.items()]


# ------------------------------------------------------------------- equal to the reference


@pytest.mark.parametrize("name", golden.LPD_NAMES)
def test_golden_tokens(name: str, tmp_path: Path) -> None:
    """Greedy tokens of the authors' implementation, with guidance, without, and without class."""
    vectors = golden.read(name)
    model, expect = golden.lpd(vectors), vectors.expect
    tokenizer = golden.tokenizer(golden.read("vq_f4"))
    generator = make_generator(tmp_path, model, tokenizer, vectors.config["group_sizes"])
    labels = expect["labels"].tolist()
    guided = Sampling(
        cfg=vectors.config["cfg_scale"], guidance=vectors.config["cfg_schedule"], top_k=1
    )
    orders = expect["orders"].numpy()
    uniform = np.random.default_rng(0).random(orders.shape)
    for case, case_labels, sampling in (
        ("guided", labels, guided),
        ("plain", labels, Sampling(top_k=1)),
        ("null", [None] * len(labels), Sampling(top_k=1)),
    ):
        token_ids, images = generator.generate(
            case_labels, orders, uniform, [sampling] * len(labels)
        )
        np.testing.assert_array_equal(token_ids, expect[f"{case}.tokens"], case)
        expected_images = tokenizer.decode(expect[f"{case}.tokens"])
        np.testing.assert_allclose(images, expected_images, rtol=0, atol=1e-4)


SETTINGS = [
    Sampling(cfg=3.0),
    Sampling(cfg=1.0),
    Sampling(cfg=4.0, guidance="constant"),
    Sampling(cfg=2.0, temperature=0.7, top_k=50),
    Sampling(cfg=3.0, top_p=0.9),
    Sampling(cfg=3.0, temperature=1.3, top_k=200, top_p=0.8),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_demo_images_equal_the_reference(
    pipeline: Pipeline, demo_reference: tuple[LPD, VQTokenizer], sampling: Sampling
) -> None:
    """The same labels, orders and uniform numbers: every token, and pixels within 1e-3."""
    model, tokenizer = demo_reference
    schedule = pipeline.choose_schedule(None)
    labels: dict[int, int | None] = {index: index for index in range(5)}
    images = list(pipeline.stream(asked(labels, 7, sampling), batch=5))
    chances = [image_randomness(7, index, 256, schedule.count) for index in labels]
    orders = np.stack([schedule.orders[chance.order_index] for chance in chances])
    expected = lpd_reference.generate(
        model,
        torch.tensor(list(labels.values())),
        torch.from_numpy(orders.astype(np.int64)),
        schedule.group_sizes.tolist(),
        torch.from_numpy(np.stack([chance.uniform for chance in chances])),
        cfg=sampling.cfg,
        guidance=sampling.guidance,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
    )
    token_ids = np.stack([image.token_ids for image in images])
    np.testing.assert_array_equal(token_ids, expected.token_ids.numpy())
    np.testing.assert_allclose(
        pipeline.detokenize(token_ids), tokenizer.decode(expected.token_ids).numpy(), atol=1e-3
    )


@pytest.mark.parametrize("mutual_visibility", [True, False])
def test_logits_equal_the_references_teacher_forced_pass(
    emoji_bundle: Path, demo_reference: tuple[LPD, VQTokenizer], mutual_visibility: bool
) -> None:
    """Step by step with a cache, and in one pass: two ways to the same logits."""
    pipeline = Pipeline.open(emoji_bundle, mutual_visibility=mutual_visibility)
    images = pipeline.generate([3], cfg=1.0)
    schedule, token_ids = pipeline.choose_schedule(None), torch.from_numpy(images[0].token_ids)
    order = torch.from_numpy(images[0].order[None])
    sizes = schedule.group_sizes.tolist()
    with torch.inference_mode():
        expected = demo_reference[0](
            token_ids[None], torch.tensor([3]), order, sizes, mutual_visibility
        )
    np.testing.assert_allclose(
        pipeline.teacher_forced_logits(images), expected, atol=1e-4, rtol=1e-4
    )


def test_images_without_a_class_equal_the_reference(
    pipeline: Pipeline, demo_reference: tuple[LPD, VQTokenizer]
) -> None:
    schedule = pipeline.choose_schedule(None)
    # Beside an image with a class, whose guidance must not touch them.
    images = pipeline.generate([None, "heart", None], seed=3, batch=3)
    for index in (0, 2):
        chance = image_randomness(3, index, 256, schedule.count)
        expected = lpd_reference.generate(
            demo_reference[0],
            None,
            torch.from_numpy(images[index].order[None]),
            schedule.group_sizes.tolist(),
            torch.from_numpy(chance.uniform[None]),
        )
        np.testing.assert_array_equal(images[index].token_ids, expected.token_ids[0].numpy())


def test_tokenize_and_detokenize_equal_the_reference(
    pipeline: Pipeline, demo_reference: tuple[LPD, VQTokenizer]
) -> None:
    tokenizer = demo_reference[1]
    token_ids = np.random.default_rng(0).integers(1024, size=(3, 256))
    images = pipeline.detokenize(token_ids)
    expected = tokenizer.decode(torch.from_numpy(token_ids))
    np.testing.assert_allclose(images, expected.numpy(), atol=1e-4)
    np.testing.assert_array_equal(pipeline.tokenize(images), tokenizer.encode(expected).numpy())


# --------------------------------------------------------------------------- the same image


def mixed_requests() -> list[ImageRequest]:
    """Classes, seeds, guidance, filters and given cells of all kinds, no two alike."""
    chance = np.random.default_rng(0)
    given = chance.integers(1024, size=256)
    given[chance.random(256) < 0.5] = -1
    order = chance.permutation(256)
    return [
        ImageRequest(13, 5, 0, SETTINGS[0]),
        ImageRequest(2, 5, 1, SETTINGS[1]),
        ImageRequest(None, 5, 2, SETTINGS[2]),
        ImageRequest(8, 6, 2, SETTINGS[3]),
        ImageRequest(13, 5, 4, SETTINGS[0], given=given),
        ImageRequest(1, 2**64 - 1, 2**64 - 1, SETTINGS[5], order=order),
        ImageRequest(4, 5, 9, SETTINGS[4], order=order, given=given),
    ]


@pytest.mark.parametrize("bundle", ["emoji_bundle", "emoji_fp16_bundle", "emoji_int8_bundle"])
def test_an_image_follows_from_its_request_alone(
    bundle: str, request: pytest.FixtureRequest
) -> None:
    """Whatever it is generated beside, wherever it stands, and in a batch that is filled up."""
    pipeline, requests = Pipeline.open(request.getfixturevalue(bundle)), mixed_requests()
    alone = {id(r): image for r in requests for image in pipeline.stream([r])}
    for batch, asked_for in ((3, requests), (7, requests[::-1])):
        for image in pipeline.stream(asked_for, batch=batch):
            expected = alone[id(image.request)]
            np.testing.assert_array_equal(image.token_ids, expected.token_ids)
            assert np.abs(image.pixels.astype(int) - expected.pixels).max() <= 1


def test_given_cells_stay_and_the_others_follow_them(pipeline: Pipeline) -> None:
    """All the tokens of an image but those of the last step, with its order and numbers."""
    (image,) = pipeline.generate(["heart"], seed=4)
    last = image.order[-image.schedule.group_sizes[-1] :]
    given = image.token_ids.copy()
    given[last] = -1
    request = dataclasses.replace(image.request, given=given)
    (again,) = pipeline.stream([request])
    np.testing.assert_array_equal(again.token_ids, image.token_ids)
    np.testing.assert_array_equal(again.pixels, image.pixels)
    given[image.order[0]] = (given[image.order[0]] + 1) % 1024
    (other,) = pipeline.stream([dataclasses.replace(request, given=given)])
    np.testing.assert_array_equal(other.token_ids[given >= 0], given[given >= 0])
    assert not np.array_equal(other.token_ids[last], image.token_ids[last])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"label": 15}, "from 0 to 14, but it is 15"),
        ({"label": "heart"}, "label must be a whole number"),
        ({"index": -1}, "the image's index must be a whole number from 0"),
        ({"seed": 2**64}, "the seed must be a whole number from 0"),
        ({"order": [0, 0, 1]}, "every cell once"),
        ({"order": np.arange(16)}, "order must be of the model's 256 cells, not of 16"),
        ({"given": np.zeros((16, 16))}, r"whole numbers .* float64 of shape \[16, 16\]"),
        ({"given": np.full(256, 1024)}, "token 1024 is not in the model's codebook"),
        ({"given": np.full(256, -2)}, "token -2 is not in the model's codebook"),
    ],
)
def test_wrong_requests_are_answered(
    pipeline: Pipeline, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        pipeline.stream([ImageRequest(**({"label": 13} | settings))])


def test_seeds_and_indices_give_other_images(pipeline: Pipeline) -> None:
    first, second = pipeline.generate(["heart", "heart"], seed=0)
    (other,) = pipeline.generate(["heart"], seed=1)
    (again,) = pipeline.generate(["heart"], seed=0)
    assert not np.array_equal(first.token_ids, second.token_ids)
    assert not np.array_equal(first.token_ids, other.token_ids)
    np.testing.assert_array_equal(first.pixels, again.pixels)


def test_a_returned_image_is_not_overwritten_by_the_next(pipeline: Pipeline) -> None:
    images = pipeline.stream(asked({0: 13, 1: 2}, 0, pipeline.sampling()))
    first = next(images)
    pixels, token_ids = first.pixels.copy(), first.token_ids.copy()
    next(images)
    np.testing.assert_array_equal(first.pixels, pixels)
    np.testing.assert_array_equal(first.token_ids, token_ids)


def test_randomness_never_changes_between_versions() -> None:
    """Seeds are promises: these numbers may not change."""
    chance = image_randomness(seed=1, image_index=2, cells=4, orders=64)
    assert chance.order_index == ORDER_INDEX
    np.testing.assert_allclose(chance.uniform, UNIFORM, rtol=1e-12)


ORDER_INDEX = 29
UNIFORM = [0.2774711934347405, 0.8321883614772233, 0.9290694774039243, 0.6036086831245772]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(1, 100))
def test_randomness_is_a_function_of_seed_and_index(seed: int, index: int, orders: int) -> None:
    first = image_randomness(seed, index, 16, orders)
    again = image_randomness(seed, index, 16, orders)
    assert first.order_index == again.order_index < orders
    np.testing.assert_array_equal(first.uniform, again.uniform)
    assert ((first.uniform >= 0) & (first.uniform < 1)).all()
    other = image_randomness(seed ^ 1, index, 16, orders)
    assert not np.array_equal(first.uniform, other.uniform)


# ---------------------------------------------------------------------------------- sampler


def random_logits(seed: int, shape: tuple[int, ...], spread: float) -> Tensor:
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.01, 1.0, 5.0, 50.0]),
    temperature=st.sampled_from([0.1, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0.01, 1.0),
)
def test_sampler_draws_what_the_reference_draws(
    seed: int, spread: float, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = random_logits(seed, (2, 3, 32), spread)
    uniform = torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    expected = draw(filter_logits(logits / temperature, top_k, top_p), uniform)
    rows = SamplingRows.of([sampling] * 2, 3, 32)
    given = logits.numpy(), uniform.numpy()
    np.testing.assert_array_equal(sample(*given, rows, sampling.filtered)[0], expected)
    # Beside an image that is filtered in another way, its own are what they are alone.
    other = Sampling(top_k=3, top_p=0.5, temperature=2.0)
    mixed, _ = sample(*given, SamplingRows.of([other, sampling], 3, 32))
    np.testing.assert_array_equal(mixed[1], expected[1])


def test_sampler_stays_in_the_vocabulary_at_the_ends() -> None:
    logits = np.full((1, 2, 8), -np.inf, np.float32)
    logits[..., 3] = 0.0
    rows = SamplingRows.of([Sampling()], 2, 8)
    for end in (0.0, 1 - 2**-53):
        assert (sample(logits, np.full((1, 2), end), rows)[0] == 3).all()
    broken = np.full((1, 2, 8), np.nan, np.float32)
    with np.errstate(invalid="ignore"):
        tokens, finite = sample(broken, np.zeros((1, 2)), rows)
    assert (tokens < 8).all()
    assert not finite.any()


def test_guidance_is_the_references() -> None:
    logits = random_logits(0, (4, 3, 8), 1.0).numpy()
    for guidance in ("linear", "constant"):
        scale = Sampling(cfg=4.8, guidance=guidance).scale(16)
        np.testing.assert_allclose(scale, guidance_scale(4.8, guidance, 16), rtol=0, atol=1e-6)
        expected = logits[2:] + scale[:3, None] * (logits[:2] - logits[2:])
        np.testing.assert_array_equal(guide(logits, scale[:3]), expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cfg", -1.0),
        ("cfg", float("nan")),
        ("cfg", float("inf")),
        ("guidance", "cosine"),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: float | str) -> None:
    with pytest.raises(UserError, match=str(value)):
        Sampling(**{field: value})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ the machine


def test_caches_are_updated_in_place_and_buffers_are_reused(tmp_path: Path) -> None:
    vectors = golden.read("lpd_grid4")
    model, expect = golden.lpd(vectors), vectors.expect
    bound: list[dict[str, int]] = []

    class Recording(OnnxRuntimeExecutor):
        def bind(self, graph: str, tensors: Mapping[str, Array]) -> Run:
            bound.append({name: address_of(array) for name, array in tensors.items()})
            return super().bind(graph, tensors)

    tokenizer = golden.tokenizer(golden.read("vq_f4"))
    generator = make_generator(tmp_path, model, tokenizer, vectors.config["group_sizes"])
    files = {name: tmp_path / f"{name}.onnx" for name in ("decode", "detokenize")}
    generator._executor = Recording(files)
    labels, orders = expect["labels"].tolist(), expect["orders"].numpy()
    uniform = np.zeros(orders.shape)
    first, second = (
        [address_of(array) for array in generator.generate(labels, orders, uniform, samplings)]
        for samplings in ([Sampling(cfg=2.0)] * len(labels), [Sampling(cfg=3.0)] * len(labels))
    )
    assert first == second
    decode = [addresses for addresses in bound if "logits" in addresses]
    sizes = vectors.config["group_sizes"]
    assert len(decode) == len(sizes), "a second generation of the same batch size bound anew"
    for addresses in decode:
        for past in contract.cache_names("past", model.config.depth):
            assert addresses[past] == addresses[past.replace("past", "present")]
            assert addresses[past] == decode[0][past]


def test_nan_is_noticed_and_named(tmp_path: Path) -> None:
    vectors = golden.read("lpd_grid4")
    model, expect = golden.lpd(vectors), vectors.expect
    # Reached only by a step that looks at this cell.
    cell = int(expect["orders"][0, 5])
    tokenizer = golden.tokenizer(golden.read("vq_f4"))
    sizes = vectors.config["group_sizes"]
    generator = make_generator(tmp_path, model, tokenizer, sizes, {"pos_embed": cell + 1})
    orders = expect["orders"][:1].numpy()
    uniform = np.zeros(orders.shape)
    step = next(p.index + 1 for p in phase_table(sizes) if p.first_cell + p.queries > 5)
    with pytest.raises(UserError, match=f"step {step} .*NaN"):
        generator.generate([0], orders, uniform, [Sampling()])


def test_nan_does_not_stay_for_the_next_generation(tmp_path: Path) -> None:
    """Class 1 is broken, class 0 is not."""
    vectors = golden.read("lpd_grid4")
    model, expect = golden.lpd(vectors), vectors.expect
    tokenizer = golden.tokenizer(golden.read("vq_f4"))
    broken = {"embedding": model.config.vocab_size + 1}
    sizes = vectors.config["group_sizes"]
    generator = make_generator(tmp_path, model, tokenizer, sizes, broken)
    orders = expect["orders"][:1].numpy()
    uniform = np.zeros(orders.shape)
    before = generator.generate([0], orders, uniform, [Sampling()])[0].copy()
    with pytest.raises(UserError, match="NaN"):
        generator.generate([1], orders, uniform, [Sampling()])
    after = generator.generate([0], orders, uniform, [Sampling()])[0]
    np.testing.assert_array_equal(after, before)


class Counting(OnnxRuntimeExecutor):
    """Counts what is bound; records by calling again, where a GPU would replay its graph."""

    bound = 0
    bound_while_recording = 0
    recorded = 0

    def bind(self, graph: str, tensors: Mapping[str, Array]) -> Run:
        self.bound += 1
        return super().bind(graph, tensors)

    def record(self, work: Run) -> Run:
        before = self.bound
        self.recorded += 1
        work()
        self.bound_while_recording += self.bound - before
        return work


class Replaying(Counting):
    records = True  # type: ignore[assignment]


def counting(pipeline: Pipeline, emoji_bundle: Path, kind: type[Counting]) -> Pipeline:
    files = {name: emoji_bundle / f"onnx/{name}.onnx" for name in ("decode", "detokenize")}
    return Pipeline(pipeline.manifest, pipeline.choose_schedule(None), kind(files))


def test_everything_is_bound_before_it_is_recorded(pipeline: Pipeline, emoji_bundle: Path) -> None:
    recording = counting(pipeline, emoji_bundle, Replaying)
    (image,) = recording.generate([13])
    assert isinstance(recording.executor, Counting)
    assert recording.executor.bound > 0
    assert recording.executor.bound_while_recording == 0
    np.testing.assert_array_equal(image.token_ids, pipeline.generate([13])[0].token_ids)


def test_a_recording_serves_requests_of_all_settings(
    pipeline: Pipeline, emoji_bundle: Path
) -> None:
    """Settings are in buffers; only filters, which sort, are recorded apart."""
    replaying = counting(pipeline, emoji_bundle, Replaying)
    assert isinstance(replaying.executor, Replaying)
    for sampling in (SETTINGS[0], SETTINGS[2], SETTINGS[3], SETTINGS[4], SETTINGS[0]):
        (image,) = replaying.stream([ImageRequest(13, sampling=sampling)])
        (expected,) = pipeline.stream([ImageRequest(13, sampling=sampling)])
        np.testing.assert_array_equal(image.token_ids, expected.token_ids)
    assert replaying.executor.recorded == 2


def test_a_last_smaller_batch_binds_nothing_anew(pipeline: Pipeline, emoji_bundle: Path) -> None:
    counted = counting(pipeline, emoji_bundle, Counting)
    assert isinstance(counted.executor, Counting)
    full = counted.generate([13, 2, 8], batch=3)
    bound = counted.executor.bound
    images = counted.generate([13, 2, 8, None], batch=3)
    assert counted.executor.bound == bound
    (alone,) = pipeline.stream(asked({3: None}, 0, pipeline.sampling()))
    for image, expected in zip(images, [*full, alone], strict=True):
        np.testing.assert_array_equal(image.token_ids, expected.token_ids)


@pytest.mark.parametrize("kind", [Counting, Replaying])
def test_buffers_of_another_batch_size_go_at_once(
    pipeline: Pipeline, emoji_bundle: Path, kind: type[Counting]
) -> None:
    """Without waiting for the garbage collector: on a GPU the caches would be there twice."""
    other = counting(pipeline, emoji_bundle, kind)
    gc.disable()
    try:
        other.generate([13])
        (generator,) = other._generators.values()
        old = weakref.ref(generator._batch)  # type: ignore[arg-type]
        other.generate([13, 2], batch=2)
        assert old() is None
    finally:
        gc.enable()


def test_memory_that_is_held_counts_as_free(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.generate([13, 2, 8], batch=3)
    nothing = Memory(total=2**34, free=0)
    monkeypatch.setattr("lpd_export.runtime.memory.read_memory", lambda: nothing)
    pipeline.generate([13, 2, 8], batch=3)
    with pytest.raises(UserError, match="smaller batch"):
        pipeline.generate([0] * 40, batch=40)


def test_images_of_a_stream_stay_theirs_when_others_are_made_between(pipeline: Pipeline) -> None:
    images = pipeline.stream(asked({0: 13, 1: 2}, 0, pipeline.sampling()), batch=2)
    next(images)
    pipeline.generate([5, 6], seed=9, batch=2)
    second = next(images)
    expected = pipeline.generate([13, 2], seed=0, batch=2)[1]
    np.testing.assert_array_equal(second.token_ids, expected.token_ids)


def test_teacher_forcing_follows_the_images_own_schedule(pipeline: Pipeline) -> None:
    """Greedy tokens are the most probable ones of the logits that they were drawn from."""
    schedule = Schedule.make(16, steps=8, kind="random", count=2)
    images = pipeline.generate([13], cfg=1.0, top_k=1, schedule=schedule)
    order = images[0].order
    drawn = pipeline.teacher_forced_logits(images).argmax(axis=-1)[0]
    np.testing.assert_array_equal(drawn, images[0].token_ids[order])
    with pytest.raises(UserError, match="each alone"):
        pipeline.teacher_forced_logits([*images, *pipeline.generate([13], cfg=1.0, top_k=1)])


def test_progress_tells_each_step_of_each_batch(pipeline: Pipeline) -> None:
    told: list[Progress] = []
    pipeline.generate([0, 1, 2], batch=2, progress=told.append)
    assert told == [
        *(Progress(0, 2, step, 20) for step in range(1, 21)),
        *(Progress(2, 1, step, 20) for step in range(1, 21)),
    ]


def test_another_schedule_is_followed(pipeline: Pipeline, tmp_path: Path) -> None:
    schedule = Schedule.make(16, steps=8, kind="random", count=2)
    schedule.save(tmp_path / "random.npz")
    (given,) = pipeline.generate([13], schedule=schedule)
    (read,) = pipeline.generate([13], schedule=tmp_path / "random.npz")
    (own,) = pipeline.generate([13])
    np.testing.assert_array_equal(given.token_ids, read.token_ids)
    assert not np.array_equal(given.token_ids, own.token_ids)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"classes": ["hart"]}, "did you mean 'heart'"),
        ({"classes": [15]}, "0 to 14"),
        ({"classes": [0], "batch": 0}, "batch size must be a whole number from 1"),
        ({"classes": "heart"}, r"one class: give \['heart'\]"),
        ({"classes": 3}, r"one class: give \[3\]"),
        ({"classes": [0], "seed": "1"}, "whole number"),
        ({"classes": [0], "seed": -1}, "seed"),
        ({"classes": [0], "seed": 2**64}, "seed"),
        ({"classes": [0], "top_p": 2.0}, "top-p"),
        ({"classes": [0], "schedule": Schedule.make(8, 4, count=1)}, "8x8 grid"),
    ],
)
def test_wrong_arguments_are_answered(
    pipeline: Pipeline, arguments: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        pipeline.generate(**arguments)  # type: ignore[arg-type]


def test_wrong_tensors_are_answered(pipeline: Pipeline) -> None:
    with pytest.raises(UserError, match="below 1024"):
        pipeline.detokenize(np.full((1, 256), 1024))
    with pytest.raises(UserError, match="256"):
        pipeline.detokenize(np.zeros((1, 64), np.int64))
    with pytest.raises(UserError, match="32, 32"):
        pipeline.tokenize(np.zeros((1, 3, 16, 16), np.float32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": 3.0}, "generate takes no 'guidance_scale': here it is called cfg"),
        ({"steps": 3}, r"generate takes no 'steps': see help\(Pipeline.generate\)"),
        ({"seed": True}, "the seed must be a whole number from 0 .*, but it is True"),
        ({"batch": 2.5}, "the batch size must be a whole number from 1 .*, but it is 2.5"),
        ({"cfg": "3"}, "cfg must be a number from 0 to 1000, but it is '3'"),
        ({"cfg": 1e308}, "cfg must be a number from 0 to 1000, but it is 1e[+]308"),
        ({"temperature": None}, "temperature must be a number from 0.001 to 1000, but it is None"),
        ({"top_k": 2.5}, "top-k must be a whole number from 1 .*, but it is 2.5"),
        ({"top_p": True}, "top-p must be a number above 0 and at most 1, but it is True"),
    ],
)
def test_wrong_arguments_are_sentences(
    pipeline: Pipeline, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pipeline.generate([13], **settings)


def test_a_closed_pipeline_holds_nothing_and_says_so(
    pipeline: Pipeline, emoji_bundle: Path
) -> None:
    with counting(pipeline, emoji_bundle, Counting) as opened:
        opened.generate([13])
        (generator,) = opened._generators.values()
        assert generator.held_bytes > 0
    assert generator.held_bytes == 0
    with pytest.raises(UserError, match="closed: open the bundle again"):
        opened.generate([13])


def test_what_is_printed_of_pipelines_and_images_is_short(pipeline: Pipeline) -> None:
    (image,) = pipeline.generate([13], seed=3)
    assert repr(pipeline) == "<Pipeline emoji32: 32 px in 20 steps, fp32, onnxruntime on cpu>"
    assert repr(image) == f"<GeneratedImage 0 of seed 3: {image.class_name}, 32 x 32>"
