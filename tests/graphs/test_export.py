"""The graphs compute what the reference does, and the ONNX files are what design and tools want."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

import golden
from damage import randomize
from lpd_export.graphs import contract, export
from lpd_export.graphs.modules import (
    Decode,
    Detokenize,
    Tokenize,
    attention,
    tensor_scatter,
)
from lpd_export.schedule.phases import attention_mask, phase_table
from lpd_reference import LPD, LPDConfig, VQTokenizer

pytestmark = pytest.mark.model

MASKED = float(torch.finfo(torch.float32).min)


@pytest.fixture(scope="module", params=golden.LPD_NAMES)
def lpd_golden(request: pytest.FixtureRequest) -> tuple[golden.Golden, LPD]:
    vectors = golden.read(request.param)
    return vectors, golden.lpd(vectors)


@pytest.fixture(scope="module")
def tokenizer() -> VQTokenizer:
    return golden.tokenizer(golden.read("vq_f4"))


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory,
    lpd_golden: tuple[golden.Golden, LPD],
    tokenizer: VQTokenizer,
) -> Path:
    """A folder with all ONNX files of a golden model at its golden group sizes."""
    vectors, model = lpd_golden
    folder = tmp_path_factory.mktemp("onnx")
    export.write_models(
        {
            "decode": export.export_decode(model),
            "detokenize": export.export_detokenize(tokenizer, model.config.grid),
            "tokenize": export.export_tokenize(tokenizer, model.config.grid),
        },
        folder,
    )
    export.write_phases(folder, phase_table(vectors.config["group_sizes"]), rows=2)
    return folder


def open_graph(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def run_onnx(path: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


# ----------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("case", ["guided", "plain", "null"])
def test_decode_graph_reproduces_the_golden_logits(
    lpd_golden: tuple[golden.Golden, LPD], case: str
) -> None:
    """The cache of S + 1 overwritten rows is the reference's growing cache."""
    vectors, model = lpd_golden
    config, expect = model.config, vectors.expect
    graph = Decode(model).eval()
    cfg = vectors.config["cfg_scale"] if case == "guided" else 1.0
    orders, tokens = expect["orders"], expect[f"{case}.tokens"]
    null = config.vocab_size + config.num_classes
    condition = expect["labels"] + config.vocab_size
    if case == "null":
        condition = torch.full_like(condition, null)
    if case == "guided":
        condition = torch.cat([condition, torch.full_like(condition, null)])
    repeats = len(condition) // len(orders)
    rows = len(condition)
    shape = (rows, config.heads, config.cells + 1, config.head_dim)
    keys, values = ([torch.zeros(shape) for _ in range(config.depth)] for _ in range(2))
    token_ids, logits = condition[:, None], []
    sequence = torch.cat([torch.zeros_like(orders[:, :1]), orders + 1], dim=1)
    for phase in phase_table(vectors.config["group_sizes"]):
        positions = sequence[:, phase.write_index : phase.write_index + phase.tokens]
        raw, keys, values = graph(
            token_ids,
            positions.repeat(repeats, 1),
            torch.from_numpy(attention_mask(phase, config.cells, MASKED)),
            torch.full((rows,), phase.write_index),
            keys,
            values,
        )
        cells = orders[:, phase.first_cell : phase.first_cell + phase.queries]
        if case == "guided":
            n = torch.arange(phase.first_cell, phase.first_cell + phase.queries)
            linear = vectors.config["cfg_schedule"] == "linear"
            scale = 1 + (cfg - 1) * n / config.cells if linear else torch.full((len(n),), cfg)
            conditional, unconditional = raw.chunk(2)
            raw = unconditional + scale[:, None] * (conditional - unconditional)
        logits.append(raw)
        token_ids = tokens.gather(1, cells).repeat(repeats, 1)
    torch.testing.assert_close(
        torch.cat(logits, dim=1), expect[f"{case}.logits"], rtol=1e-4, atol=1e-4
    )


def test_tokenizer_graphs_reproduce_the_golden_images() -> None:
    for name in golden.VQ_NAMES:
        vectors = golden.read(name)
        model, expect = golden.tokenizer(vectors), vectors.expect
        grid = vectors.config["grid"][0]
        image = Detokenize(model, grid)(expect["indices"])
        torch.testing.assert_close(image, expect["image"], rtol=0, atol=1e-4)
        assert Tokenize(model)(expect["encode_image"]).equal(expect["encode_indices"])


def test_tensor_scatter_replaces_the_rows_of_each_row() -> None:
    generator = torch.Generator().manual_seed(0)
    write_index = torch.tensor([0, 5, 2])
    for heads in ((2,), ()):
        cache = torch.randn(3, *heads, 7, 4, generator=generator)
        update = torch.randn(3, *heads, 2, 4, generator=generator)
        expected = cache.clone()
        for row, index in enumerate(write_index.tolist()):
            expected[row, ..., index : index + 2, :] = update[row]
        assert tensor_scatter(cache, update, write_index).equal(expected)
        torch.library.opcheck(tensor_scatter, (cache, update, write_index))


def test_attention_beside_one_another_is_that_of_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    query, *rest = (torch.randn(3, rows, 12, generator=generator) for rows in (5, 7, 7))
    mask = torch.zeros(5, 7).masked_fill(torch.ones(5, 7).triu(3).bool(), MASKED)
    mixed = attention(query, *rest, mask, 3)
    for row in range(3):
        for head in range(3):
            q, k, v = (x[row, :, 4 * head : 4 * head + 4] for x in (query, *rest))
            expected = torch.softmax(q @ k.T / 2 + mask, dim=-1) @ v
            torch.testing.assert_close(mixed[row, :, 4 * head : 4 * head + 4], expected)
    torch.library.opcheck(attention, (query, *rest, mask, 3))


# ------------------------------------------------------------------------------- onnx files


def test_decode_onnx_has_the_promised_names_shapes_and_types(
    exported: Path, lpd_golden: tuple[golden.Golden, LPD]
) -> None:
    config = lpd_golden[1].config
    cells, depth = config.cells, config.depth
    shapes = export.load_shapes(exported / "decode.onnx")
    cache = ["rows", config.heads, cells + 1, config.head_dim]
    assert shapes.pop("token_ids") == ["rows", "context_tokens"]
    assert shapes.pop("positions") == ["rows", "tokens"]
    assert shapes.pop("attention_mask") == ["tokens", cells + 1]
    assert shapes.pop("write_index") == ["rows"]
    assert shapes.pop("logits") == ["rows", "tokens - context_tokens", config.vocab_size]
    names = contract.cache_names("past", depth) + contract.cache_names("present", depth)
    assert shapes == dict.fromkeys(names, cache)

    graph = open_graph(exported / "decode.onnx").graph
    integers = {"token_ids", "positions", "write_index"}
    for value in (*graph.input, *graph.output):
        wanted = onnx.TensorProto.INT64 if value.name in integers else onnx.TensorProto.FLOAT
        assert value.type.tensor_type.elem_type == wanted, value.name


def test_tokenizer_onnx_files_have_the_promised_names_and_shapes(
    exported: Path, lpd_golden: tuple[golden.Golden, LPD]
) -> None:
    cells, side = lpd_golden[1].config.cells, 4 * lpd_golden[1].config.grid
    image, indices = ["batch", 3, side, side], ["batch", cells]
    assert export.load_shapes(exported / "detokenize.onnx") == {"indices": indices, "image": image}
    assert export.load_shapes(exported / "tokenize.onnx") == {"image": image, "indices": indices}


def test_decode_onnx_is_one_attention_and_two_scatters_a_layer(
    exported: Path, lpd_golden: tuple[golden.Golden, LPD]
) -> None:
    model = open_graph(exported / "decode.onnx")
    depth = lpd_golden[1].config.depth
    counts = Counter(node.op_type for node in model.graph.node)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
    assert counts["Attention"] == depth
    assert counts["TensorScatter"] == 2 * depth
    assert counts["MatMul"] == 6 * depth + 1
    assert counts["LayerNormalization"] == 2 * depth + 2
    assert counts["Gelu"] == depth
    # A transposed copy of a weight would be made anew by every backend.
    weights = {tensor.name for tensor in model.graph.initializer}
    assert not [n for n in model.graph.node if n.op_type == "Transpose" and n.input[0] in weights]


def test_every_file_passes_the_checker_and_damage_does_not(exported: Path, tmp_path: Path) -> None:
    files = sorted(exported.glob("*.onnx"))
    assert len(files) >= 8
    for path in files:
        export.check_model(path)
    broken = open_graph(exported / "decode.onnx")
    scatter = next(node for node in broken.graph.node if node.op_type == "TensorScatter")
    scatter.input[1] = "nowhere"
    onnx.save(broken, exported / "broken.onnx")
    with pytest.raises(onnx.checker.ValidationError):
        export.check_model(exported / "broken.onnx")
    (exported / "broken.onnx").unlink()


def test_weights_are_on_disk_once(exported: Path) -> None:
    spans: dict[tuple[int, int], set[str]] = {}
    for path in exported.glob("*.onnx"):
        assert path.stat().st_size < 200_000, path
        for tensor in open_graph(path).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                entry = {item.key: item.value for item in tensor.external_data}
                assert entry["location"] == export.WEIGHTS_FILE
                span = int(entry["offset"]), int(entry["length"])
                spans.setdefault(span, set()).add(path.name)
            else:
                assert len(tensor.raw_data) <= export.EMBEDDED_BYTES, tensor.name
    content = (exported / export.WEIGHTS_FILE).read_bytes()
    stored = [content[start : start + length] for start, length in spans]
    assert len(set(stored)) == len(stored), "two tensors of the same content"
    pages = sum(-(-length // export.ALIGNMENT) for _, length in spans)
    assert len(content) <= pages * export.ALIGNMENT, "bytes that no graph uses"
    codebook = [names for names in spans.values() if {"detokenize.onnx", "tokenize.onnx"} <= names]
    assert codebook, "the codebook is not shared"


def test_files_say_where_nodes_come_from_but_not_on_which_machine(exported: Path) -> None:
    content = (exported / "decode.onnx").read_bytes()
    assert b"blocks.0.fc1/MatMul" in content
    assert str(Path(export.__file__).parent).encode() not in content
    assert b"stack_trace" not in content
    assert b".py" not in content


def test_each_static_phase_equals_the_dynamic_graph_on_its_own(
    exported: Path, lpd_golden: tuple[golden.Golden, LPD]
) -> None:
    vectors, model = lpd_golden
    sizes = vectors.config["group_sizes"]
    for number in range(len(sizes)):
        inputs = golden.step_inputs(model, sizes, rows=2, number=number)
        path = exported / f"phase_{number:02d}.onnx"
        for name, shape in export.load_shapes(path).items():
            assert all(isinstance(axis, int) and axis > 0 for axis in shape), name
        dynamic = run_onnx(exported / "decode.onnx", inputs)
        static = run_onnx(path, inputs)
        eager_logits, *_ = Decode(model)(
            *list(inputs.values())[:4],
            [inputs[f"past_key_{i}"] for i in range(model.config.depth)],
            [inputs[f"past_value_{i}"] for i in range(model.config.depth)],
        )
        for name, value in static.items():
            torch.testing.assert_close(value, dynamic[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(static["logits"], eager_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused_attention", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_every_block_has_its_own_weights_and_caches(
    tmp_path: Path, depth: int, fused_attention: bool
) -> None:
    """Three are traced, whatever the depth; what the last one leaves out is not missed."""
    model = LPD(LPDConfig(dim=64, depth=depth, heads=2, grid=3, num_classes=2, vocab_size=8))
    randomize(model, torch.Generator().manual_seed(0))
    export.write_models({"decode": export.export_decode(model, fused_attention)}, tmp_path)
    inputs = golden.step_inputs(model, [1, 3, 5], 2, 1, fused_attention)
    caches = list(inputs.values())[4:]
    graph = Decode(model, fused_attention)
    logits, keys, values = graph(*list(inputs.values())[:4], caches[:depth], caches[depth:])
    outputs = run_onnx(tmp_path / "decode.onnx", inputs)
    assert list(outputs) == ["logits", *contract.cache_names("present", depth)]
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "decode.onnx").graph.node)
    assert operators["Transpose"] == (4 * depth if fused_attention else 0)
    for actual, expected in zip(outputs.values(), (logits, *keys, *values), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("graph", ["detokenize", "tokenize"])
def test_normalizations_have_a_kernel_each(
    exported: Path, tokenizer: VQTokenizer, tmp_path: Path, graph: str
) -> None:
    """ONNX Runtime's CPU takes a GroupNormalization apart, with casts and means of its own."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # past the remark that the file is for this machine alone
    onnxruntime.InferenceSession(
        exported / f"{graph}.onnx", options, providers=["CPUExecutionProvider"]
    )
    optimized = open_graph(tmp_path / "optimized.onnx").graph
    operators = Counter(node.op_type for node in optimized.node)
    part = {"detokenize": tokenizer.decoder, "tokenize": tokenizer.encoder}[graph]
    norms = sum(isinstance(module, torch.nn.GroupNorm) for module in part.modules())
    assert operators["InstanceNormalization"] == norms > 0
    assert not {"Cast", "ReduceMean", "Sqrt"} & {*operators}


def test_detokenize_and_tokenize_run_any_batch(exported: Path, tokenizer: VQTokenizer) -> None:
    cells = export.load_shapes(exported / "detokenize.onnx")["indices"][1]
    assert isinstance(cells, int)
    indices = torch.randint(64, (3, cells), generator=torch.Generator().manual_seed(0))
    image = run_onnx(exported / "detokenize.onnx", {"indices": indices})["image"]
    torch.testing.assert_close(image, tokenizer.decode(indices), rtol=1e-4, atol=1e-4)
    again = run_onnx(exported / "tokenize.onnx", {"image": image})["indices"]
    assert again.equal(tokenizer.encode(image))
