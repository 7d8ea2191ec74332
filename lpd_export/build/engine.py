"""ONNX graphs to TensorRT engines: one way for TensorRT and for TensorRT-RTX, by Polygraphy.

Knows the shapes that each graph runs at, the builder's options and its log, and what an engine
must be to be worth having: attention as fused kernels, caches updated in place. Does not know how
the graphs were made, what a bundle is, or how an engine runs. TensorRT, TensorRT-RTX and
Polygraphy are imported when something is compiled; one process drives one of the two products.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from lpd_export.errors import UserError
from lpd_export.graphs import contract
from lpd_export.precision.casting import WIDEST_FUSED_HEAD
from lpd_export.progress import Progress
from lpd_export.schedule.phases import Phase

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""The Python module of each backend."""
PRODUCTS = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
OPTIMIZATION_LEVELS = range(6)
PROFILE_SPREAD = 8
"""A decode profile's longest phase has at most this many times the tokens of its shortest.

That is 2 groups for the published schedules. Each profile adds its own kernels to the engine, 6 MB
in fp16 and 20 MB in int8 for lpd-l, and seconds to the build: one a phase takes 107 s and 800 MB,
one for all 5 s and 680 MB. All are fused into the same layers; but one profile would tune the
prefill of 2 tokens as if it had 40.
"""


# ----------------------------------------------------------------------------------- profiles


@dataclass(frozen=True)
class AxisRange:
    """The sizes that a dynamic axis may have, and the one that the engine is tuned for."""

    minimum: int
    optimum: int
    maximum: int


Profile = Mapping[str, AxisRange]
"""An optimization profile: the range of each dynamic axis, by its name in the ONNX file."""


def decode_profiles(phases: Sequence[Phase], max_batch: int) -> tuple[Profile, ...]:
    """The profiles of decode.onnx: together every phase at every batch, guidance on or off.

    Phases of a similar number of tokens are a group, see PROFILE_SPREAD. A group has a profile
    tuned for one image with guidance, the most frequent run, and one for the largest batch. Each
    end of a profile, and what it is tuned for, is itself a possible shape: its tokens are more
    than its context.

    Args:
        phases: the phase table; any group sizes, in any order.
        max_batch: images, at most; each has one row, or two with guidance.
    """
    batches = _batches(2, max_batch)
    left = sorted(phases, key=lambda phase: (phase.tokens, phase.context))
    profiles: list[Profile] = []
    while left:
        longest = left[-1]
        group = [phase for phase in left if phase.tokens * PROFILE_SPREAD >= longest.tokens]
        left = left[: -len(group)]
        contexts = [phase.context for phase in group]
        context = AxisRange(min(contexts), longest.context, max(contexts))
        tokens = AxisRange(group[0].tokens, longest.tokens, longest.tokens)
        profiles += (
            {contract.ROWS: rows, contract.CONTEXT_TOKENS: context, contract.TOKENS: tokens}
            for rows in batches
        )
    return tuple(profiles)


def _batches(rows: int, max_batch: int) -> list[AxisRange]:
    """One image of up to `rows` rows, and all that is more, tuned for the largest batch."""
    one, most = AxisRange(1, rows, rows), max_batch * rows
    return [one] if max_batch == 1 else [one, AxisRange(rows + 1, most, most)]


def tokenizer_profiles(max_batch: int) -> tuple[Profile, ...]:
    """The profiles of detokenize.onnx and tokenize.onnx: one image, and 2 to `max_batch`."""
    return tuple({contract.BATCH: images} for images in _batches(1, max_batch))


# ------------------------------------------------------------------------------------ options


@dataclass(frozen=True)
class EngineOptions:
    """How engines are built; None and False leave it to TensorRT.

        EngineOptions("tensorrt-rtx", compute_capabilities=("8.9", "12.0"))

    Attributes:
        backend: tensorrt or tensorrt-rtx.
        workspace_mib: scratch memory that a kernel may use at most, in MiB.
        optimization_level: 0 (fast build) to 5 (longest search); TensorRT's default is 3.
        timing_cache: a file of kernel timings, used and added to (tensorrt).
        version_compatible: an engine for later TensorRT versions too (tensorrt).
        hardware_compatible: an engine for every GPU from Ampere on (tensorrt).
        compute_capabilities: the GPUs to compile for, as "8.9" (tensorrt-rtx). By default none is
            named: TensorRT-RTX then compiles for Ampere and later in one. Naming 8.6, 8.9 and 12.0
            gives the same layers; 8.9 and 12.0 alone spare transposes of caches, but leave out
            the GPUs of Ampere.
        weight_stripped: an engine without weights, to be refitted from its ONNX file.

    Raises:
        UserError: for a value out of range, an option that the backend has not, or a backend that
            is not installed if the answer depends on its version.
    """

    backend: str
    workspace_mib: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    compute_capabilities: tuple[str, ...] = ()
    weight_stripped: bool = False

    def __post_init__(self) -> None:
        if self.backend not in MODULES:
            raise UserError(f"there is no engine backend {self.backend!r}: {' or '.join(MODULES)}")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise UserError(f"the workspace must be at least 1 MiB, but it is {self.workspace_mib}")
        level = self.optimization_level
        if level is not None and level not in OPTIMIZATION_LEVELS:
            raise UserError(f"the optimization level must be from 0 to 5, but it is {level}")
        if self.backend == "tensorrt" and self.compute_capabilities:
            raise UserError(
                "tensorrt compiles for the GPU that it runs on: leave out the compute capability "
                "(hardware compatibility takes in all GPUs from Ampere on), or use tensorrt-rtx"
            )
        if self.backend == "tensorrt-rtx":
            self._check_rtx()

    def _check_rtx(self) -> None:
        if self.timing_cache is not None:
            raise UserError(
                f"tensorrt-rtx times no kernels when it builds: leave out the timing cache "
                f"{self.timing_cache}"
            )
        if self.version_compatible:
            raise UserError(
                "tensorrt-rtx engines run in the very version that built them: leave out version "
                "compatibility, and build again after an upgrade"
            )
        if self.hardware_compatible:
            raise UserError(
                "tensorrt-rtx engines run on every GPU from Ampere on as they are: leave out "
                "hardware compatibility, or name the compute capabilities to compile for"
            )
        if self.compute_capabilities:
            known = _known_capabilities(load_tensorrt(self.backend))
            for value in self.compute_capabilities:
                if value not in known:
                    raise UserError(
                        f"tensorrt-rtx compiles for compute capability {', '.join(known)}, not for "
                        f"{value!r}"
                    )
                if self.compute_capabilities.count(value) > 1:
                    raise UserError(f"compute capability {value} is given twice")


def _known_capabilities(trt: Any) -> list[str]:
    """The compute capabilities that this TensorRT-RTX compiles for: 8.9 is its member SM89."""
    names = (re.fullmatch(r"SM(\d+)(\d)", name) for name in trt.ComputeCapability.__members__)
    numbers = sorted((int(name[1]), int(name[2])) for name in names if name)
    return [f"{major}.{minor}" for major, minor in numbers]


def load_tensorrt(backend: str) -> Any:
    """The Python module of a backend, with Polygraphy set to drive it.

    Raises:
        UserError: if it is not installed, or this process already drives the other one.
    """
    try:
        module = importlib.import_module(MODULES[backend])
        config: Any = importlib.import_module("polygraphy.config")
    except ImportError as error:
        raise UserError(
            f"{backend} needs {error.name}, which is not installed: pip install {backend} "
            "polygraphy"
        ) from error
    rtx = backend == "tensorrt-rtx"
    if "polygraphy.backend.trt" in sys.modules and rtx != config.USE_TENSORRT_RTX:
        raise UserError(f"this process has built with another backend: build {backend} in its own")
    config.USE_TENSORRT_RTX = rtx
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(rtx))  # for processes that it starts
    return module


# ------------------------------------------------------------------------------------ compiling


@dataclass(frozen=True)
class EngineReport:
    """What a graph became, read off the network that TensorRT made of it and the builder's log.

    Attributes:
        attentions: attention operations of the network.
        decomposable_attentions: those of them that may fall apart into unfused kernels.
        fused_kernels: names of fused attention kernels, one an attention and profile.
        cache_updates: caches that TensorRT updates in place.
        copied_caches: caches, by the name `past_...` or `present_...`, that a layer reads whole
            without being fused attention or their update in place: it writes a copy, for
            attention to read. One that is updated in place is `present_...` throughout.
        network_layers, engine_layers: layers before and after fusion; the latter of all profiles.
        inputs, outputs: how many tensors go in and out.
        profiles: optimization profiles, 1 for a graph of static shapes.
        size: of the serialized engine, in bytes.
        seconds: that parsing and building took.
        notes: what a user should be told, a sentence each.
    """

    backend: str
    backend_version: str
    attentions: int
    decomposable_attentions: int
    fused_kernels: tuple[str, ...]
    cache_updates: int
    copied_caches: tuple[str, ...]
    network_layers: int
    engine_layers: int
    inputs: int
    outputs: int
    profiles: int
    size: int
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class CompiledEngine:
    """A serialized engine; `serialized` is TensorRT's own memory, to be written as it is."""

    serialized: memoryview
    report: EngineReport


def compile_graph(
    path: Path,
    graph: str,
    profiles: Sequence[Profile],
    options: EngineOptions,
    log_path: Path,
    progress: Progress = lambda stage, step, steps: None,
) -> CompiledEngine:
    """Compiles an ONNX file with its weights beside it.

    A decode graph in fp16 or bf16 becomes an engine with fused attention or none at all. In fp32
    there is no fused attention, and the tokenizer's one wide head has none in any type: these are
    marked decomposable.

    Args:
        path: of the ONNX file.
        graph: decode, detokenize or tokenize; the static phases are decode graphs.
        profiles: from `decode_profiles` or `tokenizer_profiles`; empty for static shapes.
        options: of the build.
        log_path: where the builder's verbose log is written, whether the build succeeds or not.
        progress: called in this thread; whatever it raises ends the build, as does Ctrl-C.

    Raises:
        UserError: if TensorRT does not take the graph, or an attention would not be fused or a
            cache not be updated in place; the sentence names the node and the log.

    Meanwhile file descriptor 2 leads to the log, since TensorRT writes there past every logger.
    """
    trt = load_tensorrt(options.backend)
    from polygraphy.backend.trt import (
        EngineBytesFromNetwork,
        NetworkFromOnnxPath,
        PostprocessNetwork,
        SetDecomposableAttentions,
    )
    from polygraphy.exception import PolygraphyException

    started = time.perf_counter()
    inputs = _read_inputs(path)
    in_fp32 = any(element == onnx.TensorProto.FLOAT for element, _ in inputs.values())
    facts: dict[str, Any] = {}
    events: SimpleQueue[tuple[str, int, int] | None] = SimpleQueue()
    cancelled = Event()

    network = NetworkFromOnnxPath(str(path), strongly_typed=True)
    if graph != "decode" or in_fp32:
        network = SetDecomposableAttentions(network)
    network = PostprocessNetwork(network, partial(_inspect, trt, graph, path, facts))
    shapes = [_shapes(inputs, profile) for profile in profiles]
    config = builder_config(trt, options, shapes, _monitor(trt, events, cancelled))
    timing_cache = options.timing_cache and str(options.timing_cache)
    engine = EngineBytesFromNetwork(network, config, save_timing_cache=timing_cache)
    try:
        with _logged_to(log_path):
            built = _run_watched(engine, events, cancelled, progress)
    except PolygraphyException as error:
        reason = _explain(_read_log(log_path), options, facts)
        product = PRODUCTS[options.backend]
        raise UserError(
            f"{product} cannot compile {path.name}: {reason}; its log is {log_path}"
        ) from error
    notes = []
    if graph == "decode" and in_fp32:
        notes.append(
            f"{PRODUCTS[options.backend]} has no fused attention in fp32: {path.name} computes it "
            "in separate kernels, so prefer fp16 or bf16 for speed"
        )
    serialized = memoryview(built)
    report = EngineReport(
        backend=options.backend,
        backend_version=trt.__version__,
        **_facts_of_log(_read_log(log_path), inputs),
        attentions=len(facts["attentions"]),
        decomposable_attentions=sum(facts["attentions"].values()),
        cache_updates=len(facts["cache_updates"]),
        network_layers=facts["layers"],
        inputs=facts["inputs"],
        outputs=facts["outputs"],
        profiles=max(1, len(profiles)),
        size=serialized.nbytes,
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )
    return CompiledEngine(serialized, report)


def builder_config(
    trt: Any, options: EngineOptions, shapes: Sequence[Mapping[str, Any]], monitor: Any = None
) -> Any:
    """Polygraphy's loader of a builder configuration.

    Args:
        trt: the backend's module.
        options: what to set.
        shapes: for each profile the least, tuned and greatest shape of each input.
        monitor: TensorRT's progress monitor, if any.
    """
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig, Profile

    profiles = [Profile() for _ in shapes] or [Profile()]
    for profile, by_input in zip(profiles, shapes, strict=False):
        for name, (minimum, optimum, maximum) in by_input.items():
            profile.add(name, minimum, optimum, maximum)
    settings: dict[str, Any] = {
        "profiles": profiles,
        "builder_optimization_level": options.optimization_level,
        "version_compatible": options.version_compatible,
        # Alone it means refitting with the same weights, which costs no fusion.
        "strip_plan": options.weight_stripped,
        "progress_monitor": monitor,
    }
    if options.workspace_mib is not None:
        workspace = {trt.MemoryPoolType.WORKSPACE: options.workspace_mib << 20}
        settings["memory_pool_limits"] = workspace
    if options.hardware_compatible:
        settings["hardware_compatibility_level"] = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.timing_cache is not None:
        settings["load_timing_cache"] = str(options.timing_cache)
    if options.backend == "tensorrt":
        return CreateConfig(**settings)
    if options.compute_capabilities:
        pairs = [value.split(".") for value in options.compute_capabilities]
        settings["compute_capabilities"] = [(int(major), int(minor)) for major, minor in pairs]

    def set_flags(builder: Any, network: Any, config: Any) -> None:
        config.clear_flag(trt.BuilderFlag.TF32)  # as Polygraphy does for TensorRT
        # An engine that allocates by itself cannot be captured into a CUDA graph.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)

    return PostprocessConfig(CreateConfigRTX(**settings), set_flags)


def _read_inputs(path: Path) -> dict[str, tuple[int, list[int | str]]]:
    """Element type and shape of an ONNX file's inputs, dynamic axes by name."""
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise UserError(f"cannot read the ONNX file {path}: {error}") from error
    types = {value.name: value.type.tensor_type for value in graph.input}
    return {
        name: (t.elem_type, [axis.dim_param or axis.dim_value for axis in t.shape.dim])
        for name, t in types.items()
    }


def _shapes(
    inputs: Mapping[str, tuple[int, list[int | str]]], profile: Profile
) -> dict[str, list[tuple[int, ...]]]:
    """The least, tuned and greatest shape of each input in a profile."""

    def shape(axes: list[int | str], end: str) -> tuple[int, ...]:
        return tuple(getattr(profile[a], end) if isinstance(a, str) else a for a in axes)

    ends = ("minimum", "optimum", "maximum")
    return {name: [shape(axes, end) for end in ends] for name, (_, axes) in inputs.items()}


def _inspect(trt: Any, graph: str, path: Path, facts: dict[str, Any], network: Any) -> None:
    """Notes what TensorRT made of a graph, and refuses a decode graph that would be slow."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    attentions, heads, updates = {}, {}, {}
    for layer in layers:
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            attention = layer.attention
            attentions[attention.name] = attention.decomposable
            query, mask = attention.get_input(0), attention.mask
            heads[attention.name] = query.shape[1], query.shape[3]
            if mask is not None and mask.dtype != query.dtype:
                raise UserError(
                    f"the mask of {attention.name} in {path.name} is {mask.dtype.name}, its "
                    f"queries are {query.dtype.name}: fused attention adds a mask of their own "
                    "type; export it again"
                )
        if layer.type == trt.LayerType.KV_CACHE_UPDATE:
            past, present = layer.get_input(0), layer.get_output(0)
            if past.is_network_input and present.is_network_output:
                updates[past.name] = present.name
    outputs = [network.get_output(i).name for i in range(network.num_outputs)]
    facts.update(
        layers=len(layers),
        inputs=network.num_inputs,
        outputs=network.num_outputs,
        attentions=attentions,
        heads=heads,
        cache_updates=updates,
    )
    if graph != "decode":
        return
    for name in outputs:
        if contract.is_present(name) and name not in updates.values():
            raise UserError(
                f"{path.name} does not update {name} in place: it must be the output of a "
                "TensorScatter whose cache is an input of the graph; export it again"
            )
    # A cache of keys and one of values feed each attention.
    if len(attentions) * 2 != len(updates):
        raise UserError(
            f"{path.name} has {len(updates)} caches, but {len(attentions)} Attention nodes, where "
            f"{len(updates) // 2} belong: the others would not be fused; export it again"
        )


def _monitor(trt: Any, events: SimpleQueue[tuple[str, int, int] | None], cancelled: Event) -> Any:
    """TensorRT's progress monitor, which tells of each step and stops the build on request."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            events.put((phase_name, 0, num_steps))

        def phase_finish(self, phase_name: str) -> None:
            events.put((phase_name, self.steps[phase_name], self.steps[phase_name]))

        def step_complete(self, phase_name: str, step: int) -> bool:
            events.put((phase_name, step + 1, self.steps[phase_name]))
            return not cancelled.is_set()

    return Monitor()


def _run_watched(
    engine: Callable[[], Any],
    events: SimpleQueue[tuple[str, int, int] | None],
    cancelled: Event,
    progress: Progress,
) -> Any:
    """Builds in a thread of its own, so that this one is free to report and to be interrupted.

    An exception in a callback from TensorRT would end the process.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        built = pool.submit(engine)
        built.add_done_callback(lambda _: events.put(None))
        try:
            while (event := events.get()) is not None:
                progress(*event)
        except BaseException:
            cancelled.set()
            raise
    return built.result()


# --------------------------------------------------------------------------------------- the log


@contextlib.contextmanager
def _logged_to(path: Path) -> Iterator[None]:
    """Writes all that TensorRT and Polygraphy say to a file, and none of it on the terminal."""
    from polygraphy.logger import G_LOGGER

    path.write_bytes(b"")
    # Appending, as do the writes past the logger: each goes to the end, none over another.
    logger, handler = logging.getLogger("Polygraphy"), logging.FileHandler(path, "a", "utf-8")
    before = G_LOGGER.use_python_logging_system, G_LOGGER.colors, logger.propagate
    G_LOGGER.use_python_logging_system, G_LOGGER.colors, logger.propagate = True, False, False
    G_LOGGER.once_logged.clear()  # what it said of another graph it should say of this one
    logger.setLevel(1)
    logger.addHandler(handler)
    try:
        with G_LOGGER.verbosity(G_LOGGER.EXTRA_VERBOSE), _standard_error_to(path):
            yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        G_LOGGER.use_python_logging_system, G_LOGGER.colors, logger.propagate = before


@contextlib.contextmanager
def _standard_error_to(path: Path) -> Iterator[None]:
    """Leads file descriptor 2 to the end of a file: Myelin prints there past every logger."""
    if sys.stderr is not None:
        sys.stderr.flush()  # what was said before belongs where it was said
    try:
        before = os.dup(2)
    except OSError:  # it is closed, and nobody would see what is printed
        yield
        return
    try:
        with open(path, "ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _read_log(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _facts_of_log(log: str, inputs: Iterable[str]) -> dict[str, Any]:
    """What the builder's verbose log says of the engine's layers; see EngineReport."""
    layer = r"^ *Name: (\S.*?), LayerType: \w+, Inputs: (.*?), Constants: .*?, Outputs: (.*)"
    layers = re.findall(layer, log, re.MULTILINE)

    def tensors(text: str) -> set[str]:
        # In another profile than the first it is `past_key_0 [profile 1]`.
        return set(re.findall(r"\{ Name: ([^ ,]+)", text))

    copied: set[str] = set()
    for name, read, written in layers:
        if "mha" not in name:
            copied |= tensors(read) - tensors(written)
    caches = [name for name in inputs if contract.is_past(name)]
    return {
        "engine_layers": len(layers),
        "fused_kernels": tuple(name for name, *_ in layers if "mha" in name),
        "copied_caches": tuple(
            name for past in caches for name in (past, contract.present_of(past)) if name in copied
        ),
    }


def _explain(log: str, options: EngineOptions, facts: Mapping[str, Any]) -> str:
    """Why a build failed, in words that help."""
    if "not supported by a dedicated kernel" in log:
        fused = [name for name, decomposable in facts["attentions"].items() if not decomposable]
        heads, width = facts["heads"][fused[0]]
        return (
            f"it has no fused attention kernel for nodes like {fused[0]}, "
            f"{_why_unfused(options.backend, heads, width)}; build in fp32, or with --backend "
            "onnxruntime"
        )
    if "within workspace limit" in log:
        return f"a kernel needs more workspace than {options.workspace_mib} MiB"
    if options.weight_stripped and "CUDA_SUCCESS" in log:
        return "a weight-stripped engine can be built on a machine with a GPU alone"
    node = re.search(r"with name: (\S+) and operator: (\S+) \(\w+\): \w+: (.*)", log)
    if node:
        words = f" ({node[3].rstrip('. ')})" if " " in node[3] else ""  # else a bare "false"
        return f"it does not take the {node[2]} node {node[1]}{words}"
    errors = re.findall(r"^\[E\] (.*)", log, re.M) or ["it does not say why"]
    noise = r"^\S+ Error Code \d+: \w* ?\(?|\[[\w.]+:\d+: \S+\] ?| In \w+ at /.*"
    return re.sub(noise, "", errors[-1]).rstrip(". ")


def _why_unfused(backend: str, heads: int, width: int) -> str:
    """What keeps an attention from being fused, as far as it is known."""
    if heads == 1 and backend == "tensorrt-rtx":
        return "which have 1 head, where it takes 2 or more"
    if width > WIDEST_FUSED_HEAD:
        return f"whose heads are {width} wide, where it takes {WIDEST_FUSED_HEAD} at most"
    return f"which have {heads} head{'s' * (heads != 1)} of width {width}"
