"""What TensorRT-RTX makes of the graphs, asserted from the built network and the builder's log."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import resource
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import golden
from lpd_export import formats
from lpd_export.build import engine
from lpd_export.build import profiles as profiles_module
from lpd_export.build.compiler import EngineOptions, Network, builder_config
from lpd_export.build.engine import EngineReport, compile_graph
from lpd_export.build.profiles import Profile, decode_profiles, tokenizer_profiles
from lpd_export.errors import UserError
from lpd_export.graphs import export
from lpd_export.precision.casting import lower
from lpd_export.progress import Progress
from lpd_export.schedule.phases import phase_table
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
WIDE = LPDConfig(dim=128, depth=2, heads=2, grid=4, num_classes=5, vocab_size=64)
"""A small model whose heads are 64 wide, as those of the published models."""


Graphs = Callable[[str, str], Path]


def drawn(name: str) -> LPD:
    """The model `wide`, or a shallow one of so many heads x their width."""
    if name == "wide":
        return LPD(WIDE).initialize(0).eval()
    heads, width = map(int, name.split("x"))
    config = dataclasses.replace(WIDE, dim=heads * width, depth=1, heads=heads)
    return LPD(config).initialize(0).eval()


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """Makes a folder of ONNX files, static phases among them, of a model in a precision, once."""

    @functools.cache
    def exported(name: str) -> Path:
        model = golden.lpd(golden.read(name)) if name == "lpd_grid4" else drawn(name)
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


class Compiled(NamedTuple):
    report: EngineReport
    log: str
    engine: bytes


def compile_file(
    path: Path,
    folder: Path,
    *,
    graph: str = "decode",
    profiles: Sequence[Profile] = decode_profiles(phase_table(SIZES), max_batch=2),
    options: EngineOptions = RTX,
    progress: Progress = lambda stage, step, steps: None,
) -> Compiled:
    """Compiles into a folder, which holds `engine` and `log` then."""
    engine, log = folder / "engine", folder / "log"
    report = compile_graph(path, graph, profiles, options, engine, log, progress)
    return Compiled(report, log.read_text(), engine.read_bytes())


def depth_of(folder: Path) -> int:
    names = export.load_shapes(folder / "decode.onnx")
    return sum(name.startswith("past_key_") for name in names)


def check_decode(compiled: Compiled, depth: int, precision: str) -> None:
    """A decode engine is one fused kernel an attention and profile; its copies are reported."""
    report, log, engine = compiled
    assert report.attentions == depth
    assert report.cache_updates == 2 * depth
    # The log's own words: a kernel of no other work than to move what attention reads.
    moved = re.findall(
        r"Name: __myl_Resh\w*, LayerType: kgen, Inputs: \[ { Name: (present_\w+)", log
    )
    caches = {f"present_{kind}_{number}" for kind in ("key", "value") for number in range(depth)}
    assert set(report.copied_caches) == set(moved) == caches
    assert report.size == len(engine) > 100_000
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
def test_decode_compiles_fused_and_in_place_in_every_precision(
    graphs: Graphs,
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Sixteen cells are too few for two profiles otherwise.
    monkeypatch.setattr(profiles_module, "PROFILE_SPREAD", 4)
    folder = graphs("lpd_grid4", precision)
    profiles = decode_profiles(phase_table(SIZES), max_batch=2)
    compiled = compile_file(folder / "decode.onnx", tmp_path, profiles=profiles)
    assert compiled.report.profiles == 4  # one image and all that is more, of two groups
    check_decode(compiled, depth_of(folder), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("graph", ["detokenize", "tokenize"])
def test_tokenizer_graphs_compile_with_attention_that_may_fall_apart(
    graphs: Graphs, graph: str, precision: str, tmp_path: Path
) -> None:
    path = graphs("wide", precision) / f"{graph}.onnx"
    report = compile_file(path, tmp_path, graph=graph, profiles=tokenizer_profiles(2)).report
    nodes = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    assert report.decomposable_attentions == report.attentions == nodes.count("Attention") > 0
    assert report.cache_updates == 0
    assert report.notes == ()


@pytest.mark.parametrize("sizes", [[16], [1] * 16, [5, 1, 9, 1], [1, 15]])
def test_decode_compiles_for_odd_schedules(wide: Path, sizes: list[int], tmp_path: Path) -> None:
    profiles = decode_profiles(phase_table(sizes), max_batch=1)
    compiled = compile_file(wide / "decode.onnx", tmp_path, profiles=profiles)
    assert compiled.report.profiles == len(profiles)
    check_decode(compiled, WIDE.depth, "fp16")


# ----------------------------------------------------------------------------------- refusals


def altered(wide: Path, name: str, change: Callable[[onnx.GraphProto], None]) -> Path:
    """A changed copy of decode.onnx beside it, where its weights are."""
    model = onnx.load(wide / "decode.onnx", load_external_data=False)
    change(model.graph)
    path = wide / f"{name}.onnx"
    onnx.save(model, path)
    return path


def refusal(path: Path, folder: Path, options: EngineOptions = RTX) -> str:
    with pytest.raises(UserError) as error:
        compile_file(path, folder, options=options)
    assert not (folder / "engine").exists()
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
        assert f"mask of blocks.0/Attention in {path.name} is {name}" in refusal(path, tmp_path)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("heads", "width", "reason"),
    [
        (1, 64, "which have 1 head, where it takes 2 or more"),
        (2, 264, "whose heads are 264 wide, where it takes 256 at most"),
    ],
)
def test_heads_without_a_fused_kernel_are_refused(
    graphs: Graphs, heads: int, width: int, reason: str, precision: str, tmp_path: Path
) -> None:
    assert refusal(graphs(f"{heads}x{width}", precision) / "decode.onnx", tmp_path) == (
        "TensorRT-RTX cannot compile decode.onnx: it has no fused attention kernel for nodes like "
        f"blocks.0/Attention, {reason}; build in fp32, or with --backend onnxruntime; its log is "
        f"{tmp_path / 'log'}"
    )
    assert "dedicated kernel" in (tmp_path / "log").read_text()
    # The sentence is true: just within what it names, the same model is fused.
    within = graphs("wide" if heads == 1 else "2x256", precision)
    compile_file(within / "decode.onnx", tmp_path)


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
    attentions = {"a": (9, 9), "b": (heads, width)}
    network = Network("", attentions, decomposable=("a",), cache_updates=4)
    log = "Attention operation was not supported by a dedicated kernel."
    assert f"nodes like b, {reason}; build" in engine._explain(log, EngineOptions(backend), network)


def test_attention_written_out_is_refused(wide: Path, tmp_path: Path) -> None:
    sentence = refusal(altered(wide, "unfused", unfuse), tmp_path)
    assert "unfused.onnx has 4 caches, but 1 Attention nodes, where 2 belong" in sentence


@pytest.mark.parametrize("change", [change_cache_before, copy_cache_after])
def test_a_cache_that_is_not_updated_in_place_is_refused(
    wide: Path, change: Callable[[onnx.GraphProto], None], tmp_path: Path
) -> None:
    path = altered(wide, change.__name__, change)
    assert f"{path.name} does not update present_key_0 in place" in refusal(path, tmp_path)


def test_the_log_tells_a_copied_cache_from_one_in_place(wide: Path, tmp_path: Path) -> None:
    """As a tokenizer's graph, of which nothing is asked, the altered one compiles."""

    def change(graph: onnx.GraphProto) -> None:
        _, scatter = first(graph, "TensorScatter")
        past = scatter.input[0]
        scatter.op_type, scatter.input[:] = "Neg", [past]
        scatter.ClearField("attribute")

    path = altered(wide, "copied", change)
    report = compile_file(path, tmp_path, graph="detokenize").report
    assert report.cache_updates == 2 * WIDE.depth - 1
    assert "past_key_0" in report.copied_caches
    assert not {"past_value_0", "past_key_1", "past_value_1"} & set(report.copied_caches)


def test_an_operator_that_tensorrt_lacks_is_named(wide: Path, tmp_path: Path) -> None:
    def change(graph: onnx.GraphProto) -> None:
        _, node = first(graph, "Gelu")
        node.op_type = "Det"
        node.ClearField("attribute")

    sentence = refusal(altered(wide, "unknown", change), tmp_path)
    assert sentence == (
        "TensorRT-RTX cannot compile unknown.onnx: it does not take the Det node blocks.0/Gelu; "
        f"its log is {tmp_path / 'log'}"
    )


def test_a_damaged_or_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "decode.onnx"
    assert f"cannot read the ONNX file {path}" in refusal(path, tmp_path)
    path.write_bytes(b"\x0f\xff not a graph")
    assert f"cannot read the ONNX file {path}" in refusal(path, tmp_path)


# ------------------------------------------------------------------------------------ options


def test_options_reach_the_builder(wide: Path) -> None:
    """As TensorRT-RTX takes them; its own library is loaded into this process, and no other."""
    tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polygraphy.config.USE_TENSORRT_RTX", True)
        from polygraphy.backend.trt import NetworkFromOnnxPath

        builder, network, _parser = NetworkFromOnnxPath(str(wide / "phase_00.onnx"))()

        def config(**options: Any) -> Any:
            made = builder_config(tensorrt_rtx, EngineOptions("tensorrt-rtx", **options), [])
            return made(builder, network)

        plain = config()
        set_up = config(workspace=96, optimization_level=5, compute_capability=("12.0", "8.9"))
    flags, targets = tensorrt_rtx.BuilderFlag, tensorrt_rtx.ComputeCapability
    assert not plain.get_flag(flags.TF32)
    # Without it TensorRT-RTX's documentation promises no capture into a CUDA graph.
    assert plain.get_flag(flags.REQUIRE_USER_ALLOCATION)
    assert plain.num_compute_capabilities == 0
    assert set_up.get_memory_pool_limit(tensorrt_rtx.MemoryPoolType.WORKSPACE) == 96 << 20
    assert set_up.builder_optimization_level == 5
    assert set_up.num_compute_capabilities == 2
    assert set_up.get_compute_capability(0) == targets.SM120
    assert set_up.get_compute_capability(1) == targets.SM89


def test_compute_capabilities_change_the_engine(wide: Path, tmp_path: Path) -> None:
    def size(*capabilities: str) -> int:
        options = EngineOptions("tensorrt-rtx", compute_capability=capabilities)
        return compile_file(wide / "decode.onnx", tmp_path, options=options).report.size

    ada, both, turing = size("8.9"), size("8.9", "12.0"), size("7.5")
    # Ada's kernels run on Blackwell too; what is added is the target. Turing needs its own.
    assert ada < both < turing


def test_both_products_are_driven_from_one_process(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT cannot be installed everywhere: TensorRT-RTX's library stands in under its name.

    It takes TensorRT's way through Polygraphy, where the timing cache is a file.
    """
    package = tmp_path / "tensorrt"
    package.mkdir()
    (package / "__init__.py").write_text("from tensorrt_rtx import *\n__version__ = '11.0.0'\n")
    monkeypatch.syspath_prepend(tmp_path)
    timings = tmp_path / "timing.cache"
    versions = []
    for options in (
        RTX,
        EngineOptions("tensorrt", timing_cache=str(timings), hardware_compatible=True),
        RTX,
    ):
        compiled = compile_file(wide / "phase_00.onnx", tmp_path, profiles=(), options=options)
        check_decode(compiled, WIDE.depth, "fp16")
        versions.append(compiled.report.backend_version)
    assert versions[1] == "11.0.0"
    assert versions[0] == versions[2] != versions[1]
    assert timings.stat().st_size > 0


def test_a_type_that_a_target_lacks_is_refused(graphs: Graphs, tmp_path: Path) -> None:
    folder = graphs("wide", "bf16")
    options = EngineOptions("tensorrt-rtx", compute_capability=("7.5",))
    sentence = refusal(folder / "decode.onnx", tmp_path, options)
    assert "Cannot compile for target(s) sm75" in sentence


def test_too_small_a_workspace_is_named(wide: Path, tmp_path: Path) -> None:
    options = EngineOptions("tensorrt-rtx", workspace=1)
    sentence = refusal(wide / "decode.onnx", tmp_path, options)
    assert "a kernel needs more workspace than 1 MiB" in sentence


# --------------------------------------------------------------------------- log and progress


def test_what_tensorrt_prints_is_in_the_log_and_nowhere_else(
    graphs: Graphs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Myelin writes why it gives up to standard error itself, in the order of what is logged."""
    refusal(graphs("1x64", "fp16") / "decode.onnx", tmp_path)
    assert capfd.readouterr() == ("", "")
    log = (tmp_path / "log").read_text()
    assert len(re.findall(r"^Internal Error: MyelinCheckException", log, re.MULTILINE)) == 1
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
        compile_file(wide / "phase_00.onnx", tmp_path, profiles=())
    finally:
        os.dup2(before, 2)
        os.close(before)


def test_progress_counts_up(wide: Path, tmp_path: Path) -> None:
    events: list[tuple[str, int, int]] = []
    compile_file(
        wide / "phase_00.onnx", tmp_path, profiles=(), progress=lambda *event: events.append(event)
    )
    assert all(0 <= step <= steps for _, step, steps in events)
    total = next(steps for stage, _, steps in events if stage == "Building engine")
    assert [s for stage, s, _ in events if stage == "Building engine"] == list(range(total + 1))


# ---------------------------------------------------------------------- compilations that are ended


def compiler_of(process: int) -> int:
    """The process that a process compiles in."""
    return int(Path(f"/proc/{process}/task/{process}/children").read_text())


def has_children() -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
        return True
    return False


@pytest.mark.parametrize("raised", [KeyboardInterrupt, ValueError])
def test_what_progress_raises_ends_the_build(
    wide: Path, tmp_path: Path, raised: type[BaseException]
) -> None:
    def progress(stage: str, step: int, steps: int) -> None:
        raise raised("enough")

    with pytest.raises(raised, match="enough"):
        compile_file(wide / "decode.onnx", tmp_path, progress=progress)
    assert not (tmp_path / "engine").exists()
    assert "Engine generation completed" not in (tmp_path / "log").read_text()
    assert not has_children()


def end_compiler(end: Callable[[int], object]) -> Progress:
    """Does something to the compiler when it first tells how far it is."""
    told: list[str] = []

    def progress(stage: str, step: int, steps: int) -> None:
        if not told:
            end(compiler_of(os.getpid()))
        told.append(stage)

    return progress


def leave_no_memory(process: int) -> None:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[0])
    resource.prlimit(process, resource.RLIMIT_AS, (pages * resource.getpagesize(),) * 2)


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda process: os.kill(process, signal.SIGSEGV), r"TensorRT-RTX crashed .* \(SIGSEGV\)"),
        (lambda process: os.kill(process, signal.SIGKILL), "the system ended TensorRT-RTX"),
        (leave_no_memory, "memory ran out while TensorRT-RTX compiled decode.onnx: end other"),
    ],
)
def test_how_a_compiler_ended_is_told(
    wide: Path, end: Callable[[int], object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words) as error:
        compile_file(wide / "decode.onnx", tmp_path, progress=end_compiler(end))
    assert str(error.value).endswith(f"; its log is {tmp_path / 'log'}")
    assert "decode.onnx" in str(error.value)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("import os; os.abort()", r"crashed .* \(SIGABRT\): .*; the last it said is ''"),
        (
            "import os; print('one\\ntwo', flush=True); os._exit(9)",
            r"\(exit code 9\): .* said is 'one; two'",
        ),
        ("raise ValueError('no')", r"\(exit code 1\): .*ValueError: no'"),
    ],
)
def test_a_broken_library_is_told(
    wide: Path, content: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    assert re.search(words, refusal(wide / "decode.onnx", tmp_path, EngineOptions("tensorrt")))


def test_an_engine_that_does_not_fit_on_the_disk_is_not_left(wide: Path, tmp_path: Path) -> None:
    def small_files(process: int) -> None:
        resource.prlimit(process, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    with pytest.raises(OSError, match="File too large"):
        compile_file(wide / "decode.onnx", tmp_path, progress=end_compiler(small_files))
    assert not (tmp_path / "engine").exists()


def test_the_profiles_name_the_axes_of_the_files(wide: Path) -> None:
    decode, detokenize = (
        {axis for axes in engine._read_inputs(wide / name)[1].values() for axis in axes}
        for name in ("decode.onnx", "detokenize.onnx")
    )
    names = {axis for axis in decode | detokenize if isinstance(axis, str)}
    assert names == {"rows", "context_tokens", "tokens", "batch"}
