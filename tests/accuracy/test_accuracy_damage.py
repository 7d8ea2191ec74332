"""`lpd-export verify` of bundles that are wrong: every mistake is found, and where it was made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import damage
from commandline import answer, mistake
from lpd_export.accuracy.report import grown_layers
from lpd_export.accuracy.request import VerifyRequest
from lpd_export.accuracy.results import GENERATION, SEQUENCE, Verification
from lpd_export.accuracy.verify import verify
from lpd_export.bundle.manifest import Bundle
from lpd_export.runtime.generator import Batch
from lpd_export.runtime.randomness import ImageRandomness, image_randomness
from lpd_export.runtime.sampler import guide, sample
from lpd_export.schedule.phases import Phase, attention_mask

pytestmark = pytest.mark.model

CFG = 2.0
TOKENIZER = {"detokenize", "tokenize"}
IMAGES_OF_THE_SAME_TOKENS = (GENERATION, "pixels", "generation_psnr")

LifelikeBundle = Callable[..., Path]
First = tuple[str, str, str]
"""Phase, tensor and metric of the first failure."""


# ----------------------------------------------------------------------------------- bundles


def verified(bundle: Path, out: Path, **options: Any) -> Verification:
    """What `verify` finds of a bundle."""
    settings = {"images": 1, "save_phases": "none"} | options
    return verify(VerifyRequest(bundle, threads=1, out=out, **settings), lambda stage: None)


def first_failure(verification: Verification) -> First:
    assert not verification.passed
    first = verification.failures[0]
    return first.phase, first.tensor, first.metric


def failed_phases(verification: Verification) -> set[str]:
    return {entry.phase for entry in verification.failures}


# -------------------------------------------------------------------------------- undamaged


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_undamaged_bundle_passes(
    lifelike_bundle: LifelikeBundle, tmp_path: Path, precision: str
) -> None:
    out = tmp_path / "report"
    said = answer("verify", lifelike_bundle(precision), "--images", 2, "--threads", 1, "--out", out)
    assert said.code == 0, said
    assert f"passed: every threshold of {precision} holds for 2 images" in said.out
    assert json.loads((out / "report.json").read_text())["passed"]


def test_a_bundle_written_again_passes(lifelike_bundle: LifelikeBundle, tmp_path: Path) -> None:
    """So it is the damage that is found, and not that files were written anew."""
    again = damage.damaged(lifelike_bundle("fp32"), tmp_path / "again", lambda models: None)
    found = verified(again, tmp_path / "report")
    assert found.passed, found.failures
    assert set(found.phases) == {*(f"phase_0{i}" for i in range(5)), *TOKENIZER} | {
        SEQUENCE,
        GENERATION,
    }


# ------------------------------------------------------------------------------ the decode graph


class Case(NamedTuple):
    """A damage of the decode graph, and where verify must see it."""

    damage: damage.Damage
    tensor: str
    metric: str = "cache_error"
    phase: str = "phase_00"
    layers: tuple[str, ...] = ()
    """Those where the error grows most, the most first up to their order."""
    precision: str = "fp32"


CASES = {
    "a weight 5 % too large": Case(damage.scaled_weight, "present_key_2", layers=("blocks.1.fc1",)),
    "a weight 5 % too large, in fp16": Case(
        damage.scaled_weight, "present_key_2", layers=("blocks.1.fc1",), precision="fp16"
    ),
    "query and key swapped": Case(
        damage.query_and_key_swapped, "present_key_1", layers=("blocks.1.query", "blocks.1.key")
    ),
    "mask off by one": Case(
        damage.mask_off_by_one, "present_key_1", layers=("blocks.0.attention",)
    ),
    "condition's row forgotten": Case(
        damage.condition_row_forgotten, "rows_left_alone", "rows_left_alone", "phase_01"
    ),
    "rows from the fourth phase on in one place": Case(
        damage.rows_beyond(4), "rows_left_alone", "rows_left_alone", "phase_04"
    ),
    "a stale row": Case(damage.stale_row, "present_value_1", layers=("blocks.1.attention",)),
    "guidance in the graph": Case(damage.guided_twice(CFG), "logits", "logits_error"),
    "epsilon of norms": Case(damage.norm_epsilon, "present_key_0", layers=("z_proj_ln",)),
    "queries' positions off by one": Case(
        damage.positions_of_queries_off_by_one, "present_key_0", layers=("z_proj_ln",)
    ),
    "classes off by one": Case(damage.classes_off_by_one, "present_key_0"),
    "null condition is a class": Case(damage.null_condition_is_a_class, "present_key_0"),
    "logits off by one": Case(damage.logits_off_by_one, "logits", "logits_error", layers=("head",)),
    "GELU by tanh": Case(damage.tanh_gelu, "present_key_1", layers=("blocks.0.fc2",)),
    "weights rounded to fp16": Case(damage.rounded_to_fp16, "present_key_0"),
    "a weight that is NaN": Case(damage.not_a_number, "present_key_2", layers=("blocks.1.proj",)),
    "INT8 scales doubled": Case(
        damage.doubled_scales, "present_value_1", layers=("blocks.1.value",), precision="int8"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_damage_of_the_decode_graph(
    lifelike_bundle: LifelikeBundle, tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    bundle = damage.damaged(lifelike_bundle(case.precision), tmp_path / "bundle", case.damage)
    found = verified(bundle, tmp_path / "report", by_layer=bool(case.layers))
    assert first_failure(found) == (case.phase, case.tensor, case.metric)
    assert SEQUENCE in failed_phases(found)
    # Nothing is blamed that is in order.
    assert not failed_phases(found) & TOKENIZER
    if case.tensor == "logits":
        assert not any(entry.metric == "cache_error" for entry in found.failures)
    if case.layers:
        grown = grown_layers([layer for layer in found.layers if layer.graph == "decode"])
        assert found.layers_phase == case.phase
        assert {layer.layer for layer in grown[: len(case.layers)]} == set(case.layers)


def test_a_lost_position_fails_where_its_cell_is_asked_and_given(
    lifelike_bundle: LifelikeBundle, tmp_path: Path
) -> None:
    bundle = Bundle.open(lifelike_bundle("fp32"))
    schedule = bundle.schedule()
    chance = image_randomness(0, 0, schedule.cells, schedule.count)
    asked = bundle.manifest.phases[2]
    cell = int(schedule.orders[chance.order_index, asked.first_cell])
    out = damage.damaged(bundle.path, tmp_path / "bundle", damage.position_lost(cell))
    found = verified(out, tmp_path / "report", by_layer=True)
    assert first_failure(found) == ("phase_02", "present_key_0", "cache_error")
    # First a query, then context; each phase is fed right caches, so that later ones pass.
    assert failed_phases(found) - {SEQUENCE, GENERATION} == {"phase_02", "phase_03"}
    assert found.layers_phase == "phase_02"


def test_rows_beyond_the_cache_fail(lifelike_bundle: LifelikeBundle, tmp_path: Path) -> None:
    """The last phase cannot be run: the report says so, and what failed before it comes first."""
    bundle = damage.damaged(
        lifelike_bundle("fp32"), tmp_path / "bundle", damage.write_index_off_by_one
    )
    found = verified(bundle, tmp_path / "report", save_phases=None, by_layer=True)
    assert first_failure(found) == ("phase_00", "rows_left_alone", "rows_left_alone")
    last = [entry for entry in found.failures if entry.phase == "phase_04"]
    assert all(np.isnan(entry.value) for entry in last)
    cause = f"cannot run {bundle / 'onnx/decode.onnx'}: "
    phases, *others, drawing = found.remarks
    assert phases.startswith(f"{bundle} fails in phase_04")
    assert drawing.startswith(f"{bundle} draws no image: ")
    assert all(cause in remark for remark in found.remarks)
    assert all("TensorScatter" in remark for remark in found.remarks)
    assert any("whole sequences: " in remark for remark in (phases, *others))
    # A run has no verdict to give: it says the same in one sentence, and leaves nothing.
    said = mistake("run", bundle, "--class", "0", "--out", tmp_path / "images")
    assert cause in said
    assert said.endswith(": build the bundle again")
    assert not (tmp_path / "images").exists()


def first_use(model: ir.Model) -> tuple[ir.Node, int]:
    """The first node that uses an input of the graph, and where."""
    uses = ((node, i) for node in model.graph for i, value in enumerate(node.inputs))
    return next((node, i) for node, i in uses if node.inputs[i] in model.graph.inputs)


def breaks_at_run(graph: str) -> damage.Damage:
    """A graph that loads, and whose first operation then finds no such index."""

    def apply(models: damage.Models) -> None:
        model = models[graph]
        far = damage.constant(model, "far", [2**20])
        use = first_use(model)
        damage.replace_input(model, *use, lambda value: [ir.node("Gather", [value, far])])

    return apply


def test_a_tokenizer_that_fails_draws_images_all_the_same(
    lifelike_bundle: LifelikeBundle, tmp_path: Path
) -> None:
    """It is no part of a generation; and what it fails at is remarked of either side."""
    good = lifelike_bundle("fp32")
    bad = damage.damaged(good, tmp_path / "bad", breaks_at_run("tokenize"))
    cause = f"cannot run {bad / 'onnx/tokenize.onnx'}: "
    for bundle, other in ((bad, good), (good, bad), (bad, bad)):
        found = verified(bundle, tmp_path / "report", against=str(other))
        assert first_failure(found) == ("tokenize", "indices", "index_agreement")
        assert failed_phases(found) == {"tokenize"}
        assert len(found.pairs) == 1
        assert len(found.remarks) == [bundle, other].count(bad)
        for remark in found.remarks:
            assert remark.startswith(f"{bad} fails in tokenize: ONNX Runtime ")
            assert cause in remark
    found = verified(bad, tmp_path / "report", by_layer=True)
    assert {layer.graph for layer in found.layers} == {"decode", "detokenize"}


def test_nothing_is_compared_with_a_bundle_that_draws_nothing(
    lifelike_bundle: LifelikeBundle, tmp_path: Path
) -> None:
    for name, what, cause in (
        ("failing", breaks_at_run("detokenize"), "onnx/detokenize.onnx: "),
        ("broken", damage.not_a_number, "the logits of step 1 (phase 0, prefill) are NaN or"),
    ):
        bad = damage.damaged(lifelike_bundle("fp32"), tmp_path / name, what)
        command = ["verify", lifelike_bundle("fp32"), "--against", bad, "--images", 1]
        said = mistake(*command, "--out", tmp_path / "report")
        assert said.startswith(f"there is nothing to compare with, {bad} draws no image: ")
        assert cause in said
        assert not (tmp_path / "report").exists()


def test_too_little_memory_is_no_verdict(lifelike_bundle: LifelikeBundle, tmp_path: Path) -> None:
    """More than any machine has is asked for: that says nothing of the model."""

    def needs_petabytes(models: damage.Models) -> None:
        model = models["tokenize"]
        many = damage.constant(model, "many", [2**40, 1, 1, 1])
        first = damage.constant(model, "first", [0])

        def repeat(image: ir.Value) -> list[ir.Node]:
            repeated = ir.node("Expand", [image, many])
            return [repeated, ir.node("ReduceMax", [repeated.outputs[0], first])]

        damage.replace_input(model, *first_use(model), repeat)

    bundle = damage.damaged(lifelike_bundle("fp32"), tmp_path / "bundle", needs_petabytes)
    said = mistake("verify", bundle, "--images", 1, "--out", tmp_path / "report")
    assert said.startswith(f"there is too little memory to run {bundle / 'onnx/tokenize.onnx'} (")
    assert said.endswith("): end what else runs here, or use a smaller --batch")
    assert not (tmp_path / "report").exists()


def test_a_mistake_in_the_code_is_no_verdict(
    lifelike_bundle: LifelikeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*arguments: object) -> None:
        raise TypeError("a mistake in the code")

    monkeypatch.setattr("lpd_export.accuracy.bundle_side.guide", mistaken)
    with pytest.raises(TypeError, match="a mistake in the code"):
        verified(lifelike_bundle("fp32"), tmp_path / "report")
    assert not (tmp_path / "report").exists()


# -------------------------------------------------------------------------- the tokenizer's graphs


@pytest.mark.parametrize(
    "name",
    ["not normalized", "off by one", "group norm", "bias", "attention"],
)
def test_a_damage_of_detokenize(
    lifelike_bundle: LifelikeBundle, lifelike_weights: Path, tmp_path: Path, name: str
) -> None:
    what = {
        "not normalized": damage.codebook_not_normalized(lifelike_weights),
        "off by one": damage.codebook_off_by_one("detokenize"),
        "group norm": damage.group_norm_epsilon,
        "bias": damage.bias_dropped,
        "attention": damage.unscaled_attention,
    }[name]
    found = verified(
        damage.damaged(lifelike_bundle("fp32"), tmp_path / "bundle", what), tmp_path / "report"
    )
    failures = [(entry.phase, entry.tensor, entry.metric) for entry in found.failures]
    first, *more = failures
    assert first == ("detokenize", "image", "image_psnr")
    # 8-bit pixels of the same tokens may show it too; everything else passes.
    assert more in ([], [IMAGES_OF_THE_SAME_TOKENS])


@pytest.mark.parametrize(
    "what",
    [damage.codebook_off_by_one("tokenize"), damage.least_similar],
    ids=["codebook off by one", "the least similar row"],
)
def test_a_damage_of_tokenize(
    lifelike_bundle: LifelikeBundle, tmp_path: Path, what: damage.Damage
) -> None:
    bundle = damage.damaged(lifelike_bundle("fp32"), tmp_path / "bundle", what)
    found = verified(bundle, tmp_path / "report")
    assert first_failure(found) == ("tokenize", "indices", "index_agreement")
    assert failed_phases(found) == {"tokenize"}


# ------------------------------------------------------------------------------------ the runtime


def shifted_mask(phase: Phase, cells: int, masked: float, *options: Any) -> NDArray[np.float32]:
    return np.roll(attention_mask(phase, cells, masked, *options), 1, axis=1)


def guide_twice(logits: NDArray[Any], scale: NDArray[Any]) -> NDArray[Any]:
    null = np.split(logits, 2)[1]
    return guide(np.concatenate([guide(logits, scale), null]), scale)


def sample_in_reverse(logits: NDArray[Any], uniform: NDArray[Any], *settings: Any) -> Any:
    """The uniform numbers of the cells of a step, given to them from the last."""
    return sample(logits, uniform[:, ::-1], *settings)


def next_order(seed: int, image_index: int, cells: int, orders: int) -> ImageRandomness:
    chance = image_randomness(seed, image_index, cells, orders)
    return chance._replace(order_index=(chance.order_index + 1) % orders)


def given_tokens(change: Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]) -> Any:
    """`Batch.load` that changes what is given [B, S], in raster order, by it and the orders."""
    load = Batch.load

    def load_changed(batch: Batch, *inputs: Any) -> None:
        *others, given = inputs
        load(batch, *others, change(given, inputs[1]))

    return load_changed


def scattered(given: NDArray[Any], orders: NDArray[Any]) -> NDArray[Any]:
    changed = given.copy()
    np.put_along_axis(changed, orders, given, axis=1)
    return changed


ignored = given_tokens(lambda given, orders: np.full_like(given, -1))
in_raster_order = given_tokens(scattered)
off_by_one = given_tokens(lambda given, orders: np.where(given < 0, given, (given + 1) % 64))


def test_a_wrong_mask_of_the_loop_alone(
    lifelike_bundle: LifelikeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lpd_export.runtime.generator.attention_mask", shifted_mask)
    found = verified(lifelike_bundle("fp32"), tmp_path / "report")
    assert first_failure(found) == (SEQUENCE, "guided_logits", "sequence_kl")
    assert failed_phases(found) <= {SEQUENCE, GENERATION}


def test_a_wrong_mask_wherever_it_is_used(
    lifelike_bundle: LifelikeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference makes its own mask, so that a mistake in the shared one is seen."""
    monkeypatch.setattr("lpd_export.runtime.generator.attention_mask", shifted_mask)
    monkeypatch.setattr("lpd_export.accuracy.phases.attention_mask", shifted_mask)
    found = verified(lifelike_bundle("fp32"), tmp_path / "report")
    assert first_failure(found) == ("phase_00", "present_key_1", "cache_error")


def test_guidance_applied_twice(
    lifelike_bundle: LifelikeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("runtime.sampler", "runtime.teacher_forcing", "accuracy.bundle_side"):
        monkeypatch.setattr(f"lpd_export.{module}.guide", guide_twice)
    found = verified(lifelike_bundle("fp32"), tmp_path / "report")
    # Linear guidance is 1 for the first cell, the only one of phase_00: twice is once.
    assert Bundle.open(lifelike_bundle("fp32")).manifest.phases[0].queries == 1
    assert first_failure(found) == ("phase_01", "guided_logits", "kl")
    phases = [entry for entry in found.failures if entry.phase.startswith("phase_")]
    assert {entry.tensor for entry in phases} == {"guided_logits"}


@pytest.mark.parametrize(
    ("precision", "place", "fault"),
    [
        ("fp32", "runtime.sampler.guide", guide_twice),
        ("fp16", "runtime.sampler.guide", guide_twice),
        ("int8", "runtime.sampler.guide", guide_twice),
        ("fp32", "runtime.sampler.sample", sample_in_reverse),
        ("int8", "runtime.sampler.sample", sample_in_reverse),
        ("fp32", "runtime.requests.image_randomness", next_order),
        ("int8", "runtime.requests.image_randomness", next_order),
        ("fp32", "runtime.generator.Batch.load", ignored),
        ("int8", "runtime.generator.Batch.load", ignored),
        ("fp32", "runtime.generator.Batch.load", in_raster_order),
        ("fp32", "runtime.generator.Batch.load", off_by_one),
    ],
)
def test_a_fault_of_the_loop_is_no_rounding(
    lifelike_bundle: LifelikeBundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    place: str,
    fault: Callable[..., Any],
) -> None:
    """Every graph is right, and images differ: lower precisions excuse that, but not this."""
    monkeypatch.setattr(f"lpd_export.{place}", fault)
    found = verified(lifelike_bundle(precision), tmp_path / "report", images=2)
    assert failed_phases(found) == {GENERATION}
    (unexplained,) = (entry for entry in found.failures if entry.metric == "unexplained_draws")
    assert unexplained.value >= 1


# ------------------------------------------------------------------------------ the command line


def test_the_command_line_names_the_place_first(
    lifelike_bundle: LifelikeBundle, tmp_path: Path
) -> None:
    bundle = damage.damaged(lifelike_bundle("fp32"), tmp_path / "bundle", damage.scaled_weight)
    said = answer("verify", bundle, "--images", 1, "--threads", 1, "--by-layer")
    assert said.code == 1
    verdict, *more = said.out[said.out.index("FAILED") :].splitlines()
    assert verdict.startswith("FAILED: step 1 (phase_00), present_key_2: cache_error ")
    assert any(line.split()[:2] == ["decode", "blocks.1.fc1"] for line in more), more
    folder = tmp_path / "bundle-verification"
    assert more[-1] == f"report: {folder / 'report.html'}"
    record = json.loads((folder / "report.json").read_text())
    assert not record["passed"]
    first = record["first_failure"]
    assert (first["phase"], first["tensor"]) == ("phase_00", "present_key_2")
    assert "blocks.1.fc1" in (folder / "report.html").read_text()
    assert "phase_00" in record["saved_phases"]


def test_what_is_not_a_number_is_a_failure_and_no_mistake(
    lifelike_bundle: LifelikeBundle, tmp_path: Path
) -> None:
    bundle = damage.damaged(lifelike_bundle("fp32"), tmp_path / "bundle", damage.not_a_number)
    said = answer("verify", bundle, "--images", 1, "--threads", 1, "--by-layer")
    assert said.code == 1
    assert "Traceback" not in said.err
    assert "FAILED: step 1 (phase_00), present_key_2: cache_error NaN" in said.out
    folder = tmp_path / "bundle-verification"
    assert "draws no image" in (folder / "report.html").read_text()
    record = json.loads((folder / "report.json").read_text())
    assert record["first_failure"]["value"] is None  # strict JSON has no NaN
    assert any("NaN" in remark for remark in record["remarks"])
