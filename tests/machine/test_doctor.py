"""The doctor: what it concludes from the facts of any machine, and how it says so."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lpd_export.formats import BACKENDS, PRECISIONS, TRT
from lpd_export.machine.doctor import (
    TARGETS,
    Diagnosis,
    abilities,
    can_build,
    examine,
    report_lines,
)
from lpd_export.machine.facts import Facts, Gpu, Hub, Package

RTX = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
ALL = {
    "torch": Package("2.13.0"),
    "onnxruntime": Package("1.31.1"),
    "tensorrt": Package("11.0.0"),
    "tensorrt_rtx": Package("1.7.1.116"),
    "polygraphy": Package("0.53.6"),
}
ADA = Facts(
    packages=ALL,
    gpus=(Gpu("NVIDIA GeForce RTX 4090", 24 << 30, "8.9"),),
    driver="580.10",
    driver_cuda="13.0",
    torch_cuda="13.0",
    torch_gpu_problem=None,
    providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
    cuda_provider_problem=None,
    rtx_capabilities=RTX,
)
"""A machine that can do everything."""
NO_GPU = dataclasses.replace(
    ADA,
    packages=ALL | {"torch": Package("2.13.0+cpu")},
    gpus=(),
    driver=None,
    driver_cuda=None,
    torch_cuda=None,
    torch_gpu_problem="it is a CPU build",
    cuda_provider_problem="libcublasLt.so.13: cannot open shared object file",
)


def with_packages(facts: Facts, **packages: Package) -> Facts:
    return dataclasses.replace(facts, packages={**facts.packages, **packages})


def with_gpu(name: str, capability: str) -> Facts:
    return dataclasses.replace(ADA, gpus=(Gpu(name, 16 << 30, capability),))


def table(facts: Facts) -> dict[tuple[str, str], str]:
    """For each backend and device the precisions that build, a bar, and those that run."""
    rows: dict[tuple[str, str], list[list[str]]] = {}
    for ability in abilities(facts):
        builds, runs = rows.setdefault((ability.backend, ability.device), [[], []])
        name = ability.precision.replace("-weights", "w")
        builds += [name] * ability.build.possible
        runs += [name] * ability.run.possible
    return {cell: f"{' '.join(builds)} | {' '.join(runs)}" for cell, (builds, runs) in rows.items()}


def lacks(facts: Facts, backend: str, device: str, precision: str, verb: str) -> tuple[str, ...]:
    """What the table says is missing in one cell."""
    cell = (backend, device, precision)
    found = [a for a in abilities(facts) if (a.backend, a.device, a.precision) == cell]
    assert len(found) == 1
    answer = getattr(found[0], verb)
    assert answer.possible == (not answer.missing)
    return tuple(answer.missing)


def diagnosis(facts: Facts) -> Diagnosis:
    return Diagnosis(
        lpd_export="0.1.0",
        python="3.11.2",
        platform="Linux",
        facts=facts,
        memory_total=None,
        memory_free=None,
        folder="/a",
        disk_free=1 << 30,
        hub=Hub("https://huggingface.co"),
        abilities=abilities(facts),
    )


# ------------------------------------------------------------------------------ the rules


AMPERE = "fp32 bf16 fp16 int8 int8w int4w | fp32 bf16 fp16 int8 int8w int4w"
EVERYTHING = AMPERE.replace("int4w", "int4w fp8")


def test_a_machine_with_everything() -> None:
    assert table(ADA) == {
        (
            "onnxruntime",
            "cpu",
        ): "fp32 fp16 int8 int8w int4w | fp32 fp16 int8 int8w int4w",
        (
            "onnxruntime",
            "cuda",
        ): "fp32 fp16 int8 int8w int4w | fp32 fp16 int8 int8w int4w",
        ("tensorrt", "cuda"): EVERYTHING,
        ("tensorrt-rtx", "cuda"): EVERYTHING,
    }


def test_without_a_gpu_engines_for_rtx_are_still_built() -> None:
    assert table(NO_GPU) == {
        (
            "onnxruntime",
            "cpu",
        ): "fp32 fp16 int8 int8w int4w | fp32 fp16 int8 int8w int4w",
        ("onnxruntime", "cuda"): "fp32 fp16 int8 int8w int4w | ",
        ("tensorrt", "cuda"): " | ",
        ("tensorrt-rtx", "cuda"): "fp32 bf16 fp16 int8 int8w int4w fp8 | ",
    }
    for target in TARGETS[1:]:
        # The cause alone, not what follows from it.
        assert lacks(NO_GPU, *target.place, "fp16", "run") == (
            "no NVIDIA GPU was found: use a machine that has one",
        )


def test_an_empty_machine_can_do_nothing() -> None:
    assert set(table(Facts()).values()) == {" | "}
    for ability in abilities(Facts()):
        for answer in (ability.build, ability.run):
            assert all(": " in lack for lack in answer.missing), "what to do about it"


@pytest.mark.parametrize(
    ("module", "backend", "device", "verbs", "install"),
    [
        ("tensorrt", "tensorrt", "cuda", ("build", "run"), "pip install tensorrt"),
        ("tensorrt_rtx", "tensorrt-rtx", "cuda", ("build", "run"), "pip install tensorrt-rtx"),
        ("polygraphy", "tensorrt", "cuda", ("build",), "pip install polygraphy"),
        ("polygraphy", "tensorrt-rtx", "cuda", ("build",), "pip install polygraphy"),
        ("onnxruntime", "onnxruntime", "cpu", ("build", "run"), "pip install onnxruntime-gpu"),
        ("torch", "onnxruntime", "cpu", ("run",), "pip install torch"),
    ],
)
def test_a_missing_package(
    module: str, backend: str, device: str, verbs: tuple[str, ...], install: str
) -> None:
    for package in (Package(), Package("1.0", "libsome.so.1: cannot open")):
        facts = with_packages(ADA, **{module: package})
        for verb in ("build", "run"):
            missing = lacks(facts, backend, device, "fp16", verb)
            if verb not in verbs:
                assert missing == ()
            elif package.problem:
                again = install.replace("install", "install --force-reinstall")
                said = f"{module} cannot be imported (libsome.so.1: cannot open): {again}"
                assert missing == (said,)
            else:
                assert missing == (f"{module} is not installed: {install}",)


def test_a_missing_package_is_not_missed_elsewhere() -> None:
    facts = with_packages(ADA, tensorrt=Package())
    for target in TARGETS:
        if target.place != TRT:
            assert lacks(facts, *target.place, "fp16", "run") == ()


def test_bf16_needs_an_engine() -> None:
    for device in ("cpu", "cuda"):
        for verb in ("build", "run"):
            (lack,) = lacks(ADA, "onnxruntime", device, "bf16", verb)
            assert "bf16: use fp16, or tensorrt" in lack


def test_a_gpu_that_torch_cannot_use() -> None:
    facts = dataclasses.replace(
        with_packages(ADA, torch=Package("2.13.0+cpu")),
        torch_cuda=None,
        torch_gpu_problem="it is a CPU build",
    )
    for target in TARGETS[1:]:
        (lack,) = lacks(facts, *target.place, "fp16", "run")
        assert lack.startswith("torch 2.13.0+cpu is a CPU build, which cannot use the GPU: pip ")
        assert lacks(facts, *target.place, "fp16", "build") == ()
    old_driver = dataclasses.replace(ADA, torch_gpu_problem="The NVIDIA driver is too old")
    (lack,) = lacks(old_driver, "tensorrt", "cuda", "fp16", "run")
    assert lack.startswith("torch cannot use the GPU (The NVIDIA driver is too old): ")


def test_a_gpu_without_a_driver() -> None:
    facts = dataclasses.replace(NO_GPU, gpu_problem="there is a GPU, but no driver: install it")
    for verb in ("build", "run"):
        missing = lacks(facts, "tensorrt", "cuda", "fp16", verb)
        assert missing == ("there is a GPU, but no driver: install it",)


def test_onnxruntime_without_cuda() -> None:
    facts = dataclasses.replace(ADA, cuda_provider_problem="libcudnn.so.9: no such file")
    (lack,) = lacks(facts, "onnxruntime", "cuda", "fp16", "run")
    assert "(libcudnn.so.9: no such file): pip install 'onnxruntime-gpu[cuda,cudnn]'" in lack
    facts = dataclasses.replace(facts, providers=("CPUExecutionProvider",))
    (lack,) = lacks(facts, "onnxruntime", "cuda", "fp16", "run")
    assert lack.startswith("this ONNX Runtime is built without CUDA: pip ")
    assert lacks(facts, "onnxruntime", "cuda", "fp16", "build") == ()


@pytest.mark.parametrize(
    ("name", "capability", "tensorrt", "rtx"),
    [
        ("Tesla V100", "7.0", " | ", "fp32 bf16 fp16 int8 int8w int4w fp8 | "),
        (
            "Tesla T4",
            "7.5",
            "fp32 fp16 int8 int8w int4w | fp32 fp16 int8 int8w int4w",
            "fp32 bf16 fp16 int8 int8w int4w fp8 | fp32 fp16 int8w int4w",
        ),
        ("NVIDIA A100", "8.0", AMPERE, AMPERE.replace(" |", " fp8 |")),
        # A capability of two digits is not less than one of one digit.
        ("NVIDIA RTX 5090", "12.0", EVERYTHING, EVERYTHING),
        ("NVIDIA H100", "9.0", EVERYTHING, "fp32 bf16 fp16 int8 int8w int4w fp8 | "),
    ],
)
def test_compute_capabilities(name: str, capability: str, tensorrt: str, rtx: str) -> None:
    found = table(with_gpu(name, capability))
    assert found["tensorrt", "cuda"] == tensorrt
    assert found["tensorrt-rtx", "cuda"] == rtx


def test_int8_for_rtx_comes_with_what_is_not_known_of_it() -> None:
    notes = {(a.backend, a.precision): a.note for a in abilities(ADA) if a.device == "cuda"}
    assert "documented nowhere" in (notes["tensorrt-rtx", "int8"] or "")
    assert notes["tensorrt", "int8"] is None


def test_a_gpu_that_is_too_old_or_not_for_rtx() -> None:
    (lack,) = lacks(with_gpu("Tesla T4", "7.5"), "tensorrt", "cuda", "bf16", "build")
    assert lack.startswith("the Tesla T4 has compute capability 7.5, and 8.0 is needed: use ")
    (lack,) = lacks(with_gpu("NVIDIA H100", "9.0"), "tensorrt-rtx", "cuda", "fp16", "run")
    assert "8.9, 12.0, 12.1, and the NVIDIA H100 has 9.0: use tensorrt" in lack
    # What the driver does not tell is not held against the GPU.
    unknown = dataclasses.replace(ADA, gpus=(Gpu("NVIDIA Some"),))
    assert lacks(unknown, "tensorrt-rtx", "cuda", "bf16", "run") == ()


def test_whether_a_bundle_can_be_built_is_one_question() -> None:
    assert can_build("fp16", "tensorrt", ADA) is None
    assert can_build("bf16", "tensorrt-rtx", NO_GPU) is None
    assert can_build("int8", "onnxruntime", NO_GPU) is None, "the CPU is enough"
    facts = with_packages(NO_GPU, tensorrt=Package())
    assert can_build("fp16", "tensorrt", facts) == (
        "tensorrt is not installed: pip install tensorrt; no NVIDIA GPU was found: use a machine "
        "that has one"
    )
    assert "loads no bf16: use fp16" in (can_build("bf16", "onnxruntime", ADA) or "")


def test_every_precision_says_of_every_place_whether_it_is_taken() -> None:
    places = [target.place for target in TARGETS]
    assert {backend for backend, _ in places} == set(BACKENDS)
    for precision in PRECISIONS.values():
        assert set(precision.support) == set(places)
        for (_, device), support in precision.support.items():
            assert not (support.refused and (support.capability or support.note))
            assert support.refused or bool(support.capability) == (device == "cuda")


# ---------------------------------------------------------------------------- this machine


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Diagnosis:
    return examine(tmp_path_factory.mktemp("folder"), hub_timeout=2)


def test_what_is_here(here: Diagnosis) -> None:
    assert here.python == ".".join(map(str, sys.version_info[:3]))
    assert here.facts.packages["torch"] == Package(torch.__version__)
    assert here.facts.torch_cuda == torch.version.cuda
    assert here.facts.packages["onnxruntime"].version
    assert "CPUExecutionProvider" in here.facts.providers
    assert here.memory_total is not None
    assert here.memory_free is not None
    assert 0 < here.memory_free < here.memory_total
    assert here.disk_free
    assert (
        table(here.facts)["onnxruntime", "cpu"]
        == "fp32 fp16 int8 int8w int4w | fp32 fp16 int8 int8w int4w"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_is_not_here(here: Diagnosis) -> None:
    assert here.facts.torch_gpu_problem
    assert here.facts.cuda_provider_problem
    for target in TARGETS[1:]:
        assert all(lacks(here.facts, *target.place, precision, "run") for precision in PRECISIONS)
    if here.facts.packages["tensorrt"].version is None:
        assert "pip install tensorrt" in (can_build("fp16", "tensorrt") or "")
    if here.facts.packages["tensorrt_rtx"].version:
        assert can_build("fp16", "tensorrt-rtx") is None
        assert "8.9" in here.facts.rtx_capabilities


def test_as_json(here: Diagnosis) -> None:
    for found in (here, diagnosis(ADA)):
        values = json.loads(json.dumps(dataclasses.asdict(found), allow_nan=False))
        assert len(values["abilities"]) == len(TARGETS) * len(PRECISIONS)
        assert values["facts"]["packages"]["onnxruntime"]["version"]


TURING = with_gpu("Quadro RTX 8000 with a name of many words " * 3, "7.5")
BROKEN = with_packages(
    NO_GPU, torch=Package("2.13", "words " * 40), tensorrt=Package(None, "x" * 240)
)


@pytest.mark.parametrize("facts", [ADA, NO_GPU, Facts(), TURING, BROKEN])
def test_text_of_any_machine(facts: Facts) -> None:
    lines = list(report_lines(diagnosis(facts)))
    assert max(map(len, lines)) < 100
    text = "\n".join(lines)
    assert "None" not in text
    assert len([line for line in lines if line.endswith((" yes", " no"))]) == len(PRECISIONS)


def test_text_of_this_machine(here: Diagnosis) -> None:
    lines = list(report_lines(here))
    assert max(map(len, lines)) < 100
    assert lines[0] == f"lpd-export {here.lpd_export} on this machine"
    assert f"  torch          {torch.__version__}" in "\n".join(lines)


def test_text_of_a_machine_without_a_gpu() -> None:
    lines = list(report_lines(diagnosis(with_packages(NO_GPU, tensorrt=Package()))))
    table_at = lines.index("What can be built and run here")
    assert lines[table_at + 1 : table_at + 5] == [
        "                onnxruntime, CPU   onnxruntime, CUDA  tensorrt           tensorrt-rtx",
        "                build  run         build  run         build  run         build  run",
        "  fp32          yes    yes         yes    no          no     no          yes    no",
        "  bf16          no     no          no     no          no     no          yes    no",
    ]
    why = lines[lines.index("Why not, and what to do") :]
    at = why.index("  tensorrt")
    assert why[at + 1 : at + 3] == [
        "    to build and run: tensorrt is not installed: pip install tensorrt",
        "    to build and run: no NVIDIA GPU was found: use a machine that has one",
    ]
    takers = "fp32, fp16, int8, int8-weights, int4-weights"
    assert f"    {takers}, to run: no NVIDIA GPU was found: use a machine" in why
    assert "  GPU            no NVIDIA GPU found" in lines


# ------------------------------------------------------------------------ broken machines


def test_a_broken_package_is_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("import os; os.abort()")
    monkeypatch.syspath_prepend(tmp_path)
    for precision in ("fp16", "int8"):
        said = can_build(precision, "tensorrt") or ""
        assert said.startswith("tensorrt cannot be imported (it crashed with SIGABRT): pip install")


def test_a_whole_diagnosis_of_a_broken_machine(tmp_path: Path) -> None:
    """In a process of its own, with fresh imports and an nvidia-smi that fails."""
    for module in ("torch", "onnxruntime", "tensorrt"):
        (tmp_path / f"{module}.py").write_text("raise ImportError('libfake.so: not there')")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed.'\nexit 9\n")
    smi.chmod(0o755)
    script = (
        "import pathlib, lpd_export.machine.doctor as doctor\n"
        "print(*doctor.report_lines(doctor.examine(pathlib.Path('.'), 1)), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ
        | {
            "PYTHONPATH": str(tmp_path),
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "HF_ENDPOINT": "http://localhost:9",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "cannot be imported: ImportError: libfake.so: not there" in said
    assert "GPU nvidia-smi finds no GPU (NVIDIA-SMI has failed.): install its driver" in said
    assert "hub http://localhost:9 cannot be used (ConnectError" in said
    assert "torch cannot be imported (ImportError: libfake.so: not there): pip install" in said
