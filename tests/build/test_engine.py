"""What TensorRT-RTX makes of the graphs, asserted from the built network and the builder's log."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

import golden
from lpd_export import formats
from lpd_export.build import engine
from lpd_export.build.engine import (
    AxisRange,
    CompiledEngine,
    EngineOptions,
    Profile,
    compile_graph,
    decode_profiles,
    tokenizer_profiles,
)
from lpd_export.errors import UserError
from lpd_export.graphs import export
from lpd_export.precision.casting import lower
from lpd_export.runtime.tensorrt_executor import ShapeRange, choose_profile
from lpd_export.schedule.phases import Phase, group_sizes, phase_table
from lpd_reference import LPD, LPDConfig

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("polygraphy")

# Polygraphy sets an empty timing cache, which TensorRT-RTX calls a no-op.
pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore:.*Timing cache:DeprecationWarning"),
]

RTX = EngineOptions("tensorrt-rtx")
SIZES = [1, 3, 5, 7]
PRECISIONS = ("fp32", "fp16", "bf16")
MODELS = ("lpd_grid4", "wide")
WIDE = LPDConfig(dim=128, depth=2, heads=2, grid=4, num_classes=5, vocab_size=64)
"""A small model whose heads are 64 wide, as those of the published models."""


Graphs = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """Makes a folder of ONNX files, static phases among them, of a model in a precision, once."""

    @functools.cache
    def exported(name: str) -> Path:
        model = LPD(WIDE).initialize(0).eval() if name == "wide" else golden.lpd(golden.read(name))
        models = {"decode": export.export_decode(model)}
        if name == "wide":
            tokenizer = golden.tokenizer(golden.read("vq_f4"))
            models["detokenize"] = export.export_detokenize(tokenizer, model.config.grid)
            models["tokenize"] = export.export_tokenize(tokenizer, model.config.grid)
        folder = tmp_path_factory.mktemp(name)
        export.write_models(models, folder)
        return folder

    @functools.cache
    def lowered(name: str, precision: str) -> Path:
        models = {path.stem: ir.load(path) for path in sorted(exported(name).glob("*.onnx"))}
        for model in models.values():
            lower(model, formats.PRECISIONS[precision].throughout)
        folder = tmp_path_factory.mktemp(f"{name}_{precision}")
        export.write_models(models, folder)
        export.write_phases(folder, phase_table(SIZES), rows=2)
        return folder

    return lowered


@pytest.fixture(scope="module")
def wide(graphs: Graphs) -> Path:
    """The files of the model with heads of 64 in fp16."""
    return graphs("wide", "fp16")


def compile_decode(folder: Path, log: Path, options: EngineOptions = RTX) -> CompiledEngine:
    profiles = decode_profiles(phase_table(SIZES), max_batch=2)
    return compile_graph(folder / "decode.onnx", "decode", profiles, options, log)


def depth_of(folder: Path) -> int:
    names = export.load_shapes(folder / "decode.onnx")
    return sum(name.startswith("past_key_") for name in names)


def check_decode(compiled: CompiledEngine, log: str, depth: int, precision: str) -> None:
    """A decode engine is one fused kernel an attention and profile; its copies are reported."""
    report = compiled.report
    assert report.attentions == depth
    assert report.cache_updates == 2 * depth
    # The log's own words: a kernel of no other work than to move what attention reads.
    moved = re.findall(
        r"Name: __myl_Resh\w*, LayerType: kgen, Inputs: \[ { Name: (present_\w+)", log
    )
    caches = {f"present_{kind}_{number}" for kind in ("key", "value") for number in range(depth)}
    assert set(report.copied_caches) == set(moved) == caches
    assert (report.inputs, report.outputs) == (4 + 2 * depth, 1 + 2 * depth)
    assert report.size == len(bytes(compiled.serialized)) > 100_000
    for number in range(depth):  # the log's own words, without our reading of it
        assert len(re.findall(rf"KVCACHE_UPDATE blocks\.{number}/TensorScatter", log)) == 2
        assert re.search(rf"ATTENTION_INPUT blocks\.{number}/Attention", log)
        assert re.search(
            rf"Name: present_key_{number}\b.*LayerType|Name: present_key_{number}", log
        )
    fused = len(re.findall(r"Name: _gemm_mha\w*, LayerType", log))
    if precision == "fp32":
        assert (report.decomposable_attentions, fused, len(report.fused_kernels)) == (depth, 0, 0)
        assert len(report.notes) == 1
        assert "no fused attention in fp32" in report.notes[0]
    else:
        assert report.decomposable_attentions == 0
        assert fused == len(report.fused_kernels) == depth * report.profiles
        assert report.notes == ()


# ------------------------------------------------------------------------------------ graphs


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", MODELS)
def test_decode_compiles_fused_and_in_place_in_every_precision(
    graphs: Graphs,
    model: str,
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Sixteen cells are too few for two profiles otherwise.
    monkeypatch.setattr(engine, "PROFILE_SPREAD", 4)
    folder = graphs(model, precision)
    compiled = compile_decode(folder, tmp_path / "log")
    assert compiled.report.profiles == 4  # one image and all that is more, of two groups
    check_decode(compiled, (tmp_path / "log").read_text(), depth_of(folder), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", MODELS)
def test_every_static_phase_compiles_alone(
    graphs: Graphs, model: str, precision: str, tmp_path: Path
) -> None:
    folder = graphs(model, precision)
    paths = sorted(folder.glob("phase_*.onnx"))
    assert len(paths) == len(SIZES)
    for path in paths:
        compiled = compile_graph(path, "decode", (), RTX, tmp_path / "log")
        assert compiled.report.profiles == 1
        check_decode(compiled, (tmp_path / "log").read_text(), depth_of(folder), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("graph", ["detokenize", "tokenize"])
def test_tokenizer_graphs_compile_with_attention_that_may_fall_apart(
    graphs: Graphs, graph: str, precision: str, tmp_path: Path
) -> None:
    path = graphs("wide", precision) / f"{graph}.onnx"
    report = compile_graph(path, graph, tokenizer_profiles(2), RTX, tmp_path / "log").report
    nodes = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    assert report.decomposable_attentions == report.attentions == nodes.count("Attention") > 0
    assert (report.inputs, report.outputs, report.cache_updates) == (1, 1, 0)
    assert report.notes == ()


@pytest.mark.parametrize("sizes", [[16], [1] * 16, [5, 1, 9, 1], [1, 15]])
def test_decode_compiles_for_odd_schedules(wide: Path, sizes: list[int], tmp_path: Path) -> None:
    profiles = decode_profiles(phase_table(sizes), max_batch=1)
    compiled = compile_graph(wide / "decode.onnx", "decode", profiles, RTX, tmp_path / "log")
    assert compiled.report.profiles == len(profiles)
    check_decode(compiled, (tmp_path / "log").read_text(), WIDE.depth, "fp16")


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_polygraphy_converts_a_phase_file_without_shape_flags(
    wide: Path, number: int, tmp_path: Path
) -> None:
    polygraphy = Path(sys.executable).with_name("polygraphy")
    command = [str(polygraphy), "convert", f"phase_{number:02d}.onnx"]
    process = subprocess.run(
        [*command, "--convert-to", "trt", "-o", str(tmp_path / "phase.engine")],
        cwd=wide,
        env=os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert (tmp_path / "phase.engine").stat().st_size > 100_000


# ----------------------------------------------------------------------------------- refusals


def altered(wide: Path, name: str, change: Callable[[onnx.GraphProto], None]) -> Path:
    """A changed copy of decode.onnx beside it, where its weights are."""
    model = onnx.load(wide / "decode.onnx", load_external_data=False)
    change(model.graph)
    path = wide / f"{name}.onnx"
    onnx.save(model, path)
    return path


def refusal(path: Path, log: Path, options: EngineOptions = RTX) -> str:
    profiles = decode_profiles(phase_table(SIZES), max_batch=1)
    with pytest.raises(UserError) as error:
        compile_graph(path, "decode", profiles, options, log)
    return str(error.value)


def first(graph: onnx.GraphProto, op_type: str) -> tuple[int, onnx.NodeProto]:
    return next((i, node) for i, node in enumerate(graph.node) if node.op_type == op_type)


def set_mask_type(graph: onnx.GraphProto, element_type: int) -> None:
    mask = next(value for value in graph.input if value.name == "attention_mask")
    mask.type.tensor_type.elem_type = element_type


def change_cache_before(graph: onnx.GraphProto) -> None:
    index, scatter = first(graph, "TensorScatter")
    past, scatter.input[0] = scatter.input[0], "changed"
    graph.node.insert(index, helper.make_node("Neg", [past], ["changed"], name="change"))


def copy_cache_after(graph: onnx.GraphProto) -> None:
    _, scatter = first(graph, "TensorScatter")
    present, scatter.output[0] = scatter.output[0], "scattered"
    for node in graph.node:
        node.input[:] = ["scattered" if name == present else name for name in node.input]
    graph.node.append(helper.make_node("Identity", ["scattered"], [present], name="copy"))


def unfuse(graph: onnx.GraphProto) -> None:
    """An attention written out, as an exporter without the operator does."""
    index, attention = first(graph, "Attention")
    (query, key, value, mask), output = attention.input[:4], attention.output[0]
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Transpose", [key], "transposed", {"perm": [0, 1, 3, 2]}),
        ("MatMul", [query, "transposed"], "scores", {}),
        ("Add", ["scores", mask], "masked", {}),
        ("Softmax", ["masked"], "chances", {"axis": -1}),
        ("MatMul", ["chances", value], output, {}),
    ]
    graph.node.remove(attention)
    for offset, (op_type, inputs, name, attributes) in enumerate(steps):
        node = helper.make_node(op_type, inputs, [name], name=name, **attributes)
        graph.node.insert(index + offset, node)


def test_a_mask_that_keeps_attention_from_fusing_is_refused(wide: Path, tmp_path: Path) -> None:
    for element_type, name in ((TensorProto.BOOL, "BOOL"), (TensorProto.FLOAT, "FLOAT")):
        path = altered(wide, f"mask_{name}", lambda g, t=element_type: set_mask_type(g, t))
        assert f"mask of blocks.0/Attention in {path.name} is {name}" in refusal(
            path, tmp_path / "log"
        )


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("heads", "width", "reason"),
    [
        (1, 64, "which have 1 head, where it takes 2 or more"),
        (2, 264, "whose heads are 264 wide, where it takes 256 at most"),
    ],
)
def test_heads_without_a_fused_kernel_are_refused(
    heads: int, width: int, reason: str, precision: str, tmp_path: Path
) -> None:
    def compile_with(heads: int, width: int) -> None:
        config = LPDConfig(
            dim=heads * width, depth=1, heads=heads, grid=4, num_classes=5, vocab_size=64
        )
        model = export.export_decode(LPD(config).initialize(0).eval())
        lower(model, formats.PRECISIONS[precision].throughout)
        export.write_models({"decode": model}, tmp_path)
        compile_decode(tmp_path, tmp_path / "log")

    with pytest.raises(UserError) as error:
        compile_with(heads, width)
    assert str(error.value) == (
        "TensorRT-RTX cannot compile decode.onnx: it has no fused attention kernel for nodes like "
        f"blocks.0/Attention, {reason}; build in fp32, or with --backend onnxruntime; its log is "
        f"{tmp_path / 'log'}"
    )
    assert "dedicated kernel" in (tmp_path / "log").read_text()
    # The sentence is true: just within what it names, the same model is fused.
    compile_with(2, 64 if heads == 1 else 256)


@pytest.mark.parametrize(
    ("backend", "heads", "width", "reason"),
    [
        ("tensorrt-rtx", 1, 512, "which have 1 head, where it takes 2 or more"),
        ("tensorrt", 1, 512, "whose heads are 512 wide, where it takes 256 at most"),
        ("tensorrt", 1, 64, "which have 1 head of width 64"),
        ("tensorrt", 3, 48, "which have 3 heads of width 48"),
    ],
)
def test_no_more_is_said_of_unfused_attention_than_is_known(
    backend: str, heads: int, width: int, reason: str
) -> None:
    facts = {"attentions": {"a": True, "b": False}, "heads": {"a": (9, 9), "b": (heads, width)}}
    log = "Attention operation was not supported by a dedicated kernel."
    assert f"nodes like b, {reason}; build" in engine._explain(log, EngineOptions(backend), facts)


def test_attention_written_out_is_refused(wide: Path, tmp_path: Path) -> None:
    sentence = refusal(altered(wide, "unfused", unfuse), tmp_path / "log")
    assert "unfused.onnx has 4 caches, but 1 Attention nodes, where 2 belong" in sentence


@pytest.mark.parametrize("change", [change_cache_before, copy_cache_after])
def test_a_cache_that_is_not_updated_in_place_is_refused(
    wide: Path, change: Callable[[onnx.GraphProto], None], tmp_path: Path
) -> None:
    path = altered(wide, change.__name__, change)
    assert f"{path.name} does not update present_key_0 in place" in refusal(path, tmp_path / "log")


def test_the_log_tells_a_copied_cache_from_one_in_place(wide: Path, tmp_path: Path) -> None:
    """As a tokenizer's graph, of which nothing is asked, the altered one compiles."""

    def change(graph: onnx.GraphProto) -> None:
        _, scatter = first(graph, "TensorScatter")
        past = scatter.input[0]
        scatter.op_type, scatter.input[:] = "Neg", [past]
        scatter.ClearField("attribute")

    path = altered(wide, "copied", change)
    profiles = decode_profiles(phase_table(SIZES), max_batch=1)
    report = compile_graph(path, "detokenize", profiles, RTX, tmp_path / "log").report
    assert report.cache_updates == 2 * WIDE.depth - 1
    assert "past_key_0" in report.copied_caches
    assert not {"past_value_0", "past_key_1", "past_value_1"} & set(report.copied_caches)


def test_an_operator_that_tensorrt_lacks_is_named(wide: Path, tmp_path: Path) -> None:
    def change(graph: onnx.GraphProto) -> None:
        _, node = first(graph, "Gelu")
        node.op_type = "Det"
        node.ClearField("attribute")

    sentence = refusal(altered(wide, "unknown", change), tmp_path / "log")
    assert sentence == (
        "TensorRT-RTX cannot compile unknown.onnx: it does not take the Det node blocks.0/Gelu; "
        f"its log is {tmp_path / 'log'}"
    )


def test_a_damaged_or_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "decode.onnx"
    assert f"cannot read the ONNX file {path}" in refusal(path, tmp_path / "log")
    path.write_bytes(b"\x0f\xff not a graph")
    assert f"cannot read the ONNX file {path}" in refusal(path, tmp_path / "log")


# ------------------------------------------------------------------------------------ options


def test_options_reach_the_builder(wide: Path) -> None:
    """All but the timing cache, which only TensorRT proper has, as TensorRT-RTX takes them."""
    trt = engine.load_tensorrt("tensorrt-rtx")
    from polygraphy.backend.trt import NetworkFromOnnxPath

    builder, network, _parser = NetworkFromOnnxPath(str(wide / "phase_00.onnx"))()

    def config(options: EngineOptions) -> Any:
        return engine.builder_config(trt, options, [])(builder, network)

    flags = trt.BuilderFlag
    plain = config(RTX)
    wanted = (flags.STRIP_PLAN, flags.VERSION_COMPATIBLE, flags.TF32, flags.REFIT)
    assert not any(plain.get_flag(flag) for flag in wanted)
    # Without it TensorRT-RTX's documentation promises no capture into a CUDA graph.
    assert plain.get_flag(flags.REQUIRE_USER_ALLOCATION)
    assert plain.num_compute_capabilities == 0
    set_up = config(
        EngineOptions(
            "tensorrt-rtx",
            workspace_mib=96,
            optimization_level=5,
            compute_capabilities=("12.0", "8.9"),
            weight_stripped=True,
        )
    )
    assert set_up.get_flag(flags.STRIP_PLAN)
    assert set_up.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 96 << 20
    assert set_up.builder_optimization_level == 5
    targets = [set_up.get_compute_capability(i) for i in range(set_up.num_compute_capabilities)]
    assert targets == [trt.ComputeCapability.SM120, trt.ComputeCapability.SM89]
    other = config(EngineOptions("tensorrt", version_compatible=True, optimization_level=1))
    assert other.get_flag(flags.VERSION_COMPATIBLE)
    assert other.builder_optimization_level == 1
    assert not other.get_flag(flags.TF32)


def test_compute_capabilities_change_the_engine(wide: Path, tmp_path: Path) -> None:
    def size(*capabilities: str) -> int:
        options = EngineOptions("tensorrt-rtx", compute_capabilities=capabilities)
        return compile_decode(wide, tmp_path / "log", options).report.size

    ada, both, turing = size("8.9"), size("8.9", "12.0"), size("7.5")
    # Ada's kernels run on Blackwell too; what is added is the target. Turing needs its own.
    assert ada < both < turing


def test_a_type_that_a_target_lacks_is_refused(graphs: Graphs, tmp_path: Path) -> None:
    folder = graphs("wide", "bf16")
    options = EngineOptions("tensorrt-rtx", compute_capabilities=("7.5",))
    sentence = refusal(folder / "decode.onnx", tmp_path / "log", options)
    assert "Cannot compile for target(s) sm75" in sentence


def test_too_small_a_workspace_is_named(wide: Path, tmp_path: Path) -> None:
    options = EngineOptions("tensorrt-rtx", workspace_mib=1)
    sentence = refusal(wide / "decode.onnx", tmp_path / "log", options)
    assert "a kernel needs more workspace than 1 MiB" in sentence


def gpu_works() -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0
    return False


@pytest.mark.skipif(gpu_works(), reason="with a GPU it is built")
def test_a_weight_stripped_engine_without_a_gpu_is_refused(wide: Path, tmp_path: Path) -> None:
    options = EngineOptions("tensorrt-rtx", weight_stripped=True)
    sentence = refusal(wide / "decode.onnx", tmp_path / "log", options)
    assert "weight-stripped engine can be built on a machine with a GPU alone" in sentence


@pytest.mark.gpu
@pytest.mark.skipif(not gpu_works(), reason="TensorRT-RTX strips weights with the help of a GPU")
def test_a_weight_stripped_engine_is_smaller(tmp_path: Path) -> None:
    config = LPDConfig(dim=512, depth=2, heads=8, grid=4, num_classes=5, vocab_size=1024)
    model = export.export_decode(LPD(config).initialize(0).eval())
    lower(model, formats.FLOAT16)
    export.write_models({"decode": model}, tmp_path)
    weights = (tmp_path / export.WEIGHTS_FILE).stat().st_size
    stripped = EngineOptions("tensorrt-rtx", weight_stripped=True)
    whole = compile_decode(tmp_path, tmp_path / "log").report.size
    assert compile_decode(tmp_path, tmp_path / "log", stripped).report.size < whole - weights / 2


@pytest.mark.parametrize(
    ("backend", "options", "sentence"),
    [
        ("tensorflow", {}, "there is no engine backend 'tensorflow': tensorrt or tensorrt-rtx"),
        ("tensorrt", {"workspace_mib": 0}, "workspace must be at least 1 MiB, but it is 0"),
        ("tensorrt", {"optimization_level": 6}, "must be from 0 to 5, but it is 6"),
        ("tensorrt", {"optimization_level": -1}, "must be from 0 to 5, but it is -1"),
        ("tensorrt", {"compute_capabilities": ("8.9",)}, "compiles for the GPU that it runs on"),
        ("tensorrt-rtx", {"compute_capabilities": ("9.0",)}, "8.9, 12.0, 12.1, not for '9.0'"),
        ("tensorrt-rtx", {"compute_capabilities": ("sm89",)}, "not for 'sm89'"),
        ("tensorrt-rtx", {"compute_capabilities": ("8.9", "8.9")}, "8.9 is given twice"),
        ("tensorrt-rtx", {"timing_cache": Path("a.cache")}, "leave out the timing cache a.cache"),
        ("tensorrt-rtx", {"version_compatible": True}, "leave out version compatibility"),
        ("tensorrt-rtx", {"hardware_compatible": True}, "leave out hardware compatibility"),
    ],
)
def test_options_that_cannot_be_met_are_refused(
    backend: str, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        EngineOptions(backend, **options)


def test_a_backend_that_is_not_installed_is_named(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for backend, module in engine.MODULES.items():
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
        with pytest.raises(UserError, match=f"pip install {backend} polygraphy"):
            compile_decode(wide, tmp_path / "log", EngineOptions(backend))


def test_a_process_does_not_change_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    trt = engine.load_tensorrt("tensorrt-rtx")
    import polygraphy.backend.trt  # noqa: F401

    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    with pytest.raises(UserError, match="build tensorrt in its own"):
        engine.load_tensorrt("tensorrt")


# --------------------------------------------------------------------------- log and progress


def test_the_log_is_verbose_and_the_terminal_quiet(
    wide: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # the second says all that the first did
        compile_decode(wide, tmp_path / "log")
        log = (tmp_path / "log").read_text()
        assert log.count("\n") > 1000
        assert "Parsing node: blocks.1/Attention" in log
        assert "Make sure input token_ids has Int64 binding" in log
        assert re.search(r"I/O Tensors:\n +Name: token_ids", log)
    assert capfd.readouterr() == ("", "")


def test_what_tensorrt_prints_past_its_logger_is_in_the_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Myelin writes why it gives up to standard error itself; after it, ours is there again."""
    config = LPDConfig(dim=64, depth=1, heads=1, grid=4, num_classes=5, vocab_size=64)
    model = export.export_decode(LPD(config).initialize(0).eval())
    lower(model, formats.FLOAT16)
    export.write_models({"decode": model}, tmp_path)
    os.write(2, b"before\n")
    refusal(tmp_path / "decode.onnx", tmp_path / "log")
    os.write(2, b"after\n")
    assert capfd.readouterr() == ("", "before\nafter\n")
    log = (tmp_path / "log").read_text()
    assert len(re.findall(r"^Internal Error: MyelinCheckException", log, re.MULTILINE)) == 1
    # Neither writer went over what the other had written.
    places = [
        log.index(words)
        for words in (
            "[V] Input filename: ",
            "Parsing node: blocks.0/Attention",
            "Internal Error: MyelinCheckException",
            "[E] IBuilder::buildSerializedNetwork",
        )
    ]
    assert places == sorted(places)


def test_a_closed_standard_error_is_no_obstacle(wide: Path, tmp_path: Path) -> None:
    before = os.dup(2)
    os.close(2)
    try:
        compile_graph(wide / "phase_00.onnx", "decode", (), RTX, tmp_path / "log")
    finally:
        os.dup2(before, 2)
        os.close(before)


def test_progress_counts_up_in_the_callers_thread(wide: Path, tmp_path: Path) -> None:
    events, threads = [], set()

    def progress(stage: str, step: int, steps: int) -> None:
        events.append((stage, step, steps))
        threads.add(threading.current_thread())

    compile_graph(wide / "phase_00.onnx", "decode", (), RTX, tmp_path / "log", progress)
    assert threads == {threading.main_thread()}
    assert all(0 <= step <= steps for _, step, steps in events)
    total = next(steps for stage, _, steps in events if stage == "Building engine")
    assert [s for stage, s, _ in events if stage == "Building engine"] == list(range(total + 1))


@pytest.mark.parametrize("raised", [KeyboardInterrupt, ValueError])
def test_what_progress_raises_ends_the_build(
    wide: Path, tmp_path: Path, raised: type[BaseException]
) -> None:
    def progress(stage: str, step: int, steps: int) -> None:
        raise raised("enough")

    profiles = decode_profiles(phase_table(SIZES), max_batch=2)
    with pytest.raises(raised, match="enough"):
        compile_graph(wide / "decode.onnx", "decode", profiles, RTX, tmp_path / "log", progress)
    log = (tmp_path / "log").read_text()
    assert "Static check for parsing" in log
    assert "Engine generation completed" not in log
    compile_decode(wide, tmp_path / "log")  # nothing of it is left over
    assert "Engine generation completed" in (tmp_path / "log").read_text()


def test_an_interrupt_while_tensorrt_works_is_not_lost() -> None:
    cancelled, events = threading.Event(), SimpleQueue[tuple[str, int, int] | None]()
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        engine._run_watched(lambda: cancelled.wait(60), events, cancelled, lambda *_: None)
    assert cancelled.is_set()
    assert time.perf_counter() - started < 20


# ----------------------------------------------------------------------------------- profiles


def shape_of(axes: Sequence[int | str], sizes: dict[str, int]) -> list[int]:
    return [sizes[axis] if isinstance(axis, str) else axis for axis in axes]


DECODE_INPUTS: dict[str, tuple[int, list[int | str]]] = {
    "token_ids": (7, ["rows", "context_tokens"]),
    "positions": (7, ["rows", "tokens"]),
    "attention_mask": (10, ["tokens", 17]),
    "write_index": (7, ["rows"]),
    "past_key_0": (10, ["rows", 2, 17, 64]),
}


def decode_shapes(phase: Phase, rows: int) -> dict[str, list[int]]:
    sizes = {"rows": rows, "context_tokens": phase.context, "tokens": phase.tokens}
    return {name: shape_of(axes, sizes) for name, (_, axes) in DECODE_INPUTS.items()}


def ranges(profiles: Sequence[Profile]) -> list[dict[str, ShapeRange]]:
    """Profiles as an engine tells them when it is run."""
    every = [engine._shapes(DECODE_INPUTS, profile) for profile in profiles]
    return [{name: ShapeRange(*ends) for name, ends in shapes.items()} for shapes in every]


def check_profiles(phases: tuple[Phase, ...], max_batch: int) -> None:
    """Whatever may run is in its profile, for every input, and profiles are few.

    One image with guidance has a profile that is tuned for it, and is run with that one.
    """
    profiles = decode_profiles(phases, max_batch)
    tokens = [phase.tokens for phase in phases]
    groups = len(profiles) // min(2, max_batch)
    assert groups <= 1 + math.log(max(tokens) / min(tokens), engine.PROFILE_SPREAD)
    ends = [engine._shapes(DECODE_INPUTS, profile) for profile in profiles]
    for end in ends:
        for least, tuned, most in end.values():
            assert all(a <= b <= c for a, b, c in zip(least, tuned, most, strict=True))
        for corner in range(3):  # TensorRT tries all three, where there must be a query
            assert end["token_ids"][corner][1] < end["positions"][corner][1]
            assert end["positions"][corner][1] == end["attention_mask"][corner][0]
    for phase in phases:
        for rows in range(1, 2 * max_batch + 1):
            shapes = decode_shapes(phase, rows)
            chosen = ends[choose_profile("decode", ranges(profiles), shapes)]
            for name, actual in shapes.items():
                least, _, most = chosen[name]
                assert all(a <= b <= c for a, b, c in zip(least, actual, most, strict=True)), name
            assert chosen["token_ids"][1][0] == (2 if rows <= 2 else 2 * max_batch)


@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=60), max_batch=st.integers(1, 4))
def test_no_run_is_out_of_profile(sizes: list[int], max_batch: int) -> None:
    check_profiles(phase_table(sizes), max_batch)


@pytest.mark.parametrize(
    ("cells", "steps", "count"),
    [(256, 20, 2), (256, 32, 2), (1024, 48, 2), (256, 1, 1), (256, 256, 1), (1024, 1024, 1)],
)
def test_published_and_extreme_schedules_need_few_profiles(
    cells: int, steps: int, count: int
) -> None:
    phases = phase_table(group_sizes(cells, steps))
    check_profiles(phases, max_batch=2)
    assert len(decode_profiles(phases, max_batch=1)) == count
    assert len(decode_profiles(phases, max_batch=2)) == 2 * count


def test_the_tokenizer_is_tuned_for_one_image_and_for_the_largest_batch() -> None:
    ranges = [profile["batch"] for profile in tokenizer_profiles(8)]
    assert ranges == [AxisRange(1, 1, 1), AxisRange(2, 8, 8)]
    assert [profile["batch"] for profile in tokenizer_profiles(1)] == [AxisRange(1, 1, 1)]


def test_the_profiles_name_the_axes_of_the_files(wide: Path) -> None:
    decode, detokenize = (
        {axis for _, axes in engine._read_inputs(wide / name).values() for axis in axes}
        for name in ("decode.onnx", "detokenize.onnx")
    )
    names = {axis for axis in decode | detokenize if isinstance(axis, str)}
    assert names == {"rows", "context_tokens", "tokens", "batch"}


def test_what_no_profile_takes_is_told() -> None:
    profiles = ranges(decode_profiles(phase_table(SIZES), max_batch=2))
    phase = phase_table(SIZES)[1]
    assert choose_profile("decode", profiles, decode_shapes(phase, rows=4)) == 1
    with pytest.raises(UserError, match=r"takes 4 rows at most .* not 5: use a smaller --batch"):
        choose_profile("decode", profiles, decode_shapes(phase, rows=5))
    whole = phase_table([16])[0]
    with pytest.raises(UserError, match=r"takes positions of \[1, 2\] to \[2, 12\], not \[1, 17\]"):
        choose_profile("decode", profiles, decode_shapes(whole, rows=1))
