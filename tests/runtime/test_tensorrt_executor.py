"""The TensorRT executor on a machine without a GPU: its calls, its choices and its errors.

The executor is thin over an API that runs on a GPU alone, so each call that its source makes is
checked against the installed `tensorrt_rtx`, which imports anywhere. What runs without a GPU
(the logger, refusing a damaged engine, choosing a profile) runs here; the rest is in test_gpu.py.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpd_export import UserError
from lpd_export.formats import BACKENDS, ENGINE_BACKENDS
from lpd_export.runtime import tensorrt_engine, tensorrt_executor
from lpd_export.runtime.tensorrt_engine import (
    ShapeRange,
    choose_profile,
    deserialize,
    explain,
    find_gpu,
    import_tensorrt,
    make_logger,
    open_runtime,
)
from lpd_export.runtime.tensorrt_executor import TORCH_TYPES, TensorRTExecutor


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx")


# ------------------------------------------------------------------- the calls against the API

RECEIVERS = {
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "config": "IRuntimeConfig",
    "cache": "IRuntimeCache",
}
"""What the executor calls its TensorRT objects, with or without a leading underscore."""


class Signature(NamedTuple):
    """One overload of a pybind11 method, as its docstring tells it."""

    parameters: list[str]
    required: set[str]
    returns: str

    def accepts(self, positional: int, keywords: set[str]) -> bool:
        given = set(self.parameters[:positional])
        return (
            positional <= len(self.parameters)
            and not given & keywords
            and keywords <= set(self.parameters)
            and self.required <= given | keywords
        )


def signatures(method: Any) -> list[Signature]:
    """The overloads of a pybind11 method or constructor, without self."""
    found = []
    for line in (method.__doc__ or "").splitlines():
        match = re.fullmatch(rf"(?:\d+\. )?{method.__name__}\((self: .*)\) -> (.*)", line.strip())
        if match:
            parameters = split_at_commas(match[1])[1:]
            names = [parameter.split(":")[0].strip() for parameter in parameters]
            optional = {n for n, p in zip(names, parameters, strict=True) if " = " in p}
            found.append(Signature(names, set(names) - optional, re.split(r"[.:]", match[2])[-1]))
    assert found, f"{method.__name__} has no signature in its docstring"
    return found


def split_at_commas(text: str) -> list[str]:
    """Splits parameters, leaving commas inside brackets alone."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[(<{") - (character in "])>}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


class ApiCheck(ast.NodeVisitor):
    """Collects what a source does wrong with TensorRT."""

    def __init__(self, trt: Any) -> None:
        self.trt = trt
        self.mistakes: list[str] = []

    def resolve(self, node: ast.expr) -> Any:
        """The module, class, member or enum value that an expression is, or None."""
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if name == "trt":
                return self.trt
            receiver = RECEIVERS.get(name.lstrip("_"))
            if receiver is not None:
                return getattr(self.trt, receiver)
        if isinstance(node, ast.Attribute):
            owner = self.resolve(node.value)
            return None if owner is None else inspect.getattr_static(owner, node.attr, None)
        if isinstance(node, ast.Call):
            return self.returned(node)
        return None

    def returned(self, node: ast.Call) -> Any:
        """The class of TensorRT that a call gives, or None."""
        called = self.resolve(node.func)
        if inspect.isclass(called):
            return called
        return getattr(self.trt, signatures(called)[0].returns, None) if callable(called) else None

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.resolve(node.value)
        if inspect.isclass(owner) or inspect.ismodule(owner):
            name = f"{owner.__name__}.{node.attr}"
            member = inspect.getattr_static(owner, node.attr, None)
            if member is None:
                self.mistakes.append(f"there is no {name}")
            elif isinstance(node.ctx, ast.Store) and getattr(member, "fset", None) is None:
                self.mistakes.append(f"{name} cannot be assigned")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = self.resolve(node.func)
        if isinstance(node.func, ast.Name) and node.func.id == "hasattr":
            owner, name = self.resolve(node.args[0]), ast.literal_eval(node.args[1])
            if owner is not None and not hasattr(owner, name):
                self.mistakes.append(f"there is no {owner.__name__}.{name} to ask for")
        elif called is not None:
            # A class is called as its constructor; a base's constructor is called with self.
            method = called.__init__ if inspect.isclass(called) else called
            count = len(node.args) - (ast.unparse(node.func).endswith(".__init__"))
            keywords = {keyword.arg or "**" for keyword in node.keywords}
            if not callable(method):
                self.mistakes.append(f"{ast.unparse(node.func)} is no method")
            elif not any(s.accepts(count, keywords) for s in signatures(method)):
                self.mistakes.append(
                    f"{ast.unparse(node)} is not {(method.__doc__ or '').strip()[:200]}"
                )
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        made = self.returned(node.value) if isinstance(node.value, ast.Call) else None
        if made is not None and made.__name__ in RECEIVERS.values():
            for target in node.targets:
                if self.resolve(target) is not made:
                    self.mistakes.append(
                        f"{ast.unparse(target)} is a {made.__name__}, which is called "
                        f"{next(name for name, cls in RECEIVERS.items() if cls == made.__name__)}"
                    )
        self.generic_visit(node)


def check_api(source: str) -> ApiCheck:
    check = ApiCheck(pytest.importorskip("tensorrt_rtx"))
    check.visit(ast.parse(source))
    return check


SOURCES = [inspect.getsource(module) for module in (tensorrt_executor, tensorrt_engine)]


@pytest.mark.parametrize("source", SOURCES, ids=["executor", "engine"])
def test_every_call_is_in_the_api(source: str) -> None:
    assert check_api(source).mistakes == []


@pytest.mark.parametrize(
    "source",
    [
        "self._context.execute_async_v3()",
        "context.execute_async_v3(handle=stream)",
        "engine.num_tensors",
        "engine.num_io_tensors()",
        "engine.num_io_tensors = 3",
        "engine.get_tensor_dtype(name).nam",
        "engine.create_execution_context(strategy=a, runtime_config=b)",
        "config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE",
        "trt.Runtime()",
        "hasattr(context, 'is_capturable')",
        "thing = engine.create_runtime_config()",
        "context = engine.create_runtime_config()",
        "engine.create_runtime_config().cuda_graph",
    ],
)
def test_a_wrong_call_is_noticed(source: str) -> None:
    assert check_api(source).mistakes


def test_each_call_of_the_executor_would_be_noticed_if_it_were_wrong(trt: Any) -> None:
    tree = ast.parse("\n".join(SOURCES).replace("from __future__ import annotations", ""))
    check = ApiCheck(trt)
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and callable(check.resolve(node.func))
    ]
    assert len(calls) > 20
    for call in calls:
        assert isinstance(call.func, ast.Attribute)
        call.args.append(ast.Constant("one too many"))
        assert check_api(ast.unparse(tree)).mistakes, ast.unparse(call)
        call.args.pop()
        name, call.func.attr = call.func.attr, f"{call.func.attr}_mistyped"
        assert check_api(ast.unparse(tree)).mistakes, ast.unparse(call)
        call.func.attr = name


def test_right_calls_are_no_mistakes() -> None:
    source = """
context = engine.create_execution_context(runtime_config=config)
context = engine.create_execution_context()
context.set_optimization_profile_async(0, stream)
context.set_optimization_profile_async(profile_index=0, stream_handle=stream)
"""
    assert check_api(source).mistakes == []


def test_tensor_types_are_those_of_tensorrt(trt: Any) -> None:
    for name, torch_type in TORCH_TYPES.items():
        assert trt.DataType.__members__[name].itemsize == torch_type.itemsize


# ------------------------------------------------------------------------------------ profiles

SIZES = st.integers(1, 6)


@st.composite
def profiles_and_shapes(
    draw: st.DrawFn,
) -> tuple[list[dict[str, ShapeRange]], dict[str, list[int]]]:
    ranks = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    shapes = {f"x{i}": [draw(SIZES) for _ in range(rank)] for i, rank in enumerate(ranks)}
    profiles = []
    for _ in range(draw(st.integers(1, 5))):
        ends = {n: [sorted(draw(SIZES) for _ in range(3)) for _ in s] for n, s in shapes.items()}
        profiles.append({n: ShapeRange(*zip(*axes, strict=True)) for n, axes in ends.items()})
    return profiles, shapes


@given(profiles_and_shapes())
def test_a_chosen_profile_takes_the_shapes_and_is_the_nearest(
    case: tuple[list[dict[str, ShapeRange]], dict[str, list[int]]],
) -> None:
    profiles, shapes = case

    def takes(profile: dict[str, ShapeRange]) -> bool:
        return all(
            least <= size <= most
            for name, shape in shapes.items()
            for least, size, most in zip(
                profile[name].least, shape, profile[name].most, strict=True
            )
        )

    def distance(profile: dict[str, ShapeRange]) -> int:
        return sum(profile[name].distance(shape) for name, shape in shapes.items())

    if not any(map(takes, profiles)):
        with pytest.raises(UserError, match=r"^the decode engine takes"):
            choose_profile("decode", profiles, shapes)
        return
    chosen = profiles[choose_profile("decode", profiles, shapes)]
    assert takes(chosen)
    assert distance(chosen) == min(distance(profile) for profile in profiles if takes(profile))


def test_ranges_take_the_dimensions_of_tensorrt(trt: Any) -> None:
    """An engine gives `Dims`, not tuples."""
    ranges = {"x": ShapeRange(*map(trt.Dims, ((1, 2), (2, 2), (4, 2))))}
    assert choose_profile("decode", [ranges], {"x": (3, 2)}) == 0
    with pytest.raises(UserError, match=r"takes 4 rows at most .*, not 5"):
        choose_profile("decode", [ranges], {"x": (5, 2)})
    with pytest.raises(UserError, match=r"takes x of \[1, 2\] to \[4, 2\], not \[3, 3\]"):
        choose_profile("decode", [ranges], {"x": (3, 3)})


# -------------------------------------------------------------------------------------- errors


@pytest.fixture(scope="module")
def engine_bytes(trt: Any) -> bytes:
    """A real engine: y = x + x."""
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    x = network.add_input("x", trt.float16, (4, 4))
    y = network.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0)
    network.mark_output(y)
    return bytes(builder.build_serialized_network(network, builder.create_builder_config()))


@pytest.fixture
def no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")


@pytest.mark.parametrize("length", [0, 40, 100, -100])
def test_a_truncated_engine_is_told(
    trt: Any, engine_bytes: bytes, length: int, tmp_path: Path
) -> None:
    logger = make_logger(trt)
    path = tmp_path / "decode.engine"
    path.write_bytes(engine_bytes[:length])
    message = r"decode\.engine does not load with tensorrt_rtx .* on this GPU: .*truncated.*build"
    with pytest.raises(UserError, match=message):
        deserialize(trt, open_runtime(trt, logger), logger, path, "this GPU")


def test_kernels_are_kept_where_there_is_no_folder_yet(tmp_path: Path) -> None:
    """Compiling them needs a GPU; writing what was compiled does not."""
    path = tmp_path / "cache" / "lpd-export" / "kernels.bin"
    tensorrt_executor.save_kernels(path, b"kernels")
    assert path.read_bytes() == b"kernels"
    assert list(path.parent.iterdir()) == [path]


def failed_capture(broke: Exception) -> BaseException:
    """As torch tells it: ending the capture fails too, and hides what broke it."""
    try:
        try:
            raise broke
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    except RuntimeError as error:
        return error


def test_memory_that_runs_out_in_a_capture_is_an_error() -> None:
    """Without a GPU there is no capture: the errors are torch's own classes, raised as it does."""
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory")
    for error in (out_of_memory, failed_capture(out_of_memory)):
        with pytest.raises(UserError, match="too little free memory to record"):
            tensorrt_executor.cause_of_failed_capture(error)
    other = ValueError("an operation that no capture allows")
    assert tensorrt_executor.cause_of_failed_capture(failed_capture(other)) is other


def test_a_file_that_is_no_engine_is_told(trt: Any, tmp_path: Path) -> None:
    logger = make_logger(trt)
    path = tmp_path / "decode.engine"
    path.write_bytes(b"not an engine" * 100)
    with pytest.raises(UserError, match=r"truncated or not an engine; build the bundle again"):
        deserialize(trt, open_runtime(trt, logger), logger, path, "this GPU")
    with pytest.raises(UserError, match=r"cannot read .*missing.engine: No such file"):
        deserialize(trt, open_runtime(trt, logger), logger, tmp_path / "missing.engine", "")


def test_a_driver_that_does_not_run_is_told(
    trt: Any, engine_bytes: bytes, tmp_path: Path, no_gpu: None
) -> None:
    logger = make_logger(trt)
    path = tmp_path / "decode.engine"
    path.write_bytes(engine_bytes)
    with pytest.raises(UserError, match="driver is too old or does not run; update it"):
        deserialize(trt, open_runtime(trt, logger), logger, path, "this GPU")


@pytest.mark.parametrize(
    ("reason", "meaning"),
    [
        ("VERSION_MISMATCH", "another version"),
        ("UNSUPPORTED_CC", "another GPU architecture"),
        ("OLD_CUDA_DRIVER", "driver is too old"),
        ("OLD_CUDA_RUNTIME", "driver is too old"),
        ("CUDA_ERROR", "driver is too old or does not run"),
        ("INSUFFICIENT_GPU_MEMORY", "too little free memory"),
        ("MALFORMED_ENGINE", "truncated"),
        (
            "The engine plan file is generated on an incompatible device, expecting compute 9.0 "
            "got compute 8.9, please rebuild.",
            "another GPU architecture",
        ),
        (
            "The engine plan file is not compatible with this version of TensorRT, expecting "
            "library version 8.0.0 got 8.0.1, please rebuild.",
            "another version",
        ),
        ("CUDA initialization failure with error: 35", "driver is too old"),
        ("Error Code 2: OutOfMemory (Requested size was 123 bytes.)", "too little free memory"),
        ("[defaultAllocator.cpp] Cuda Driver (out of memory)", "too little free memory"),
        ("Error Code 9: something new\nand more", "Error Code 9: something new; build"),
        ("", "gives no reason"),
    ],
)
def test_tensorrts_words_are_explained(reason: str, meaning: str) -> None:
    assert meaning in explain(reason)
    assert "\n" not in explain(reason)


def test_every_diagnosis_is_explained(trt: Any) -> None:
    for name in trt.EngineInvalidityDiagnostics.__members__:
        assert name not in explain(name)


def test_the_logger_keeps_errors_alone(trt: Any) -> None:
    logger = make_logger(trt)
    logger.log(trt.ILogger.WARNING, "a warning")
    logger.log(trt.ILogger.ERROR, "first")
    logger.log(trt.ILogger.INTERNAL_ERROR, "second")
    assert logger.take() == "first\nsecond"
    assert logger.take() == ""


def test_a_missing_module_is_told() -> None:
    for backend in ENGINE_BACKENDS:
        module = BACKENDS[backend].module
        try:
            importlib.import_module(module)
        except ImportError:
            with pytest.raises(UserError, match=f"pip install {backend}`$"):
                import_tensorrt(backend)
        else:
            assert import_tensorrt(backend).__name__ == module


def test_a_machine_without_a_gpu_is_told(trt: Any, no_gpu: None) -> None:
    with pytest.raises(UserError, match=r"needs an NVIDIA GPU, but torch cannot use cuda:1 here"):
        find_gpu("cuda:1")
    with pytest.raises(UserError, match=r"nvidia-smi .* or use a bundle built with --backend"):
        TensorRTExecutor({}, backend="tensorrt-rtx")
