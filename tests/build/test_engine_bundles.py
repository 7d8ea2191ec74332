"""Bundles of engines, built as a user builds them: TensorRT-RTX really compiles every graph."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

import lpd_export.build.build
from commandline import answer, end, entries, mistake, sentence, start, wait_for
from lpd_export.build.compiler import EngineOptions
from lpd_export.build.engine import EngineReport, compile_graph
from lpd_export.bundle.manifest import GRAPH_NAMES, Bundle

tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
pytest.importorskip("polygraphy")

# Polygraphy sets an empty timing cache, which TensorRT-RTX calls a no-op.
pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore:.*Timing cache:DeprecationWarning"),
]

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
FLOATS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
RTX = EngineOptions("tensorrt-rtx")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

Bundles = Callable[[str], Bundle]


@pytest.fixture
def weights(lifelike_weights: Path) -> list[object]:
    """Options of a model of two heads, as TensorRT-RTX has no fused attention for a single one."""
    checkpoint, tokenizer = lifelike_weights / "lpd.pth", lifelike_weights / "vq.pt"
    return ["--checkpoint", checkpoint, "--tokenizer", tokenizer, "--steps", 5]


@pytest.fixture
def int8_settings(lifelike_weights: Path) -> dict[str, object]:
    """With so many cells that phases of few and of many tokens need profiles of their own."""
    kept = lifelike_weights / "kept_but_tokenize.json"
    return {"precision": "int8", "keep_layers": str(kept), "res": 32}


@pytest.fixture
def bundles(lifelike_bundle: Callable[..., Path], int8_settings: dict[str, object]) -> Bundles:
    """Gives the bundle of engines in a precision, built once; shared, so leave it as it is."""

    def bundle(precision: str) -> Bundle:
        settings: dict[str, object] = (
            int8_settings if precision == "int8" else {"precision": precision}
        )
        return Bundle.open(lifelike_bundle(backend="tensorrt-rtx", **settings))

    return bundle


def rtx(*options: object) -> list[object]:
    return ["--backend", "tensorrt-rtx", *options]


def load(path: Path) -> onnx.GraphProto:
    return onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False)).graph


def log_of(bundle: Bundle, graph: str) -> str:
    return bundle.file(f"engines/{graph}.log").read_text()


# --------------------------------------------------------------------------------- what is built


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_bundle_holds_an_engine_and_its_log_for_each_graph(
    bundles: Bundles, precision: str
) -> None:
    bundle = bundles(precision)
    manifest = bundle.manifest
    bundle.files()  # as they were written
    assert sorted(manifest.files) == sorted(
        name for name in entries(bundle.path) if "." in name and name != "manifest.json"
    )
    engines = {name for name in manifest.files if name.startswith("engines/")}
    assert engines == {f"engines/{g}.{kind}" for g in GRAPH_NAMES for kind in ("engine", "log")}
    assert (manifest.backend, manifest.precision) == ("tensorrt-rtx", precision)
    assert manifest.backend_version == tensorrt_rtx.__version__
    assert (manifest.max_batch, manifest.target_compute_capabilities) == (8, [])
    around = {"fp32": "float32", "bf16": "bfloat16"}.get(precision, "float16")
    assert manifest.float_type == around
    for graph, report in manifest.engines.items():
        assert report["size"] == manifest.files[f"engines/{graph}.engine"].size
        assert report["backend_version"] == tensorrt_rtx.__version__
        assert report["profiles"] == len(report["optimization_profiles"])
    assert list(manifest.engines) == list(GRAPH_NAMES)


def test_a_dry_run_names_the_files_of_engines(
    bundles: Bundles, weights: list[object], tmp_path: Path
) -> None:
    options = rtx("--precision", "fp16", "--out", tmp_path / "a")
    planned = json.loads(answer("build", *weights, *options, "--dry-run", "--json").out)
    assert set(planned["files"]) == {"manifest.json", *bundles("fp16").manifest.files}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_attention_is_fused_and_every_cache_updated_in_place(
    bundles: Bundles, precision: str
) -> None:
    manifest = bundles(precision).manifest
    report, depth = manifest.engines["decode"], manifest.model.depth
    assert report["attentions"] == depth
    assert report["cache_updates"] == 2 * depth
    copied = {f"present_{kind}_{i}" for kind in ("key", "value") for i in range(depth)}
    assert set(report["copied_caches"]) == copied
    fused = re.findall(
        r"^ *Name: (\w*gemm_mha\w*), LayerType", log_of(bundles(precision), "decode"), re.M
    )
    assert report["fused_kernels"] == fused
    if precision == "fp32":
        assert (report["decomposable_attentions"], fused) == (depth, [])
        assert "no fused attention in fp32" in report["notes"][0]
    else:
        assert report["decomposable_attentions"] == 0
        assert len(fused) == depth * report["profiles"]
        assert report["profiles"] == (4 if precision == "int8" else 2)
        assert report["notes"] == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_log_in_the_bundle_is_the_verbose_one(bundles: Bundles, precision: str) -> None:
    bundle = bundles(precision)
    for graph in GRAPH_NAMES:
        log = log_of(bundle, graph)
        assert log.count("\n") > 1000
        assert "Engine generation completed" in log
        assert re.search(r"I/O Tensors:\n +Name: ", log)
        nodes = onnx.load(bundle.path / f"onnx/{graph}.onnx", load_external_data=False).graph.node
        missing = [node.name for node in nodes if f"Parsing node: {node.name}" not in log]
        assert missing == []


def test_the_log_of_int8_tells_of_int8_kernels(bundles: Bundles) -> None:
    bundle = bundles("int8")
    manifest = bundle.manifest
    kept = manifest.calibration["quantization"]["decode"]["kept"]
    log = log_of(bundle, "decode")
    for block in range(manifest.model.depth):
        for layer in ("query", "key", "value", "proj", "fc1", "fc2"):
            name = f"blocks.{block}.{layer}/MatMul"
            kernels = re.findall(
                # In another profile than the first it is `blocks.0.fc1/MatMul [profile 1]_...`;
                # a product of several layers at once has all their names, joined by +.
                rf"Name: [^,]*{re.escape(name)}[^,]*, LayerType: gemm, Inputs: (.*?), Constants: ",
                log,
            )
            int8 = [inputs for inputs in kernels if "Datatype: Int8" in inputs]
            wanted = 0 if name in kept else manifest.engines["decode"]["profiles"]
            assert len(int8) == wanted, name
    for graph in ("detokenize", "tokenize"):
        report, decision = manifest.engines[graph], manifest.calibration["quantization"][graph]
        quantized = decision["layers"] - len(decision["kept"])
        assert report["convolutions"] == decision["layers"] * report["profiles"]
        assert report["integer_convolutions"] == quantized * report["profiles"] > 0
        assert bundles("fp16").manifest.engines[graph]["integer_convolutions"] == 0
    half = log_of(bundles("fp16"), "decode")
    assert "Datatype: Int8" not in half


# ---------------------------------------------------------------------------------- phase files


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_phase_file_compiles_alone(bundles: Bundles, precision: str, tmp_path: Path) -> None:
    bundle = bundles(precision)
    depth = bundle.manifest.model.depth
    paths = sorted(bundle.path.glob("onnx/phase_*.onnx"))
    assert len(paths) == len(bundle.manifest.phases)
    for path in paths:
        report = compile_graph(path, "decode", (), RTX, tmp_path / "engine", tmp_path / "log")
        unfused = depth if precision == "fp32" else 0
        assert (report.attentions, report.decomposable_attentions) == (depth, unfused)
        assert len(report.fused_kernels) == depth - unfused
        assert report.cache_updates == len(report.copied_caches) == 2 * depth


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_polygraphy_converts_a_phase_file_as_it_is(
    bundles: Bundles, precision: str, tmp_path: Path
) -> None:
    path = sorted(bundles(precision).path.glob("onnx/phase_*.onnx"))[-1]
    command = [str(Path(sys.executable).with_name("polygraphy")), "convert", path.name]
    # There is no fused attention in FP32 to insist on.
    command += ["--decomposable-attentions"] if precision == "fp32" else []
    said = subprocess.run(
        [*command, "--convert-to", "trt", "-o", str(tmp_path / "phase.engine")],
        cwd=path.parent,
        env=os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert said.returncode == 0, said.stdout + said.stderr
    assert (tmp_path / "phase.engine").stat().st_size > 100_000


# ----------------------------------------------------------------------------------------- types


@pytest.fixture
def int8_for_onnxruntime(
    lifelike_bundle: Callable[..., Path], int8_settings: dict[str, object]
) -> Bundle:
    return Bundle.open(lifelike_bundle(**int8_settings))


def type_of_levels(node: onnx.NodeProto, types: Mapping[str, int]) -> int:
    """Of a QuantizeLinear or DequantizeLinear; that of weights alone has no zero point."""
    return types[node.input[2 if len(node.input) > 2 else 0]]


def quantized_types(bundle: Bundle, graph: str) -> dict[str, set[int]]:
    """By operator, the types of the levels that its activation and weight come as."""
    found = load(bundle.file(f"onnx/{graph}.onnx"))
    types = {tensor.name: tensor.data_type for tensor in found.initializer}
    makers = {output: node for node in found.node for output in node.output}
    levels: dict[str, set[int]] = {}
    for node in found.node:
        for name in node.input:
            maker = makers.get(name)
            if maker is not None and maker.op_type == "DequantizeLinear":
                levels.setdefault(node.op_type, set()).add(type_of_levels(maker, types))
    return levels


def test_int8_is_measured_in_its_own_batches(
    lifelike_bundle: Callable[..., Path], int8_settings: dict[str, object]
) -> None:
    """Engines for one image at a time are calibrated on many, which are no batch of theirs."""
    settings = int8_settings | {"backend": "tensorrt-rtx", "max_batch": 1}
    bundle = Bundle.open(lifelike_bundle(**settings))
    assert bundle.manifest.max_batch == 1
    assert bundle.manifest.calibration["quantization"]["decode"]["layers"]


def test_tensorrt_gets_signed_levels_alone(bundles: Bundles) -> None:
    for path in sorted(bundles("int8").path.glob("onnx/*.onnx")):
        found = load(path)
        assert not [t.name for t in found.initializer if t.data_type == TensorProto.UINT8], path
        pairs = [n for n in found.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
        types = {tensor.name: tensor.data_type for tensor in found.initializer}
        assert {type_of_levels(node, types) for node in pairs} == {TensorProto.INT8}, path
    # Of embeddings and of the products that are kept, weights alone are on levels.
    for graph, operators in (("decode", {"MatMul", "Gather"}), ("detokenize", {"Conv"})):
        assert quantized_types(bundles("int8"), graph).keys() == operators


def test_onnxruntime_gets_unsigned_activations(int8_for_onnxruntime: Bundle) -> None:
    bundle = int8_for_onnxruntime
    signed, unsigned = TensorProto.INT8, TensorProto.UINT8
    # The activation is unsigned, the weight signed, and so is a convolution's bias.
    assert quantized_types(bundle, "decode") == {"MatMul": {signed, unsigned}}
    for graph in ("detokenize", "tokenize"):
        assert quantized_types(bundle, graph)["Conv"] == {signed, unsigned, TensorProto.INT32}
    decided = bundle.manifest.calibration["quantization"]["decode"]
    assert decided["layers"] > len(decided["kept"])


def test_onnxruntime_computes_every_quantized_product_in_integers(
    int8_for_onnxruntime: Bundle, tmp_path: Path
) -> None:
    """A product that is not fused would have its weight dequantized in every step."""
    bundle = int8_for_onnxruntime
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        bundle.file("onnx/decode.onnx"), options, providers=["CPUExecutionProvider"]
    )
    operators = Counter(node.op_type for node in load(tmp_path / "optimized.onnx").node)
    decided = bundle.manifest.calibration["quantization"]["decode"]
    assert operators["MatMulIntegerToFloat"] == decided["layers"] - len(decided["kept"])
    assert operators["DequantizeLinear"] == 0


def test_around_int8_is_fp16_for_tensorrt_and_fp32_for_onnxruntime(
    bundles: Bundles, int8_for_onnxruntime: Bundle
) -> None:
    for bundle, around in ((bundles("int8"), "fp16"), (int8_for_onnxruntime, "fp32")):
        for path in sorted(bundle.path.glob("onnx/*.onnx")):
            found = load(path)
            for value in (*found.input, *found.output):
                element = value.type.tensor_type.elem_type
                if element in FLOATS.values() and value.name != "logits":
                    assert element == FLOATS[around], (path, value.name)
            scales = {n.input[1] for n in found.node if n.op_type == "DequantizeLinear"}
            types = {t.data_type for t in found.initializer if t.name in scales}
            assert types == {FLOATS[around]}, path
    names = ("past_key_0", "attention_mask")
    for precision in ("fp32", "fp16", "bf16"):
        inputs = load(bundles(precision).file("onnx/decode.onnx")).input
        types = {v.type.tensor_type.elem_type for v in inputs if v.name in names}
        assert types == {FLOATS[precision]}


# -------------------------------------------------------------------------------------- commands


def test_inspect_describes_the_engines(bundles: Bundles) -> None:
    bundle = bundles("int8")
    manifest, size = bundle.manifest, bundle.manifest.files["engines/decode.engine"].size
    said = answer("inspect", bundle.path)
    assert said.code == 0, said
    lines = [line.strip() for line in said.out.splitlines()]
    version, layers = tensorrt_rtx.__version__, manifest.engines["decode"]["engine_layers"]
    at = lines.index(
        f"engine     decode: {size / 1e6:.1f} MB, tensorrt-rtx {version} for the default GPUs, "
        f"{layers} layers"
    )
    depth = manifest.model.depth
    assert lines[at + 1] == (
        f"{2 * depth} caches updated in place, {2 * depth} copied for attention, "
        f"{depth} of {depth} attentions fused"
    )
    assert "token_ids [rows, context_tokens], positions [rows, tokens]" in lines[at + 2]
    assert "attention_mask [tokens, 65], write_index [rows], logits [rows, " in lines[at + 2]
    for number, profile in enumerate(manifest.engines["decode"]["optimization_profiles"]):
        (least, best, most), line = profile["tokens"], lines[at + 3 + number]
        rows = "3 to 16 (best 16)" if number % 2 else "1 to 2 (best 2)"
        assert line.startswith(f"profile {number}: rows {rows}, context_tokens ")
        assert line.endswith(f"tokens {least} to {most} (best {best})")
    detokenize = next(line for line in lines if line.startswith("engine     detokenize: "))
    report, at = manifest.engines["detokenize"], lines.index(detokenize)
    of_all = f"{report['integer_convolutions']} of {report['convolutions']}"
    assert lines[at + 1 : at + 3] == [
        f"{of_all} convolutions in INT8 kernels",
        "indices [batch, 64], image [batch, 3, 32, 32]",
    ]
    for graph in GRAPH_NAMES:
        mb = manifest.files[f"engines/{graph}.engine"].size / 1e6
        assert f"{mb:.2f} MB  engines/{graph}.engine" in lines
    printed = json.loads(answer("inspect", bundle.path, "--json").out)
    assert printed["manifest"]["engines"] == manifest.engines


def needed_megabytes(bundle: Bundle, batch: int) -> tuple[int, int]:
    """What `inspect` says that a batch takes in all, and that the engines take of it."""
    said = answer("inspect", bundle.path, "--batch", batch).out
    found = re.search(rf"memory +(\d+) MB for a batch of {batch}\b.*?: (\d+) weights", said)
    assert found, said
    return int(found[1]), int(found[2])


def test_a_larger_batch_needs_more_memory(bundles: Bundles) -> None:
    bundle = bundles("int8")
    sizes = bundle.manifest.files
    engines = round(sum(sizes[f"engines/{graph}.engine"].size for graph in GRAPH_NAMES) / 1e6)
    (one, weights), (eight, same) = (needed_megabytes(bundle, batch) for batch in (1, 8))
    assert weights == same == engines
    model = bundle.manifest.model
    # The two rows of an image have a key and a value in each block, in FP16.
    caches = 2 * 2 * 2 * model.depth * (model.grid**2 + 1) * model.dim
    assert engines <= one < eight
    assert eight - one >= round(7 * caches / 1e6)


@NO_GPU
def test_an_engine_does_not_run_without_a_gpu(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundles("fp16").path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said = mistake("run", bundle, "--class", 0, "--out", tmp_path / "a/b")
    assert said.startswith("TensorRT needs an NVIDIA GPU, but torch cannot use cuda here (")
    assert "or use a bundle built with --backend onnxruntime" in said
    # In a process of its own nothing else is said either.
    alone = end(start("run", bundle, "--class", 0, "--json", "--out", tmp_path / "a/b"))
    assert sentence(alone) == said
    assert alone.err.splitlines()[:-1] == [f"loading {bundle}"]
    for options in (["--device", "cpu"], ["--threads", 2]):
        said = mistake("run", bundle, "--class", 0, *options, "--out", tmp_path / "a/b")
        assert "engines, which run on a GPU: leave out the CPU's settings" in said
    assert not (tmp_path / "a").exists()
    # ONNX Runtime may leave a file of its own in the cache; kernels and logs there are none.
    assert not (tmp_path / "cache" / "lpd-export").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "was altered after it was built"),
        (lambda content: content[:-1], "it is truncated or altered"),
        (None, "is missing"),
    ],
)
@pytest.mark.parametrize("name", ["decode.engine", "tokenize.log"])
def test_a_damaged_engine_is_named(
    bundles: Bundles,
    name: str,
    change: Callable[[bytes], bytes] | None,
    message: str,
    tmp_path: Path,
) -> None:
    shutil.copytree(bundles("fp16").path, tmp_path / "bundle")
    path = tmp_path / "bundle/engines" / name
    if change:
        path.write_bytes(change(path.read_bytes()))
    else:
        path.unlink()
    said = mistake("inspect", tmp_path / "bundle")
    assert said.startswith(str(path))
    assert message in said
    if name == "decode.engine":
        run = mistake("run", tmp_path / "bundle", "--class", 0, "--out", tmp_path / "images")
        assert run == said
        assert not (tmp_path / "images").exists()


# --------------------------------------------------------------------------------------- options


def test_compute_capabilities_reach_the_engines(
    bundles: Bundles, weights: list[object], tmp_path: Path
) -> None:
    def made(*capabilities: str) -> Bundle:
        options = rtx("--precision", "fp16", "--max-batch", 2, "--out", tmp_path / capabilities[-1])
        options += [part for value in capabilities for part in ("--compute-capability", value)]
        said = answer("build", *weights, *options, "--json")
        assert said.code == 0, said
        targets = json.loads(said.out)["manifest"]["target_compute_capabilities"]
        assert targets == list(capabilities)
        return Bundle.open(tmp_path / capabilities[-1])

    ada, both = made("8.9"), made("8.9", "12.0")
    sizes = [bundle.manifest.files["engines/decode.engine"].size for bundle in (ada, both)]
    assert sizes[0] < sizes[1]
    said = answer("inspect", both.path).out
    assert said.count(f"tensorrt-rtx {tensorrt_rtx.__version__} for 8.9, 12.0, ") == 3
    assert "rows 3 to 4 (best 4)" in said
    assert both.manifest.max_batch == 2


def write_recipe(folder: Path, more: str) -> Path:
    path = folder / "small.toml"
    path.write_text(f'steps = 4\nprecision = "fp16"\nbackend = "tensorrt-rtx"\n{more}\n')
    return path


def test_a_recipe_of_engine_options(weights: list[object], tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        'compute-capability = ["8.9"]\noptimization-level = 1\nworkspace = 256\nmax-batch = 1',
    )
    seen = []

    def compile_seen(*arguments: Any) -> EngineReport:
        seen.append(next(value for value in arguments if isinstance(value, EngineOptions)))
        return compile_graph(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lpd_export.build.build, "compile_graph", compile_seen)
        assert answer("build", recipe, *weights).code == 0
    options = EngineOptions(
        "tensorrt-rtx", workspace=256, optimization_level=1, compute_capability=("8.9",)
    )
    assert seen == [options] * 3
    manifest = Bundle.open(tmp_path / "small").manifest
    assert manifest.target_compute_capabilities == ["8.9"]
    assert manifest.engines["decode"]["optimization_profiles"][0]["rows"] == [1, 2, 2]


@pytest.mark.parametrize("value", ['"8.9"', "8.9", "[8.9]", '["8.9", 12]', "true"])
def test_a_recipe_with_capabilities_of_a_wrong_type(value: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, f"compute-capability = {value}")
    said = mistake("build", recipe)
    assert said.startswith(
        f"{recipe}, line 4: compute-capability must be a list of texts in quotes, but it is "
    )
    assert entries(tmp_path) == ["small.toml"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("tensorrt-rtx --timing-cache a.cache", "leave out the timing cache"),
        ("tensorrt-rtx --hardware-compatible", "leave out hardware compatibility"),
        ("tensorrt-rtx --compute-capability 9.0", "12.1, not for '9.0'"),
        (
            "tensorrt-rtx --precision fp8 --compute-capability 12.0 --compute-capability 8.6",
            "fp8 needs compute capability 8.9: leave out 8.6",
        ),
        (
            "tensorrt-rtx --compute-capability 8.9 --compute-capability 8.9",
            "compute capability 8.9 is given twice",
        ),
        ("tensorrt --compute-capability 8.9", "or use tensorrt-rtx"),
        ("onnxruntime --workspace 9", "--workspace is for engines"),
        ("onnxruntime --compute-capability 8.9", "--compute-capability is for engines"),
    ],
)
def test_options_of_another_backend_are_refused(
    weights: list[object], options: str, message: str, tmp_path: Path
) -> None:
    command = ["build", *weights, "--backend", *options.split(), "--out", tmp_path / "a"]
    assert message in mistake(*command)
    assert entries(tmp_path) == []


# --------------------------------------------------------------------------- builds that do not end


def test_a_failed_build_leaves_its_log_alone(
    small_weights: Path, shared_folder: Path, tmp_path: Path
) -> None:
    """A single head has no fused attention, which the compiler prints to standard error itself."""
    files = ["--checkpoint", small_weights / "lpd.pth", "--tokenizer", small_weights / "vq.pt"]
    options = ["--steps", 4, *rtx("--precision", "fp16", "--out", tmp_path / "a/b")]
    said = end(start("build", *files, *options, exports=shared_folder))
    assert re.search("for nodes like .*, which have 1 head, where it takes 2 or more; ", said.err)
    found = re.search(r"build in fp32, or with --backend onn.*its log is (\S+)$", sentence(said))
    assert found, said
    stages = said.err.splitlines()[:-1]
    assert stages[0] == "loading torch and onnx"
    assert stages[-1] == "compiling decode for tensorrt-rtx"
    assert "Myelin" not in said.err
    assert entries(tmp_path) == []
    log = Path(found[1]).read_text()
    assert "Parsing node: blocks.1/Attention" in log
    assert "not supported by a dedicated kernel" in log


WHILE_COMPILING = """
import sys, time
from lpd_export.cli.progress import stages

with stages() as (report, advance):
    report("compiling")
    for step in range(1, 4):
        advance("Building", step, 3)
        time.sleep(0.5)  # rich draws ten times a second
print("done", file=sys.stderr)
"""


def test_progress_is_shown_on_a_terminal_while_it_compiles() -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", WHILE_COMPILING]
    process = subprocess.Popen(command, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux ends a terminal without a writer by an error
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert process.wait(timeout=300) == 0
    for step in (1, 2, 3):
        assert f"compiling: Building {step} of 3".encode() in shown
    assert shown.endswith(b"done\r\n")


def compiler_of(process: subprocess.Popen[str]) -> int:
    """The process in which a build compiles."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (found := children.read_text()):
        time.sleep(0.05)
    return int(found)


def wait_until_gone(process: int) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < deadline, "the compiler outlives the build"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_compilation_leaves_nothing(
    weights: list[object], number: signal.Signals, shared_folder: Path, tmp_path: Path
) -> None:
    command = ["build", *weights, *rtx("--out", tmp_path / "a/b")]
    process = start(*command, exports=shared_folder, start_new_session=True)
    wait_for(process, "compiling decode")
    compiler = compiler_of(process)
    # A terminal interrupts all processes of a command at once.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    said = end(process)
    assert said.code == 130, said
    assert said.err.splitlines()[-1] == "lpd-export: interrupted"
    assert "Traceback" not in said.err
    assert said.out == ""
    assert entries(tmp_path) == []
    wait_until_gone(compiler)


def test_a_compiler_does_not_outlive_a_killed_build(
    weights: list[object], shared_folder: Path, tmp_path: Path
) -> None:
    process = start("build", *weights, *rtx("--out", tmp_path / "a"), exports=shared_folder)
    wait_for(process, "compiling decode")
    compiler = compiler_of(process)
    process.kill()
    assert end(process).code == -signal.SIGKILL
    wait_until_gone(compiler)
