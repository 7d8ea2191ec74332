"""ONNX graphs to TensorRT engines: one way for TensorRT and for TensorRT-RTX.

Knows how a graph is compiled by a process of its own (`compiler`), what ended it, and how to read
its log. Does not know how the graphs were made, what a bundle is, or how an engine runs. Neither
of the two libraries is imported into this process.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from lpd_export.build.compiler import NOT_COMPILED, Compilation, EngineOptions, Network
from lpd_export.build.memory import SHORTAGE_ADVICE, tells_of_shortage
from lpd_export.build.profiles import Profile, input_shapes
from lpd_export.errors import UserError
from lpd_export.files import uninterrupted
from lpd_export.formats import BACKENDS, Backend
from lpd_export.graphs import contract
from lpd_export.precision.casting import WIDEST_FUSED_HEAD
from lpd_export.progress import Progress

COMPILER = "from lpd_export.build.compiler import main; main()"


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
        convolutions, integer_convolutions: kernels of convolutions in all profiles, and those of
            them that read INT8.
        engine_layers: layers after fusion, of all profiles.
        profiles: optimization profiles, 1 for a graph of static shapes.
        size: of the serialized engine, in bytes.
        seconds: that compiling took.
        notes: what a user should be told, a sentence each.
    """

    backend: str
    backend_version: str
    attentions: int
    decomposable_attentions: int
    fused_kernels: tuple[str, ...]
    cache_updates: int
    copied_caches: tuple[str, ...]
    convolutions: int
    integer_convolutions: int
    engine_layers: int
    profiles: int
    size: int
    seconds: float
    notes: tuple[str, ...]


def compile_graph(
    path: Path,
    graph: str,
    profiles: Sequence[Profile],
    options: EngineOptions,
    engine: Path,
    log: Path,
    progress: Progress = lambda stage, step, steps: None,
) -> EngineReport:
    """Compiles an ONNX file with its weights beside it, in a process of its own.

    A decode graph in fp16 or bf16 becomes an engine with fused attention or none at all. In fp32
    there is no fused attention, and the tokenizer's one wide head has none in any type: these are
    marked decomposable.

    Args:
        path: of the ONNX file.
        graph: decode, detokenize or tokenize; the static phases are decode graphs.
        profiles: from `decode_profiles` or `tokenizer_profiles`; empty for static shapes.
        options: of the build.
        engine: the file to write; if anything fails there is none.
        log: where the builder's verbose log is written, whether the build succeeds or not.
        progress: whatever it raises ends the compilation, as does Ctrl-C.

    Raises:
        UserError: if TensorRT does not take the graph, an attention would not be fused or a cache
            not be updated in place, or the compiler crashes or is killed; the sentence names the
            log.
    """
    started = time.perf_counter()
    types, inputs = _read_inputs(path)
    in_fp32 = onnx.TensorProto.FLOAT in types
    job = Compilation(
        path=path,
        engine=engine,
        in_place=graph == "decode",
        decomposable=graph != "decode" or in_fp32,
        shapes=[input_shapes(inputs, profile) for profile in profiles],
        options=options,
    )
    try:
        network = _run_compiler(job, log, progress)
    except BaseException:
        engine.unlink(missing_ok=True)
        raise
    notes = []
    if graph == "decode" and in_fp32:
        product = BACKENDS[options.backend].product
        notes.append(
            f"{product} has no fused attention in fp32: {path.name} computes it in separate "
            "kernels, so prefer fp16 or bf16 for speed"
        )
    return EngineReport(
        backend=options.backend,
        backend_version=network.version,
        **_facts_of_log(_read_log(log), inputs),
        attentions=len(network.attentions),
        decomposable_attentions=len(network.decomposable),
        cache_updates=network.cache_updates,
        profiles=max(1, len(profiles)),
        size=engine.stat().st_size,
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )


def _read_inputs(path: Path) -> tuple[set[int], dict[str, list[int | str]]]:
    """Element types of an ONNX file's inputs, and their axes by name."""
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise UserError(f"cannot read the ONNX file {path}: {error}") from error
    types = {value.name: value.type.tensor_type for value in graph.input}
    axes = {
        name: [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]
        for name, tensor in types.items()
    }
    return {tensor.elem_type for tensor in types.values()}, axes


# ---------------------------------------------------------------------------------- the process


def _run_compiler(job: Compilation, log: Path, progress: Progress) -> Network:
    """Runs the compiler to its end; raises UserError unless it has written the engine."""
    network: Network | None = None
    with open(log, "wb") as errors, _started(errors.fileno()) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:  # it may have crashed already
            pickle.dump(job, process.stdin)
        # Of a process that is killed the last words may be cut off.
        with contextlib.suppress(EOFError, pickle.UnpicklingError):
            while True:
                event = pickle.load(process.stdout)
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Network):
                    network = event
                else:
                    progress(*event)
        code = process.wait()
    if code == 0 and network is not None:
        return network
    raise UserError(f"{_why_it_ended(code, job, network, _read_log(log))}; its log is {log}")


@contextlib.contextmanager
def _started(log: int) -> Iterator[subprocess.Popen[bytes]]:
    """The compiler's process, which does not outlive the block."""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", COMPILER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        # It imports from where this process would.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"},
    ) as process:
        try:
            yield process
        except BaseException:
            with uninterrupted():
                process.kill()
                process.wait()
            raise


def _why_it_ended(code: int, job: Compilation, network: Network | None, log: str) -> str:
    """Why there is no engine, by the compiler's exit code and its log."""
    product, name = BACKENDS[job.options.backend].product, job.path.name
    last = "; ".join(log.splitlines()[-3:])
    if tells_of_shortage("\n".join([*_errors(log), last])):
        return f"memory ran out while {product} compiled {name}: {SHORTAGE_ADVICE}"
    if code == NOT_COMPILED:
        return f"{product} cannot compile {name}: {_explain(log, job.options, network)}"
    if code == -9:
        return (
            f"the system ended {product} while it compiled {name}, as it does when memory runs "
            f"out: {SHORTAGE_ADVICE}"
        )
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return (
        f"{product} crashed while it compiled {name} ({how}): see that memory suffices, "
        f"then try another version of it or another --backend; the last it said is {last[-300:]!r}"
    )


# --------------------------------------------------------------------------------------- the log


def _read_log(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _errors(log: str) -> list[str]:
    """TensorRT's errors, or else Polygraphy's."""
    found = (re.findall(rf"^\[{letter}\] (\S.*)", log, re.MULTILINE) for letter in "E!")
    return next(filter(None, found), [])


def _facts_of_log(log: str, inputs: Mapping[str, object]) -> dict[str, Any]:
    """What the builder's verbose log says of the engine's layers; see EngineReport."""
    layer = r"^ *Name: (\S.*?), LayerType: (\w+), Inputs: (.*?), Constants: .*?, Outputs: (.*)"
    layers = re.findall(layer, log, re.MULTILINE)

    def tensors(text: str) -> set[str]:
        # In another profile than the first it is `past_key_0 [profile 1]`.
        return set(re.findall(r"\{ Name: ([^ ,]+)", text))

    copied: set[str] = set()
    for name, _, read, written in layers:
        if "mha" not in name:
            copied |= tensors(read) - tensors(written)
    caches = [name for name in inputs if contract.is_past(name)]
    # A kernel that fuses a convolution with what is beside it is a correlation too.
    convolutions = [read for _, kind, read, _ in layers if kind == "correlation"]
    return {
        "engine_layers": len(layers),
        "fused_kernels": tuple(name for name, *_ in layers if "mha" in name),
        "convolutions": len(convolutions),
        "integer_convolutions": sum("Datatype: Int8" in read for read in convolutions),
        "copied_caches": tuple(
            name for past in caches for name in (past, contract.present_of(past)) if name in copied
        ),
    }


def _explain(log: str, options: EngineOptions, network: Network | None) -> str:
    """Why the library refused a graph, in words that help."""
    if network is not None and "not supported by a dedicated kernel" in log:
        fused = next(name for name in network.attentions if name not in network.decomposable)
        why = _why_unfused(BACKENDS[options.backend], *network.attentions[fused])
        return (
            f"it has no fused attention kernel for nodes like {fused}, {why}; build in fp32, or "
            "with --backend onnxruntime"
        )
    if "within workspace limit" in log:
        return f"a kernel needs more workspace than {options.workspace} MiB"
    node = re.search(r"with name: (\S+) and operator: (\S+) \(\w+\): \w+: (.*)", log)
    if node:
        words = f" ({node[3].rstrip('. ')})" if " " in node[3] else ""  # else a bare "false"
        return f"it does not take the {node[2]} node {node[1]}{words}"
    errors = _errors(log) or ["it does not say why"]
    noise = r"^\S+ Error Code \d+: \w* ?\(?|\[[\w.]+:\d+: \S+\] ?| In \w+ at /.*"
    return re.sub(noise, "", errors[-1]).rstrip(". ")


def _why_unfused(backend: Backend, heads: int, width: int) -> str:
    """What keeps an attention from being fused, as far as it is known."""
    some = f"which have {heads} head{'s' * (heads != 1)}"
    if heads < backend.fewest_fused_heads:
        return f"{some}, where it takes {backend.fewest_fused_heads} or more"
    if width > WIDEST_FUSED_HEAD:
        return f"whose heads are {width} wide, where it takes {WIDEST_FUSED_HEAD} at most"
    return f"{some} of width {width}"
