"""What can be built and run on a machine, and what to do about the rest.

Knows what each precision needs in each backend, as one table, and how to say which of it is there.
Does not know how a bundle is built or run, nor how a machine is looked at: that is in `machine`.
"""

from __future__ import annotations

import importlib.metadata
import platform
import textwrap
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lpd_export.formats import (
    BACKENDS,
    CPU,
    CUDA,
    ONNXRUNTIME,
    PRECISIONS,
    RTX,
    TENSORRT,
    TENSORRT_RTX,
    TRT,
    reaches,
)
from lpd_export.formats import Target as Place
from lpd_export.machine.facts import (
    PACKAGES,
    Facts,
    Hub,
    Package,
    look,
    reach_hub,
    read_free_disk,
    read_memory,
)

TORCH_CUDA = "pip install --force-reinstall torch, or see https://pytorch.org/get-started"
WIDTH = 98


# ---------------------------------------------------------------------------------- the table


class Need(NamedTuple):
    """A thing that building or running needs."""

    subjects: tuple[str, ...]
    """What to look at to know whether it is there; see `machine.SUBJECTS`."""
    missing: Callable[[Facts, str], str | None]
    """What is missing and what to do about it, given the least compute capability."""


class Target(NamedTuple):
    """A backend on a device, and what it needs; which precisions it takes is in `formats`."""

    place: Place
    build: tuple[Need, ...]
    run: tuple[Need, ...]

    @property
    def title(self) -> str:
        """As the command line calls it, with the device where it leaves a choice."""
        backend, device = self.place
        several = sum(target.place[0] == backend for target in TARGETS) > 1
        return f"{backend}, {device.upper()}" if several else backend


def _package(module: str) -> Need:
    def missing(facts: Facts, least: str) -> str | None:
        package, name = facts.packages.get(module, Package()), PACKAGES[module][0]
        if package.problem:
            again = f"pip install --force-reinstall {name}"
            return f"{module} cannot be imported ({package.problem}): {again}"
        return None if package.version else f"{module} is not installed: pip install {name}"

    return Need((module,), missing)


def _no_gpu(facts: Facts, least: str) -> str | None:
    if not facts.gpus:
        return facts.gpu_problem or "no NVIDIA GPU was found: use a machine that has one"
    gpu = facts.gpus[0]
    if gpu.capability and not reaches(gpu.capability, least):
        return (
            f"the {gpu.name} has compute capability {gpu.capability}, and {least} is needed: use "
            "another precision or a newer GPU"
        )
    return None


def _no_gpu_for_torch(facts: Facts, least: str) -> str | None:
    missing = _no_gpu(facts, least)
    if missing:
        return missing
    torch = facts.packages.get("torch", Package())
    if torch.problem or not torch.version:
        return None  # which is said already
    if facts.torch_cuda is None:
        return f"torch {torch.version} is a CPU build, which cannot use the GPU: {TORCH_CUDA}"
    if facts.torch_gpu_problem:
        return (
            f"torch cannot use the GPU ({facts.torch_gpu_problem}): see that nvidia-smi works and "
            "that the driver is new enough for torch's CUDA"
        )
    return None


def _no_rtx_gpu(facts: Facts, least: str) -> str | None:
    if not facts.gpus or not facts.rtx_capabilities:
        return None
    gpu, known = facts.gpus[0], facts.rtx_capabilities
    if gpu.capability is None or gpu.capability in known:
        return None
    return (
        f"TensorRT-RTX compiles for compute capability {', '.join(known)}, and the {gpu.name} "
        f"has {gpu.capability}: use tensorrt, or see whether a newer tensorrt-rtx takes it"
    )


def _no_cuda_provider(facts: Facts, least: str) -> str | None:
    if not facts.gpus or not facts.packages.get(ONNXRUNTIME.module, Package()).version:
        return None  # which is said already
    if "CUDAExecutionProvider" not in facts.providers:
        return (
            "this ONNX Runtime is built without CUDA: pip uninstall onnxruntime, then pip install "
            "--force-reinstall onnxruntime-gpu"
        )
    if facts.cuda_provider_problem:
        return (
            f"ONNX Runtime's CUDA provider does not load ({facts.cuda_provider_problem}): "
            "pip install 'onnxruntime-gpu[cuda,cudnn]', or a torch built for the same CUDA"
        )
    return None


GPU = Need(("torch", "nvidia"), _no_gpu)
GPU_FOR_TORCH = Need(("torch", "nvidia"), _no_gpu_for_torch)
RTX_GPU = Need(("torch", "nvidia", "tensorrt_rtx"), _no_rtx_gpu)
CUDA_PROVIDER = Need(("torch", "nvidia", "onnxruntime", "cuda_provider"), _no_cuda_provider)

TARGETS = (
    Target(
        CPU,
        build=(_package(ONNXRUNTIME.module),),
        run=(_package("torch"), _package(ONNXRUNTIME.module)),
    ),
    Target(
        CUDA,
        build=(_package(ONNXRUNTIME.module),),
        run=(_package("torch"), _package(ONNXRUNTIME.module), GPU_FOR_TORCH, CUDA_PROVIDER),
    ),
    Target(
        TRT,
        build=(_package(TENSORRT.module), _package("polygraphy"), GPU),
        run=(_package("torch"), _package(TENSORRT.module), GPU_FOR_TORCH),
    ),
    Target(
        RTX,
        build=(_package(TENSORRT_RTX.module), _package("polygraphy")),  # no GPU takes part
        run=(_package("torch"), _package(TENSORRT_RTX.module), GPU_FOR_TORCH, RTX_GPU),
    ),
)
"""What each needs."""


@dataclass(frozen=True)
class Answer:
    """Whether something is possible, and if not what is missing, a sentence each."""

    possible: bool
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Ability:
    """A cell of the table: a precision in a backend on a device."""

    precision: str
    backend: str
    device: str
    build: Answer
    run: Answer
    note: str | None


def abilities(facts: Facts) -> tuple[Ability, ...]:
    """What a machine of these facts can build and run, target by target."""
    return tuple(
        Ability(
            precision,
            *target.place,
            _answer(target, target.build, precision, facts),
            _answer(target, target.run, precision, facts),
            PRECISIONS[precision].support[target.place].note or None,
        )
        for target in TARGETS
        for precision in PRECISIONS
    )


def can_build(precision: str, backend: str, facts: Facts | None = None) -> str | None:
    """None if such a bundle can be built here, else why not and what to do, in a sentence.

    Without facts this looks at the machine, at no more than the answer depends on.
    """
    reasons = []
    for target in TARGETS:
        if target.place[0] == backend:
            answer = _answer(target, target.build, precision, facts)
            if answer.possible:
                return None
            reasons.append("; ".join(answer.missing))
    return reasons[0]


def _answer(
    target: Target, needs: Collection[Need], precision: str, facts: Facts | None = None
) -> Answer:
    support = PRECISIONS[precision].support[target.place]
    if support.refused:
        return Answer(False, (support.refused,))
    seen = facts or look({subject for need in needs for subject in need.subjects})
    missing = tuple(lack for need in needs if (lack := need.missing(seen, support.capability)))
    return Answer(not missing, missing)


# ------------------------------------------------------------------------------- the diagnosis


@dataclass(frozen=True)
class Diagnosis:
    """All that `lpd-export doctor` says, in plain values."""

    lpd_export: str
    python: str
    platform: str
    facts: Facts
    memory_total: int | None
    memory_free: int | None
    folder: str
    disk_free: int | None
    hub: Hub
    abilities: tuple[Ability, ...]


def examine(folder: Path, hub_timeout: float = 5.0) -> Diagnosis:
    """Looks at this machine; takes seconds and never fails for what it finds.

    Args:
        folder: where bundles would be written.
        hub_timeout: how many seconds to wait for the hub.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        asked = pool.submit(reach_hub, hub_timeout)
        facts, memory = look(), read_memory()
    return Diagnosis(
        lpd_export=importlib.metadata.version("lpd-export"),
        python=platform.python_version(),
        platform=platform.platform(),
        facts=facts,
        memory_total=memory.total,
        memory_free=memory.free,
        folder=str(folder.absolute()),
        disk_free=read_free_disk(folder),
        hub=asked.result(),
        abilities=abilities(facts),
    )


def report_lines(diagnosis: Diagnosis) -> Iterator[str]:
    """The facts, the table, and for each "no" of it what to do."""
    yield f"lpd-export {diagnosis.lpd_export} on this machine"
    for name, value in _fact_lines(diagnosis):
        yield from _wrapped(f"  {name:14} ", value)
    yield ""
    yield "What can be built and run here"
    yield f"  {'':14}" + "".join(f"{target.title:19}" for target in TARGETS).rstrip()
    yield f"  {'':14}" + ("build  run".ljust(19) * len(TARGETS)).rstrip()
    for precision, row in zip(
        PRECISIONS, zip(*(_of(diagnosis, target) for target in TARGETS), strict=True), strict=True
    ):
        cells = "".join(f"{_yes(ability.build):7}{_yes(ability.run):12}" for ability in row)
        yield f"  {precision:14}{cells.rstrip()}"
    yield ""
    yield "Why not, and what to do"
    for target in TARGETS:
        reasons = list(_reasons(_of(diagnosis, target)))
        if reasons:
            yield f"  {target.title}"
        for reason in reasons:
            yield from _wrapped("    ", reason, "      ")
    notes = [
        f"{target.title}, {ability.precision}: {ability.note}"
        for target in TARGETS
        for ability in _of(diagnosis, target)
        if ability.note and ability.run.possible
    ]
    if notes:
        yield ""
        yield "Good to know"
    for note in notes:
        yield from _wrapped("  ", note, "    ")


def _fact_lines(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    facts = diagnosis.facts
    torch = facts.packages.get("torch", Package())
    yield "Python", f"{diagnosis.python} on {diagnosis.platform}"
    kind = f"built for CUDA {facts.torch_cuda}" if facts.torch_cuda else "a CPU build"
    yield (
        "torch",
        _package_line(torch) + (f", {kind}" if torch.version and not torch.problem else ""),
    )
    for gpu in facts.gpus:
        memory = f", {gpu.memory / 1e9:.0f} GB" if gpu.memory else ""
        capability = f", compute capability {gpu.capability}" if gpu.capability else ""
        yield "GPU", f"{gpu.name}{memory}{capability}"
    if not facts.gpus:
        yield "GPU", facts.gpu_problem or "no NVIDIA GPU found"
    yield "driver", facts.driver or "none found"
    driver_cuda = f"the driver runs up to {facts.driver_cuda}" if facts.driver_cuda else ""
    torch_cuda = f"torch has {facts.torch_cuda}" if facts.torch_cuda else ""
    yield "CUDA", ", ".join(filter(None, (driver_cuda, torch_cuda))) or "none found"
    products = {backend.module: backend.product for backend in BACKENDS.values()}
    for module, name in (products | {"polygraphy": "Polygraphy"}).items():
        yield name, _package_line(facts.packages.get(module, Package()))
    for provider in facts.providers:
        problem = facts.cuda_provider_problem if provider.startswith("CUDA") else None
        # That of TensorRT is another way to the same engines, which lpd-export does not go.
        usable = {"CUDAExecutionProvider": "works", "CPUExecutionProvider": "works"}
        state = f"does not load: {problem}" if problem else usable.get(provider, "not used here")
        yield "", f"{provider} {state}"
    free, total = _gigabytes(diagnosis.memory_free), _gigabytes(diagnosis.memory_total)
    yield "memory", f"{free} free of {total}"
    yield "disk", f"{_gigabytes(diagnosis.disk_free)} free in {diagnosis.folder}"
    hub = diagnosis.hub
    advice = "fetch checkpoints on another machine and give `build` their paths"
    state = f"cannot be used ({hub.problem}): {advice}" if hub.problem else "answers"
    yield "hub", f"{hub.endpoint} {state}"


def _package_line(package: Package) -> str:
    if package.problem:
        return f"{package.version or 'installed, but'} cannot be imported: {package.problem}"
    return package.version or "not installed"


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"


def _yes(answer: Answer) -> str:
    return "yes" if answer.possible else "no"


def _of(diagnosis: Diagnosis, target: Target) -> list[Ability]:
    return [a for a in diagnosis.abilities if (a.backend, a.device) == target.place]


def _reasons(row: list[Ability]) -> Iterator[str]:
    """What is missing in a row of the table, each thing once, with what it prevents."""
    prevented: dict[str, dict[str, list[str]]] = {}
    for ability in row:
        for verb, answer in (("build", ability.build), ("run", ability.run)):
            for lack in answer.missing:
                prevented.setdefault(lack, {}).setdefault(verb, []).append(ability.precision)
    for lack, verbs in prevented.items():
        precisions = list(dict.fromkeys(p for names in verbs.values() for p in names))
        only = f"{', '.join(precisions)}, " if len(precisions) < len(row) else ""
        yield f"{only}to {' and '.join(verbs)}: {lack}"


def _wrapped(first: str, text: str, others: str | None = None) -> Iterator[str]:
    yield from textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first) if others is None else others,
        break_on_hyphens=False,
    )
