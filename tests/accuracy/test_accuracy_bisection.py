"""`verify --bisect` finds the layers that quantization must leave out, `build` leaves them out."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import lpd_export.accuracy.bisection
import lpd_export.build.build
from commandline import answer, entries, mistake
from lpd_export.accuracy.bisection import Bisector, save_kept_layers, smallest_sufficient
from lpd_export.accuracy.results import Bisection
from lpd_export.build.request import read_recipe
from lpd_export.build.settings import Source
from lpd_export.bundle.inspection import GRAPH_TITLES
from lpd_export.bundle.manifest import GRAPH_NAMES, Bundle
from lpd_export.formats import FLOAT32, PRECISIONS, QUANTIZED
from lpd_export.precision.calibration import LayerMeasurement
from lpd_export.precision.writer import KeptLayers, read_kept_layers

pytestmark = pytest.mark.model

Suffices = Callable[[frozenset[int]], bool]

# --------------------------------------------------------------------------------- the search


class Asked:
    """A question, with the answers that it gave; nothing may be asked twice."""

    def __init__(self, suffices: Suffices) -> None:
        self._suffices = suffices
        self.answers: dict[frozenset[int], bool] = {}

    def __call__(self, elements: frozenset[int]) -> bool:
        assert elements not in self.answers, "it was asked before"
        self.answers[elements] = self._suffices(elements)
        return self.answers[elements]


candidates = st.lists(st.integers(0, 1000), max_size=40, unique=True)


@st.composite
def monotone(draw: st.DrawFn) -> tuple[list[int], Suffices]:
    """Candidates, and a question that more of them never spoil: by sets, or by a sum of weights."""
    chosen = draw(candidates)
    if draw(st.booleans()):
        subsets = st.sets(st.integers(0, max(len(chosen) - 1, 0)), max_size=min(6, len(chosen)))
        required = [{chosen[i] for i in places} for places in draw(st.lists(subsets, max_size=4))]
        return chosen, lambda taken: any(needed <= taken for needed in required)
    weights = {element: draw(st.integers(0, 20)) for element in chosen}
    least = draw(st.integers(0, 60))
    return chosen, lambda taken: sum(weights[element] for element in taken) >= least


@given(monotone())
def test_what_is_found_suffices_and_nothing_of_it_can_be_left_out(
    question: tuple[list[int], Suffices],
) -> None:
    chosen, suffices = question
    decided: list[int] = []
    found = smallest_sufficient(chosen, Asked(suffices), decided.append)
    # Each candidate is counted once, unless none or all of them settle it.
    assert sum(decided) == (len(chosen) if found else 0)
    if found is None:
        assert not suffices(frozenset(chosen))
        return
    assert suffices(found)
    assert found <= set(chosen)
    for element in found:
        assert not suffices(found - {element})
    assert (found == frozenset()) == suffices(frozenset())


@given(monotone())
def test_the_first_candidates_are_preferred(question: tuple[list[int], Suffices]) -> None:
    """Nothing is taken that comes after the fewest first ones that suffice."""
    chosen, suffices = question
    found = smallest_sufficient(chosen, suffices)
    assume(found)
    assert found is not None
    fewest = next(n for n in range(len(chosen) + 1) if suffices(frozenset(chosen[:n])))
    assert max(map(chosen.index, found)) == fewest - 1


@given(monotone())
def test_it_takes_few_trials(question: tuple[list[int], Suffices]) -> None:
    """As published, a few for each element that is found and each halving of the candidates."""
    chosen, suffices = question
    asked = Asked(suffices)
    found = smallest_sufficient(chosen, asked)
    if not found:
        assert len(asked.answers) <= 2
        return
    halvings = math.ceil(math.log2(len(chosen)))
    # Besides, of none and of all.
    assert len(asked.answers) <= 2 + len(found) * (2 * halvings + 1)


@given(candidates, st.data())
def test_a_question_that_more_may_spoil_still_gets_an_answer_that_holds(
    chosen: list[int], data: st.DataObject
) -> None:
    """Roundings may cancel, so that a layer more in higher precision is worse."""
    asked = Asked(lambda elements: elements == frozenset(chosen) or data.draw(st.booleans()))
    found = smallest_sufficient(chosen, asked)
    assert found is not None
    assert asked.answers[found]


# ------------------------------------------------------------------------------- from end to end


@pytest.fixture(scope="module", autouse=True)
def exported_once(small_bundle: Path, small_weights: Path) -> Iterator[None]:
    """The graphs of `small_bundle` are taken, where an export would take most of the time."""
    states = [torch.load(small_weights / name)["model"] for name in ("lpd.pth", "vq.pt")]

    def copy_graphs(folder: Path, source: Source, backend: object, report: object) -> None:
        for model, state in zip((source.model, source.tokenizer), states, strict=True):
            exported = model.state_dict()
            assert all(torch.equal(exported[name], state[name]) for name in exported)
        shutil.copytree(small_bundle / "onnx", folder, ignore=shutil.ignore_patterns("phase_*"))

    with pytest.MonkeyPatch.context() as patch:
        for module in (lpd_export.build.build, lpd_export.accuracy.bisection):
            patch.setattr(module, "write_exact_graphs", copy_graphs)
        yield


@pytest.fixture(scope="module")
def int8_build(small_weights: Path) -> list[object]:
    files = ["--checkpoint", small_weights / "lpd.pth", "--tokenizer", small_weights / "vq.pt"]
    return ["build", *files, "--steps", 4, "--precision", "int8"]


@pytest.fixture(scope="module")
def bundle(int8_build: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small_bundle` in INT8; shared, so leave it as it is."""
    out = tmp_path_factory.mktemp("int8") / "small"
    said = answer(*int8_build, "--out", out)
    assert said.code == 0, said
    decided = Bundle.open(out).manifest.calibration["quantization"]
    assert decided["decode"]["kept"] == {}, "so that what is measured is of INT8 throughout"
    return out


def limited(sequence_kl: float) -> list[object]:
    """Options of a verification of one image, judged by one limit of the transformer alone.

    Untrained weights give near ties, which one rounding or another decides.
    """
    loose = {"sequence_top_1": 0, "index_agreement": 0, "image_psnr": 0}
    limits = {**loose, "generation_psnr": 0, "sequence_kl": sequence_kl}
    words = [word for limit in limits.items() for word in ("--threshold", "{}={!r}".format(*limit))]
    return ["--images", 1, "--threads", 1, "--save-phases", "none", *words]


def sequence_kl(report: Path) -> float:
    measured = json.loads((report / "report.json").read_text())["measurements"]
    return next(float(m["value"]) for m in measured if m["metric"] == "sequence_kl")


@pytest.fixture(scope="module")
def limit(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Small beside what INT8 throughout gives, most of which comes from the last layer."""
    out = tmp_path_factory.mktemp("measured") / "out"
    assert answer("verify", bundle, *limited(1.0), "--out", out).code == 0
    assert sequence_kl(out) > 1e-8
    return sequence_kl(out) / 300


class Found:
    """What a bisection of `bundle` said and left."""

    def __init__(self, bundle: Path, limit: float, out: Path) -> None:
        self.out = out
        self.said = answer("verify", bundle, *limited(limit), "--bisect", "--out", out)
        self.kept = json.loads((out / "keep_layers.json").read_text())
        self.result = json.loads((out / "report.json").read_text())
        self.by_graph = {entry["graph"]: entry for entry in self.result["bisections"]}


@pytest.fixture(scope="module")
def found(bundle: Path, limit: float, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return Found(bundle, limit, tmp_path_factory.mktemp("bisected") / "out")


def quantized_layers(bundle: Path, graph: str) -> dict[str, bool]:
    """Whether each layer of a graph has Q/DQ pairs before both of its factors, by node.

    What a convolution that is left out reads may have been rounded by the one before.
    """
    model = onnx.load(bundle / f"onnx/{graph}.onnx", load_external_data=False).graph
    producers = {output: node for node in model.node for output in node.output}
    weights = {tensor.name for tensor in model.initializer}
    layers = {}
    for node in model.node:
        if node.op_type not in ("MatMul", "Conv"):
            continue
        before = [producers[name].op_type for name in node.input[:2] if name in producers]
        quantized = before == ["DequantizeLinear"] * 2
        if "DequantizeLinear" in before[-1:] or node.input[1] in weights:
            layers[node.name] = quantized
    return layers


def test_the_layers_are_found_and_listed(bundle: Path, found: Found) -> None:
    assert found.said.code == 1, found.said  # of the bundle as it is
    layers = {graph: quantized_layers(bundle, graph) for graph in GRAPH_NAMES}
    decode = found.by_graph["decode"]
    assert list(found.by_graph) == list(GRAPH_NAMES)
    assert {graph: entry["layers"] for graph, entry in found.by_graph.items()} == {
        graph: len(of_graph) for graph, of_graph in layers.items()
    }
    assert 0 < len(decode["kept"]) < decode["layers"]
    assert set(decode["kept"]) < set(layers["decode"])
    assert decode["kept"] == [node for node in layers["decode"] if node in decode["kept"]]
    kept = {"decode": decode["kept"], "detokenize": [], "tokenize": []}
    assert found.kept == kept | {"exact": True}
    assert read_kept_layers(found.out / "keep_layers.json") == KeptLayers(kept, exact=True)
    # On the terminal: the trials as they are made, and what was found.
    trials = [line for line in found.said.err.splitlines() if " layers in int8: " in line]
    for graph, entry in found.by_graph.items():
        told = [line for line in trials if line.startswith(f"{graph}, trial ")]
        assert len(told) == entry["trials"]
        count = entry["layers"]
        first = f"{graph}, trial 1, {count} undecided: {count} of {count} layers in int8: "
        assert told[0].startswith(first)
    short, count = " over whole sequences", decode["layers"]
    assert trials[0].endswith("in int8: a threshold fails" + short)
    assert trials[1] == (
        f"decode, trial 2, {count} undecided: 0 of {count} layers in int8: the thresholds hold"
        + short
    )
    # Trials are compared in short; the answer, and only that, is compared in everything.
    tried = [line for line in trials if line.startswith("decode, ")]
    assert all(line.endswith(short) for line in tried[:-1])
    assert tried[-1] == (
        f"decode, trial {decode['trials']}, 0 undecided: {count - len(decode['kept'])} of {count} "
        "layers in int8: the thresholds hold"
    )
    lines = found.said.out.splitlines()
    words = ", ".join(decode["kept"])
    told = f"{len(decode['kept'])} of {decode['layers']} layers must stay in higher precision"
    assert f"decode: {told}: {words}" in lines
    detokenize = found.by_graph["detokenize"]
    assert detokenize == {
        "graph": "detokenize",
        "layers": len(layers["detokenize"]),
        "kept": [],
        "trials": 1,
    }
    assert f"detokenize: all {detokenize['layers']} layers can be quantized" in lines


def test_a_build_keeps_exactly_these_layers_and_holds_the_limit(
    bundle: Path, found: Found, limit: float, int8_build: list[object], tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    said = answer(*int8_build, "--keep-layers", found.out / "keep_layers.json", "--out", kept)
    assert said.code == 0, said
    decided = Bundle.open(kept).manifest.calibration["quantization"]
    for graph in GRAPH_NAMES:
        layers = quantized_layers(kept, graph)
        exact = {node for node, quantized in layers.items() if not quantized}
        assert exact == set(found.kept[graph])
        assert list(decided[graph]["kept"]) == found.kept[graph]
        assert list(layers) == list(quantized_layers(bundle, graph))
    counts = [
        f"{title}: {sum(layers.values())} of {len(layers)} layers INT8"
        for graph, title in GRAPH_TITLES.items()
        for layers in [quantized_layers(kept, graph)]
    ]
    assert answer("inspect", kept).out.splitlines()[0] == "; ".join(counts)
    out = tmp_path / "out"
    said = answer("verify", kept, *limited(limit), "--out", out)
    assert said.code == 0, said
    assert said.out.splitlines()[0] == "; ".join(counts)
    assert 0 < sequence_kl(out) <= limit
    assert decided["decode"]["kept_as"] == ""
    # A list of one's own is of layers that fewer bits suffice for, if they do.
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"decode": found.kept["decode"]}))
    said = answer(*int8_build, "--keep-layers", own, "--out", tmp_path / "own")
    assert said.code == 0, said
    decided = Bundle.open(tmp_path / "own").manifest.calibration["quantization"]
    assert decided["decode"]["kept_as"] == "INT8 weights"
    model = onnx.load(tmp_path / "own/onnx/decode.onnx", load_external_data=False).graph
    blocks = [node for node in model.node if any(a.name == "block_size" for a in node.attribute)]
    assert blocks
    assert {node.op_type for node in blocks} == {"DequantizeLinear"}
    # Without the layer that matters most, it does not hold.
    fewer = tmp_path / "fewer.json"
    others = [layer for layer in found.kept["decode"] if layer != "head/MatMul"]
    assert len(others) == len(found.kept["decode"]) - 1
    fewer.write_text(json.dumps(found.kept | {"decode": others}))
    said = answer(*int8_build, "--keep-layers", fewer, "--out", tmp_path / "fewer")
    assert said.code == 0, said
    assert answer("verify", tmp_path / "fewer", *limited(limit), "--out", out).code == 1


def test_graphs_that_are_not_named_are_decided_as_ever(
    bundle: Path, int8_build: list[object], tmp_path: Path
) -> None:
    """And a recipe names the file relative to itself."""
    (tmp_path / "layers").mkdir()
    layer = "head/MatMul"
    (tmp_path / "layers/mine.json").write_text(json.dumps({"decode": [layer]}))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('keep-layers = "layers/mine.json"\nsteps = 4\nprecision = "int8"\n')
    assert read_recipe(recipe)["keep_layers"] == str(tmp_path / "layers/mine.json")
    *_, checkpoint, _, tokenizer, _, _, _, _ = int8_build
    files = ["--checkpoint", checkpoint, "--tokenizer", tokenizer]
    assert answer("build", recipe, *files).code == 0
    made = tmp_path / "recipe"
    for graph in GRAPH_NAMES:
        layers, usual = quantized_layers(made, graph), quantized_layers(bundle, graph)
        expected = usual | {layer: False} if graph == "decode" else usual
        assert layers == expected


def test_where_nothing_helps(bundle: Path, tmp_path: Path) -> None:
    found = Found(bundle, -1.0, tmp_path / "out")
    assert found.said.code == 1
    decode = found.by_graph["decode"]
    assert (decode["kept"], decode["trials"]) == (None, 2)
    told = "decode: the thresholds fail even with every layer in higher precision"
    assert told in found.said.out.splitlines()
    assert found.kept == {"detokenize": [], "tokenize": [], "exact": True}


def test_an_answer_that_fails_as_a_whole_is_searched_again(
    small_bundle: Path, tmp_path: Path
) -> None:
    """What a search over whole sequences alone would have missed is found."""
    wanted = {"head/MatMul": False, "blocks.0.fc1/MatMul": True}  # by whether only all tells it
    layers = {
        node: LayerMeasurement(activation_range=1.0, noise=float(number))
        for number, node in enumerate(quantized_layers(small_bundle, "decode"))
    }
    judged: list[bool] = []
    lines: list[str] = []

    def judge(graph: str, file: Path, whole: bool) -> bool:
        quantized = quantized_layers(file.parents[1], graph)
        judged.append(whole)
        return not any(quantized[layer] for layer, late in wanted.items() if whole or not late)

    bisector = Bisector(
        small_bundle / "onnx", tmp_path / "onnx", PRECISIONS["int8"], FLOAT32, judge, lines.append
    )
    found = bisector.search("decode", layers)
    assert found.kept is not None
    assert set(found.kept) == set(wanted)
    first_whole = judged.index(True)
    assert first_whole > 0, "it is searched in short first"
    assert all(judged[first_whole:]), "and then in everything"
    assert found.trials == len(judged) == len(lines)
    assert lines[first_whole].endswith("a threshold fails")


def test_what_was_found_is_what_a_build_reads(tmp_path: Path) -> None:
    found = [
        Bisection("decode", 13, ["head/MatMul", "blocks.0.fc1/MatMul"], 9),
        Bisection("detokenize", 34, [], 1),
        Bisection("tokenize", 24, None, 2),
    ]
    save_kept_layers(found, tmp_path / "a.json")
    kept = {"decode": ["head/MatMul", "blocks.0.fc1/MatMul"], "detokenize": []}
    assert read_kept_layers(tmp_path / "a.json") == KeptLayers(kept, exact=True)


# ------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read --keep-layers {file}: No such file or directory"),
        ("", "cannot read --keep-layers {file}: it is not JSON"),
        ("decode: head", "cannot read --keep-layers {file}: it is not JSON"),
        (b"\xff\xfe", "cannot read --keep-layers {file}: it is not JSON"),
        ("[" * 100_000, "cannot read --keep-layers {file}: it is not JSON"),
        ('["head/MatMul"]', "--keep-layers {file} must be a JSON object with a list of layers for"),
        ('{"encode": []}', "--keep-layers {file} must be a JSON object with a list of layers for"),
        ('{"decode": "head/MatMul"}', "--keep-layers {file} must be a JSON object with a list of"),
        ('{"decode": [1]}', "--keep-layers {file} must be a JSON object with a list of layers for"),
        ('{"decode": null}', "--keep-layers {file} must be a JSON object with a list of layers"),
        ('{"exact": 1}', "--keep-layers {file} must be a JSON object with a list of layers"),
        (
            '{"decode": ["head"]}',
            "--keep-layers names 'head', which is no layer of decode.onnx; there are blocks.0",
        ),
        (
            '{"detokenize": [], "tokenize": ["head/MatMul"]}',
            "--keep-layers names 'head/MatMul', which is no layer of tokenize.onnx; there are",
        ),
    ],
)
def test_layers_that_cannot_be_kept(
    bundle: Path,  # so that what is measured is known
    int8_build: list[object],
    tmp_path: Path,
    content: Any,
    message: str,
) -> None:
    file = tmp_path / "layers.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = entries(tmp_path)
    said = mistake(*int8_build, "--keep-layers", file, "--out", tmp_path / "new/bundle")
    assert said.startswith(message.format(file=file))
    assert entries(tmp_path) == before


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_only_int8_keeps_layers(int8_build: list[object], tmp_path: Path, precision: str) -> None:
    file = tmp_path / "layers.json"
    file.write_text("{}")
    command = [*int8_build[:-1], precision, "--keep-layers", file, "--out", tmp_path / "out"]
    assert mistake(*command) == (
        "--keep-layers says which layers are not quantized: it needs --precision "
        f"{' or '.join(QUANTIZED)}, not {precision}"
    )
    assert entries(tmp_path) == ["layers.json"]


def test_a_recipe_that_names_no_file(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("precision = 'int8'\nkeep-layers = ['head/MatMul']\n")
    said = mistake("build", recipe)
    assert said.startswith(
        f"{recipe}, line 2: keep-layers must be text in quotes, but it is ['head"
    )
    (tmp_path / "a.pth").touch()
    recipe.write_text("checkpoint = 'a.pth'\nprecision = 'int8'\nkeep-layers = 'gone.json'\n")
    said = mistake("build", recipe)
    assert said == f"cannot read --keep-layers {tmp_path / 'gone.json'}: No such file or directory"
    assert entries(tmp_path) == ["a.pth", "recipe.toml"]
