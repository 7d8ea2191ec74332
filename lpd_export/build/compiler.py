"""The process that compiles one graph: TensorRT or TensorRT-RTX through Polygraphy.

Knows the builder, its options, and what an engine must be to be worth having: attention as fused
kernels, caches updated in place. It is a process of its own for each graph, so that a crash, the
end of memory and whatever the library prints are its own. A pickled `Compilation` comes in by
standard input; progress and the result, pickled, go out by standard output, and standard error is
the log. Who starts it and what is made of its words is in `engine`.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpd_export.build.profiles import ShapeEnds
from lpd_export.errors import UserError
from lpd_export.formats import BACKENDS
from lpd_export.graphs import contract

NOT_COMPILED = 3
"""The exit code when the library refuses the graph, for reasons that are in its log."""


@dataclass(frozen=True)
class EngineOptions:
    """How engines are built; None and False leave it to the library.

        EngineOptions("tensorrt-rtx", compute_capability=("8.9", "12.0"))

    Attributes:
        backend: tensorrt or tensorrt-rtx.
        workspace: scratch memory that a kernel may use at most, in MiB.
        optimization_level: 0 (fast build) to 5 (longest search); TensorRT's default is 3.
        timing_cache: a file of kernel timings, used and added to (tensorrt).
        hardware_compatible: an engine for every GPU from Ampere on (tensorrt).
        compute_capability: the GPUs to compile for, as "8.9" (tensorrt-rtx). By default none is
            named: TensorRT-RTX then compiles for Ampere and later in one. Naming 8.6, 8.9 and 12.0
            gives the same layers; 8.9 and 12.0 alone avoid transposes of caches, but leave out
            the GPUs of Ampere.
    """

    backend: str
    workspace: int | None = None
    optimization_level: int | None = None
    timing_cache: str | None = None
    hardware_compatible: bool = False
    compute_capability: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compilation:
    """What to compile: an ONNX file with its weights beside it, to an engine file.

    Attributes:
        in_place: whether it must update its caches in place, and attend to nothing else.
        decomposable: whether its attention may fall apart into unfused kernels.
        shapes: by profile those of each input; empty for a graph of static shapes.
    """

    path: Path
    engine: Path
    in_place: bool
    decomposable: bool
    shapes: Sequence[ShapeEnds]
    options: EngineOptions


@dataclass(frozen=True)
class Network:
    """What the library made of a graph before it is built.

    Attributes:
        version: of the library.
        attentions: by name, the heads and their width.
        decomposable: the names of those that may fall apart.
        cache_updates: caches that are updated in place.
    """

    version: str
    attentions: dict[str, tuple[int, int]]
    decomposable: tuple[str, ...]
    cache_updates: int


def main() -> None:
    """Compiles what standard input says; the exit code is 0 if the engine is written."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered by whoever started this
    events = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed goes to the log
    sys.stdout = sys.stderr

    def tell(event: object) -> None:
        try:
            events.write(pickle.dumps(event))
            events.flush()
        except OSError:  # nobody is left to compile for
            os._exit(1)

    job: Compilation = pickle.load(sys.stdin.buffer)
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(BACKENDS[job.options.backend].portable))
    from polygraphy.exception import PolygraphyException

    try:
        compile_engine(importlib.import_module(BACKENDS[job.options.backend].module), job, tell)
    except PolygraphyException:
        sys.exit(NOT_COMPILED)
    except (UserError, OSError, MemoryError) as error:
        tell(error)


def compile_engine(trt: Any, job: Compilation, tell: Callable[[object], None]) -> None:
    """Writes the engine, and tells of (stage, steps done, all steps) and of the network."""
    from polygraphy.backend.trt import (
        EngineBytesFromNetwork,
        NetworkFromOnnxPath,
        PostprocessNetwork,
        SetDecomposableAttentions,
    )
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity, G_LOGGER.colors = G_LOGGER.EXTRA_VERBOSE, False
    network = NetworkFromOnnxPath(str(job.path), strongly_typed=True)
    if job.decomposable:
        network = SetDecomposableAttentions(network)

    def inspect(network: Any) -> None:
        tell(inspect_network(trt, job, network))

    config = builder_config(trt, job.options, job.shapes, monitor(trt, tell))
    build = EngineBytesFromNetwork(
        PostprocessNetwork(network, inspect), config, save_timing_cache=job.options.timing_cache
    )
    job.engine.write_bytes(memoryview(build()))


def builder_config(
    trt: Any, options: EngineOptions, shapes: Sequence[ShapeEnds], monitor: Any = None
) -> Any:
    """Polygraphy's loader of a builder configuration, with TensorRT's progress monitor, if any."""
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig, Profile

    profiles = [Profile() for _ in shapes] or [Profile()]
    for profile, by_input in zip(profiles, shapes, strict=False):
        for name, ends in by_input.items():
            profile.add(name, *ends)
    settings: dict[str, Any] = {
        "profiles": profiles,
        "builder_optimization_level": options.optimization_level,
        "progress_monitor": monitor,
        "load_timing_cache": options.timing_cache,
    }
    if options.workspace is not None:
        workspace = {trt.MemoryPoolType.WORKSPACE: options.workspace << 20}
        settings["memory_pool_limits"] = workspace
    if options.hardware_compatible:
        settings["hardware_compatibility_level"] = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if not BACKENDS[options.backend].portable:
        return CreateConfig(**settings)
    if options.compute_capability:
        pairs = [value.split(".") for value in options.compute_capability]
        settings["compute_capabilities"] = [(int(major), int(minor)) for major, minor in pairs]

    def set_flags(builder: Any, network: Any, config: Any) -> None:
        config.clear_flag(trt.BuilderFlag.TF32)  # as Polygraphy does for TensorRT
        # An engine that allocates by itself cannot be captured into a CUDA graph.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)

    return PostprocessConfig(CreateConfigRTX(**settings), set_flags)


def inspect_network(trt: Any, job: Compilation, network: Any) -> Network:
    """What the library made of a graph; raises UserError for a decode graph that would be slow."""
    heads, decomposable, updated = {}, [], set()
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            attention = layer.attention
            query, mask = attention.get_input(0), attention.mask
            heads[attention.name] = query.shape[1], query.shape[3]
            decomposable += [attention.name] * attention.decomposable
            if mask is not None and mask.dtype != query.dtype:
                raise UserError(
                    f"the mask of {attention.name} in {job.path.name} is {mask.dtype.name}, its "
                    f"queries are {query.dtype.name}: fused attention adds a mask of their own "
                    "type; export it again"
                )
        if layer.type == trt.LayerType.KV_CACHE_UPDATE:
            past, present = layer.get_input(0), layer.get_output(0)
            if past.is_network_input and present.is_network_output:
                updated.add(present.name)
    outputs = [network.get_output(i).name for i in range(network.num_outputs)]
    for name in filter(contract.is_present, outputs if job.in_place else ()):
        if name not in updated:
            raise UserError(
                f"{job.path.name} does not update {name} in place: it must be the output of a "
                "TensorScatter whose cache is an input of the graph; export it again"
            )
    # A cache of keys and one of values feed each attention.
    if job.in_place and len(heads) * 2 != len(updated):
        raise UserError(
            f"{job.path.name} has {len(updated)} caches, but {len(heads)} Attention nodes, where "
            f"{len(updated) // 2} belong: the others would not be fused; export it again"
        )
    return Network(
        version=trt.__version__,
        attentions=heads,
        decomposable=tuple(decomposable),
        cache_updates=len(updated),
    )


def monitor(trt: Any, tell: Callable[[object], None]) -> Any:
    """TensorRT's progress monitor, which tells of each step."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            tell((phase_name, 0, num_steps))

        def phase_finish(self, phase_name: str) -> None:
            tell((phase_name, self.steps[phase_name], self.steps[phase_name]))

        def step_complete(self, phase_name: str, step: int) -> bool:
            tell((phase_name, step + 1, self.steps[phase_name]))
            return True  # to stop it, its process is killed

    return Monitor()
